"""The site's own log. It stays at the site: nothing written here is sent anywhere."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

import structlog

_BYTES, _FILES = 10_000_000, 5


LogStyle = Literal["auto", "console", "json"]


def configure_logging(file: Path, style: LogStyle = "auto", level: int = logging.INFO) -> None:
    """Lines on standard error, for people or as JSON (auto: for people on a terminal), and JSON
    lines in `file` (rotated, never above 50 MB)."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    terminal = sys.stderr.isatty()
    shown: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if style == "console" or (style == "auto" and terminal):
        shown = structlog.dev.ConsoleRenderer(colors=terminal)
    people = _handler(logging.StreamHandler(sys.stderr), shared, shown)
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
