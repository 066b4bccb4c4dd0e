"""Options of what a run writes: files, states, logs, metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import OptionError, opt, options_of, path_of, require

PRECISIONS = [None, "float", "fp16", "bf16"]


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
