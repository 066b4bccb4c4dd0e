"""Files of encoded captions: how they are named, when they are trusted, how they are read and written.

The files are those of the trade, `<image>_te_outputs.npz` with `hidden_state1` and `hidden_state2` (75 N + 2, D), the
states of both encoders, and `pool2` (P), the second one's pooled text, all float32; readable both ways. One more array,
`fingerprint`, a JSON text, says what made them. Further versions of a caption stand beside the first one, with `_v1`,
`_v2` and so on at the end of their names.

A file without fingerprint is another program's: it knows neither what it was made of nor by which encoders. It is used
where its caption is the stored one, unchanged, and it is newer than the file of that caption.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from library.data.npz_files import DAMAGE, FINGERPRINT, array_names, fingerprint_in, read_arrays, save_arrays
from library.options import OptionError
from library.text.states import TextStates

DISK_FLAG = "--cache_text_encoder_outputs_to_disk"
CODE_VERSION = 1  # of everything between the caption and the encoders' states; raise it when that changes
ENDING = "_te_outputs"
UNCHECKED = "taken unchecked"
OF_ANOTHER_PROGRAM = "of another program"
VALID = {"valid", OF_ANOTHER_PROGRAM, UNCHECKED}
NOT_OURS = "not a cache of text"


@dataclass(frozen=True, slots=True)
class TextItem:
    """The captions of one image of one subset: what one cache file holds."""

    image: str  # path
    captions: tuple[str, ...]  # processed: at least one
    stored: str  # as it was found
    sources: tuple[str, ...]  # files that the stored caption may come from
    npz: str


@dataclass(frozen=True)
class TextMaking:
    """What made encoded captions."""

    encoders: str  # identifies weights, precision and settings
    shapes: tuple[tuple[int, ...], ...]  # of one caption's arrays
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, encoders: str, example: TextStates) -> TextMaking:
        """`example` is a batch as the encoders make it."""
        parts = example.tensors
        return cls(encoders, tuple(tuple(part.shape[1:]) for part in parts), tuple(part.dtype for part in parts))

    def keys(self, version: int) -> tuple[str, ...]:
        """The names of the arrays of one version of a caption."""
        count = sum(len(shape) == 2 for shape in self.shapes)
        names = [f"hidden_state{number}" for number in range(1, count + 1)]
        names += [f"pool{count}"] * (len(self.shapes) - count)
        return tuple(name if version == 0 else f"{name}_v{version}" for name in names)

    def fingerprint(self, captions: Sequence[str]) -> dict[str, str | int]:
        """What a file of these captions says of its making."""
        text = "\x1f".join(captions)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return {"code": CODE_VERSION, "captions": digest, "encoders": self.encoders}


def text_file_names(images: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    """The cache file of each (path, captions): `<base>_te_outputs.npz` as in the trade, longer where two would share.

    Images of one stem but several extensions use the whole file name; an image with other captions in another subset
    has a hash of them in the name.
    """
    unique = list(dict.fromkeys(images))
    names = {image: f"{os.path.splitext(image[0])[0]}{ENDING}.npz" for image in unique}
    for lengthen in (
        lambda path, _: f"{path}{ENDING}.npz",
        lambda path, captions: f"{path}{ENDING}.{_short_hash(captions)}.npz",
    ):
        uses = Counter(names.values())
        names = {image: lengthen(*image) if uses[name] > 1 else name for image, name in names.items()}
    return [names[image] for image in images]


def _short_hash(captions: tuple[str, ...]) -> str:
    return hashlib.blake2b("\x1f".join(captions).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


# ---------------------------------------------------------------------------------------------- states


def state_of(item: TextItem, making: TextMaking) -> str:
    """One of VALID, "missing", NOT_OURS, or what is stale about an item's file; reads and checks the whole file."""
    if not os.path.exists(item.npz):
        return "missing"
    try:
        with open(item.npz, "rb") as file:
            content = file.read()
    except OSError:  # a folder, or not for us to read
        return NOT_OURS
    keys = [key for version in range(len(item.captions)) for key in making.keys(version)]
    try:
        if making.keys(0)[0] not in array_names(io.BytesIO(content)):
            return NOT_OURS
        arrays = read_arrays(io.BytesIO(content), [*keys, FINGERPRINT])
        found = fingerprint_in(arrays)
    except DAMAGE:
        return "unreadable" if content.startswith(b"PK\x03\x04") or not content.strip(b"\0") else NOT_OURS
    if found is not None:
        expected = making.fingerprint(item.captions)
        reasons = {"code": "of older code", "captions": "of other captions", "encoders": "of other text encoders"}
        for key, reason in reasons.items():
            if found.get(key) != expected[key]:
                return reason
    elif item.captions != (item.stored,) or not _is_newer(item):
        return "perhaps of other captions"
    for index, key in enumerate(keys):
        array = arrays.get(key)
        if array is None or array.shape != making.shapes[index % len(making.shapes)]:
            return "of another size"
        if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
            return "not finite"
    return OF_ANOTHER_PROGRAM if found is None else "valid"


def _is_newer(item: TextItem) -> bool:
    """Whether the file is no older than the files that its caption may come from."""
    made = os.stat(item.npz).st_mtime_ns
    return all(os.stat(source).st_mtime_ns <= made for source in item.sources if os.path.exists(source))


# ---------------------------------------------------------------------------------------------- reading and writing


def read_version(item: TextItem, version: int, making: TextMaking) -> TextStates:
    """One caption of a file that was valid at the start, in the encoders' precision; OptionError when it is no more."""
    keys = making.keys(version)
    try:
        arrays = read_arrays(item.npz, [*keys, FINGERPRINT])
        found = fingerprint_in(arrays)
        parts = [torch.from_numpy(arrays[key]).to(dtype) for key, dtype in zip(keys, making.dtypes, strict=True)]
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(DISK_FLAG, f"{item.npz} can't be read any more ({reason})", "delete it and resume") from None
    is_same = found is None or found == making.fingerprint(item.captions)
    if not is_same or any(part.shape != shape for part, shape in zip(parts, making.shapes, strict=True)):
        raise OptionError(DISK_FLAG, f"another run has rewritten {item.npz}", "resume when that run has ended")
    pooled = parts.pop() if parts[-1].dim() == 1 else None
    return TextStates(tuple(parts), pooled)


def write(item: TextItem, versions: Sequence[TextStates], making: TextMaking) -> None:
    """Write a cache file, whole or not at all; `versions` are single captions, (T, D) and (P)."""
    arrays = {
        key: part.float().numpy()
        for version, states in enumerate(versions)
        for key, part in zip(making.keys(version), states.tensors, strict=True)
    }
    try:
        save_arrays(item.npz, arrays | {FINGERPRINT: np.array(json.dumps(making.fingerprint(item.captions)))})
    except OSError as error:
        problem = f"can't write {item.npz} ({error.strerror or error})"
        memory = "training can also keep it in memory: --cache_text_encoder_outputs"
        raise OptionError(DISK_FLAG, problem, f"free some space or make the folder writable; {memory}") from None
