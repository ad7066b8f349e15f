"""The site's own log. It stays at the site: nothing written here is sent anywhere."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

_BYTES, _FILES = 10_000_000, 5


def configure_logging(file: Path, level: int = logging.INFO) -> None:
    """Lines for people on standard error, JSON lines in `file` (rotated, never above 60 MB)."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    people = _handler(
        logging.StreamHandler(sys.stderr),
        shared,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
    )
    file.touch(mode=0o600)
    stored = RotatingFileHandler(file, maxBytes=_BYTES, backupCount=_FILES - 1, encoding="utf-8")
    machine = _handler(stored, shared, structlog.processors.JSONRenderer(ensure_ascii=False))
    root = logging.getLogger()
    root.handlers = [people, machine]
    root.setLevel(level)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _handler(
    handler: logging.Handler,
    shared: list[structlog.typing.Processor],
    renderer: structlog.typing.Processor,
) -> logging.Handler:
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    return handler
