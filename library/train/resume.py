"""The place in a run: names of its files, finding a state, and whether it belongs to the same run.

Nothing here imports torch, so a state that does not fit is refused before anything heavy starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import OptionError
from library.train.output_options import FOLDERS, SavingOptions

STATE_FORMAT = 1
STATE_FILE = "train_state.json"  # written last: where it is, the state is complete
OF_ANOTHER_PROGRAM = ("optimizer.bin", "random_states_0.pkl")  # accelerate's states, as the trade's tools keep them
PLACE_OF_ANOTHER_PROGRAM = {"current_epoch", "current_step"}  # what such a program writes into the file of our name
SHARES = "shares"  # folder of a state: what each process keeps for itself, with DeepSpeed or FSDP
MODEL_FILES = ("base model", "VAE", "base weights")  # names, in the digest of a run's data, of what is no image or text
PARTIAL, REPLACED = ".partial", ".old"  # endings of hidden folders while a state is written and put in place

# options that may differ between a run and its continuation: they don't change what a step computes, or, for the
# names of files and folders, the digest of their contents is compared
FREE_ON_RESUME = frozenset(
    {
        "max_train_steps", "max_train_epochs", "output_dir", "output_name", "save_precision", "save_model_as",
        "use_safetensors",
        "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio", "save_last_n_epochs",
        "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state", "save_state", "resume",
        "save_state_on_train_end", "save_best", "early_stop_patience", "validate_every_n_steps",
        "validate_every_n_epochs", "initial_step", "initial_epoch", "skip_until_initial_step",
        "no_metadata", "logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_tracker_config",
        "wandb_api_key", "metadata_title", "metadata_author", "metadata_description", "metadata_license",
        "metadata_tags", "metadata_usage_hint", "metadata_trigger_phrase", "metadata_thumbnail", "metadata_merged_from",
        "metadata_preprocessor", "metadata_is_negative_embedding", "wandb_run_name", "log_config",
        "console_log_level", "console_log_file", "huggingface_repo_id", "huggingface_repo_type",
        "huggingface_path_in_repo", "huggingface_token", "huggingface_repo_visibility", "save_state_to_huggingface",
        "resume_from_huggingface", "max_data_loader_n_workers", "training_comment", "max_nonfinite_steps", "plan",
        "on_bad_image", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", "sample_prompts",
        "sample_sampler", "network_weights", "sdpa", "pretrained_model_name_or_path", "vae", "base_weights",
        "train_data_dir",
        "reg_data_dir", "dataset_config", "in_json", "cache_info", "data_index", "conditioning_data_dir",
        "skip_cache_check", "cache_format", "debug_dataset", "highvram", "lowram", "cpu_offload_checkpointing",
        "ddp_timeout",
        "ddp_gradient_as_bucket_view", "ddp_static_graph",
    }
)  # fmt: skip


@dataclass(frozen=True)
class FileNames:
    """The trade's names of a run's files."""

    folder: Path
    name: str | None
    extension: str  # with dot; none for models that are folders

    @classmethod
    def of(cls, saving: SavingOptions) -> FileNames:
        assert saving.output_dir is not None
        form = saving.save_model_as or "safetensors"
        return cls(saving.output_dir, saving.output_name, "" if form in FOLDERS else f".{form}")

    def epoch_file(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}{self.extension}"

    def step_file(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}{self.extension}"

    def final_file(self) -> Path:
        return self.folder / f"{self.name or 'last'}{self.extension}"

    def best_file(self) -> Path:
        return self.folder / f"{f'{self.name}-best' if self.name else 'best'}{self.extension}"

    def average_of(self, file: Path) -> Path:
        """The file of the averaged weights that belongs to a model file, beside it."""
        return file.with_name(f"{file.name.removesuffix(self.extension)}-ema{self.extension}")

    def state_of(self, file: Path) -> Path:
        """The state folder that belongs to a model file, beside it."""
        return file.parent / f"{file.name.removesuffix(self.extension)}-state"

    def log_file(self) -> Path:
        return self.folder / f"{self.name or 'last'}.log"


@dataclass(frozen=True)
class RunState:
    """The place in a run, and what must be equal for it to go on there."""

    step: int
    epoch: int
    settings: Mapping[str, Any]  # options that shape a step, as JSON
    data: Mapping[str, Any]  # a digest of the images and captions
    recent_losses: list[float]
    skipped_steps: int
    planned_steps: int | None = None  # the length of the run that it was saved in


def settings_that_matter(values: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Resolved options as JSON values, without those that may differ on resume; no seed means that any will do."""
    settings = {name: value for name, value in values.items() if name not in FREE_ON_RESUME}
    return json.loads(json.dumps(settings | {"seed": seed}, default=str))


