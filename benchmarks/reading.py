"""Reading an institution's images: time and memory of `concilium silo check` against their number.

    python -m benchmarks.reading npz 1000000
    python -m benchmarks.reading images 100000
    python -m benchmarks.reading dicom 4000 --threads 2

Memory is the resident set of all processes of the command without the pages of the mapped cache,
looked at ten times a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from silo import admin
from silo.files import read_json


def write_npz(path: Path, count: int) -> Path:
    """`count` images of 28×28, written a thousand at a time."""
    rng, file = np.random.default_rng(1), path / "images.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 28, 28)}
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open("images.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, count, 1000):
            part = rng.integers(0, 256, (min(1000, count - start), 28, 28), dtype=np.uint8)
            out.write(part.tobytes())
    return file


def write_images(path: Path, count: int) -> Path:
    """`count` PNG files of 28×28, a thousand in a folder."""
    rng = np.random.default_rng(1)
    for number in range(count):
        folder = path / f"{number // 1000:04}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
    return path


def write_dicom(path: Path, count: int) -> Path:
    """`count` slices of pydicom's CT (512×512, lossless JPEG 2000), a hundred in a series."""
    import data_store
    import pydicom
    from pydicom.uid import generate_uid

    slice_ = pydicom.dcmread(Path(data_store.__file__).parent / "data" / "693_J2KR.dcm")
    for number in range(count):
        if number % 100 == 0:
            slice_.SeriesInstanceUID = generate_uid()
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_.InstanceNumber = number
        slice_.save_as(path / f"{number}")
    return path


WRITE = {"npz": write_npz, "images": write_images, "dicom": write_dicom}


def anonymous_mib(group: int) -> float:
    """Resident memory of the processes of a group that is not of files."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                lines = status.read_text().split("\n")
                total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        except (OSError, ValueError):
            continue
    return total / 1024


def measure(home: Path, size: int) -> tuple[float, list[float]]:
    command = [sys.executable, "-m", "concilium", "silo", "check", "--home", home]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--image-size", str(size)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    memory = []
    while process.poll() is None:
        memory.append(anonymous_mib(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"check ended with {process.returncode}")
    return time.monotonic() - started, memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=WRITE)
    parser.add_argument("count", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=28)
    given = parser.parse_args()
    with TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        source, home = Path(folder) / "source", Path(folder) / "home"
        source.mkdir()
        data = WRITE[given.format](source, given.count)
        admin.init(home, name="bench", data=data, format=given.format, threads=given.threads)
        seconds, memory = measure(home, given.image_size)
        (report,) = (home / "cache").glob("*/report.json")
        quarter, half = len(memory) // 4, len(memory) // 2
        print(
            f"{given.format}: {read_json(report)['count']} images in {seconds:.1f} s "
            f"({given.count / seconds:.0f} a second, {given.threads} threads); memory "
            f"{memory[quarter]:.0f} MiB after a quarter, {memory[half]:.0f} after half, "
            f"{memory[-2]:.0f} at the end, at most {max(memory):.0f}"
        )


if __name__ == "__main__":
    main()
