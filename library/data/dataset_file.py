"""Reading dataset files (--dataset_config): TOML or JSON, three levels, no unknown keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.listing import is_utf8
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CaptionOptions,
    DatasetOptions,
    FolderOptions,
    MaskOptions,
    ValidationSplitOptions,
)
from library.options import OptionError, did_you_mean, options_of, read_text, read_toml, require

KEYS = {"train_batch_size": "batch_size"}  # option -> its key in a dataset file


def _names(*groups: type) -> frozenset[str]:
    return frozenset(option.name for group in groups for option in options_of(group))


DATASET_KEYS = _names(BucketOptions, DatasetOptions, ValidationSplitOptions) | {"batch_size"}
SUBSET_KEYS = _names(CaptionOptions, AugmentOptions, MaskOptions, FolderOptions)
FOLDER_ONLY_KEYS = SUBSET_KEYS & {"image_dir", "is_reg", "metadata_file", "conditioning_data_dir"}
INHERITED_KEYS = SUBSET_KEYS - FOLDER_ONLY_KEYS  # may stand at the levels above as well

NOT_OF_METADATA = {  # keys that a dataset of metadata files can't have, and why
    "caption_extension": "its captions stand in metadata_file",
    "class_tokens": "its captions stand in metadata_file",
    "is_reg": "regularisation images need a dataset of folders",
    "cache_info": "metadata_file says it all",
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
    content = _table(parse_file(path, "--dataset_config"), "the file")
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
        level = DatasetLevel(Level(place, table), tuple(subsets))
        _check_kind(level)
        datasets.append(level)
    return DatasetFile(Level("general", general), tuple(datasets))


def _check_kind(dataset: DatasetLevel) -> None:
    """A dataset is one of folders or one of metadata files, with the keys of its kind."""
    with_metadata = [level for level in dataset.subsets if level.values.get("metadata_file") is not None]
    if not with_metadata:
        return
    if len(with_metadata) < len(dataset.subsets):
        raise OptionError(
            f"{with_metadata[0].place}.metadata_file",
            "stands beside a subset without one, and a dataset can't have both kinds",
            "give it a [[datasets]] of its own",
        )
    for level in (dataset.own, *with_metadata):
        for key, why in NOT_OF_METADATA.items():
            if level.values.get(key) is not None:
                raise OptionError(f"{level.place}.{key}", f"is not for a dataset of metadata files: {why}", "remove it")


def parse_file(path: Path, flag: str) -> Any:
    """The content of a .toml or .json file; raises OptionError naming `flag`, or the line that is broken."""
    kind = path.suffix.lower()
    require(kind in (".toml", ".json"), flag, f"{str(path)!r} is neither .toml nor .json")
    if kind == ".toml":
        return read_toml(path, flag)
    try:
        content = json.loads(read_text(path, flag))
    except json.JSONDecodeError as error:
        raise OptionError(str(path), f"line {error.lineno} is not JSON ({error.msg})", "correct that line") from None
    except (RecursionError, ValueError) as error:  # tables without end, a number of 5,000 digits
        raise OptionError(str(path), f"is not JSON ({error})", "correct it") from None
    is_whole = is_utf8(json.dumps(content, ensure_ascii=False))
    require(is_whole, str(path), "has half a character (\\ud800 to \\udfff alone)", "write that text anew")
    return content


def _table(value: Any, place: str) -> Mapping[str, Any]:
    require(isinstance(value, dict), place, f"{value!r} is not a table")
    return value


def _tables(value: Any, place: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise OptionError(
            place, "is not a list of tables", f"write [[{place.split('[')[0]}{'.subsets' * ('.' in place)}]]"
        )
    return [_table(item, f"{place}[{index}]") for index, item in enumerate(value)]


def _check_keys(table: Mapping[str, Any], place: str, known: Set[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse the first unknown key: with the level it belongs to, or the nearest known name."""
    for key in table:
        if key in known:
            continue
        where = f"{place}.{key}" if place else key
        if key in elsewhere:
            raise OptionError(where, "unknown at this level", f"move it to {elsewhere[key]}")
        raise OptionError(where, "unknown key", did_you_mean(key, sorted(known)))