def find_state(resume: str, names: FileNames) -> Path | None:
    """The folder that --resume names; for "latest" the newest one of this output name, or None."""
    if resume != "latest":
        folder = Path(resume)
        if not (folder / STATE_FILE).is_file():
            if any((folder / name).is_file() for name in OF_ANOTHER_PROGRAM):
                raise _of_another_program(folder)
            raise OptionError(
                "--resume", f"{resume} is no state folder", 'name a folder ending in "-state", or use "latest"'
            )
        return folder
    _finish_renames(names)
    return next(reversed(_states(names)), None)


def _states(names: FileNames) -> list[Path]:
    """Complete states of this output name, the newest last."""
    found = [
        folder for folder in names.folder.glob("*-state") if (folder / STATE_FILE).is_file() and _is_ours(folder, names)
    ]
    return sorted(found, key=lambda folder: (folder / STATE_FILE).stat().st_mtime_ns)


def notes_on_earlier_files(names: FileNames) -> list[str]:
    """What a new run should know of a run before it with the same output name."""
    final, states = names.final_file(), _states(names)
    notes = []
    if final.exists():
        notes.append(f"{final} is there already, from an earlier run: it will be replaced; --output_name keeps both")
    if states:
        more = f" and {len(states) - 1} more" if len(states) > 1 else ""
        notes.append(
            f"{names.folder} has states of an earlier run ({states[-1].name}{more}): this run begins anew beside them; "
            "--resume latest goes on from the newest"
        )
    return notes


def _finish_renames(names: FileNames) -> None:
    """Complete what was cut off between the two renames by which a state replaces an older one of its name."""
    for ending in (PARTIAL, REPLACED):  # the newer one first
        for hidden in names.folder.glob(f".*-state{ending}"):
            folder = hidden.with_name(hidden.name[1:].removesuffix(ending))
            if (hidden / STATE_FILE).is_file() and not folder.exists() and _is_ours(folder, names):
                hidden.rename(folder)


def _is_ours(folder: Path, names: FileNames) -> bool:
    stems = "|".join([re.escape(names.name)] if names.name else ["epoch", "at", "last", "best"])
    return re.fullmatch(rf"(?:{stems})(?:-\d{{6}}|-step\d{{8}}|-best)?-state", folder.name) is not None


def read_state(folder: Path) -> RunState:
    """The place that a state folder holds; raises OptionError where it can't be read."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if "format" not in content and PLACE_OF_ANOTHER_PROGRAM.issubset(content):
            raise _of_another_program(folder)
        if content.pop("format") != STATE_FORMAT:
            raise OptionError(
                "--resume", f"{folder} was written by another version", "finish that run with the version that began it"
            )
        state = RunState(**content)
        if not (isinstance(state.step, int) and isinstance(state.settings, dict) and isinstance(state.data, dict)):
            raise ValueError("wrong types")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError("--resume", f"{folder / STATE_FILE} can't be read ({error})") from None


def _of_another_program(folder: Path) -> OptionError:
    return OptionError(
        "--resume", f"{folder} was written by another program", "start from its weights with --network_weights"
    )


def check_same_settings(
    folder: Path, state: RunState, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Raise OptionError naming every setting in which the state and this run differ.

    A state that is older than an option was written with the option's default.
    """
    was = {name: state.settings.get(name, defaults.get(name)) for name in {*state.settings, *settings}}
    differing = [
        f"--{name} was {_shown(was[name])} and is {_shown(settings.get(name))}"
        for name in sorted(was)
        if was[name] != settings.get(name) and not (name == "seed" and settings.get(name) is None)
    ]
    _require_same(folder, differing, "give the same settings")


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def share_name(process_index: int) -> str:
    """The file of one process in the folder of shares."""
    return f"process-{process_index:05d}.pt"


def check_processes(folder: Path, num_processes: int) -> None:
    """Raise OptionError for a state whose shares were written by another number of processes."""
    count = sum(1 for _ in (folder / SHARES).glob("process-*.pt"))
    if count not in (0, num_processes):
        problem = f"{folder} holds the shares of {count} processes, and this run has {num_processes}"
        raise OptionError("--resume", problem, f"start {count}, or start a new run from its model")


def check_same_data(folder: Path, state: RunState, data: Mapping[str, Any]) -> None:
    """Raise OptionError where the images, captions or batches are not those of the state."""
    differing = {
        name: f"the {name} changed" if _is_hash(value) else f"{name} was {state.data.get(name)} and is {value}"
        for name, value in data.items()
        if state.data.get(name) != value
    }
    models = [f"the {name}" for name in differing if name in MODEL_FILES]
    ways_out = [f"give {' and '.join(models)} that it began with"] * bool(models)
    ways_out += ["put the training data back as it was"] * (len(models) < len(differing))
    _require_same(folder, list(differing.values()), ", ".join(ways_out))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def _require_same(folder: Path, differing: list[str], way_out: str) -> None:
    if differing:
        problem = f"{folder} belongs to a run with other settings: {'; '.join(differing)}"
        raise OptionError("--resume", problem, f"{way_out}, or start a new run from its model")
