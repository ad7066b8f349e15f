"""DICOM: pydicom's own files of real scanners, and files written here for each rule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from silo import admin
from silo.data.cache import cache_dataset
from silo.data.dataset import Dataset as Images
from silo.data.dataset import open_dataset
from silo.data.decoding import Work, decode
from silo.data.items import Item, Reading, Skipped, Source
from silo.data.readers import reader_of

CT = "1.2.840.10008.5.1.4.1.1.2"
SECRET = "ZEBRAFINCH"


def write(path: Path, pixels: np.ndarray, **elements: Any) -> None:
    """A CT image with these pixels: int16 or uint16, or uint8 in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    header.SeriesInstanceUID = "1.2.3"
    header.PatientName = f"{SECRET}^ADA"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    header.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.HighBit, header.PixelRepresentation = (
        header.BitsStored - 1,
        int(pixels.dtype.kind == "i"),
    )
    header.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def read(path: Path, size: int = 8, channels: int = 1, **reading: Any) -> Images:
    return open_dataset(path, "dicom", size, channels, Reading(**reading))


def pixels_of(path: Path, size: int = 8, channels: int = 1, **reading: Any) -> np.ndarray:
    return np.stack([pixels for pixels, _ in read(path, size, channels, **reading)])


def ramp(low: int, high: int, dtype: type = np.int16) -> np.ndarray:
    return np.linspace(low, high, 64).astype(dtype).reshape(8, 8)


# --- real files


def test_one_picture_compressed_in_seven_ways_is_the_same_picture() -> None:
    plain = Path(get_testdata_file("MR_small.dcm", download=False))
    expected = pixels_of(plain, 64)
    for name in (
        "MR_small_bigendian",
        "MR_small_expb",
        "MR_small_implicit",
        "MR_small_RLE",
        "MR_small_jp2klossless",
        "MR_small_jpeg_ls_lossless",
        "MR_small_padded",
    ):
        path = Path(get_testdata_file(f"{name}.dcm", download=False))
        assert np.array_equal(pixels_of(path, 64), expected), name


def test_every_file_of_pydicom_is_read_or_skipped_for_a_reason() -> None:
    folder = Path(get_testdata_file("MR_small.dcm", download=False)).parent
    found = read(folder, 32)
    images = np.stack([pixels for pixels, _ in found])
    assert found.count == len(images) >= 91
    assert found.series >= 30
    reasons = found.skips.counts
    assert reasons["a DICOMDIR"] >= 8
    assert reasons["a dose, no image"] >= 7
    assert reasons["a segmentation, no image"] >= 2
    unread = found.skips.examples[
        "no decoder here reads its pixels: a rare compression, or damaged"
    ]
    assert set(unread) == {"JPEG-lossy.dcm", "JPEG2000-embedded-sequence-delimiter.dcm"}


@pytest.mark.slow
def test_every_large_file_of_pydicom_data_is_read_or_skipped_for_a_reason() -> None:
    import data_store

    found = read(Path(data_store.__file__).parent / "data", 64)
    assert sum(1 for _ in found) == found.count >= 165
    assert set(found.skips.counts) == {
        "a copy of another file",
        "a segmentation, no image",
        "no DICOM file",
    }


def test_a_ct_is_windowed_as_its_file_says() -> None:
    path = Path(get_testdata_file("693_J2KI.dcm", download=False))
    header = pydicom.dcmread(path)
    values = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    low = header.WindowCenter - 0.5 - (header.WindowWidth - 1) / 2
    expected = np.clip((values - low) / (header.WindowWidth - 1), 0, 1) * 255
    assert np.array_equal(pixels_of(path, 512)[0, 0], np.round(expected))


# --- rules, one by one


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescale_and_window_are_pydicom_s(tmp_path: Path, function: str) -> None:
    stored = ramp(0, 2000, np.uint16)
    elements = dict(
        RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[40, 1], WindowWidth=[400, 2]
    )
    write(tmp_path / "a", stored, VOILUTFunction=function, **elements)
    header = pydicom.dcmread(tmp_path / "a")
    shown = apply_windowing(stored * 2.0 - 1000, header)
    full = (65535 * 2.0 - 1000) - (-1000.0)
    expected = np.round((shown + 1000.0) / full * 255)
    assert np.abs(pixels_of(tmp_path)[0, 0] - expected).max() <= 1
    assert np.array_equal(
        np.unique(pixels_of(tmp_path)[[0], 0])[[0, -1]], expected[[0, -1], [0, -1]]
    )


