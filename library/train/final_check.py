"""Whether the weights that a run ends with are of use: a loss computed with them is finite.

The loss of an update says nothing about the weights that this update makes, and a run may end before
--max_nonfinite_steps is reached. So a few of the run's own batches are tried at its end; where none has a finite loss,
the run goes back to the last weights that are known to be good, and those are saved.
"""

from __future__ import annotations

import logging
from functools import partial
from itertools import islice

import torch

from library.data.batch import Position
from library.train.callbacks import Callback
from library.train.ema import given_out_by
from library.train.guard import REASONS
from library.train.loop import batch_loss
from library.train.placement import evaluating, reduced, to_device
from library.train.run import Run

logger = logging.getLogger(__name__)

TRIED = 3  # batches: one or two may be of images that are damaged themselves


class FinalCheck(Callback):
    """Looks at the weights before the last files are written."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def before_end(self, step: int) -> None:
        run = self.run
        if step == run.start_step:
            return
        if not self._is_of_use():
            good = run.go_back()
            if good == step:  # a whole model, of which no copy is kept in memory
                logger.warning(
                    "the weights after step %d give no finite loss; use a file saved before; %s", step, REASONS
                )
            else:
                what = "nothing was learned by then" if good == 0 else "the last ones that are known to be good"
                logger.warning(
                    "the weights after step %d give no finite loss, so those after step %d are saved, %s; %s",
                    step, good, what, REASONS,
                )  # fmt: skip
        run.guard.in_a_row = 0

    @torch.no_grad()
    def _is_of_use(self) -> bool:
        """Whether the weights of each file that would be saved give a finite loss on some batch."""
        run = self.run
        batches = [batch for _, batch in islice(run.batches_from(Position(1, 0), workers=0), TRIED)]
        saved = [partial(given_out_by, run.optimizer, run.parameters)]
        saved += [run.average.applied] if run.average is not None else []
        for weights in saved:
            with weights(), evaluating(run.model):
                losses = (batch_loss(run, to_device(batch, run.device), trains_text=False) for batch in batches)
                if not any(bool(torch.isfinite(reduced(run.accelerator, loss, "mean"))) for loss in losses):
                    return False
        return True
