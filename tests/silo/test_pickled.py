"""CIFAR's Python version is read as data: what a file asks to call is never called."""

from __future__ import annotations

import builtins
import os
import pickle
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.data import pickled
from silo.data.dataset import open_dataset
from silo.data.pickled import bytes_of_rows, parse, read_pickle
from silo.errors import DataError
from tests.silo.pickles import cifar_batch, python_2


def images(n: int) -> np.ndarray:
    return np.random.default_rng(6).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


IMAGE = np.zeros((1, 3072), np.uint8)
META = {"num_cases_per_batch": 10000, "label_names": ["airplane", "bird"], "num_vis": 3072}
SEED = python_2(cifar_batch(images(1), [1]))


def folder_of(path: Path, batch: bytes, meta: bytes = python_2(META)) -> Path:
    path.mkdir(exist_ok=True)
    (path / "data_batch_1").write_bytes(batch)
    (path / "batches.meta").write_bytes(meta)
    return path


def read(path: Path) -> list[int | None]:
    return [sample.label for sample in open_dataset(path, "auto", 32, 3)]


def test_a_batch_as_python_2_wrote_it_holds_its_images_and_labels() -> None:
    some = images(300)
    batch = cifar_batch(some, [n % 10 for n in range(300)])
    found = parse(python_2(batch))
    assert found["labels"] == batch["labels"]
    assert found["filenames"] == batch["filenames"]
    assert np.array_equal(bytes_of_rows(found["data"], 3072), some.reshape(300, -1))
    by_columns = python_2({"data": np.asfortranarray(some.reshape(300, -1))})
    assert np.array_equal(bytes_of_rows(parse(by_columns)["data"], 3072), some.reshape(300, -1))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_a_batch_that_python_3_wrote_again_holds_the_same(protocol: int, module: bytes) -> None:
    batch = {key.encode(): value for key, value in cifar_batch(images(2), [3, 700]).items()}
    written = pickle.dumps(batch, protocol)
    if protocol < 4:  # in the newest the module's length stands before it
        written = written.replace(b"numpy._core.multiarray", module)
    found = parse(written)
    assert found["labels"] == [3, 700]
    assert np.array_equal(bytes_of_rows(found["data"], 3072), images(2).reshape(2, -1))