def test_a_voi_table_is_looked_up(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 10, 8], [0, 100, 200, 255]
    stored = np.repeat(np.array([[9, 10, 11, 12, 13, 14, 99, 0]], np.uint16), 8, 0)
    write(tmp_path / "a", stored)
    header = pydicom.dcmread(tmp_path / "a")
    header.VOILUTSequence = [table]
    header["VOILUTSequence"].value[0]["LUTDescriptor"].VR = "US"
    header["VOILUTSequence"].value[0]["LUTData"].VR = "US"
    header.save_as(tmp_path / "a")
    assert pixels_of(tmp_path)[0, 0, 0].tolist() == [0, 0, 100, 200, 255, 255, 255, 0]


def test_without_a_window_percentiles_become_black_and_white(tmp_path: Path) -> None:
    write(tmp_path / "signed", ramp(-500, 500))
    shown = pixels_of(tmp_path)[0, 0]
    assert shown[0, 0] == 0
    assert shown[-1, -1] == 255
    assert np.all(np.diff(shown.ravel().astype(int)) >= 0)
    write(tmp_path / "signed", np.full((8, 8), 7, np.int16))
    assert np.all(pixels_of(tmp_path) == 0), "a picture of one value is black, not noise"


def test_the_site_s_window_goes_before_the_file_s(tmp_path: Path) -> None:
    write(tmp_path / "a", ramp(-100, 300), WindowCenter=0, WindowWidth=2)
    shown = pixels_of(tmp_path, window=(100.5, 401.0))[0, 0]
    assert shown[0, 0] == 0
    assert shown[-1, -1] == 255
    assert len(np.unique(shown)) == 64


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    write(tmp_path / "a", ramp(0, 4095, np.uint16), PhotometricInterpretation="MONOCHROME2")
    write(tmp_path / "b", ramp(0, 4095, np.uint16), PhotometricInterpretation="MONOCHROME1")
    two, one = pixels_of(tmp_path)
    assert np.array_equal(one, 255 - two)


def test_colour_stays_colour_or_becomes_luma(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write(tmp_path / "a", red)
    assert pixels_of(tmp_path, channels=3)[0, :, 0, 0].tolist() == [255, 0, 0]
    assert np.all(pixels_of(tmp_path) == 76)


def test_a_series_lies_in_the_order_of_its_slices_whatever_the_files_are_called(
    tmp_path: Path,
) -> None:
    for name, place in (("z", 5.0), ("a", 15.0), ("m", -5.0)):
        write(
            tmp_path / name,
            np.full((8, 8), int(place) + 10, np.uint16),
            ImagePositionPatient=[0, 0, place],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            InstanceNumber=1,
        )
    for number in (3, 1, 2):
        write(
            tmp_path / "other" / f"{9 - number}",
            np.full((8, 8), 100 + number, np.uint16),
            SeriesInstanceUID="1.2.4",
            InstanceNumber=number,
        )
    found = read(tmp_path, window=(128.0, 257.0))
    values = [int(pixels[0, 0, 0]) for pixels, _ in found]
    assert values == sorted(values)
    assert len(values) == 6
    assert found.series == 2


def test_frames_of_an_enhanced_object_have_their_own_scale(tmp_path: Path) -> None:
    frames = np.stack([np.full((8, 8), 100, np.uint16), np.full((8, 8), 100, np.uint16)])

    def scaled(intercept: float) -> Dataset:
        group, inner = Dataset(), Dataset()
        inner.RescaleSlope, inner.RescaleIntercept = 1, intercept
        group.PixelValueTransformationSequence = [inner]
        return group

    shared, window = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 128, 256
    shared.FrameVOILUTSequence = [window]
    write(
        tmp_path / "a",
        frames[0],
        NumberOfFrames=2,
        PixelData=frames.tobytes(),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[scaled(0), scaled(100)],
    )
    assert [int(p[0, 0, 0]) for p in pixels_of(tmp_path)] == [100, 200]


def test_burned_in_text_is_skipped_unless_the_site_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "a", ramp(0, 9), BurnedInAnnotation="YES")
    write(tmp_path / "b", ramp(0, 9), BurnedInAnnotation="NO")
    found = read(tmp_path)
    assert len(list(found)) == 1
    assert "text is burned into" in next(iter(found.skips.counts))
    assert len(pixels_of(tmp_path, burned_in=True)) == 2


