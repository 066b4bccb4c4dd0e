"""Training with DeepSpeed: optimizer state, gradients and weights split over devices (ZeRO, Rajbhandari et al. 2020).

DeepSpeed updates inside the backward pass and keeps masters and moments by itself, one part on each process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import DeepSpeedPlugin

from library.options import OptionError
from library.train.config import RunConfig
from library.train.updates import Updates


def deepspeed_plugin(config: RunConfig) -> DeepSpeedPlugin | None:
    """accelerate's settings of DeepSpeed, or None without --deepspeed."""
    options = config.distributed
    if not options.deepspeed:
        return None
    if "RANK" not in os.environ:
        raise OptionError(
            "--deepspeed", "needs processes that know of each other", "start with accelerate launch --use_deepspeed"
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


def keep_whole(plugin: DeepSpeedPlugin | None, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Let stage 3 split no parameter as small as the largest trained one; without DeepSpeed nothing is to be done.

    Networks read their weights outside the modules that own them, where DeepSpeed does not gather them.
    """
    if plugin is None:
        return
    largest = max(parameter.numel() for parameter in parameters)
    zero = plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = max(100_000, largest + 1)


class DeepSpeedUpdates(Updates):
    """Hears of the updates that DeepSpeed makes."""

    has_state = False  # masters and moments are spread over the processes

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
