"""Old spellings of the trade and flags that need no effect here: known in this file and nowhere else.

A flag of the second kind is accepted because batch files carry it; one sentence says why nothing is to be done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from library.options import OptionError, opt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LegacyOptions:
    """Old spellings, and flags without effect."""

    caption_extention: str | None = opt(help="old spelling of --caption_extension")
    use_8bit_adam: bool = opt(False, help="old form of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = opt(False, help="old form of --optimizer_type Lion")
    tokenizer_cache_dir: str | None = opt(help="without effect: the CLIP vocabulary is part of this program")
    persistent_data_loader_workers: bool = opt(False, help="without effect: workers always live as long as the run")
    async_upload: bool = opt(False, help="without effect: uploads always go on beside the training")
    console_log_simple: bool = opt(False, help="without effect: messages are always plain lines")


@dataclass(frozen=True)
class SdxlLegacyOptions(LegacyOptions):
    """Old spellings, and flags without effect."""

    disable_mmap_load_safetensors: bool = opt(
        False, help="without effect: weights are read one after the other, each of them once"
    )


@dataclass(frozen=True)
class FullLegacyOptions(LegacyOptions):
    """Old spellings, and flags without effect."""

    diffusers_xformers: bool = opt(False, help="old form of --xformers")


@dataclass(frozen=True)
class SdxlFullLegacyOptions(SdxlLegacyOptions):
    """Old spellings, and flags without effect."""

    diffusers_xformers: bool = opt(False, help="old form of --xformers")


WITHOUT_EFFECT = {
    "tokenizer_cache_dir": "the CLIP vocabulary is part of this program, nothing is downloaded",
    "persistent_data_loader_workers": "workers always live as long as the run",
    "async_upload": "uploads always go on beside the training",
    "console_log_simple": "messages are always plain lines",
    "disable_mmap_load_safetensors": "weights are read one after the other, each of them once, as the file has them",
}
# options for which 0 says "off", in batch files and above all in a GUI's files
ZERO_IS_OFF = (
    "clip_skip", "ddp_timeout", "initial_epoch", "initial_step", "lr_decay_steps", "lr_scheduler_num_cycles",
    "lr_scheduler_timescale", "max_train_epochs", "max_validation_steps", "min_snr_gamma", "save_every_n_epochs",
    "save_every_n_steps", "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps",
    "save_last_n_steps_state", "save_n_epoch_ratio", "scale_weight_norms", "text_variations", "vae_batch_size",
    "validate_every_n_epochs", "validate_every_n_steps",
)  # fmt: skip
OPTIMIZER_SWITCHES = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Values by option name with old spellings in today's form; raises OptionError where both contradict."""
    values = {name: None if name in ZERO_IS_OFF and value in (0, "0") else value for name, value in values.items()}
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
    if values.get("diffusers_xformers"):
        values["xformers"] = True
    chosen = [name for name in OPTIMIZER_SWITCHES if values.get(name)]
    if len(chosen) + bool(values.get("optimizer_type")) > 1:
        given = [f"--{name}" for name in chosen] + ["--optimizer_type"] * bool(values.get("optimizer_type"))
        raise OptionError(" and ".join(given), "name one optimizer")
    for name in chosen:
        values["optimizer_type"] = OPTIMIZER_SWITCHES[name]
    return values


def notes(values: dict[str, Any]) -> list[str]:
    """A sentence for each flag given that has no effect."""
    return [f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if values.get(name)]
