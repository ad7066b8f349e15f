"""From files to images of the study's size, in their order, by one process or several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from silo.data.items import Reading, Skipped, Source
from silo.data.pixels import Pixels
from silo.data.readers import reader_of
from silo.errors import DataError
from silo.process import begin

_FILES_AT_ONCE = 8
_WORTH_PROCESSES = 64  # files: to start a process takes about as long as to read so many
_BATCHES_AHEAD = 4  # per process: enough to keep it busy, and a bound on what waits in memory


@dataclass(frozen=True)
class Work:
    """How files are decoded."""

    format: str
    reading: Reading
    image_size: int
    channels: int


class Decoded(NamedTuple):
    """An image, uint8 (channels, image_size, image_size), and what its file said about it."""

    pixels: Pixels
    label: int | None
    shape: str
    series: int


Found = Decoded | Skipped


def decode(work: Work, sources: Iterable[Source | Skipped], processes: int) -> Iterator[Found]:
    """Every image of the sources, and what was skipped, in the order of the sources.

    Raises DataError where a file's device fails, or for an archive of another layout.
    """
    remaining = iter(sources)
    first = list(islice(remaining, _WORTH_PROCESSES)) if processes > 1 else []
    if len(first) < _WORTH_PROCESSES:
        return chain.from_iterable(_decode_one(work, source) for source in chain(first, remaining))
    return _decode_by(work, chain(first, remaining), processes)


def _decode_by(work: Work, sources: Iterator[Source | Skipped], processes: int) -> Iterator[Found]:
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[list[Found]]] = deque()
    with ProcessPoolExecutor(processes, context, begin, (0,)) as pool:
        try:
            while batch := tuple(islice(sources, _FILES_AT_ONCE)):
                waiting.append(pool.submit(_decode_all, work, batch))
                if len(waiting) >= processes * _BATCHES_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _decode_all(work: Work, sources: tuple[Source | Skipped, ...]) -> list[Found]:
    return [found for source in sources for found in _decode_one(work, source)]


def _decode_one(work: Work, source: Source | Skipped) -> Iterator[Found]:
    """Files come from scanners, archives and people: over a damaged one a decoder may raise
    anything, and the next file is read all the same."""
    if isinstance(source, Skipped):
        yield source
        return
    try:
        for item in reader_of(work.format).read(source, work.reading):
            if isinstance(item, Skipped):
                yield item
            else:
                pixels = item.fit(work.image_size, work.channels)
                yield Decoded(pixels, item.label, item.shape, item.series)
    except DataError:
        raise
    except FileNotFoundError:
        yield Skipped(source.name, "gone while the folder was read")
    except PermissionError:
        yield Skipped(source.name, "may not be read by this user")
    except OSError as error:
        if error.errno is None:
            yield Skipped(source.name, "cannot be decoded: damaged, or cut short")
        else:  # a disk or a share that fails: without its files this would be another data set
            raise DataError(f"{source.file} cannot be read: {error.strerror}") from error
    except Exception:
        yield Skipped(source.name, "cannot be decoded: damaged, or cut short")