def test_the_second_copy_of_an_object_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a", ramp(0, 9))
    (tmp_path / "copy").write_bytes((tmp_path / "a").read_bytes())
    found = read(tmp_path)
    assert len(list(found)) == 1
    assert found.skips.examples == {"a copy of another file": ["copy"]}


def test_several_processes_read_what_one_reads_in_the_same_order(tmp_path: Path) -> None:
    for number in range(70):
        write(tmp_path / f"{number:02}", ramp(0, 100 + number), InstanceNumber=100 - number)
    (tmp_path / "notes.txt").write_text("x")
    one, two = read(tmp_path), read(tmp_path)
    two.processes = 2
    assert np.array_equal(np.stack([p for p, _ in one]), np.stack([p for p, _ in two]))
    assert one.skips == two.skips


# --- what must not happen


def test_no_word_of_a_header_leaves_the_reader(tmp_path: Path) -> None:
    """Cache, report, sheet, the agent's folder, standard output and error: none holds a header."""
    data, home = tmp_path / "data", tmp_path / "home"
    for number in range(3):
        write(data / f"{number}", ramp(0, 9 + number), PatientID=SECRET, StudyDescription=SECRET)
    strange = (data / "0").read_bytes()
    (data / "cut").write_bytes(strange[: len(strange) - 40])
    (data / "birth").write_bytes(strange.replace(b"ADA", b"\xff\xfe\0"))
    # A window that is a name, and rows that are not there: both make pydicom speak of the value.
    write(data / "window", ramp(0, 9), WindowCenter=1.5, WindowWidth=8)
    broken = (data / "window").read_bytes()
    (data / "window").write_bytes(broken.replace(b"1.5 ", SECRET.encode()[:4]))
    admin.init(home, name="north", data=data, format="dicom")
    done = subprocess.run(
        [sys.executable, "-m", "concilium", "silo", "check", "--home", home, "--image-size", "8"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "always"},
    )
    written = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "images.npy" for path in written)
    for content in (done.stdout, done.stderr, *(path.read_bytes() for path in written)):
        assert SECRET.encode() not in content
        assert SECRET[:4].encode() not in content
    sheet = next(path for path in written if path.name == "contact-sheet.png")
    with Image.open(sheet) as image:
        assert image.info == {}


def test_a_damaged_file_is_read_or_skipped_whatever_is_damaged(tmp_path: Path) -> None:
    """Each on its own, since all but the first would be copies of it."""
    rng, path, work = np.random.default_rng(3), tmp_path / "x", Work("dicom", Reading(), 8, 1)
    reasons: Counter[str] = Counter()
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_jpeg_dcmd.dcm"):
        original = Path(get_testdata_file(name, download=False)).read_bytes()
        for number in range(100):
            content = bytearray(original)
            for _ in range(rng.integers(1, 40)):
                content[rng.integers(132, len(content))] = rng.integers(256)
            if number % 4 == 0:
                del content[rng.integers(len(content)) :]
            path.write_bytes(content)
            for found in decode(work, [Source(path, "x")], 1):
                reasons[found.reason if isinstance(found, Skipped) else "image"] += 1
            list(reader_of("dicom").sources(tmp_path, Reading()))
    assert reasons["image"] > 30
    assert reasons.total() - reasons["image"] > 60
    assert len(reasons) >= 5


def test_what_is_no_dicom_at_all_is_skipped_by_the_reader_itself(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" * 128 + b"DICM" + os.urandom(400))
    reader, reading = reader_of("dicom"), Reading()
    assert all(isinstance(s, Skipped) for s in reader.sources(tmp_path, reading))
    found = list(reader.read(Source(tmp_path / "a", "a"), reading))
    assert not any(isinstance(item, Item) for item in found)


def test_the_cache_is_made_anew_when_it_is_read_another_way(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a", ramp(0, 9))
    plain = cache_dataset(read(tmp_path / "data"), tmp_path / "cache")
    windowed = cache_dataset(read(tmp_path / "data", window=(4.0, 9.0)), tmp_path / "cache")
    assert plain.key != windowed.key
