"""Files of named arrays (numpy's .npz): read with their checksums verified, written whole or not at all.

A `fingerprint`, a JSON text among the arrays, says what made them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

FINGERPRINT = "fingerprint"
DAMAGE = (  # what reading a damaged file raises
    OSError, EOFError, KeyError, ValueError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_arrays(npz: str | BinaryIO, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays that are there, their checksums verified; raises one of DAMAGE."""
    arrays = {}
    with zipfile.ZipFile(npz) as archive:
        names = set(archive.namelist())
        for key in keys:
            if f"{key}.npy" in names:
                arrays[key] = _array(archive, f"{key}.npy")
    return arrays


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name} is compressed in a way that no such file is")
    return np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)


def array_names(npz: str | BinaryIO) -> set[str]:
    """The names of the arrays in a file; raises one of DAMAGE."""
    with zipfile.ZipFile(npz) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def fingerprint_in(arrays: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """None where there is none; raises ValueError where it is none that was written here."""
    if FINGERPRINT not in arrays:
        return None
    found = json.loads(str(arrays[FINGERPRINT]))
    if not isinstance(found, dict):
        raise ValueError("its fingerprint is no table")
    return found


def save_arrays(npz: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Under the final name there is never less than a whole file, even after a power cut. Raises OSError."""
    temporary = f"{npz}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, npz)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
