"""Everything about a run that can be refused before torch is loaded: files, folders, settings, the state to resume."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.checkpoints.probe import check_vae, probe
from library.checkpoints.source import ModelSource
from library.data.config import (
    DatasetConfig,
    check_cacheable,
    check_dataset_class,
    face_crop_notes,
    load_configs,
)
from library.data.headers import BadImage, open_image
from library.data.mask_settings import settle_masks
from library.data.text_cache_check import check_text_cacheable
from library.families.options import SDXL_BUCKET_STEP
from library.generate.prompt_line import PromptLine
from library.options import OptionError, read_toml
from library.packages import is_installed
from library.train.config import RunConfig
from library.train.earlier_files import check_places
from library.train.hub import check_hub, fetch_state
from library.train.optimizer_table import check_package
from library.train.output_options import TRACKERS, LoggingOptions, ModelSavingOptions
from library.train.preview_prompts import read_previews
from library.train.resume import (
    FileNames,
    RunState,
    check_same_settings,
    find_state,
    notes_on_earlier_files,
    read_state,
    settings_that_matter,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedRun:
    """A configuration that fits the files it names."""

    config: RunConfig  # with the model's kind and prediction type as found in its file
    datasets: tuple[DatasetConfig, ...]
    names: FileNames
    resume_folder: Path | None
    resume_state: RunState | None
    previews: tuple[PromptLine, ...] = ()


def check_before_start(config: RunConfig, other_script: str, family: str = "sd", only: str | None = None) -> CheckedRun:
    """Raise OptionError for whatever can't work.

    `family` is that of the script's models, "sd" or "sdxl"; `other_script` is named to those who bring another model.
    `only` is the one kind of datasets that it trains on, if it does: "folders" or "metadata".
    """
    check_writable(config.saving.output_dir, "--output_dir")
    check_logging(config.logging)
    check_packages(config)
    check_thumbnail(config.metadata.metadata_thumbnail)
    if hasattr(config.target, "check_before_start"):
        config.target.check_before_start()
    model = config.model
    assert model.pretrained_model_name_or_path is not None
    scripts = {"sdxl_script" if family == "sd" else "sd_script": other_script}
    config = as_found(
        config, probe(model.pretrained_model_name_or_path, family=family, v2=model.v2, may_inpaint=False, **scripts)
    )
    if model.vae:
        check_vae(model.vae)
    for warning in [*config.check(), *check_hub(config.hub)]:
        logger.warning(warning)
    previews = read_previews(config.preview) if config.preview.is_on else ()
    if only == "metadata" and not any(config.source.given("in_json", "dataset_config", "dataset_class")):
        raise _needs_metadata()
    datasets = load_configs(config.source, config.bucket, config.caption, config.augment, config.loader, config.split,
                            config.masks)  # fmt: skip
    check_kind_of_data(datasets, only)
    datasets = settle_masks(datasets, masked_loss=config.loss.masked_loss)
    is_split = any(dataset.split.validation_split for dataset in datasets)
    for note in config.split.without_effect(is_split=is_split) + config.validation.check_split(is_split=is_split):
        logger.warning(note)
    check_cacheable(datasets, config.cache)
    for note in check_text_cacheable(datasets, config.text_cache):
        logger.warning(note)
    if family == "sdxl":
        check_bucket_steps(datasets, SDXL_BUCKET_STEP)
    for note in check_dataset_class(config.source, config.cache, *_shaping_data(config)):
        logger.warning(note)
    for note in face_crop_notes(datasets, config.cache):
        logger.warning(note)
    names = FileNames.of(config.saving)
    check_places(config, names, datasets)
    folder, state = _to_go_on_from(config, names)
    return CheckedRun(config, datasets, names, folder, state, previews)


def _to_go_on_from(config: RunConfig, names: FileNames) -> tuple[Path | None, RunState | None]:
    """The state that --resume names, checked; for a new run a word on what an earlier one left."""
    if not config.saving.resume:
        for note in notes_on_earlier_files(names):
            logger.warning(note)
        return None, None
    is_remote, token = config.hub.resume_from_huggingface, config.hub.huggingface_token
    resume = str(fetch_state(config.saving.resume, token)) if is_remote else config.saving.resume
    folder = find_state(resume, names)
    if folder is None:
        return None, None
    state = read_state(folder)
    defaults = settings_that_matter(config.defaults(), None)
    check_same_settings(folder, state, settings_that_matter(config.values(), config.training.seed), defaults)
    for name in config.start.skipping:
        logger.warning("--%s has no effect: the state goes on after step %d", name, state.step)
    return folder, state


def _shaping_data(config: RunConfig) -> tuple[Any, ...]:
    return config.bucket, config.caption, config.augment, config.loader, config.masks


def as_found(config: RunConfig, source: ModelSource) -> RunConfig:
    """The configuration with what the model's file says about itself, without what this kind of model lacks."""
    v_prediction = config.model.v_parameterization or source.v_prediction
    if source.v_prediction and not config.model.v_parameterization:
        logger.info("the model predicts velocity, as its file says")
    if source.zero_terminal_snr and not config.noise.zero_terminal_snr:
        logger.info("the model's last timestep is pure noise, as its file says: --zero_terminal_snr is on")
        config = replace(config, noise=replace(config.noise, zero_terminal_snr=True))
    if source.kind == "sdxl" and config.text.clip_skip is not None:
        logger.warning("--clip_skip has no effect: SDXL always takes the last layer but one of its text encoders")
        config = replace(config, text=replace(config.text, clip_skip=None))
    if isinstance(config.saving, ModelSavingOptions):
        config = replace(config, saving=config.saving.for_source(is_single_file=source.is_single_file))
    return replace(config, model=replace(config.model, v2=source.kind == "sd2", v_parameterization=v_prediction))


