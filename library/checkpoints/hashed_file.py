"""Network files written a tensor at a time, with the hashes of the trade in their headers.

A header stands before the tensors whose hash it holds. It is written with room for the hashes first, which are put in
while the file still has its temporary name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from library.checkpoints.safetensors_io import (
    CHUNK,
    HASHED_WINDOW,
    ByteWindow,
    Entry,
    atomic_file,
    checked_bytes,
    encode_header,
    in_layout_order,
    only_ss,
    read_header,
)
from library.checkpoints.torch_file import write_torch_file

MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"


def write_hashed_entries(entries: Iterable[Entry], path: Path | str, metadata: Mapping[str, str]) -> None:
    """A .safetensors file of a network as the trainers write it, its tensors produced one by one.

    Raises OptionError when the folder can't be written or the disk is too full, NonFiniteError for NaN or infinity;
    nothing is left then.
    """
    entries = in_layout_order(entries)
    metadata = dict(metadata) | {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    has_spec = "modelspec.sai_model_spec" in metadata
    if has_spec:
        metadata[SPEC_HASH] = "0x" + "0" * 64
    head = encode_header(entries, metadata)
    model_hash, window = hashlib.sha256(), ByteWindow(*HASHED_WINDOW)
    window.add(encode_header(entries, only_ss(metadata)))
    with atomic_file(path, len(head) + sum(entry.nbytes for entry in entries)) as file:
        file.write(head)
        for entry in entries:
            data = checked_bytes(entry)
            model_hash.update(data)
            window.add(data)
            file.write(data)
        digest = model_hash.hexdigest()
        metadata |= {MODEL_HASH: digest, LEGACY_HASH: hashlib.sha256(window.content).hexdigest()[:8]}
        if has_spec:
            metadata[SPEC_HASH] = f"0x{digest}"
        file.seek(0)
        file.write(encode_header(entries, metadata))


def write_network(entries: Iterable[Entry], path: Path, metadata: Mapping[str, str]) -> None:
    """A network's file by its extension: .safetensors, or PyTorch's own form, which has no metadata."""
    if path.suffix.lower() == ".safetensors":
        write_hashed_entries(entries, path, metadata)
    else:
        write_torch_file(list(entries), path)


def sshs_hashes_of_file(path: Path | str) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash) of what a .safetensors file holds, whatever its header says. No torch."""
    header = read_header(path)
    entries = [
        Entry(name, info.dtype, info.shape, _never)
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start)
    ]
    model_hash, window = hashlib.sha256(), ByteWindow(*HASHED_WINDOW)
    window.add(encode_header(entries, only_ss(header.metadata)))
    with Path(path).open("rb") as file:
        file.seek(header.data_start)
        while data := file.read(CHUNK):
            model_hash.update(data)
            window.add(data)
    return model_hash.hexdigest(), hashlib.sha256(window.content).hexdigest()[:8]


def _never() -> NoReturn:
    raise AssertionError("only the header of these entries is of interest")
