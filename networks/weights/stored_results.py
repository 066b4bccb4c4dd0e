"""Results that wait on the disk until all are known: a header stands before the tensors, and their sizes come last."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from library.checkpoints.safetensors_io import DTYPES, Entry, NonFiniteError, header_dtype, is_finite, raw_bytes
from library.options import OptionError

if TYPE_CHECKING:
    import torch


class StoredResults:
    """Named tensors in a nameless file beside the output, gone when the block ends; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            problem = f"{folder} can't be written to ({error.strerror})"
            raise OptionError("--save_to", problem, "choose another folder") from None
        self.entries: list[Entry] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises NonFiniteError for NaN and infinity."""
        if not is_finite(tensor):
            raise NonFiniteError(f"{name} would hold NaN or infinity", "use --save_precision bf16 or float")
        start = self._file.seek(0, 2)
        data = raw_bytes(tensor)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            problem = f"{self._folder} can't take more results ({error.strerror})"
            raise OptionError("--save_to", problem, "free some space or choose another folder") from None
        dtype, shape = header_dtype(tensor.dtype), tuple(tensor.shape)
        self.entries.append(Entry(name, dtype, shape, lambda: self._read(start, data_size, dtype, shape)))
        data_size = data.nbytes

    def _read(self, start: int, size: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        if not size:
            return torch.empty(shape, dtype=getattr(torch, DTYPES[dtype][1]))
        self._file.seek(start)
        data = bytearray(self._file.read(size))
        return torch.frombuffer(data, dtype=getattr(torch, DTYPES[dtype][1])).reshape(shape)

    def __enter__(self) -> StoredResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self._file.close()
