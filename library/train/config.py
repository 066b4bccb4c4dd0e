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
    MaskOptions,
    SourceOptions,
    ValidationSplitOptions,
)
from library.data.text_cache_options import TextCacheOptions
from library.diffusion.options import LossOptions, NoiseOptions
from library.families.options import ModelOptions, TextOptions
from library.models.options import AttentionOptions
from library.options import options_of, require
from library.train.course_options import AverageOptions, StartOptions, ValidationOptions
from library.train.memory_options import DistributedOptions, MemoryOptions, PrecisionOptions
from library.train.options import OWN_RATE, OptimizerOptions, ScheduleOptions, TrainingOptions
from library.train.output_options import HubOptions, LoggingOptions, MetadataOptions, SavingOptions
from library.train.preview_options import PreviewOptions


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
    masks: MaskOptions
    cache: CacheOptions
    loader: LoaderOptions
    noise: NoiseOptions
    loss: LossOptions
    split: ValidationSplitOptions
    validation: ValidationOptions
    training: TrainingOptions
    start: StartOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    average: AverageOptions
    precision: PrecisionOptions
    memory: MemoryOptions
    distributed: DistributedOptions
    saving: SavingOptions
    preview: PreviewOptions
    hub: HubOptions
    logging: LoggingOptions
    metadata: MetadataOptions
    target: Any  # the target's own group
    text_cache: TextCacheOptions = TextCacheOptions()  # of scripts for models with large text encoders

    def groups(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def values(self) -> dict[str, Any]:
        """Every option by name, as resolved."""
        return {
            option.name: getattr(group, option.name) for group in self.groups() for option in options_of(type(group))
        }

    def defaults(self) -> dict[str, Any]:
        """Every option's default by name."""
        return {option.name: option.default for group in self.groups() for option in options_of(type(group))}

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
        if self.training.max_train_epochs is None and not self.optimizer.has_no_schedule:
            self.schedule.check_length(self.training.max_train_steps)
        self._check_text()
        self.precision.check_beside(self.training)
        warnings = [note for group in self.groups() if hasattr(group, "notes") for note in group.notes()]
        rates = [name for name in ("unet_lr", "text_encoder_lr") if getattr(self.target, name, None)]
        warnings += self.schedule.notes_beside(self.optimizer)
        warnings += self.memory.check_beside(self.training, self.optimizer)
        self.distributed.check_beside(self.training, self.saving, self.memory, self.precision)
        warnings += self.distributed.check_engine(
            self.optimizer, has_previews=self.preview.is_on, has_average=self.average.ema_decay is not None
        )
        if self.optimizer.picks_own_rate:
            warnings += [f"--{name} has no effect: {OWN_RATE}" for name in rates]
        if self.optimizer == OptimizerOptions() and not rates and self.target.usual_rate:
            warnings.append(f"--learning_rate: not given, 2e-06 is used; {self.target.usual_rate}")
        if self.training.plan and self.source.debug_dataset:
            warnings.append("--debug_dataset has no effect beside --plan")
        if self.noise.zero_terminal_snr and not v_prediction:
            warnings.append(
                "--zero_terminal_snr: noise prediction learns nothing at the last timestep; use it with v-prediction"
            )
        require(
            self.average.ema_decay is None or not self.optimizer.is_schedule_free,
            "--ema_decay",
            f"{self.optimizer.optimizer_type} averages the weights by itself",
            "leave one of them out",
        )
        if self.hub.save_state_to_huggingface and not (self.saving.save_state or self.saving.save_state_on_train_end):
            warnings.append("--save_state_to_huggingface has no effect without --save_state")
        if self.hub.resume_from_huggingface and not self.saving.resume:
            warnings.append("--resume_from_huggingface has no effect without --resume")
        if self.model.v2 and self.text.clip_skip:
            warnings.append(
                f"--clip_skip {self.text.clip_skip}: SD 2.x models are made for the layer they take without it"
            )
        return warnings

    def _check_text(self) -> None:
        """Raise OptionError where the options of captions contradict others."""
        require(
            not (self.text_cache.enabled and self.target.trains_text),
            "--cache_text_encoder_outputs",
            "contradicts training the text encoders, whose outputs change with every step",
            self.target.without_text,
        )
        require(
            not (self.text_cache.enabled and self.source.dataset_class),
            "--cache_text_encoder_outputs",
            f"contradicts --dataset_class {self.source.dataset_class}, whose captions are not known beforehand",
            "leave one of them out",
        )
        require(
            self.text.pads or self.text.token_windows == 1,
            "--no_token_padding",
            f"contradicts --max_token_length {self.text.max_token_length}, which joins windows of full length",
            "leave one of them out",
        )


# What every training script offers; a script may add groups for other fields of RunConfig.
CONFIG_GROUPS: dict[str, type] = {
    "model": ModelOptions, "attention": AttentionOptions, "text": TextOptions, "source": SourceOptions,
    "bucket": BucketOptions, "caption": CaptionOptions, "augment": AugmentOptions, "masks": MaskOptions,
    "cache": CacheOptions,
    "loader": LoaderOptions, "noise": NoiseOptions, "loss": LossOptions, "split": ValidationSplitOptions,
    "validation": ValidationOptions, "training": TrainingOptions, "start": StartOptions,
    "optimizer": OptimizerOptions, "schedule": ScheduleOptions, "average": AverageOptions,
    "precision": PrecisionOptions, "memory": MemoryOptions, "distributed": DistributedOptions,
    "saving": SavingOptions, "preview": PreviewOptions,
    "hub": HubOptions, "logging": LoggingOptions, "metadata": MetadataOptions,
}  # fmt: skip
