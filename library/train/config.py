"""A run's whole configuration: one field per option group, and the rules between groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    SourceOptions,
)
from library.diffusion.options import LossOptions, NoiseOptions
from library.families.options import ModelOptions, TextOptions
from library.models.options import AttentionOptions
from library.options import options_of, require
from library.train.options import OptimizerOptions, ScheduleOptions, TrainingOptions
from library.train.output_options import LoggingOptions, MetadataOptions, SavingOptions


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run was asked to do: one field per option group."""

    model: ModelOptions
    attention: AttentionOptions
    text: TextOptions
    source: SourceOptions
    bucket: BucketOptions
    caption: CaptionOptions
    augment: AugmentOptions
    cache: CacheOptions
    loader: LoaderOptions
    noise: NoiseOptions
    loss: LossOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    saving: SavingOptions
    logging: LoggingOptions
    metadata: MetadataOptions
    target: Any  # the target's own group

    def groups(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def values(self) -> dict[str, Any]:
        """Every option by name, as resolved."""
        return {
            option.name: getattr(group, option.name) for group in self.groups() for option in options_of(type(group))
        }

    def check(self) -> list[str]:
        """Raise OptionError for groups that contradict each other; returns warnings for settings without effect."""
        v_prediction = self.model.v_parameterization
        require(
            v_prediction or not self.loss.scale_v_pred_loss_like_noise_pred,
            "--scale_v_pred_loss_like_noise_pred",
            "needs --v_parameterization",
        )
        require(
            not (v_prediction and self.loss.v_pred_like_loss),
            "--v_pred_like_loss",
            "contradicts --v_parameterization",
            "leave one of them out",
        )
        require(
            bool(self.source.train_data_dir) or bool(self.source.dataset_config),
            "--train_data_dir",
            "no training images given",
            "name a folder, or a data set file with --dataset_config",
        )
        warmup, steps = self.schedule.lr_warmup_steps, self.training.max_train_steps
        is_too_long = self.training.max_train_epochs is None and warmup > steps
        require(not is_too_long, "--lr_warmup_steps", f"{warmup} is longer than the run's {steps} steps")
        warnings = [note for group in self.groups() if hasattr(group, "notes") for note in group.notes()]
        rates = (getattr(self.target, name, None) for name in ("unet_lr", "text_encoder_lr"))
        if self.optimizer == OptimizerOptions() and not any(rates):
            warnings.append("--learning_rate: not given, 2e-06 is used; 1e-4 is usual for a LoRA")
        if self.noise.zero_terminal_snr and not v_prediction:
            warnings.append(
                "--zero_terminal_snr: noise prediction learns nothing at the last timestep; use it with v-prediction"
            )
        if self.model.v2 and self.text.clip_skip:
            warnings.append(
                f"--clip_skip {self.text.clip_skip}: SD 2.x models are made for the layer they take without it"
            )
        return warnings


CONFIG_GROUPS: dict[str, type] = {
    "model": ModelOptions, "attention": AttentionOptions, "text": TextOptions, "source": SourceOptions,
    "bucket": BucketOptions, "caption": CaptionOptions, "augment": AugmentOptions, "cache": CacheOptions,
    "loader": LoaderOptions, "noise": NoiseOptions, "loss": LossOptions, "training": TrainingOptions,
    "optimizer": OptimizerOptions, "schedule": ScheduleOptions, "saving": SavingOptions,
    "logging": LoggingOptions, "metadata": MetadataOptions,
}  # fmt: skip
