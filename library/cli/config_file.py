"""--config_file and --output_config: a training run's flags as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.cli import foreign
from library.options import Option, OptionError, convert, did_you_mean, read_toml

OWN = frozenset({"config_file", "output_config"})


def config_path(name: str) -> Path:
    """The file that --config_file names; the extension may be left out."""
    if name.lower().endswith(".json"):
        way_out = "name the .toml file that the GUI writes when it starts a training"
        raise OptionError("--config_file", f"{name} is not TOML, as a GUI's presets are not", way_out)
    return Path(name) if name.lower().endswith(".toml") else Path(name + ".toml")


def read_config_file(path: Path, options: Mapping[str, Option], models: str = "sd") -> tuple[dict[str, Any], list[str]]:
    """(raw values by option name, sentences to print). Sections are only for reading: their names mean nothing.

    Keys, types and choices are checked as on the command line; OptionError names the file and the key. There is a
    sentence for each key that belongs to another program, and for each value that is bent to what is meant.
    """
    values: dict[str, Any] = {}
    found, notes = _flattened(path, read_toml(path, "--config_file"), options)
    for name, value in found.items():
        option, where = options.get(name), f"{path}: {name}"
        if name in OWN:
            note = f"{name} has no effect inside a file"
        elif option is None:
            note = foreign.note_on_key(name, models)
            if note is None:
                raise OptionError(where, "unknown key", did_you_mean(name, options))
        else:
            value, note = foreign.as_meant(option, value)
            if value is not None:
                converted = convert(option, value, where)
                values[name] = converted if option.parse is None else value  # build() parses it
        notes += [f"{path}: {note}"] if note else []
    return values, notes


def _flattened(
    path: Path, content: Mapping[str, Any], options: Mapping[str, Option]
) -> tuple[dict[str, Any], list[str]]:
    """(values by name, the last one where sections differ; a sentence for each that is lost so)."""
    values: dict[str, Any] = {}
    sections: dict[str, str] = {}
    notes = []
    for section, name, value in _entries(path, content):
        if name in values and values[name] != value:
            is_secret = name in options and options[name].secret
            earlier, later = (name if is_secret else f"{name} = {each!r}" for each in (values[name], value))
            notes.append(f"{path}: {earlier} {sections[name]} has no effect, {later} {section} comes later")
        values[name], sections[name] = value, section
    return values, notes


def _entries(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(where it stands in words, key, value)."""
    for name, value in content.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            is_data = name == "datasets"
            way_out = "give this file as --dataset_config" if is_data else f"write [{name}] with one pair of brackets"
            raise OptionError(f"{path}: {name}", "is a list of tables", way_out)
        for key, inner in value.items() if isinstance(value, dict) else [(name, value)]:
            if isinstance(inner, dict):
                raise OptionError(f"{path}: {name}.{key}", "is a table inside a table", f"write [{key}] on its own")
            yield f"in [{name}]" if isinstance(value, dict) else "outside the sections", key, inner


def write_config_file(path: Path, values: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Write what differs from the defaults; secrets stay out."""
    if path.exists():
        raise OptionError("--output_config", f"{path} exists already", "remove it or name another file")
    kept = {
        name: _plain(values[name])
        for name, option in options.items()
        if not option.secret and name not in OWN and values.get(name) not in (None, option.default)
    }
    lines = [f"{name} = {_toml(value)}\n" for name, value in kept.items()]
    try:
        path.write_bytes("".join(lines).encode())
    except OSError as error:
        raise OptionError("--output_config", f"{path} can't be written ({error.strerror})") from None
    except UnicodeEncodeError as error:
        name = next(name for name, line in zip(kept, lines, strict=True) if not _is_text(line))
        problem = f"{kept[name]!r} holds a character that no text file can ({error.reason})"
        raise OptionError(f"--{name}", problem, "type it again") from None


def _toml(value: Any) -> str:
    """A TOML value: JSON's escapes are TOML's, but for the one control character that JSON leaves as it is."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_text(line: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in line)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
