"""Options of a training run, and the run's whole configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
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
from library.options import OptionError, not_one_of, opt, options_of, path_of, require

PRECISIONS = [None, "float", "fp16", "bf16"]
LR_SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingOptions:
    """The length of the run and how a step is computed."""

    max_train_steps: int = opt(1600, help="optimizer updates in all")
    max_train_epochs: int | None = opt(help="passes over the data; replaces --max_train_steps")
    seed: int | None = opt(help="every random draw follows from it; drawn and reported when not given")
    gradient_checkpointing: bool = opt(False, help="recompute activations in the backward pass: less memory, more time")
    gradient_accumulation_steps: int = opt(1, help="batches per optimizer update")
    mixed_precision: str = opt(
        "no", choices=["no", "fp16", "bf16"], help="dtype of the frozen model and of activations"
    )
    max_nonfinite_steps: int = opt(10, help="stop after this many updates in a row without a finite loss")

    def __post_init__(self) -> None:
        require(
            self.max_train_steps >= 1, "--max_train_steps", f"{self.max_train_steps} trains nothing", "use 1 or more"
        )
        require(
            self.max_train_epochs is None or self.max_train_epochs >= 1,
            "--max_train_epochs",
            f"{self.max_train_epochs} trains nothing",
            "use 1 or more",
        )
        require(
            self.gradient_accumulation_steps >= 1,
            "--gradient_accumulation_steps",
            f"{self.gradient_accumulation_steps} is out of range",
            "use 1 or more",
        )
        require(
            self.max_nonfinite_steps >= 1,
            "--max_nonfinite_steps",
            f"{self.max_nonfinite_steps} is out of range",
            "use 1 or more",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**63, "--seed", f"{self.seed} is out of range", "use 0 to 2^63 - 1"
        )


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer."""

    optimizer_type: str = opt(
        "", help="AdamW (default), AdamW8bit, Lion8bit, SGDNesterov, AdaFactor ... or a class path"
    )
    optimizer_args: tuple[str, ...] | None = opt(
        help="further arguments of the optimizer, as name=value (Python literals)"
    )
    learning_rate: float = opt(2.0e-6, help="learning rate of parts that have none of their own")
    max_grad_norm: float = opt(1.0, help="clip the global gradient norm to this; 0 switches clipping off")

    def __post_init__(self) -> None:
        require(self.learning_rate >= 0, "--learning_rate", f"{self.learning_rate} is negative")
        require(
            self.max_grad_norm >= 0,
            "--max_grad_norm",
            f"{self.max_grad_norm} is negative",
            "use 0 to switch clipping off",
        )


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning-rate schedule."""

    lr_scheduler: str = opt(
        "constant",
        help="linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, piecewise_constant",
    )
    lr_scheduler_type: str = opt("", help="class path of another schedule; takes precedence over --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] | None = opt(help="further arguments of the schedule, as name=value")
    lr_warmup_steps: int = opt(0, help="optimizer updates over which the rate rises from 0")
    lr_scheduler_num_cycles: int = opt(1, help="restarts of cosine_with_restarts")
    lr_scheduler_power: float = opt(1, help="power of polynomial")

    def __post_init__(self) -> None:
        require(self.lr_warmup_steps >= 0, "--lr_warmup_steps", f"{self.lr_warmup_steps} is negative")
        cycles = self.lr_scheduler_num_cycles
        require(cycles >= 1, "--lr_scheduler_num_cycles", f"{cycles} is out of range", "use 1 or more")
        is_known = self.lr_scheduler in LR_SCHEDULERS or bool(self.lr_scheduler_type)
        require(is_known, "--lr_scheduler", not_one_of(self.lr_scheduler, LR_SCHEDULERS))

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        if self.lr_scheduler_type and (self.lr_scheduler != "constant" or self.lr_warmup_steps):
            return ["--lr_scheduler and --lr_warmup_steps have no effect beside --lr_scheduler_type"]
        return []


@dataclass(frozen=True)
class SavingOptions:
    """What is written, when and where."""

    output_dir: Path | None = opt(cli=str, parse=path_of, help="folder for everything the run writes")
    output_name: str | None = opt(help="file name of the trained model, without extension")
    save_precision: str | None = opt(choices=PRECISIONS, help="dtype of the saved file; as trained without this option")
    save_model_as: str = opt("safetensors", choices=[None, "ckpt", "pt", "safetensors"], help="file format")
    save_every_n_epochs: int | None = opt(help="save after every n-th epoch")
    save_every_n_steps: int | None = opt(help="save after every n-th optimizer update")
    save_n_epoch_ratio: int | None = opt(help="save about this many times over the run, at ends of epochs")
    save_last_n_epochs: int | None = opt(help="keep the files of the last n epochs, remove older ones")
    save_last_n_epochs_state: int | None = opt(help="the same for states; --save_last_n_epochs without this option")
    save_last_n_steps: int | None = opt(help="keep the files of the last n updates, remove older ones")
    save_last_n_steps_state: int | None = opt(help="the same for states; --save_last_n_steps without this option")
    save_state: bool = opt(False, help="with every saved file, save what is needed to go on exactly there")
    resume: str | None = opt(help='go on from this state folder; "latest" finds the newest one of --output_name')
    no_metadata: bool = opt(False, help="write only the metadata needed to load the file")

    def __post_init__(self) -> None:
        require(self.output_dir is not None, "--output_dir", "no folder given", "name the folder to write to")
        for name in (option.name for option in options_of(SavingOptions) if "_n_" in option.name):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", f"{value} is out of range", "use 1 or more")
        if self.output_name is not None and Path(self.output_name).name != self.output_name:
            raise OptionError(
                "--output_name", f"{self.output_name!r} is not a file name", "put the folder into --output_dir"
            )

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        saves_steps = self.save_every_n_steps is not None
        saves_epochs = self.save_every_n_epochs is not None or self.save_n_epoch_ratio is not None
        idle = [] if saves_steps else ["save_last_n_steps", "save_last_n_steps_state"]
        idle += [] if saves_epochs else ["save_last_n_epochs", "save_last_n_epochs_state"]
        return [f"--{name} has no effect: no such files are saved" for name in idle if getattr(self, name) is not None]


@dataclass(frozen=True)
class LoggingOptions:
    """What is recorded while training."""

    logging_dir: str | None = opt(help="folder for TensorBoard logs; switches them on")
    log_with: str | None = opt(
        choices=["tensorboard", "wandb", "all"], help="tensorboard with --logging_dir, else nothing"
    )
    log_prefix: str | None = opt(help="text before the time stamp in the log folder's name")
    log_tracker_name: str | None = opt(help="the tracker's project name")
    log_tracker_config: str | None = opt(help="TOML file with arguments for the tracker")
    wandb_api_key: str | None = opt(help="log in to Weights & Biases with this key; the environment is a safer place")

    def __post_init__(self) -> None:
        needs_folder = self.log_with in ("tensorboard", "all")
        require(not needs_folder or bool(self.logging_dir), "--log_with", f"{self.log_with} needs --logging_dir")

    @property
    def uses_wandb(self) -> bool:
        return self.log_with in ("wandb", "all")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        idle = ["wandb_api_key"] if not self.uses_wandb else []
        if not (self.uses_wandb or self.logging_dir):
            idle += ["log_tracker_config", "log_tracker_name", "log_prefix"]
        return [f"--{name} has no effect: nothing is logged with it" for name in idle if getattr(self, name)]


@dataclass(frozen=True)
class MetadataOptions:
    """What the saved file says about itself."""

    metadata_title: str | None = opt(help="title; --output_name without this option")
    metadata_author: str | None = opt(help="author")
    metadata_description: str | None = opt(help="description")
    metadata_license: str | None = opt(help="licence")
    metadata_tags: str | None = opt(help="tags, separated by commas")


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
