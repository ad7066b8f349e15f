"""Readers on real files of each format, and what is said about files that are none."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from silo.data.cache import cache_dataset, open_cache
from silo.data.dataset import open_dataset
from silo.data.pixels import fit_array
from silo.data.sheet import write_sheet
from silo.errors import DataError


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, *shape), dtype=np.uint8)


def read(path: Path, size: int = 8, channels: int = 1, format: str = "auto") -> np.ndarray:
    return np.stack([pixels for pixels, _ in open_dataset(path, format, size, channels)])


def test_medmnist_npz_gives_its_training_images(tmp_path: Path) -> None:
    train = pixels(5, 8, 8)
    np.savez(tmp_path / "organ.npz", train_images=train, val_images=pixels(3, 8, 8))
    assert np.array_equal(read(tmp_path / "organ.npz"), train[:, None])
    assert np.array_equal(read(tmp_path), train[:, None]), "the only NPZ of a folder"


def test_npz_with_colour_becomes_luma_or_stays_colour(tmp_path: Path) -> None:
    colour = np.full((2, 8, 8, 3), (255, 0, 0), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=colour)
    assert np.all(read(tmp_path / "x.npz") == 76)
    assert read(tmp_path / "x.npz", channels=3)[0, :, 0, 0].tolist() == [255, 0, 0]


def test_npz_of_another_layout_is_refused_with_what_to_write(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures=pixels(2, 8, 8))
    with pytest.raises(DataError, match="holds pictures: name the array of images"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8, 8), dtype=np.float32))
    with pytest.raises(DataError, match="float32.*write uint8"):
        read(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        read(tmp_path / "c.npz")


def idx(images: np.ndarray) -> bytes:
    n, h, w = images.shape
    return struct.pack(">4sIII", b"\x00\x00\x08\x03", n, h, w) + images.tobytes()


def test_idx_folder_gives_its_training_images_plain_or_gzipped(tmp_path: Path) -> None:
    train = pixels(4, 8, 8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(2, 8, 8)))
    assert np.array_equal(read(tmp_path), train[:, None])
    assert len(read(tmp_path / "t10k-images-idx3-ubyte")) == 2


def test_images_that_lie_there_gzipped_and_plain_are_read_once(tmp_path: Path) -> None:
    train = pixels(4, 8, 8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(train))
    assert np.array_equal(read(tmp_path), train[:, None])


def test_damaged_idx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    for content, message in (
        (b"\x00\x00", "2 bytes: not an IDX file"),
        (b"\x00\x00\x08\x01" + bytes(12), "three dimensions"),
        (idx(pixels(3, 8, 8))[:-1], "another length"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path)
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip at all")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "x-images-idx3-ubyte.gz")


def test_image_folder_is_read_in_order_and_says_what_it_skipped(tmp_path: Path) -> None:
    (tmp_path / "ward").mkdir()
    first, second = pixels(2, 8, 8)
    Image.fromarray(first).save(tmp_path / "a.png")
    Image.fromarray(second).save(tmp_path / "ward" / "b.PNG", format="PNG")
    (tmp_path / "notes.txt").write_text("private")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / ".hidden.png").write_bytes(b"")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset(tmp_path, "images", 8, 1)
    found = np.stack([pixels for pixels, _ in dataset])
    assert np.array_equal(found[:, 0], np.stack([first, second]))
    assert dataset.skips.examples == {
        "not the content of a PNG or JPEG file": ["broken.jpg"],
        "cannot be decoded: damaged, or cut short": ["cut.png"],
        "neither PNG nor JPEG": ["notes.txt"],
    }
    assert dataset.shapes == {"8×8×1": 2}


def test_empty_missing_and_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: correct \\[data\\] path"):
        open_dataset(tmp_path / "nowhere", "auto", 8, 1)
    with pytest.raises(DataError, match="holds no image"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"1 files were skipped, 1 of them \(a.png, for one\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r'as "not the content of a PNG.*": check \[data\] path'):
        read(tmp_path)
    with pytest.raises(DataError, match="is a file: give the folder"):
        open_dataset(tmp_path / "a.png", "images", 8, 1)


def test_pixels_are_cropped_to_the_centre_resized_and_scaled_to_eight_bits() -> None:
    wide = np.zeros((4, 8), dtype=np.uint8)
    wide[:, 2:6] = 200
    assert np.all(fit_array(wide, 2, 1) == 200), "the borders are cut off, not squeezed in"
    halves = np.repeat(np.repeat(np.array([[0, 100], [200, 40]], dtype=np.uint8), 4, 0), 4, 1)
    assert fit_array(halves, 8, 1)[0].tolist() == halves.tolist()
    deep = Image.fromarray(np.full((4, 4), 0xAB12, dtype=np.uint16))
    from silo.data.pixels import fit

    assert np.all(fit(deep, 4, 1) == 0xAB)


def test_cache_maps_the_same_pixels_and_is_made_once_per_source(tmp_path: Path) -> None:
    source = pixels(7, 8, 8)
    np.savez(tmp_path / "x.npz", images=source)
    cached = cache_dataset(open_dataset(tmp_path / "x.npz", "auto", 8, 1), tmp_path / "cache")
    assert isinstance(cached.images(), np.memmap)
    assert np.array_equal(cached.images(), source[:, None])
    assert (cached.count, cached.shapes) == (7, {"8×8×1": 7})
    before = cached.file.stat().st_mtime_ns
    again = cache_dataset(open_dataset(tmp_path / "x.npz", "auto", 8, 1), tmp_path / "cache")
    assert again == cached == open_cache(cached.folder)
    assert cached.file.stat().st_mtime_ns == before
    np.savez(tmp_path / "x.npz", images=pixels(9, 8, 8))
    changed = cache_dataset(open_dataset(tmp_path / "x.npz", "auto", 8, 1), tmp_path / "cache")
    assert changed.key != cached.key
    assert changed.count == 9


def test_contact_sheet_shows_at_most_a_hundred_images(tmp_path: Path) -> None:
    write_sheet(pixels(250, 3, 8, 8), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (660, 660)
        assert sheet.mode == "RGB"


def test_contact_sheet_goes_from_the_first_image_to_the_last(tmp_path: Path) -> None:
    images = np.zeros((150, 1, 8, 8), dtype=np.uint8)
    images[0], images[-1] = 100, 200
    write_sheet(images, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((10, 10)) == 100
        assert sheet.getpixel((9 * 66 + 10, 9 * 66 + 10)) == 200


def test_volumes_in_medmnist_s_layout_are_refused_with_what_to_write(tmp_path: Path) -> None:
    np.savez(tmp_path / "organ3d.npz", train_images=pixels(2, 8, 8, 8))
    with pytest.raises(DataError, match="volumes are not read: write the slices"):
        read(tmp_path / "organ3d.npz")


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    upright = np.zeros((8, 8), dtype=np.uint8)
    upright[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of what is stored
    Image.fromarray(np.rot90(upright, 1)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path)[0, 0], upright)


def archives(folder: Path) -> dict[str, bytes]:
    """One small file of each format that holds many images."""
    np.savez_compressed(folder / "x.npz", images=pixels(3, 8, 8), labels=np.arange(3))
    whole = io.BytesIO()
    Image.fromarray(pixels(1, 8, 8)[0]).save(whole, format="PNG")
    return {
        "x.npz": (folder / "x.npz").read_bytes(),
        "train-images-idx3-ubyte": idx(pixels(3, 8, 8)),
        "train-images-idx3-ubyte.gz": gzip.compress(idx(pixels(3, 8, 8))),
        "data_batch_1.bin": bytes(3 * 3073),
        "a.png": whole.getvalue(),
    }


@pytest.mark.parametrize(
    "name",
    [
        "x.npz",
        "train-images-idx3-ubyte",
        "train-images-idx3-ubyte.gz",
        "data_batch_1.bin",
        "a.png",
    ],
)
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    original, rng, refused = archives(tmp_path)[name], np.random.default_rng(4), []
    for number in range(150):
        content = bytearray(original)
        for _ in range(rng.integers(1, 12)):
            content[rng.integers(len(content))] = rng.integers(256)
        if number % 3 == 0:
            del content[rng.integers(len(content)) :]
        (tmp_path / "source" / name).write_bytes(content)
        try:
            read(tmp_path / "source", channels=1)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(str(tmp_path / "source") in said for said in refused)
