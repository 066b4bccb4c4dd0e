"""What happens beside the steps: saving, previews, validation, averages of the weights.

A run has a list of callbacks and calls each in the list's order. The loop knows none of them by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Callback:
    """Something that is told how far a run is. The defaults do nothing.

    Steps and epochs are numbered from 1; step 0 is the start. A callback that keeps something for the rest of the run
    has a `state_name`, under which its state is saved and restored with the run.
    """

    state_name: str | None = None
    is_of_the_weights: bool = True  # False: its state stays when a run goes back to earlier weights

    def before_first_step(self, step: int) -> None:
        """Called once before training goes on after `step` updates; 0 for a new run."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer update, whose numbers are in the log by then or will be one update later."""

    def after_epoch(self, epoch: int, step: int) -> None:
        """Called after the last update of an epoch, once every callback's `after_step` is through."""

    def before_end(self, step: int) -> None:
        """Called once when training is over, complete or stopped, before the last files are written."""

    def at_end(self, step: int) -> None:
        """Called once when the run is complete; not when it was stopped on the way."""

    def on_saved(self, path: Path) -> None:
        """Called on the main process when a model file or a state folder is complete on the disk."""

    def close(self) -> None:
        """Called at last, however the run ended, and perhaps more than once."""

    def file_metadata(self, step: int) -> dict[str, str]:
        """What the metadata of a file saved after `step` updates says about its weights."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the run needs to go on with this callback: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
