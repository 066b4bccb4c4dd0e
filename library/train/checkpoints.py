"""What a run leaves on disk: names and rotation of model files, and states from which it goes on exactly.

A state is a folder that appears only when it is complete. It holds what is trained (float32 masters), the optimizer,
the schedule, the gradient scaler and the place in the run; the frozen model is not in it, nor is any random state,
for there is none (library/randomness.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from library.checkpoints.own_folders import MODEL_FOLDER, STATE_FOLDER
from library.checkpoints.safetensors_io import NonFiniteError, save_file
from library.options import OptionError
from library.train.background_save import Then
from library.train.callbacks import Callback
from library.train.output_options import SavingOptions
from library.train.plan import TrainPlan
from library.train.resume import PARTIAL, REPLACED, SHARES, STATE_FILE, STATE_FORMAT, FileNames, RunState
from library.train.shares import ProcessState

logger = logging.getLogger(__name__)

# what reading a damaged state can raise
DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Written:
    """Where the last files of a run are, and what kept them from their own folder."""

    model: Path | None
    state: Path | None
    error: OptionError | None

    def told(self) -> OptionError:
        """The error with where things are."""
        model = "" if self.model is None else f"the trained model is in {self.model}"
        state = "" if self.state is None else f"the state is in {self.state}"
        if not self.model:
            state = f"the state alone is saved: {self.state}" if self.state else "nothing is saved"
        places = " and ".join(filter(None, (model, state)))
        if isinstance(self.error, NonFiniteError):
            return NonFiniteError(str(self.error), places)
        return OptionError("", str(self.error), f"{places}{', move it from there' * bool(self.model)}")


@dataclass
class Checkpointer(Callback):
    """Writes model files and states when the plan says so, and removes old ones."""

    saving: SavingOptions
    plan: TrainPlan
    names: FileNames
    write_model: Callable[[Path, int, int], None]  # (path, step, epoch)
    write_best: Callable[[Path, int, int], None]  # the same with the weights that validation looks at
    write_state: Callable[[Path, int], None]  # (folder, step)
    is_healthy: Callable[[], bool] = lambda: True  # False while losses are not finite: nothing good is replaced then
    begin_model: Callable[[Path, int, int, Then], bool] = lambda path, step, epoch, then: False
    """Starts to write a model file beside training and tells `then` in the end; False where that can't be."""
    removes_old: bool = True  # on one process only
    _old: list[Path] = field(default_factory=list)  # to be removed once the next file is there

    def after_step(self, step: int) -> None:
        if self.plan.saves_at(step):
            old = outdated_step(step, self.plan, self.saving.save_last_n_steps)
            old_state = outdated_step(step, self.plan, self._state_age("steps"))
            self._note_old(self.names.step_file, old, old_state)
            self._try_to_write(self.names.step_file(step), step)

    def after_epoch(self, epoch: int, step: int) -> None:
        if self.plan.saves_after_epoch(epoch):
            old = outdated_epoch(epoch, self.plan, self.saving.save_last_n_epochs)
            old_state = outdated_epoch(epoch, self.plan, self._state_age("epochs"))
            self._note_old(self.names.epoch_file, old, old_state)
            self._try_to_write(self.names.epoch_file(epoch), step)

    def at_end(self, step: int) -> None:
        """The final file; where its folder can't take it, OptionError says where it was put instead.

        A model that can be saved nowhere leaves at least its state.
        """
        with_state = self.saving.save_state or self.saving.save_state_on_train_end
        written = self._write_somewhere(self.names.final_file(), step, with_state=with_state)
        if written.error is not None:
            raise written.told()

    def keep_best(self, step: int) -> None:
        """Weights better than all before: their file, and their state with --save_state, replace the last best."""
        self._try_to_write(self.names.best_file(), step)

    def interrupted(self, step: int) -> Path:
        """Model and state in mid-run, whatever the options say; returns the state folder."""
        written = self._write_somewhere(self.names.step_file(step), step, with_state=True)
        if written.state is None:
            raise written.told()
        if written.error is not None:
            logger.warning("%s", written.told())
        return written.state

    def _write_somewhere(self, file: Path, step: int, *, with_state: bool) -> Written:
        """Write to the folder of `file`, or, what that can't take, to one among temporary ones.

        Where there can be no model there is a state, whatever the options say. What happens follows from success and
        failure alone, which processes that share a model agree on.
        """
        refuge = Path(tempfile.mkdtemp(prefix="training-"))
        try:
            model, error = self._in_one_of((file.parent, refuge), self._write_model, file.name, step)
            if model is not None and not with_state:
                return Written(model, None, error)
            state, problem = self._in_one_of((file.parent, refuge), self._write_state, file.name, step)
            return Written(model, state, error or problem)
        finally:
            with contextlib.suppress(OSError):
                refuge.rmdir()  # unless it is in use

    @staticmethod
    def _in_one_of(
        folders: Sequence[Path], write: Callable[[Path, int], Path], name: str, step: int
    ) -> tuple[Path | None, OptionError | None]:
        """(where it was written, what kept it from the first of the folders)"""
        first: OptionError | None = None
        for folder in folders:
            try:
                return write(folder / name, step), first
            except OptionError as error:
                first = first or error
        return None, first

    def _try_to_write(self, file: Path, step: int) -> None:
        """A file on the way: the run is worth more than it, so a full disk is said and training goes on."""
        if not self.is_healthy():
            logger.warning("%s was not saved: the last update had no finite loss", file.name)
            return
        old, self._old = (self._old, []) if file != self.names.best_file() else ([], self._old)
        finished = partial(self._finished, file, old)
        is_beside = self.begin_model(file, step, self.plan.epoch_of(max(step, 1)), finished)
        if is_beside:
            logger.info("saving %s beside training", file)
        error = None
        try:
            if not is_beside:
                self._write_model(file, step)
            if self.saving.save_state:
                self._write_state(file, step)
        except OptionError as problem:
            error = problem
        if not is_beside:
            finished(error)
        elif error is not None:
            self._failed(self.names.state_of(file), old, error)

    def _finished(self, file: Path, old: list[Path], error: OptionError | None) -> None:
        if error is None:
            self._remove(old)
        else:
            self._failed(file, old, error)

    def _failed(self, path: Path, old: list[Path], error: OptionError) -> None:
        """What would have been removed for the sake of `path` stays until the next file is there."""
        self._old = [*old, *self._old]
        old.clear()
        logger.warning("%s was not saved, training goes on: %s", path.name, error)

    def _write_model(self, file: Path, step: int) -> Path:
        logger.info("saving %s", file)
        write = self.write_best if file == self.names.best_file() else self.write_model
        write(file, step, self.plan.epoch_of(max(step, 1)))
        return file

    def _write_state(self, file: Path, step: int) -> Path:
        """The state that belongs to a model file; returns its folder."""
        folder = STATE_FOLDER.free_place(self.names.state_of(file))
        logger.info("saving state %s", folder)
        self.write_state(folder, step)
        return folder

    def _state_age(self, unit: str) -> int | None:
        return getattr(self.saving, f"save_last_n_{unit}_state") or getattr(self.saving, f"save_last_n_{unit}")

    def _note_old(self, file_of: Callable[[int], Path], number: int, state_number: int) -> None:
        """What is old once the file that is due is written: the file and the state of these numbers, if above 0."""
        if number > 0:
            self._old += [file_of(number), self.names.average_of(file_of(number))]
        if state_number > 0:
            self._old.append(self.names.state_of(file_of(state_number)))

    def _remove(self, paths: list[Path]) -> None:
        for old in paths:
            if not (self.removes_old and old.exists()):
                continue
            if old.is_dir() and not any(form.is_free(old) for form in (MODEL_FOLDER, STATE_FOLDER)):
                logger.warning("%s stays: it holds what no save of ours writes", old)
                continue
            logger.info("removing %s", old)
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def outdated_step(step: int, plan: TrainPlan, age: int | None) -> int:
    """The step whose file is removed once that of `step` is written; 0 or less for none. Files of `age` steps stay."""
    every = plan.save_every_n_steps or 1
    return (step - age - 1) // every * every if age else 0


