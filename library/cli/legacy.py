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
    lowram: bool = opt(False, help="without effect: weights always go straight to their device")


# flags of the trade's train_network.py that are still to come
NOT_YET_NAMES = (
    "adaptive_noise_scale", "alpha_mask", "async_upload", "cache_info", "caption_separator",
    "conditioning_data_dir", "console_log_file", "console_log_level", "console_log_simple",
    "cpu_offload_checkpointing", "dataset_class", "dataset_repeats", "ddp_gradient_as_bucket_view",
    "ddp_static_graph", "ddp_timeout", "debiased_estimation_loss", "debug_dataset", "deepspeed",
    "dynamo_backend", "enable_wildcard", "face_crop_aug_range", "fp8_base", "fp8_base_unet", "full_bf16",
    "full_fp16", "fused_backward_pass", "highvram", "huber_c", "huber_scale", "huber_schedule",
    "huggingface_path_in_repo", "huggingface_repo_id", "huggingface_repo_type", "huggingface_repo_visibility",
    "huggingface_token", "in_json", "initial_epoch", "initial_step", "ip_noise_gamma",
    "ip_noise_gamma_random_strength", "keep_tokens_separator", "log_config", "loss_type", "lr_decay_steps",
    "lr_scheduler_min_lr_ratio", "lr_scheduler_timescale", "masked_loss", "max_validation_steps",
    "multires_noise_discount", "multires_noise_iterations", "noise_offset_random_strength",
    "resize_interpolation", "resume_from_huggingface", "sample_at_first", "sample_every_n_epochs",
    "sample_every_n_steps", "sample_prompts", "sample_sampler", "save_state_on_train_end",
    "save_state_to_huggingface", "secondary_separator", "skip_cache_check", "skip_until_initial_step",
    "torch_compile", "validate_every_n_epochs", "validate_every_n_steps", "validation_seed", "validation_split",
    "wandb_run_name", "weighted_captions",
)  # fmt: skip
NOT_YET = frozenset(f"--{name}" for name in NOT_YET_NAMES)
WITHOUT_EFFECT = {
    "tokenizer_cache_dir": "the CLIP vocabulary is part of this program, nothing is downloaded",
    "persistent_data_loader_workers": "workers always live as long as the run",
    "lowram": "weights are always read straight to their device, one copy at a time",
}
OPTIMIZER_SWITCHES = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Values by option name with old spellings in today's form; raises OptionError where both contradict."""
    values = dict(values)
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
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
