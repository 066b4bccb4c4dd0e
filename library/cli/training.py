"""The command line of every training script: parse, check, and start the run.

This is the only place that knows an argparse namespace. Whatever can be refused without torch is refused before it
is loaded.
"""

from __future__ import annotations

import importlib
import logging
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.cli import foreign, legacy
from library.cli.config_file import config_path, read_config_file, write_config_file
from library.cli.console import start_console, start_log_file
from library.cli.ending import Ending, leave
from library.options import Option, OptionError, OptionParser, add_arguments, build, opt, options_of
from library.train.config import CONFIG_GROUPS, RunConfig
from library.train.preflight import check_before_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileOptions:
    """Options from a file."""

    config_file: str | None = opt(help="TOML file with flags; the command line wins over it")
    output_config: bool = opt(False, help="write the flags of this command line to --config_file and end")


@dataclass(frozen=True)
class Script:
    """What an entry script is: a family, a target and the options its command line offers."""

    description: str
    family: str  # "module:Class"
    target: str
    target_options: type
    tracker_name: str
    other_script: str  # named to those who bring a model of the other family
    models: str = "sd"  # the family of models it takes: "sd" or "sdxl"
    datasets: str | None = None  # the one kind it trains on: "folders" or "metadata"
    omits: frozenset[str] = frozenset()  # options of its groups that it does not offer: they keep their defaults
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more_groups: Mapping[str, type] = field(default_factory=dict)  # by field of RunConfig
    legacy_options: type = legacy.LegacyOptions

    @property
    def config_groups(self) -> Mapping[str, type]:
        """The option groups it fills RunConfig with, beside the target's own."""
        return {**CONFIG_GROUPS, **self.more_groups}

    def groups(self) -> tuple[type, ...]:
        return (FileOptions, *self.config_groups.values(), self.target_options, self.legacy_options)

    def options(self) -> dict[str, Option]:
        """Every option of the script by name, with this script's defaults."""
        found = {option.name: option for group in self.groups() for option in options_of(group)}
        return {
            name: replace(option, default=self.defaults.get(name, option.default))
            for name, option in found.items()
            if name not in self.omits
        }


def main(script: Script, argv: Sequence[str] | None = None) -> None:
    """Run a training script and end the program with its exit code."""
    leave(run(script, argv))


def run(script: Script, argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for a mistake of the user's, 128 + n when stopped by signal n, 1 for anything else."""
    ending = Ending(Path(sys.argv[0]).name)
    with ending:
        config, notes = parse(script, argv)
        if config is None:
            return 0
        start_console(config.logging.console_log_level, config.logging.console_log_file)
        for note in notes:
            logger.warning(note)
        checked = check_before_start(config, script.other_script, script.models, script.datasets)
        ending.log_file = checked.names.log_file()
        start_log_file(ending.log_file)
        family, target = _load(script, checked.config)
        if checked.config.training.plan:
            from library.train.planning import plan_training  # brings torch

            return plan_training(checked, family, target)
        if checked.config.source.debug_dataset:
            from library.train.debug_dataset import show_dataset

            return show_dataset(checked, family)
        from library.train.session import run_training  # brings torch

        return run_training(checked, family, target, script.tracker_name)
    return ending.code


def build_parser(script: Script) -> OptionParser:
    parser = OptionParser(description=script.description)
    parser.explain = foreign.why_not_here
    for group in script.groups():
        add_arguments(parser, group, script.defaults, script.omits)
    return parser


def parse(script: Script, argv: Sequence[str] | None = None) -> tuple[RunConfig | None, list[str]]:
    """(configuration, sentences to print); no configuration when --output_config was all that was asked for."""
    parser = build_parser(script)
    options = script.options()
    argv, note_on_rates = foreign.with_one_rate(sys.argv[1:] if argv is None else argv, options)
    namespace = parser.parse_strictly(argv)
    notes: list[str] = []
    if namespace.config_file and not namespace.output_config:
        file_values, notes = read_config_file(config_path(namespace.config_file), options, script.models)
        parser.set_defaults(**file_values)
        namespace = parser.parse_strictly(argv)
    if namespace.output_config:
        _write_config(namespace, options)
        return None, []
    hide_secrets(text for name, option in options.items() if option.secret and (text := getattr(namespace, name)))
    values = legacy.translate(vars(namespace))
    groups = {name: build(group, values) for name, group in script.config_groups.items()}
    config = RunConfig(**groups, target=build(script.target_options, values))
    return config, [*notes, *[note_on_rates] * bool(note_on_rates), *legacy.notes(values)]


def hide_secrets(secrets: Iterable[str]) -> None:
    """Take tokens out of the process's own command line, which trackers record and send away."""
    for secret in secrets:
        sys.argv[1:] = [word.replace(secret, "***") for word in sys.argv[1:]]


def _write_config(namespace: Namespace, options: Mapping[str, Option]) -> None:
    if not namespace.config_file:
        raise OptionError("--output_config", "needs --config_file to name the file to write")
    write_config_file(config_path(namespace.config_file), vars(namespace), options)


def _load(script: Script, config: RunConfig) -> tuple[Any, Any]:
    """The family and the target; this is where torch is loaded."""
    family_module, family_name = _module_and_name(script.family)
    target_module, target_name = _module_and_name(script.target)
    family = getattr(importlib.import_module(family_module), family_name)()
    target = getattr(importlib.import_module(target_module), target_name).of(config)
    return family, target


def _module_and_name(path: str) -> tuple[str, str]:
    module, _, name = path.partition(":")
    return module, name
