"""The files of a run that users take away: which weights, which metadata, at once or beside training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.own_folders import MODEL_FOLDER
from library.checkpoints.safetensors_io import NonFiniteError
from library.options import OptionError
from library.train.background_save import BackgroundSave, Then
from library.train.ema import given_out_by, gives_out_others
from library.train.placement import SAVE_DTYPES

if TYPE_CHECKING:
    from library.train.run import Run

logger = logging.getLogger(__name__)


class ModelFiles:
    """Writes a run's model files; on the main process only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.background = BackgroundSave(run.device)

    def write(self, path: Path, step: int, epoch: int) -> None:
        """Write the file users take away; raises OptionError where it can't be, and for weights that are not finite."""
        run = self.run
        self.background.wait()
        if not self._takes_part:
            return
        with given_out_by(run.optimizer, run.parameters):
            self._write(path, step, epoch, looked_at=run.average is None)
        if run.average is not None:
            of_average = run.names.average_of(path)
            logger.info("saving %s", of_average)
            with run.average.applied():
                self._write(of_average, step, epoch, looked_at=True, ending="-ema")

    def write_best(self, path: Path, step: int, epoch: int) -> None:
        """Write the weights that validation looks at."""
        if self._takes_part:
            with self.run.weights_for_output():
                self._write(path, step, epoch, looked_at=True, ending="-best")

    @property
    def _takes_part(self) -> bool:
        """Whether this process writes files, or holds a part of the weights for the one that does."""
        return self.run.accelerator.is_main_process or not self.run.updates.writes_alone

    def _write(self, path: Path, step: int, epoch: int, **about: Any) -> None:
        """Let the main process write the weights as they are now; `about` them as for `_metadata`."""
        path = self._place(path)

        def write() -> None:
            self._write_weights(path, self._metadata(step, epoch, **about))
            self.run.tell_saved(path)

        self.run.updates.read_whole(write)

    def begin(self, path: Path, step: int, epoch: int, then: Then) -> bool:
        """Start to write the file beside training; False, and nothing is done, where that can't be.

        It can't where other weights than those being trained are put in their place for the file. `then` is called
        before the next update, when the file is complete, or with what kept it from being so.
        """
        if not self._may_be_beside:
            return False
        ending = "-best" if path == self.run.names.best_file() else ""
        content = self._metadata(step, epoch, looked_at=True, ending=ending)
        path = self._place(path)

        def written(error: OptionError | None) -> None:
            if error is None:
                self.run.tell_saved(path)
            then(error)

        self.background.begin(partial(self._write_weights, path, content), written)
        return True

    def _place(self, path: Path) -> Path:
        """Where to write: beside a folder that has come to hold something foreign, which would be deleted."""
        is_folder = self.run.names.extension == ""
        return MODEL_FOLDER.free_place(path) if is_folder and not path.is_file() else path

    @property
    def _may_be_beside(self) -> bool:
        run = self.run
        return (
            run.target.saves_beside_training
            and run.accelerator.is_main_process
            and run.updates.writes_alone
            and run.average is None
            and not gives_out_others(run.optimizer)
        )

    def _metadata(self, step: int, epoch: int, *, looked_at: bool, ending: str = "") -> Mapping[str, str]:
        """The metadata of a file; with what callbacks found out about its weights, if these were the ones they saw.

        `ending` tells its title from that of the plain file.
        """
        content = self.run.metadata_of(step=step, epoch=epoch, ending=ending)
        if looked_at and not self.run.config.saving.no_metadata:
            for callback in self.run.callbacks:
                content |= callback.file_metadata(step)
        return content

    def _write_weights(self, path: Path, content: Mapping[str, str]) -> None:
        """What is trained, as it is now; in float32 where --save_precision can't hold it."""
        dtype = SAVE_DTYPES[self.run.config.saving.save_precision]
        try:
            self.run.target.save(path, dtype=dtype, metadata=content)
        except NonFiniteError as error:
            if dtype in (None, torch.float32):
                raise
            logger.warning("%s; %s is saved in float32", error, path.name)
            self.run.target.save(path, dtype=torch.float32, metadata=content)
