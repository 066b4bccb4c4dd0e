"""Options: one declaration per option, from which argparse flags, TOML keys, checks and documentation follow.

A frozen dataclass is an option group and each of its fields, declared with :func:`opt`, is one option:
the field name is the flag, the TOML key and the attribute. Nothing here imports torch, so ``--help`` and every
configuration error answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import toml

Group = TypeVar("Group")

SWITCH_WORDS = {"true": True, "false": False, "True": True, "False": False}
# what people call an option whose name is too far from it to be found by its letters
USUAL_WORDS = {
    "alpha": "network_alpha", "batch": "train_batch_size", "batch_size": "train_batch_size", "dim": "network_dim",
    "epochs": "max_train_epochs", "lr": "learning_rate", "max_epochs": "max_train_epochs",
    "max_steps": "max_train_steps", "model": "pretrained_model_name_or_path", "rank": "network_dim",
    "repeats": "num_repeats", "steps": "max_train_steps",
}  # fmt: skip
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}


class OptionError(ValueError):
    """A user's mistake: which option, what was wrong with its value, and the way out, in one sentence."""

    def __init__(self, where: str, problem: str, way_out: str = "") -> None:
        self.where = where
        sentence = f"{where}: {problem}" if where else problem
        super().__init__(f"{sentence}; {way_out}" if way_out else sentence)


@dataclass(frozen=True)
class Option:
    """One resolved option of a group."""

    name: str
    kind: type  # bool, int, float, str or Path: the type of one value on the command line
    many: bool  # takes a list of values (argparse nargs="*")
    optional: bool  # None is a legal value
    default: Any
    choices: tuple[Any, ...] | None
    help: str
    parse: Callable[[Any], Any] | None  # raw value (command line text or TOML value) -> field value
    secret: bool = False  # never written into a file or a log

    @property
    def flag(self) -> str:
        return f"--{self.name}"


def opt(
    default: Any = None,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    cli: type | None = None,
    parse: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """Declare an option.

    `cli` names the type on the command line where it differs from the annotation; `parse` turns that text, or the
    TOML value, into the field's value and raises ValueError with the reason when it can't. A `secret` value is
    written nowhere.
    """
    choices = tuple(choices) if choices is not None else None
    metadata = {"help": help, "choices": choices, "cli": cli, "parse": parse, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def options_of(group: type) -> tuple[Option, ...]:
    """The options a group declares, in the order of declaration."""
    hints = typing.get_type_hints(group)
    return tuple(_resolve(field, hints[field.name]) for field in dataclasses.fields(group) if "help" in field.metadata)


def _resolve(field: dataclasses.Field, hint: Any) -> Option:
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    inner = [alternative for alternative in alternatives if alternative is not type(None)]
    many = typing.get_origin(inner[0]) is tuple and field.metadata["cli"] is None
    kind = field.metadata["cli"] or (typing.get_args(inner[0])[0] if many else inner[0])
    return Option(
        name=field.name,
        kind=kind,
        many=many,
        optional=type(None) in alternatives,
        default=field.default,
        choices=field.metadata["choices"],
        help=field.metadata["help"],
        parse=field.metadata["parse"],
        secret=field.metadata["secret"],
    )


# ---------------------------------------------------------------------------------------------- values


def convert(option: Option, value: Any, where: str) -> Any:
    """A TOML or command-line value as the field's value; raises OptionError naming `where`.

    Integers and the words true and false stand for switches, and texts for numbers ("512"), as GUIs write them;
    nothing else is guessed.
    """
    if value is None:
        return option.default
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, (str, Path)) and "\0" in str(text):
            raise OptionError(where, f"{str(text)!r} holds a character that no name can", "type it again")
    if option.parse is not None:
        try:
            return option.parse(value)
        except ValueError as error:
            raise OptionError(where, f"{value!r} {error}") from None
    if option.many:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_scalar(option, item, where) for item in values)
    value = _scalar(option, value, where)
    if option.choices is not None and value not in option.choices:
        raise OptionError(where, not_one_of(value, option.choices))
    return value


def _scalar(option: Option, value: Any, where: str) -> Any:
    kind = option.kind
    number = _number(value) if isinstance(value, str) else value
    if kind is bool and value in (0, 1, True, False):
        return bool(value)
    if kind is bool and isinstance(value, str) and value in SWITCH_WORDS:
        return SWITCH_WORDS[value]
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and _is_finite_number(number):
        return number  # a whole number stays one: metadata shows values as they were given
    if kind is int and _is_finite_number(number) and number == int(number):
        return int(number)
    if kind is str and isinstance(value, str):
        return value
    raise OptionError(where, f"{value!r} is not {WORDS.get(kind, kind.__name__)}")


