"""Everything about a run that can be refused before torch is loaded: files, folders, settings, the state to resume."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from library.checkpoints.probe import check_vae, probe
from library.checkpoints.source import ModelSource
from library.data.config import DatasetConfig, check_cacheable, load_configs
from library.options import OptionError
from library.train.config import RunConfig
from library.train.output_options import LoggingOptions
from library.train.resume import FileNames, RunState, check_same_settings, find_state, read_state, settings_that_matter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedRun:
    """A configuration that fits the files it names."""

    config: RunConfig  # with the model's kind and prediction type as found in its file
    datasets: tuple[DatasetConfig, ...]
    names: FileNames
    resume_folder: Path | None
    resume_state: RunState | None


def check_before_start(config: RunConfig, sdxl_script: str) -> CheckedRun:
    """Raise OptionError for whatever can't work; `sdxl_script` is named to those who bring an SDXL model."""
    check_writable(config.saving.output_dir, "--output_dir")
    check_logging(config.logging)
    check_packages(config)
    if hasattr(config.target, "check_before_start"):
        config.target.check_before_start()
    model = config.model
    assert model.pretrained_model_name_or_path is not None
    config = as_found(config, probe(model.pretrained_model_name_or_path, v2=model.v2, sdxl_script=sdxl_script))
    if model.vae:
        check_vae(model.vae)
    for warning in config.check():
        logger.warning(warning)
    datasets = load_configs(config.source, config.bucket, config.caption, config.augment, config.loader)
    check_cacheable(datasets, config.cache)
    names = FileNames.of(config.saving)
    folder = find_state(config.saving.resume, names) if config.saving.resume else None
    state = read_state(folder) if folder else None
    if folder is not None and state is not None:
        check_same_settings(folder, state, settings_that_matter(config.values(), config.training.seed))
    return CheckedRun(config, datasets, names, folder, state)


def as_found(config: RunConfig, source: ModelSource) -> RunConfig:
    """The configuration with what the model's file says about itself."""
    v_prediction = config.model.v_parameterization or source.v_prediction
    if source.v_prediction and not config.model.v_parameterization:
        logger.info("the model predicts velocity, as its file says")
    return replace(config, model=replace(config.model, v2=source.kind == "sd2", v_parameterization=v_prediction))


def check_packages(config: RunConfig) -> None:
    """The optional packages that the options need are installed."""
    if config.attention.xformers and importlib.util.find_spec("xformers") is None:
        raise OptionError("--xformers", "the package xformers is not installed", "pip install xformers, or use --sdpa")
    if config.logging.uses_wandb and importlib.util.find_spec("wandb") is None:
        raise OptionError(
            "--log_with", "the package wandb is not installed", "pip install wandb, or log to tensorboard"
        )


def check_logging(options: LoggingOptions) -> None:
    """The log folder can be written and the tracker's file is there."""
    if options.logging_dir:
        check_writable(Path(options.logging_dir), "--logging_dir")
    if options.log_tracker_config and not Path(options.log_tracker_config).is_file():
        raise OptionError("--log_tracker_config", f"{options.log_tracker_config} is no file", "check the path")


def check_writable(folder: Path | None, flag: str) -> None:
    """Raise OptionError unless files can be made in `folder`, which is created."""
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(flag, f"can't write to {folder} ({error.strerror})", "choose another folder") from None
