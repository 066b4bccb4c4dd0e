"""The options of a script as a Markdown page, made from the dataclasses that declare them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from library.options import Option, options_of

BAR = r"\|"  # a bar that does not end a cell


def options_page(
    script: str,
    groups: Collection[type],
    defaults: Mapping[str, Any] | None = None,
    *,
    omitted: Collection[str] = (),
    only: Collection[str] | None = None,
) -> str:
    """A table per option group: flag, value, default, meaning; without `omitted`, and of `only` where that is given."""
    has_file = any(option.name == "config_file" for group in groups for option in options_of(group))
    also = " A flag is also the key in a `--config_file`." if has_file else ""
    lines = [f"# Options of {script}", "", f"Made from the code.{also}", ""]
    for group in groups:
        options = [
            option
            for option in options_of(group)
            if option.name not in omitted and (only is None or option.name in only)
        ]
        lines += [f"## {(group.__doc__ or '').strip().splitlines()[0].rstrip('.')}", ""]
        lines += ["| flag | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option, (defaults or {}).get(option.name, option.default)) for option in options]
        lines.append("")
    return "\n".join(lines)


def _row(option: Option, default: Any) -> str:
    shown = "" if default is None or option.kind is bool or default == "" else f"`{default}`"
    return f"| `{option.flag}` | {_value(option)} | {shown} | {option.help.replace('|', BAR)} |"


def _value(option: Option) -> str:
    if option.kind is bool:
        return "switch"
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices if choice is not None)
    word = {"str": "text", "int": "whole number", "float": "number", "Path": "path"}.get(option.kind.__name__, "text")
    return f"{word}s" if option.many else word
