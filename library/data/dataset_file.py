"""Reading dataset files (--dataset_config): TOML or JSON, three levels, no unknown keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, FolderOptions
from library.options import OptionError, did_you_mean, options_of, require

KEYS = {"train_batch_size": "batch_size"}  # option -> its key in a dataset file

DATASET_KEYS = {option.name for option in options_of(BucketOptions)} | {"batch_size"}
FOLDER_ONLY_KEYS = {"image_dir", "is_reg"}
SUBSET_KEYS = {option.name for group in (CaptionOptions, AugmentOptions, FolderOptions) for option in options_of(group)}
INHERITED_KEYS = SUBSET_KEYS - FOLDER_ONLY_KEYS  # may stand at the levels above as well

OTHER_KINDS = {
    "metadata_file": "a dataset of a metadata file",
    "conditioning_data_dir": "a ControlNet dataset",
    "face_crop_aug_range": "cutting around faces",
}


@dataclass(frozen=True)
class Level:
    """The plain keys of one table and where it stands, such as `datasets[0]`."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class DatasetLevel:
    """One [[datasets]] table."""

    own: Level
    subsets: tuple[Level, ...]


@dataclass(frozen=True)
class DatasetFile:
    """A whole file; keys are known to be legal at their level, values are not yet checked."""

    general: Level
    datasets: tuple[DatasetLevel, ...]


def read(path: Path) -> DatasetFile:
    """Read and check a dataset file; raises OptionError naming the line or the key with its place."""
    content = _parse(path)
    _check_keys(content, "", {"general", "datasets"}, {})
    general = _table(content.get("general", {}), "general")
    _check_keys(
        general, "general", DATASET_KEYS | INHERITED_KEYS, dict.fromkeys(FOLDER_ONLY_KEYS, "[[datasets.subsets]]")
    )
    datasets = []
    for index, table in enumerate(_tables(content.get("datasets", []), "datasets")):
        place = f"datasets[{index}]"
        elsewhere = dict.fromkeys(FOLDER_ONLY_KEYS, "[[datasets.subsets]]")
        _check_keys(table, place, DATASET_KEYS | INHERITED_KEYS | {"subsets"}, elsewhere)
        subsets = []
        for number, subset in enumerate(_tables(table.get("subsets", []), f"{place}.subsets")):
            subset_place = f"{place}.subsets[{number}]"
            _check_keys(subset, subset_place, SUBSET_KEYS, dict.fromkeys(DATASET_KEYS, "[[datasets]] or [general]"))
            subsets.append(Level(subset_place, subset))
        datasets.append(DatasetLevel(Level(place, table), tuple(subsets)))
    return DatasetFile(Level("general", general), tuple(datasets))


def _parse(path: Path) -> Mapping[str, Any]:
    kind = path.suffix.lower()
    require(kind in (".toml", ".json"), "--dataset_config", f"{str(path)!r} is neither .toml nor .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError("--dataset_config", f"{str(path)!r} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError("--dataset_config", f"{path} is not UTF-8", "save it as UTF-8") from None
    try:
        content = toml.loads(text) if kind == ".toml" else json.loads(text)
    except toml.TomlDecodeError as error:
        backslash = "\\" in text.splitlines()[min(error.lineno, len(text.splitlines())) - 1]
        way_out = "write paths with / or in single quotes" if backslash else "correct that line"
        raise OptionError(str(path), f"line {error.lineno} is not TOML ({error.msg})", way_out) from None
    except json.JSONDecodeError as error:
        raise OptionError(str(path), f"line {error.lineno} is not JSON ({error.msg})", "correct that line") from None
    except (IndexError, KeyError, TypeError, ValueError) as error:  # what toml lets out on some broken files
        raise OptionError(str(path), f"is not TOML ({error})", "correct it") from None
    return _table(content, "the file")


def _table(value: Any, place: str) -> Mapping[str, Any]:
    require(isinstance(value, dict), place, f"{value!r} is not a table")
    return value


def _tables(value: Any, place: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise OptionError(
            place, "is not a list of tables", f"write [[{place.split('[')[0]}{'.subsets' * ('.' in place)}]]"
        )
    return [_table(item, f"{place}[{index}]") for index, item in enumerate(value)]


def _check_keys(table: Mapping[str, Any], place: str, known: set[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse the first unknown key: with the level it belongs to, or the nearest known name."""
    for key in table:
        if key in known:
            continue
        where = f"{place}.{key}" if place else key
        if key in OTHER_KINDS:
            raise OptionError(where, f"{OTHER_KINDS[key]} is not supported for class-folder data")
        if key in elsewhere:
            raise OptionError(where, "unknown at this level", f"move it to {elsewhere[key]}")
        raise OptionError(where, "unknown key", did_you_mean(key, sorted(known)))
