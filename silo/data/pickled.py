"""Pickles read as data: the dicts, lists and arrays of bytes of CIFAR's Python version.

A pickle is a program. `pickle.load` imports what the file names and calls it with arguments of the
file's choice, and a list of allowed names does not make that safe: `numpy.ndarray` allocates
whatever size it is asked for, the state of an array of objects or of a dtype goes to C code that
trusts it, and the unpickler itself makes room for memo entry 2³² if a file has one. So no unpickler
runs here. `pickletools.genops` tells the opcodes apart and executes none, and those that the
published files are made of are followed on values that do nothing:

    GLOBAL   a member of `Name`, one for each of the five names known here; nothing is imported
    REDUCE   `Call` of such a name with its arguments; nothing is called
    BUILD    its state, beside them; nothing is set
    strings  str, in which bytes are the characters U+0000 to U+00FF, whichever Python wrote them

`bytes_of_rows` then knows the one arrangement of these that is an array of uint8. Every other
opcode (persistent ids, extensions, instances, buffers out of band) is refused, every other name,
and keys that are no short strings. So a file of at most `_LARGEST` bytes and `_MOST_OPCODES`
opcodes costs a few times its size in memory, and a few seconds.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST = 200 * 2**20  # bytes; the largest published file, CIFAR-100's `train`, has 155,249,918
_MOST_OPCODES = 1_000_000  # four to ten for each of CIFAR-100's 50,000 images
_LONGEST_KEY = 64  # characters: equal keys are compared, and a long one could be compared often


class Name(Enum):
    """What the published files call."""

    RECONSTRUCT = "numpy's empty array"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ENCODE = "bytes as Python 3 writes them for Python 2"


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Name.RECONSTRUCT,  # since numpy 2
    ("numpy", "ndarray"): Name.NDARRAY,
    ("numpy", "dtype"): Name.DTYPE,
    ("_codecs", "encode"): Name.ENCODE,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(eq=False)
class Call:
    """A call that was not made."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = None


def read_pickle(file: Path) -> dict[str, Any]:
    """The dict that a file holds. Raises ValueError for anything else."""
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"it has {size} bytes, more than any published file")
    found = parse(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it holds no dict")
    return found


def parse(content: bytes) -> Any:
    """None, bool, int, str, tuple, list, dict or `Call`. Raises ValueError for anything else."""
    machine = _Machine()
    try:
        for number, (opcode, argument, place) in enumerate(pickletools.genops(content)):
            if number == _MOST_OPCODES:
                raise ValueError(f"it has more than {_MOST_OPCODES} opcodes")
            if opcode.name != "STOP":
                machine.follow(opcode.name, argument)
            elif place != len(content) - 1:
                raise ValueError("something follows its end")
    except LookupError as error:
        raise ValueError("an opcode misses what it works on") from error
    return machine.result()


def bytes_of_rows(value: Any, columns: int) -> NDArray[np.uint8]:
    """uint8 (n, columns), where `value` is the pickle of such an array; ValueError where not."""
    match value:
        case Call(
            Name.RECONSTRUCT,
            _,
            (1, (int(n), int(m)), Call(Name.DTYPE, ("u1", *_)), bool(by_columns), str(text)),
        ) if m == columns and len(text) == n * m:
            flat = np.frombuffer(text.encode("latin-1"), np.uint8)
            return flat.reshape((n, m), order="F" if by_columns else "C")
    raise ValueError(f"its images are no array of uint8 with {columns} columns")


class _Machine:
    """The pickle machine's stack and memo, over values that do nothing."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError("it holds not one object")
        return self._stack[0]

    def follow(self, opcode: str, argument: Any) -> None:
        """Raises ValueError or LookupError."""
        stack, memo = self._stack, self._memo
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode])
            case "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)  # pickletools decodes Python 2's strings as Latin-1
            case "SHORT_BINBYTES" | "BINBYTES":
                stack.append(argument.decode("latin-1"))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(self._since(self._marks.pop()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._last(int(opcode[-1])))
            case "APPEND":
                self._extend(self._last(1))
            case "APPENDS":
                self._extend(self._since(self._marks.pop()))
            case "SETITEM":
                self._update(self._last(2))
            case "SETITEMS":
                self._update(self._since(self._marks.pop()))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self._last(2)))
            case "REDUCE":
                stack.append(_call(*self._last(2)))
            case "BUILD":
                (state,) = self._last(1)
                _build(stack[-1], state)
            case _:
                raise ValueError(f"it has the opcode {opcode}, which no published file has")

    def _since(self, place: int) -> tuple[Any, ...]:
        if place > len(self._stack):
            raise IndexError
        found = tuple(self._stack[place:])
        del self._stack[place:]
        return found

    def _last(self, n: int) -> tuple[Any, ...]:
        if n > len(self._stack):
            raise IndexError
        return self._since(len(self._stack) - n)

    def _extend(self, items: tuple[Any, ...]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("it appends to what is no list")
        self._stack[-1].extend(items)

    def _update(self, items: tuple[Any, ...]) -> None:
        keys, values = items[::2], items[1::2]
        if not isinstance(self._stack[-1], dict) or len(keys) != len(values):
            raise ValueError("it sets items of what is no dict")
        if not all(isinstance(key, str) and len(key) <= _LONGEST_KEY for key in keys):
            raise ValueError("it has keys that are no short strings")
        self._stack[-1].update(zip(keys, values, strict=True))


def _name(module: Any, name: Any) -> Name:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("it has a name that is no string")
    if (module, name) not in _NAMES:
        raise ValueError(f"it names {module[:40]!r}, {name[:40]!r}, which no published file does")
    return _NAMES[module, name]


def _call(function: Any, arguments: Any) -> Any:
    if not (isinstance(function, Name) and isinstance(arguments, tuple)):
        raise ValueError("it calls what is no name")
    if function is not Name.ENCODE:
        return Call(function, arguments)
    match arguments:
        case (str(text), "latin1"):
            return text  # bytes are kept as this text anyhow
    raise ValueError("it encodes text otherwise than as Latin-1")


def _build(call: Any, state: Any) -> None:
    if not isinstance(call, Call):
        raise ValueError("it sets the state of what is no call")
    call.state = state
