"""What DeepSpeed keeps of a run on each process: taken and put back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from library.train.shares import ProcessState

WHOLE = 3  # the stage that splits weights too


class EngineState(ProcessState):
    """The float32 masters, the optimizer's moments and the loss scaler as this process has them.

    `engine` is a deepspeed.DeepSpeedEngine. The trained weights themselves are in it only with stage 3, where they
    follow from the masters; for the other stages they must be put back before.
    """

    def __init__(self, engine: Any, process_index: int) -> None:
        self.engine, self.process_index = engine, process_index

    def state_dict(self) -> dict[str, Any]:
        return dict(self.engine.optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave on the same process of as many; all processes do it together."""
        optimizer = self.engine.optimizer
        with _all_split(optimizer), torch.no_grad():
            if "state_dict_list" in inspect.signature(optimizer.load_state_dict).parameters:
                optimizer.load_state_dict({self.process_index: state}, load_from_fp32_weights=True)
            else:  # nothing is split: the optimizer itself, or one with masters
                optimizer.load_state_dict(state)

    def read(self, folder: Path) -> None:
        with torch.serialization.safe_globals(_plain_classes()):
            super().read(folder)


@contextmanager
def _all_split(optimizer: Any) -> Iterator[None]:
    """Inside the block stage 3 has split the small parameters too, which it otherwise keeps whole; then again not."""
    has_whole_ones = hasattr(optimizer, "persistent_parameters")
    if has_whole_ones:
        optimizer.checkpoint_event_prologue()
    yield
    if has_whole_ones:
        optimizer.checkpoint_event_epilogue()


def _plain_classes() -> list[Any]:
    """What DeepSpeed has in its state beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero.config import ZeroStageEnum  # pyright: ignore[reportMissingImports]
    from deepspeed.utils.tensor_fragment import fragment_address  # pyright: ignore[reportMissingImports]

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
