"""Options of what a run writes: files, states, logs, metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from library.options import OptionError, not_one_of, opt, options_of, path_of, require

TRACKERS = ("tensorboard", "wandb")
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
    save_state_on_train_end: bool = opt(False, help="save the state with the final file, if not with the others")
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
        notes = [f"--{name} has no effect: no such files are saved" for name in idle if getattr(self, name) is not None]
        if self.save_state and self.save_state_on_train_end:
            notes.append("--save_state_on_train_end has no effect beside --save_state")
        return notes


FOLDERS = ("diffusers", "diffusers_safetensors")  # forms of a model that are folders


@dataclass(frozen=True)
class ModelSavingOptions(SavingOptions):
    """What is written, when and where."""

    save_model_as: str | None = opt(  # type: ignore[assignment]
        None,
        choices=[None, "ckpt", "safetensors", *FOLDERS],
        help="form of the saved model: a single file, or a Diffusers folder; that of the base model without this "
        "option, with .ckpt for a single file",
    )
    use_safetensors: bool = opt(False, help="safetensors in place of ckpt and of the .bin files of Diffusers folders")

    def for_source(self, *, is_single_file: bool) -> ModelSavingOptions:
        """With the form decided for a base model that is a single file or a Diffusers folder."""
        form = self.save_model_as or ("ckpt" if is_single_file else "diffusers")
        safe = {"ckpt": "safetensors", "diffusers": "diffusers_safetensors"}
        return replace(self, save_model_as=safe.get(form, form) if self.use_safetensors else form)


@dataclass(frozen=True)
class HubOptions:
    """Uploads to the Hugging Face hub."""

    huggingface_repo_id: str | None = opt(help="upload every saved file to this repository: owner/name")
    huggingface_repo_type: str | None = opt(help="model (default), dataset or space")
    huggingface_path_in_repo: str | None = opt(help="folder in the repository; its top without this option")
    huggingface_token: str | None = opt(
        secret=True, help="access token; the environment variable HF_TOKEN or `hf auth login` are safer places"
    )
    huggingface_repo_visibility: str | None = opt(
        help="public, or private (default), for a repository that does not exist yet"
    )
    save_state_to_huggingface: bool = opt(False, help="upload states as well")
    resume_from_huggingface: bool = opt(False, help="--resume names a state on the hub: owner/name/folder[:revision]")

    def __post_init__(self) -> None:
        kinds = (None, "model", "dataset", "space")
        require(
            self.huggingface_repo_type in kinds,
            "--huggingface_repo_type",
            not_one_of(self.huggingface_repo_type, kinds),
        )
        parts = (self.huggingface_path_in_repo or "").split("/")
        require(".." not in parts, "--huggingface_path_in_repo", "leads out of the repository", "leave out ..")

    @property
    def is_private(self) -> bool:
        return self.huggingface_repo_visibility != "public"

    def path_of(self, name: str) -> str:
        """Where a file or folder of this name goes."""
        return "/".join(filter(None, [(self.huggingface_path_in_repo or "").strip("/"), name]))

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        names = ("repo_type", "path_in_repo", "token", "repo_visibility")
        idle = [f"huggingface_{name}" for name in names] + ["save_state_to_huggingface"]
        if self.huggingface_repo_id:
            visibility = self.huggingface_repo_visibility
            is_odd = visibility not in (None, "public", "private")
            return [f"--huggingface_repo_visibility {visibility}: private is used"] if is_odd else []
        used = {"huggingface_token"} if self.resume_from_huggingface else set()
        without = "has no effect without --huggingface_repo_id"
        return [f"--{name} {without}" for name in idle if getattr(self, name) and name not in used]


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
    wandb_api_key: str | None = opt(
        secret=True, help="log in to Weights & Biases with this key; the environment is a safer place"
    )
    wandb_run_name: str | None = opt(help="name of the run at Weights & Biases")
    log_config: bool = opt(False, help="give the run's settings to the tracker, without keys and folders")
    console_log_level: str | None = opt(
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], help="least weighty messages shown; INFO by default"
    )
    console_log_file: str | None = opt(help="messages go to the end of this file and not to the screen")

    def __post_init__(self) -> None:
        needs_folder = self.log_with in ("tensorboard", "all")
        require(not needs_folder or bool(self.logging_dir), "--log_with", f"{self.log_with} needs --logging_dir")

    @property
    def trackers(self) -> tuple[str, ...]:
        """What is logged with: TensorBoard by default once there is a folder."""
        if self.log_with == "all":
            return TRACKERS
        return (self.log_with,) if self.log_with else ("tensorboard",) if self.logging_dir else ()

    @property
    def uses_wandb(self) -> bool:
        return "wandb" in self.trackers

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        idle = ["wandb_api_key", "wandb_run_name"] if not self.uses_wandb else []
        if not self.trackers:
            idle += ["log_tracker_config", "log_tracker_name", "log_prefix", "log_config"]
        return [f"--{name} has no effect: nothing is logged with it" for name in idle if getattr(self, name)]


@dataclass(frozen=True)
class MetadataOptions:
    """What the saved file says about itself."""

    metadata_title: str | None = opt(help="title; --output_name without this option")
    metadata_author: str | None = opt(help="author")
    metadata_description: str | None = opt(help="description")
    metadata_license: str | None = opt(help="licence")
    metadata_tags: str | None = opt(help="tags, separated by commas")
    metadata_usage_hint: str | None = opt(help="how to use the file")
    metadata_trigger_phrase: str | None = opt(help="words that call up what was learned")
    metadata_thumbnail: str | None = opt(help="a picture to show for the file: an image file, or a data URL")
    metadata_merged_from: str | None = opt(help="titles of the models this one was merged from")
    metadata_preprocessor: str | None = opt(help="the program that prepares images for the model")
    metadata_is_negative_embedding: str | None = opt(help="for embeddings: whether it is meant for negative prompts")
