"""DICOM: a folder of files, as a scanner or an archive exports it. Headers stay in this module.

*Which files.* Those with the letters DICM at byte 128, whatever they are called. Without pixels
(reports, plans, presentation states, a DICOMDIR) they are skipped, and so are segmentations and
doses, whose pixels are no image; the second copy of the same object; and what says of itself that
text is burned into its pixels (0028,0301), unless the site allows that.

*Order.* Series by series, as their first files come; within one by the position along the normal of
the slices (0020,0032 and 0020,0037), else by instance number. Frames stay in their order.

*Grey values.* x = slope·stored + intercept, or the modality table. With a window of centre c and
width w (of site.toml, else the file's first) as PS3.3 C.11.2.1.2 has it:

    LINEAR         y = 255·((x − (c − ½))/(w − 1) + ½)        LINEAR_EXACT   y = 255·((x − c)/w + ½)
    SIGMOID        y = 255/(1 + exp(−4(x − c)/w))             a VOI table    y = 255·table(x)/end

clipped to [0, 255] and rounded. Without one the 0.5th and the 99.5th percentile of the frame become
0 and 255. MONOCHROME1 is inverted, so that more is brighter everywhere.

*Colour.* RGB, YBR and palettes become RGB; of more than eight bits the upper eight stay.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import JPEG2000, JPEG2000Lossless

from silo.data.files import is_dicom, walk
from silo.data.grey import eight_bits, stretch, window
from silo.data.items import Item, Reading, Skipped, Source

_LARGEST_FRAME = 1 << 28  # pixels; a header that says more is damaged
_NO_IMAGE = {
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation, no image",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation, no image",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose, no image",
}
# pydicom would take gdcm's, which are read-only: a wrong sign could not be mended in them.
_PLUGINS: dict[str, str] = {JPEG2000Lossless: "pylibjpeg", JPEG2000: "pylibjpeg"}
_HEADER = [
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "BurnedInAnnotation",
    "Rows",
]


def files(path: Path) -> Iterator[Path]:
    """Every file below `path` that is not hidden, or the file."""
    return walk(path) if path.is_dir() else iter([path])


def classes(path: Path) -> tuple[str, ...]:
    """DICOM has no field that is a class."""
    return ()


@dataclass(frozen=True, order=True, slots=True)
class _Place:
    """Where a file belongs: series by first appearance, then along the slices."""

    series: int
    position: float
    name: str


@dataclass(frozen=True)
class _Header:
    """What is known of a file before its pixels are read."""

    instance: bytes
    series: bytes
    """Digests of their UIDs."""
    position: float


def sources(path: Path, reading: Reading) -> Iterator[Source | Skipped]:
    """Every file with an image, in order; the headers of all of them are read first."""
    root = path if path.is_dir() else path.parent
    places: list[_Place] = []
    series: dict[bytes, int] = {}
    seen: set[bytes] = set()
    for file in files(path):
        name = str(file.relative_to(root))
        header = _header(file, reading)
        if isinstance(header, str):
            yield Skipped(name, header)
            continue
        if header.instance in seen:
            yield Skipped(name, "a copy of another file")
            continue
        seen.add(header.instance)
        number = series.setdefault(header.series, len(series) + 1)
        places.append(_Place(number, header.position, name))
    places.sort()
    for place in places:
        yield Source(root / place.name, place.name, series=place.series)


def read(source: Source, reading: Reading) -> Iterator[Item | Skipped]:
    """Every frame of a file, or why there is none."""
    _silence()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the header
        try:
            dataset = pydicom.dcmread(source.file)
            if int(dataset.Rows) * int(dataset.Columns) > _LARGEST_FRAME:
                raise ValueError("more pixels than a picture has")  # before memory is taken for it
            plugin = _PLUGINS.get(str(dataset.file_meta.TransferSyntaxUID), "")
            for number, stored in enumerate(iter_pixels(dataset, decoding_plugin=plugin)):
                name = f"{source.name}[{number}]"
                grey = _pixels(stored, dataset, number, reading)
                yield Item(name, grey, source.label, source.series)
        except (NotImplementedError, RuntimeError):
            yield Skipped(
                source.name, "no decoder here reads its pixels: a rare compression, or damaged"
            )
        except (AttributeError, KeyError):
            yield Skipped(source.name, "the header does not say how its pixels are stored")
        except (ValueError, TypeError, IndexError, InvalidDicomError):
            yield Skipped(source.name, "pixels that cannot be decoded: damaged, or cut short")


def _header(file: Path, reading: Reading) -> _Header | str:
    """What decides about a file, or why it is skipped. No sentence here holds a value of a header:
    it would be shown, and stored."""
    _silence()
    if not is_dicom(file):
        return "no DICOM file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER))
            return _reason(found, reading) or _Header(
                _digest(found.get("SOPInstanceUID") or file),
                _digest(found.get("SeriesInstanceUID", "")),
                _position(found),
            )
        except Exception:
            return "a DICOM header that cannot be read"


def _reason(header: FileDataset, reading: Reading) -> str | None:
    kind = _NO_IMAGE.get(str(getattr(header.file_meta, "MediaStorageSOPClassUID", "")))
    if kind is not None:
        return kind
    if "Rows" not in header:
        return "no image: a report, a plan, or another object without pixels"
    if not reading.burned_in and str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        return "text is burned into its pixels, it says ([data] burned_in = true reads it)"
    return None


def _position(header: Dataset) -> float:
    """Millimetres along the normal of the slices; without a place in space, the instance number."""
    corner, axes = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if corner and axes and len(corner) == 3 and len(axes) == 6:
        along, down = np.array(axes, dtype=np.float64).reshape(2, 3)
        place = round(float(np.array(corner, dtype=np.float64) @ np.cross(along, down)), 3)
        return place if np.isfinite(place) else 0.0
    return float(header.get("InstanceNumber") or 0)


def _digest(text: object) -> bytes:
    return hashlib.blake2b(str(text).encode("utf-8", "replace"), digest_size=8).digest()


def _pixels(
    stored: NDArray[Any], dataset: Dataset, frame: int, reading: Reading
) -> NDArray[np.uint8]:
    """uint8 (h, w) or (h, w, 3). Raises ValueError for pixels of another kind."""
    if stored.ndim not in (2, 3):
        raise ValueError("no picture")
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        return (stored >> (8 * stored.dtype.itemsize - 8)).astype(np.uint8)
    if stored.ndim == 3:
        if kind != "RGB" and not kind.startswith("YBR"):
            raise ValueError("unknown colours")
        return (stored >> max(int(dataset.BitsStored) - 8, 0)).astype(np.uint8)
    grey = _grey(stored, dataset, frame, reading)
    return 255 - grey if kind == "MONOCHROME1" else grey


def _grey(
    stored: NDArray[Any], dataset: Dataset, frame: int, reading: Reading
) -> NDArray[np.uint8]:
    measured = _group(dataset, frame, "PixelValueTransformationSequence")
    if "ModalityLUTSequence" in measured:
        values = apply_modality_lut(stored, measured).astype(np.float64)
    else:
        slope = _number(measured, "RescaleSlope", 1.0)
        values = stored.astype(np.float64) * slope + _number(measured, "RescaleIntercept", 0.0)
    values = np.nan_to_num(values)
    if reading.window is not None:
        return eight_bits(window(values, *reading.window))
    voi = _group(dataset, frame, "FrameVOILUTSequence")
    if voi.get("VOILUTSequence"):
        table = voi.VOILUTSequence[0]
        looked_up = apply_voi(values.astype(np.int64), voi).astype(np.float64)
        return eight_bits(looked_up / (2.0 ** int(table.LUTDescriptor[2]) - 1))
    centre, width = _number(voi, "WindowCenter", 0.0), _number(voi, "WindowWidth", 0.0)
    if width < 1:
        return eight_bits(stretch(values, values))
    function = str(voi.get("VOILUTFunction", "LINEAR") or "LINEAR").upper()
    return eight_bits(window(values, centre, width, function))


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """The item of an enhanced object that holds for a frame; of others, the object itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    own = per_frame[frame : frame + 1]
    for group in (*own, *(dataset.get("SharedFunctionalGroupsSequence") or [])):
        if group.get(name):
            item: Dataset = group[name][0]
            return item
    return dataset


def _number(dataset: Dataset, name: str, default: float) -> float:
    """The first value of an element."""
    value = dataset.get(name)
    if value is None or value == "":
        return default
    return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)


@cache
def _silence() -> None:
    """Warnings of the libraries quote the header: names, dates of birth. None may reach a log."""
    logging.getLogger("pydicom").disabled = True
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    gdcm.Trace.DebugOff()