def outdated_epoch(epoch: int, plan: TrainPlan, age: int | None) -> int:
    """The epoch whose file is removed once that of `epoch` is written; 0 or less for none. `age` files stay."""
    return epoch - (plan.save_every_n_epochs or 1) * age if age else 0


# ---------------------------------------------------------------------------------------------- states


class RawTensors:
    """The parameters and buffers of a module as they are, by name.

    Modules of other people may turn their `state_dict` into what their files hold, from which they can't go on exactly.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, torch.Tensor]:
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: tensor.detach() for name, tensor in named}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the values back in place; raises ValueError for other names or shapes."""
        own = self.state_dict()
        for name in (*own, *state):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise ValueError(f"{name} is not what this network has")
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_state(
    folder: Path,
    state: RunState,
    *,
    trained: RawTensors | None,
    others: Mapping[str, Any],
    shares: Path | None = None,
) -> None:
    """Write a state folder; it appears under its name only when everything in it is on the disk.

    `others` are further objects with a state_dict (optimizer, schedule, gradient scaler) by name. `shares` is the
    folder of what each process has written for itself; it is moved into the state.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if trained is not None:
            tensors = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
            save_file(tensors, partial / "trained.safetensors", {"format": "pt"})
        if shares is not None:
            shares.rename(partial / SHARES)
        states = {name: part.state_dict() for name, part in others.items() if not isinstance(part, ProcessState)}
        with open(partial / "optimizer.pt", "wb") as file:
            torch.save(states, file)
            file.flush()
            os.fsync(file.fileno())
        with open(partial / STATE_FILE, "w", encoding="utf-8") as file:
            json.dump({"format": STATE_FORMAT, **vars(state)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _replace_folder(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OptionError(
            "--save_state",
            f"can't write {folder} ({error.strerror or error})",
            "free some space or choose another --output_dir",
        ) from None


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an older state of that name is moved away first and then removed."""
    folder = STATE_FOLDER.free_place(folder)
    old = folder.with_name(f".{folder.name}{REPLACED}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, *, trained: RawTensors | None, others: Mapping[str, Any]) -> None:
    """Put a state's weights and everything else in place; raises OptionError for a damaged state."""
    is_split = any(isinstance(part, ProcessState) for part in others.values())
    if is_split != (folder / SHARES).is_dir():
        problem = f"this run has its weights split over processes (FSDP), and {folder} was written by one that had not"
        if not is_split:
            problem = f"{folder} was written by processes that had split the weights (FSDP), and this run does not"
        raise OptionError("--resume", problem, "start it as before, or start a new run from its model")
    try:
        tensors = load_file(folder / "trained.safetensors") if trained is not None else {}
        states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if trained is not None:
            trained.load_state_dict(tensors)
        for name, part in others.items():
            if isinstance(part, ProcessState):
                part.read(folder / SHARES)
            else:
                part.load_state_dict(states[name])
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OptionError("--resume", f"{folder} is damaged ({reason})", "resume from another state") from None
