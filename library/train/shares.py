"""What each of several processes keeps of a run for itself, its share: written to files and read back.

Shares are files in the folder SHARES of a state, one for each process. They are complete when that folder is moved
into the state, which happens after every process has written its own.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.options import OptionError
from library.train.resume import SHARES, share_name


class ProcessState(ABC):
    """What one process keeps of a run for itself; the others keep their own."""

    process_index: int

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave on the same process of as many; all processes do it together."""

    def write(self, folder: Path) -> None:
        with open(folder / share_name(self.process_index), "wb") as file:
            torch.save(self.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())

    def read(self, folder: Path) -> None:
        path = folder / share_name(self.process_index)
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def write_shares(state: ProcessState, accelerator: Accelerator, folder: Path) -> Path:
    """Let each process write its share for the state `folder`; returns the hidden folder that holds them.

    All processes call it, and none returns before all shares are on the disk. Raises OptionError on all of them where
    one could not write.
    """
    hidden = folder.with_name(f".{folder.name}.{SHARES}")

    def prepare() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)

    def write() -> None:
        if not hidden.is_dir():  # on another machine
            problem = f"{folder.parent} is not the same folder on all machines, and each process writes its share of it"
            raise OptionError("--output_dir", problem, "name a folder that all machines share")
        state.write(hidden)

    for part in (prepare, write):
        _agreed(part, accelerator, hidden)
    return hidden


def together(write: Callable[..., None], accelerator: Accelerator) -> Callable[..., None]:
    """`write`, a function of a path and more: called by all processes with the main one's path; failing on all or none.

    So that no process waits for others that have gone another way.
    """

    def write_together(path: Path, *where: Any) -> None:
        names = [str(path)]
        broadcast_object_list(names)
        path = Path(names[0])
        _agreed(lambda: write(path, *where), accelerator, path)

    return write_together


def _agreed(act: Callable[[], None], accelerator: Accelerator, path: Path) -> None:
    """Do it on all processes; where one can't, OptionError on all of them."""
    error: OptionError | None = None
    try:
        act()
    except OptionError as problem:
        error = problem
    except OSError as problem:
        way_out = "free some space or choose another --output_dir"
        error = OptionError("--save_state", f"can't write {path} ({problem.strerror or problem})", way_out)
    failed = torch.tensor(float(error is not None), device=accelerator.device)
    total = accelerator.reduce(failed, "sum")
    assert isinstance(total, torch.Tensor)
    if error is not None:
        raise error
    if bool(total):
        raise OptionError("", f"another process could not write its part of {path}", "see its message")