class Calls:
    """Unpickled, a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def malice(marker: Path) -> dict[str, Any]:
    opens = f"open({str(marker)!r}, 'w')"
    within = np.array([Calls(builtins.eval, opens), 1], dtype=object)
    return {
        "a command": Calls(os.system, f"touch {marker}"),
        "an expression": Calls(builtins.eval, opens),
        "a file": Calls(builtins.open, str(marker), "w"),
        "an array of objects": within,
        "a structured array": np.zeros(1, dtype=[("a", object)]),
        "an attribute": Calls(getattr, "text", "upper"),
        "a codec": Calls(__import__("_codecs").encode, "x", "zlib_codec"),
        "an array that was written otherwise": np.arange(3.0),
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", malice(Path()))
def test_what_a_file_asks_to_call_is_refused_and_never_called(
    tmp_path: Path, kind: str, protocol: int
) -> None:
    marker = tmp_path / "called"
    hidden = malice(marker)[kind]
    for content in (hidden, {"data": hidden, "labels": [1]}, {"data": IMAGE, "labels": hidden}):
        batch = pickle.dumps(content, protocol)
        with pytest.raises(DataError, match="data_batch_1 is not as cifar-10-python"):
            read(folder_of(tmp_path / "cifar", batch))
        with pytest.raises(DataError, match="batches.meta is not as"):
            open_dataset(folder_of(tmp_path / "cifar", SEED, batch), "auto", 32, 3).classes()
    assert not marker.exists()


def test_the_refusal_says_why_and_what_to_take_instead(tmp_path: Path) -> None:
    batch = pickle.dumps(Calls(os.system, "true"), 2)
    with pytest.raises(DataError, match=r"names 'posix', 'system'.*cifar-10-binary\.tar\.gz"):
        read(folder_of(tmp_path / "cifar", batch))


LARGE = b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7f\x85cnumpy\ndtype\nU\x02u1\x85RtR."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "exhausted"),
        (LARGE, "holds no dict"),
        (b"\x80\x02}q\x01U\x04data" + LARGE[2:-1] + b"s.", None),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "holds no dict"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),
        (b"\x80\x02T\xff\xff\xff\x7fab.", "expected 2147483647 bytes"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fab.", "bytes8"),
        (b"\x80\x05\x96" + b"\0" * 8 + b".", "opcode BYTEARRAY8"),
        (b"\x80\x02U\x01xQ.", "opcode BINPERSID"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode NEWOBJ"),
        (b"(cos\nsystem\nU\x04trueo.", "'os', 'system'"),
        (b"(U\x04trueios\nsystem\n.", "opcode INST"),
        (b"\x80\x02]U\x01xb.", "state of what is no call"),
        (b"\x80\x02]]R.", "calls what is no name"),
        (b"\x80\x02}]K\x01s.", "keys that are no short strings"),
        (b"\x80\x02}X\x41\0\0\0" + b"k" * 65 + b"K\x01s.", "keys that are no short strings"),
        (b"\x80\x02}(U\x01ku.", "what is no dict"),
        (b"\x80\x02K\x01K\x02a.", "what is no list"),
        (b"\x80\x02a.", "misses what it works on"),
        (b"\x80\x02(0t.", "opcode POP"),
        (b"\x80\x02(\x85.", "misses what it works on"),
        (b"\x80\x02h\x05.", "misses what it works on"),
        (b"\x80\x02}.}.", "follows its end"),
        (b"\x80\x02}}.", "not one object"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no dict"),
    ],
)
def test_a_file_that_asks_for_room_or_for_nonsense_gets_neither(
    tmp_path: Path, content: bytes, said: str | None
) -> None:
    file = tmp_path / "data_batch_1"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        if said is None:
            assert isinstance(read_pickle(file), dict)
        else:
            with pytest.raises(ValueError, match=said):
                read_pickle(file)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_files_and_pickles_longer_than_any_published_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "train", "wb") as file:
        file.truncate(200 * 2**20 + 1)
    with pytest.raises(ValueError, match="209715201 bytes, more than any published file"):
        read_pickle(tmp_path / "train")
    monkeypatch.setattr(pickled, "_MOST_OPCODES", 100)
    with pytest.raises(ValueError, match="more than 100 opcodes"):
        parse(b"\x80\x02" + b"N" * 101 + b".")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"labels": [1]}, "no array of uint8"),
        ({"labels": [1], "data": "x" * 3072}, "no array of uint8"),
        ({"labels": [1], "data": np.zeros((1, 3071), np.uint8)}, "no array of uint8"),
        ({"labels": ["1"], "data": IMAGE}, "list of numbers called labels"),
        ({"fine_labels": [1], "data": IMAGE}, "called labels"),
        ({"labels": [1, 2], "data": IMAGE}, "2 labels of 1 images"),
    ],
)
def test_a_dict_that_is_no_batch_is_refused(
    tmp_path: Path, batch: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read(folder_of(tmp_path, python_2(batch)))


def test_an_array_shorter_than_it_says_is_refused() -> None:
    whole = SEED.replace(b"K\x01M\x00\x0c\x86", b"K\x02M\x00\x0c\x86")
    assert whole != SEED
    with pytest.raises(ValueError, match="no array of uint8"):
        bytes_of_rows(parse(whole)["data"], 3072)


@given(data=st.data())
def test_a_damaged_batch_is_read_or_refused_with_the_one_error(data: st.DataObject) -> None:
    raw = bytearray(SEED)
    pixels = range(len(SEED) - 3200, len(SEED) - 100)  # damage there is no damage to the pickle
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)).filter(lambda n: n not in pixels))
        match data.draw(st.sampled_from(["set", "cut", "add"])):
            case "set" if at < len(raw):
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    with suppress(ValueError):
        found = parse(bytes(raw))
        bytes_of_rows(found.get("data") if isinstance(found, dict) else found, 3072)


OPCODES = st.sampled_from([bytes([code]) for code in b"()]}NKUq.a0etsubRc\x80\x85\x86\x87\x93\x94"])


@given(raw=st.one_of(st.binary(max_size=300), st.lists(OPCODES, max_size=60).map(b"".join)))
def test_garbage_is_read_or_refused_with_the_one_error(raw: bytes) -> None:
    with suppress(ValueError):
        parse(b"\x80\x02" + raw)
