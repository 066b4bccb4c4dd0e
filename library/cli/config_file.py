"""--config_file and --output_config: a training run's flags as TOML."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toml

from library.options import Option, OptionError, convert, did_you_mean

logger = logging.getLogger(__name__)

SECRET = frozenset({"wandb_api_key", "huggingface_token"})
OWN = frozenset({"config_file", "output_config"})


def config_path(name: str) -> Path:
    """The file that --config_file names; the extension may be left out."""
    return Path(name) if name.lower().endswith(".toml") else Path(name + ".toml")


def read_config_file(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """Raw values by option name. Sections are only for reading: their names mean nothing.

    Keys, types and choices are checked as on the command line; OptionError names the file and the key.
    """
    try:
        content = toml.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise OptionError("--config_file", f"{path} does not exist") from None
    except OSError as error:
        raise OptionError("--config_file", f"{path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError("--config_file", f"{path} is not UTF-8 text", "save it as UTF-8") from None
    except (toml.TomlDecodeError, IndexError, RecursionError) as error:  # the parser can fail with any of these
        way_out = (
            "write Windows paths in single quotes: 'C:\\models\\model.safetensors'" if "escape" in str(error) else ""
        )
        raise OptionError("--config_file", f"{path} is not valid TOML ({error})", way_out) from None
    values: dict[str, Any] = {}
    for name, value in content.items():
        section = value if isinstance(value, dict) else {name: value}
        for twice in [key for key in section if key in values and values[key] != section[key]]:
            raise OptionError(
                f"{path}: {twice}", f"is both {values[twice]!r} and {section[twice]!r}", "keep one of them"
            )
        values |= section
    for name in OWN & set(values):
        logger.warning("%s: %s has no effect inside a file", path, name)
        del values[name]
    for name, value in values.items():
        if name not in options:
            raise OptionError(f"{path}: {name}", "unknown key", did_you_mean(name, options))
        convert(options[name], value, f"{path}: {name}")
    return values


def write_config_file(path: Path, values: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Write what differs from the defaults; secrets stay out."""
    if path.exists():
        raise OptionError("--output_config", f"{path} exists already", "remove it or name another file")
    kept = {
        name: _plain(value)
        for name, value in values.items()
        if name in options and name not in SECRET | OWN and value is not None and value != options[name].default
    }
    try:
        path.write_text(toml.dumps(kept), encoding="utf-8")
    except OSError as error:
        raise OptionError("--output_config", f"{path} can't be written ({error.strerror})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
