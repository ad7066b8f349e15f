"""NIfTI: whichever way a volume is stored, its slices look as radiologists expect them."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from silo.data.dataset import Dataset, open_dataset
from silo.data.items import Reading


def volume() -> np.ndarray:
    """(x, y, z) = (right, anterior, superior): bright at the right, the front and the head."""
    x, y, z = np.mgrid[:8, :8, :4]
    return (4 * x + 20 * y + 100 * z).astype(np.int16)


def save(path: Path, values: np.ndarray, axes: str = "RAS") -> Path:
    """Store a canonical volume in the order and direction of other axes."""
    ras = nibabel.Nifti1Image(values, np.eye(4))
    there = nibabel.orientations.axcodes2ornt(axes)
    turned = ras.as_reoriented(
        nibabel.orientations.ornt_transform(np.array([[i, 1] for i in range(3)]), there)
    )
    nibabel.save(turned, path)
    return path


def read(
    path: Path, axis: str = "axial", window: tuple[float, float] | None = (512.5, 1025.0)
) -> Dataset:
    return open_dataset(path, "auto", 8, 1, Reading(window, axis=axis))


def slices(path: Path, axis: str = "axial") -> np.ndarray:
    return np.stack([pixels[0] for pixels, _ in read(path, axis)]).astype(int)


def test_axial_slices_have_the_front_up_and_the_right_side_at_the_left(tmp_path: Path) -> None:
    found = slices(save(tmp_path / "a.nii.gz", volume()))
    assert len(found) == 4
    assert np.all(np.diff(found, axis=1) < 0), "rows go from front to back"
    assert np.all(np.diff(found, axis=2) <= 0), "columns go from right to left"
    assert np.all(np.diff(found, axis=0) > 0), "slices go from feet to head"


def test_the_order_in_which_a_volume_is_stored_changes_nothing(tmp_path: Path) -> None:
    expected = {
        axis: slices(save(tmp_path / "a.nii", volume()), axis)
        for axis in ("axial", "coronal", "sagittal")
    }
    for axes in ("LPS", "PSR", "SAL", "IRA"):
        for axis, slices_of_ras in expected.items():
            assert np.array_equal(
                slices(save(tmp_path / "b.nii", volume(), axes), axis), slices_of_ras
            )


def test_coronal_and_sagittal_slices_have_the_head_up(tmp_path: Path) -> None:
    cube = np.zeros((8, 8, 8), np.int16)
    cube[:, :, -1] = 1000
    path = save(tmp_path / "a.nii", cube)
    for axis in ("coronal", "sagittal"):
        found = slices(path, axis)
        assert found.shape == (8, 8, 8)
        assert np.all(found[:, 0] > 200)
        assert np.all(found[:, 1:] == 0)


def test_scaled_values_are_windowed_and_slices_of_one_value_left_out(tmp_path: Path) -> None:
    values = volume()
    values[:, :, 0] = -1000
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(2.0, -100.0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    dataset = read(tmp_path, window=None)
    found = np.stack([pixels for pixels, _ in dataset])
    assert len(found) == 3
    assert dataset.skips.counts == {"a slice of one value": 1}
    assert dataset.series == 1
    assert found.max() == 255


def test_several_volumes_in_one_file_and_other_files_are_skipped(tmp_path: Path) -> None:
    save(tmp_path / "good.nii.gz", volume())
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2)), np.eye(4)), tmp_path / "four.nii")
    (tmp_path / "notes.txt").write_text("x")
    whole = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.nii").write_bytes(b"text" * 200)
    dataset = read(tmp_path)
    assert len(list(dataset)) == 4
    assert dataset.skips.examples == {
        "cannot be read as NIfTI: damaged, or cut short": ["cut.nii.gz", "text.nii"],
        "not one volume of three axes: write the one to learn from as a file of its own": [
            "four.nii"
        ],
        "no NIfTI file (.nii, .nii.gz)": ["notes.txt"],
    }


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_damaged_volume_is_read_or_skipped_whatever_is_damaged(
    tmp_path: Path, suffix: str
) -> None:
    path = save(tmp_path / f"a.{suffix}", volume())
    original, rng = path.read_bytes(), np.random.default_rng(1)
    save(tmp_path / "whole.nii", volume())
    for _ in range(60):
        content = bytearray(original)
        for _ in range(rng.integers(1, 20)):
            content[rng.integers(min(400, len(content)))] = rng.integers(256)
        path.write_bytes(content)
        assert len(list(read(tmp_path))) >= 4