def check_kind_of_data(datasets: Sequence[DatasetConfig], only: str | None) -> None:
    """Raise OptionError for datasets of a kind that the script is not for; `only` is "folders", "metadata" or None."""
    if only is None:
        return
    for dataset in datasets:
        if only == "metadata" and not dataset.is_metadata:
            raise _needs_metadata()
        if only == "folders" and dataset.is_metadata:
            problem = f"{dataset.subsets[0].source} is a metadata file, and this script trains on folders"
            raise OptionError("metadata_file", problem, "use fine_tune.py")


def _needs_metadata() -> OptionError:
    way_out = "make one with finetune/merge_captions_to_metadata.py, or train on folders with train_db.py"
    return OptionError("--in_json", "this script trains on the images of metadata files, and there is none", way_out)


def check_bucket_steps(datasets: Sequence[DatasetConfig], step: int) -> None:
    """Raise OptionError for buckets with sides that the models can't halve often enough; `step` in pixels."""
    for bucket in (dataset.bucket for dataset in datasets if dataset.bucket.enable_bucket):
        given = bucket.bucket_reso_steps
        if given % step:
            problem = f"{given} is not a multiple of {step}, as SDXL needs it"
            raise OptionError("--bucket_reso_steps", problem, "use 64 or 32")


def check_packages(config: RunConfig) -> None:
    """The optional packages that the options need are installed."""
    config.attention.check_package()
    if config.logging.uses_wandb and not is_installed("wandb"):
        raise OptionError(
            "--log_with", "the package wandb is not installed", "pip install wandb, or log to tensorboard"
        )
    if config.distributed.deepspeed and not is_installed("deepspeed"):
        raise OptionError("--deepspeed", "the package deepspeed is not installed", "pip install deepspeed")
    check_package(config.optimizer.optimizer_type)


def check_logging(options: LoggingOptions) -> None:
    """The log folder can be written and the tracker's file is there."""
    if options.logging_dir:
        check_writable(Path(options.logging_dir), "--logging_dir")
    if options.log_tracker_config:
        arguments = read_toml(options.log_tracker_config, "--log_tracker_config")
        for name in (name for name in arguments if name not in TRACKERS or not isinstance(arguments[name], dict)):
            where = f"{options.log_tracker_config}: {name}"
            raise OptionError(where, "is no table of a tracker's arguments", "write [tensorboard] or [wandb] above it")


def check_thumbnail(text: str | None) -> None:
    """--metadata_thumbnail is a data URL or a picture."""
    if text and not text.startswith("data:"):
        try:
            open_image(text).close()
        except (BadImage, OSError):
            raise OptionError("--metadata_thumbnail", f"{text} is no picture", "name an image file") from None


def check_writable(folder: Path | None, flag: str) -> None:
    """Raise OptionError unless files can be made in `folder`, which is created."""
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(flag, f"can't write to {folder} ({error.strerror})", "choose another folder") from None