def _is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _number(text: str) -> int | float | str:
    """The number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def build(group: type[Group], values: Mapping[str, Any], where: Callable[[str], str] = "--{}".format) -> Group:
    """An instance of `group` from raw values by option name; missing names take their defaults."""
    known = {
        option.name: convert(option, values[option.name], where(option.name))
        for option in options_of(group)
        if option.name in values
    }
    return group(**known)


def named_values(items: Sequence[str] | None, where: str) -> dict[str, str]:
    """Texts of the form name=value by name; the value may contain "=". OptionError names `where`."""
    values: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise OptionError(where, f"{item!r} is not of the form name=value")
        if name in values:
            raise OptionError(where, f"{name} is given twice", "keep one of them")
        values[name] = value
    return values


def read_text(path: Path | str, where: str) -> str:
    """A text file in UTF-8, with or without byte-order mark; OptionError names `where` (a flag)."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise OptionError(where, f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise OptionError(where, f"{path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(where, f"{path} is not UTF-8 text", "save it as UTF-8") from None


def read_toml(path: Path | str, where: str) -> dict[str, Any]:
    """The content of a TOML file; OptionError as :func:`read_text`, or names the file for what is wrong in it."""
    text = read_text(path, where)
    try:
        return _parsed(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # the parser lets all out
        line, lines = getattr(error, "lineno", 0), text.splitlines()
        has_backslash = "\\" in (lines[min(line, len(lines)) - 1] if line and lines else text)
        way_out = "write paths with / or in single quotes" if has_backslash else "correct it"
        reason = (getattr(error, "msg", str(error)).splitlines() or [type(error).__name__])[0]
        raise OptionError(str(path), f"{f'line {line} ' if line else ''}is not TOML ({reason})", way_out) from None


def _parsed(text: str) -> dict[str, Any]:
    """By Python's own reader where there is one; the trade's, which bends some escapes, reads what that refuses."""
    if sys.version_info >= (3, 11):
        import tomllib

        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(text)
    return toml.loads(text)


def path_of(value: Any) -> Path:
    """For `opt(parse=...)`: a path from a text."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("is not a path")
    return Path(value)


def not_one_of(value: Any, choices: Iterable[Any]) -> str:
    """ "'x' is not one of a, b; did you mean b?"."""
    known = [str(choice) for choice in choices if choice is not None]
    hint = did_you_mean(str(value), known)
    return f"{value!r} is not one of {', '.join(known)}" + (f"; {hint}" if hint else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean X?" for the nearest known name, or an empty text."""
    names, dashes = [name for name in known if name], "--" if word.startswith("--") else ""
    usual = dashes + USUAL_WORDS.get(word.removeprefix("--").lower(), "")
    near = [usual] if usual in names else difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def require(condition: bool, where: str, problem: str, way_out: str = "") -> None:
    """Raise OptionError unless `condition` holds: one line per rule in the checks of groups."""
    if not condition:
        raise OptionError(where, problem, way_out)


# ---------------------------------------------------------------------------------------------- argparse


class OptionParser(argparse.ArgumentParser):
    """An argparse parser over option groups whose errors are one sentence with the way out (exit code 2).

    `explain` gives the sentence for a flag of another script, or None.
    """

    explain: Callable[[str], str | None] = staticmethod(lambda flag: None)

    def error(self, message: str) -> NoReturn:
        for prefix in ("argument ", "unrecognized arguments: "):
            message = message.removeprefix(prefix)
        self.exit(2, f"{self.prog}: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_one_of(value, action.choices))

    def parse_strictly(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse; an unknown flag is an error that names the nearest known one."""
        argv = list(sys.argv[1:] if argv is None else argv)
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            if flag.startswith("-") and (sentence := self.explain(flag.split("=")[0])):
                self.error(sentence)
            hint = did_you_mean(flag.split("=")[0], self._option_string_actions)
            self.error(
                f"{flag}: unknown flag" + (f"; {hint}" if hint else "")
                if flag.startswith("-")
                else f"{flag!r} stands alone: it belongs to no flag; quote values that contain blanks"
            )
        for word in argv:
            self._tell_abbreviation(word.split("=")[0])
        return namespace

    def _tell_abbreviation(self, flag: str) -> None:
        """argparse takes the beginning of a flag for the flag; old command lines may rely on it."""
        if not flag.startswith("--") or flag in self._option_string_actions:
            return
        meant = [known for known in self._option_string_actions if known.startswith(flag)]
        if len(meant) == 1:
            self._print_message(f"{self.prog}: {flag} is taken for {meant[0]}\n", sys.stderr)


def add_arguments(
    parser: argparse.ArgumentParser,
    group: type,
    defaults: Mapping[str, Any] | None = None,
    omitted: Collection[str] = (),
) -> None:
    """Add one flag per option of `group` under its docstring's first line; `defaults` overrides per script."""
    section = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0].removesuffix("."))
    for option in options_of(group):
        if option.name in omitted:
            continue
        default = (defaults or {}).get(option.name, option.default)
        if option.kind is bool:
            section.add_argument(option.flag, action="store_true", default=default, help=_escaped(option.help))
            continue
        section.add_argument(
            option.flag,
            type=_command_line_type(option.kind),
            default=default,
            choices=option.choices,
            nargs="*" if option.many else None,
            metavar=None if option.choices else option.kind.__name__.upper(),
            help=_escaped(option.help),
        )


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _command_line_type(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if kind is float and not math.isfinite(value):
                raise ValueError
            return value
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {WORDS.get(kind, kind.__name__)}") from None

    parse.__name__ = kind.__name__
    return parse
