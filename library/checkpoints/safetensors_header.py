"""The header of a safetensors file, parsed and checked: what passes here, the safetensors library reads too.

The format: https://github.com/huggingface/safetensors#format. Two things the library lets pass are refused, as they
say that a file is not what it seems: a key that is there twice, and a tensor that is described by a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options import OptionError

# name in the header -> (bytes per element, name in torch); the order is the safetensors library's layout order
DTYPES = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
GET_IT_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; `start` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int


def parsed_header(text: bytes, data_start: int, size: int, subject: str) -> Header:
    """The header from its JSON; tensors begin at `data_start` of a file of `size` bytes.

    Raises OptionError, naming `subject`, unless the tensors fill the rest of the file without a gap.
    """
    content = _parsed(text, subject)
    metadata = content.pop("__metadata__", None)  # the library writes none, and reads null
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise OptionError("", f"{subject} is damaged: its metadata are no texts by name", GET_IT_AGAIN)
    tensors = {name: _tensor_info(name, row, data_start, subject) for name, row in content.items()}
    end = _end_of_tensors(tensors, data_start, subject)
    if end > size:
        problem = f"{subject} is truncated: {end:,} bytes promised, {size:,} there"
        raise OptionError("", problem, GET_IT_AGAIN)
    if end < size:
        raise OptionError("", f"{subject} is damaged: {size - end:,} bytes follow its last tensor", GET_IT_AGAIN)
    return Header(metadata or {}, tensors, data_start)


class _TwiceError(ValueError):
    """A key that is there twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _parsed(text: bytes, subject: str) -> dict[str, Any]:
    try:
        content = json.loads(text.decode(), object_pairs_hook=_object)
        if not isinstance(content, dict):
            raise ValueError
        if b"\\u" in text:  # an escape may stand for half a letter, which no reader takes
            json.dumps(content, ensure_ascii=False).encode()
    except _TwiceError as error:
        raise OptionError("", f"{subject} is damaged: its header has {error} twice", GET_IT_AGAIN) from None
    except (ValueError, RecursionError):
        raise OptionError("", f"{subject} is no safetensors file: its header can't be read") from None
    return content


def _tensor_info(name: str, row: Any, data_start: int, subject: str) -> TensorInfo:
    match row:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise OptionError("", f"{subject} is damaged: its header does not describe {name}", GET_IT_AGAIN)
    if dtype not in DTYPES:
        problem = f"{subject}: {name} is of the data type {dtype[:40]}, which is not known here"
        raise OptionError("", problem, "save it in another precision by the program that made it")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            problem = f"{subject} is damaged: shape {shape} and bytes {[begin, end]} of {name}"
            raise OptionError("", f"{problem} are no whole numbers from 0", GET_IT_AGAIN)
    if end - begin != math.prod(shape) * DTYPES[dtype][0]:
        problem = f"{subject} is damaged: {name}, {dtype} of shape {shape}, can't be the bytes {begin} to {end}"
        raise OptionError("", problem, GET_IT_AGAIN)
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _end_of_tensors(tensors: Mapping[str, TensorInfo], start: int, subject: str) -> int:
    """Where the last tensor ends; each has to begin where the one before it ends."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != start:
            what = "overlaps the tensor before it" if info.start < start else "does not follow the tensor before it"
            raise OptionError("", f"{subject} is damaged: {name} {what}", GET_IT_AGAIN)
        start = info.end
    return start
