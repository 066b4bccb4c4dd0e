"""Training with DeepSpeed: optimizer state, gradients and weights split over devices (ZeRO, Rajbhandari et al. 2020).

DeepSpeed updates inside the backward pass and keeps masters and moments by itself, one part on each process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType

from library.options import OptionError
from library.targets.base import TrainTarget
from library.train.config import RunConfig
from library.train.shares import together
from library.train.updates import Updates
from library.train.zero_state import WHOLE, EngineState

logger = logging.getLogger(__name__)


def deepspeed_plugin(config: RunConfig) -> DeepSpeedPlugin | None:
    """accelerate's settings of DeepSpeed, or None without --deepspeed."""
    options = config.distributed
    if not options.deepspeed:
        return None
    if "RANK" not in os.environ:
        raise OptionError(
            "--deepspeed", "needs processes that know of each other", "start with accelerate launch --multi_gpu"
        )
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,  # the loop's own
        gradient_clipping=config.optimizer.max_grad_norm,
        zero_stage=options.zero_stage,
        offload_optimizer_device=options.offload_optimizer_device or "none",
        offload_optimizer_nvme_path=options.offload_optimizer_nvme_path or "none",
        offload_param_device=options.offload_param_device or "none",
        offload_param_nvme_path=options.offload_param_nvme_path or "none",
        zero3_init_flag=options.zero3_init_flag,
        zero3_save_16bit_model=options.zero3_save_16bit_model,
    )
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.loader.train_batch_size
    settings["zero_force_ds_cpu_optimizer"] = False  # the optimizer is the one that was asked for
    if options.fp16_master_weights_and_gradients:
        settings["fp16"] = {"enabled": True, "fp16_master_weights_and_grads": True}
    return plugin


def check_engine(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise OptionError where accelerate's way of sharing work is not the one that the options ask for."""
    kind, is_asked = accelerator.distributed_type, config.distributed.deepspeed
    if is_asked and kind != DistributedType.DEEPSPEED:
        problem = "accelerate leaves DeepSpeed out where it was told to use the CPU (ACCELERATE_USE_CPU, --cpu)"
        raise OptionError("--deepspeed", problem, "start without that, or leave --deepspeed out")
    if kind == DistributedType.DEEPSPEED and not is_asked:
        problem = "the settings of DeepSpeed are those of this program's flags, and --deepspeed is not among them"
        raise OptionError("accelerate launch --use_deepspeed", problem, "add --deepspeed, or leave --use_deepspeed out")


def keep_whole(plugin: DeepSpeedPlugin | None, parameters: Sequence[torch.nn.Parameter], target: TrainTarget) -> None:
    """Let stage 3 split no parameter of a network as small as the largest trained one.

    Networks read their weights outside the modules that own them, where DeepSpeed does not gather them. Without
    DeepSpeed, or where a model's own weights are trained, nothing is to be done.
    """
    if plugin is None or target.trains_whole:
        return
    largest = max(parameter.numel() for parameter in parameters)
    zero = plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = max(100_000, largest + 1)


class DeepSpeedUpdates(Updates):
    """Hears of the updates that DeepSpeed makes."""

    writes_alone = False

    @property
    def engine(self) -> Any:
        wrapper = self.accelerator.deepspeed_engine_wrapped
        assert wrapper is not None, "the model is not prepared yet"
        return wrapper.engine

    @contextlib.contextmanager
    def _boundary(self, is_last: bool) -> Iterator[None]:
        self.accelerator.sync_gradients = is_last
        try:
            yield
        finally:
            self.accelerator.sync_gradients = True

    def micro_batch(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        if is_last:
            self.before_change()
        return self._boundary(is_last)

    def clip(self) -> torch.Tensor:
        """The norm that DeepSpeed clipped by."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.limit)
        return torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device)

    def apply(self, is_finite: torch.Tensor) -> None:
        """Nothing is left to do."""

    # ------------------------------------------------------------------ states and files

    def parts(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """With stage 3 the weights follow from the engine's state; the optimizer is the engine's in any case."""
        mine = {"trained", "optimizer"} if self._splits_weights else {"optimizer"}
        others = {name: part for name, part in whole.items() if name not in mine}
        trained = {name: others.pop(name) for name in ("trained",) if name in others}
        return {**trained, "engine": EngineState(self.engine, self.accelerator.process_index), **others}

    def numel_of(self, parameter: torch.nn.Parameter) -> int:
        return getattr(parameter, "ds_numel", parameter.numel())

    def together(self, write: Callable[..., None], *, whole: bool = False) -> Callable[..., None]:
        gathered = self._whole_weights if whole and self._splits_weights else contextlib.nullcontext

        def write_whole(path: Path, *where: Any) -> None:
            with gathered():
                write(path, *where)

        return together(write_whole, self.accelerator)

    @property
    def _splits_weights(self) -> bool:
        return self.engine.zero_optimization_stage() == WHOLE

    def _whole_weights(self) -> AbstractContextManager[None]:
        """Inside the block each process holds all weights; they must not be changed there."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        return deepspeed.zero.GatheredParameters(list(self.engine.module.parameters()), modifier_rank=None)
