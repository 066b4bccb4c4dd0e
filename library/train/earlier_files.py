"""What lies where a run is going to write: refused before it starts if anything of the user's would be lost.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.checkpoints.own_folders import MODEL_FOLDER, STATE_FOLDER, FolderForm
from library.data.config import DatasetConfig
from library.options import OptionError
from library.train.config import RunConfig
from library.train.resume import FileNames

FLAG = "--output_name"
WAY_OUT = "choose another --output_name or --output_dir"


def check_places(config: RunConfig, names: FileNames, datasets: Sequence[DatasetConfig]) -> None:
    """Raise OptionError where a file or folder that this run may write would replace what it needs, or what is foreign.

    The base model, the data, folders in place of files, and files in place of folders.
    """
    needed = list(_needed(config, datasets))
    for path in _in_the_way(names, _model_names(config, names)):
        _refuse_needed(path, needed)
        if names.extension == "":
            _refuse_foreign(path, MODEL_FOLDER)
        elif path.is_dir():
            raise OptionError(FLAG, f"{path} is a folder, and the model is to be a file of that name", WAY_OUT)
    for path in _in_the_way(names, _state_names(config, names)):
        _refuse_needed(path, needed)
        _refuse_foreign(path, STATE_FOLDER)


def _in_the_way(names: FileNames, pattern: re.Pattern[str]) -> list[Path]:
    """What is in the output folder under a name that this run may use."""
    return sorted(path for path in names.folder.iterdir() if pattern.fullmatch(path.name))


def _model_names(config: RunConfig, names: FileNames) -> re.Pattern[str]:
    """The names of the model files that this run may write; one of a step when it is stopped, whatever it saves."""
    found = [_stem(names, names.final_file()), _stem(names, names.step_file(0), digits=8)]
    if config.saving.save_every_n_epochs or config.saving.save_n_epoch_ratio:
        found.append(_stem(names, names.epoch_file(0), digits=6))
    if config.validation.save_best:
        found.append(_stem(names, names.best_file()))
    average = "(?:-ema)?" if config.average.ema_decay is not None else ""
    return re.compile(rf"(?:{'|'.join(found)}){average}{re.escape(names.extension)}")


def _state_names(config: RunConfig, names: FileNames) -> re.Pattern[str]:
    """The names of the states that this run is asked to write; others go beside what is in their way."""
    if not (config.saving.save_state or config.saving.save_state_on_train_end):
        return re.compile("(?!)")
    found = [_stem(names, names.final_file())]
    if config.saving.save_state:
        found += [_stem(names, names.step_file(0), digits=8), _stem(names, names.epoch_file(0), digits=6)]
        found.append(_stem(names, names.best_file()))
    return re.compile(rf"(?:{'|'.join(found)})-state")


def _stem(names: FileNames, file: Path, *, digits: int = 0) -> str:
    """A pattern of the name without extension, with any number in place of its last digits."""
    stem = file.name.removesuffix(names.extension)
    return rf"{re.escape(stem[:-digits])}\d{{{digits}}}" if digits else re.escape(stem)


def _needed(config: RunConfig, datasets: Sequence[DatasetConfig]) -> Iterator[tuple[str, Path]]:
    """(what it is, where it is) for everything that a run reads and must not replace."""
    models = {"the base model": config.model.pretrained_model_name_or_path, "the VAE": config.model.vae}
    for what, path in models.items():
        if path and os.path.exists(os.path.expanduser(path)):  # else a name on the hub
            yield what, _real(path)
    for path in getattr(config.target, "base_weights", None) or ():
        yield "the base weights", _real(path)
    if config.source.dataset_config:
        yield "the dataset's configuration", _real(config.source.dataset_config)
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        what = "the caption file" if subset.is_metadata else "the training data"
        yield what, _real(subset.source)
        yield "the training data", _real(subset.image_dir)
        if subset.masks.conditioning_data_dir is not None:
            yield "the masks", _real(subset.masks.conditioning_data_dir)


def _real(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()


def _refuse_needed(path: Path, needed: Sequence[tuple[str, Path]]) -> None:
    """Raise OptionError if `path` is or holds what the run reads."""
    real = path.resolve()
    for what, where in needed:
        if where == real:
            raise OptionError(FLAG, f"{path} is {what} itself, which a save would replace", WAY_OUT)
        if path.is_dir() and where.is_relative_to(real):
            raise OptionError(FLAG, f"{path} holds {what} ({where}), and a save would replace the folder", WAY_OUT)


def _refuse_foreign(path: Path, form: FolderForm) -> None:
    try:
        fault = form.foreign_in(path)
    except OSError as error:
        fault = f"it can't be read, {error.strerror}"
    if fault is not None:
        problem = f"{path} is where {form.what} is to be saved, and what is there is not from an earlier run ({fault})"
        raise OptionError(FLAG, problem, WAY_OUT)
