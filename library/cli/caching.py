"""The command line of the tools that fill caches: that of the training scripts, of which only the data, the model and
its precision count.

So a training run's whole command line, or its --config_file, makes the cache that the run looks for. Flags of training
that steer nothing here are taken without a word; what no training script knows is an error.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.cli import foreign, legacy
from library.cli.config_file import config_path, read_config_file
from library.cli.console import start_console
from library.cli.ending import Ending, leave
from library.cli.stopping import stoppable
from library.cli.training import FileOptions
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
    ValidationSplitOptions,
)
from library.data.text_cache_options import TextCacheOptions
from library.diffusion.options import LossOptions
from library.families.options import DreamBoothTextOptions, ModelOptions, TextOptions
from library.models.options import AttentionOptions
from library.options import Option, OptionParser, add_arguments, build, options_of
from library.targets.full_options import DreamBoothOptions, FineTuneOptions, SdxlFullOptions
from library.targets.options import NetworkOptions, SdxlNetworkOptions
from library.train.caching_options import CachingOptions
from library.train.caching_preflight import CheckedCaching, check_caching
from library.train.config import CONFIG_GROUPS, RunConfig
from library.train.memory_options import PrecisionOptions
from library.train.options import TrainingOptions
from library.train.output_options import LoggingOptions, ModelSavingOptions, SavingOptions

logger = logging.getLogger(__name__)

# the options of training that decide what a cache holds, by field of RunConfig: whole groups, or these of them
WHOLE: dict[str, type] = {
    "model": ModelOptions, "attention": AttentionOptions, "text": TextOptions, "source": SourceOptions,
    "bucket": BucketOptions, "caption": CaptionOptions, "augment": AugmentOptions, "masks": MaskOptions,
    "cache": CacheOptions, "text_cache": TextCacheOptions, "loader": LoaderOptions, "split": ValidationSplitOptions,
}  # fmt: skip
IN_PART: dict[str, tuple[type, frozenset[str]]] = {
    "training": (TrainingOptions, frozenset({"mixed_precision", "seed"})),
    "precision": (PrecisionOptions, frozenset({"fp8_base", "fp8_base_unet"})),
    "loss": (LossOptions, frozenset({"masked_loss"})),
    "logging": (LoggingOptions, frozenset({"console_log_level", "console_log_file"})),
}
# the others: whoever passes a training run's command line has them on it
OF_TRAINING: tuple[type, ...] = (
    *CONFIG_GROUPS.values(), ModelSavingOptions, SdxlNetworkOptions, NetworkOptions, SdxlFullOptions, FineTuneOptions,
    DreamBoothOptions, DreamBoothTextOptions, legacy.SdxlFullLegacyOptions,
)  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """What a caching tool is."""

    description: str | None
    caches: str  # "latents" | "texts"


def main(tool: Tool, argv: Sequence[str] | None = None) -> None:
    """Run a caching tool and end the program with its exit code."""
    leave(run(tool, argv))


def run(tool: Tool, argv: Sequence[str] | None = None) -> int:
    """0 when done, 1 where --verify finds files that are not valid or --gc can't remove some, 2 for a mistake of the
    user's, 128 + n when stopped by signal n, 1 for anything else."""
    result = 0
    with Ending(Path(sys.argv[0]).name) as ending:
        config, options, notes = parse(tool, argv)
        start_console(config.logging.console_log_level, config.logging.console_log_file)
        for note in notes:
            logger.warning(note)
        with stoppable(ending):
            result = _work(tool, check_caching(config, options))
    return ending.code or result


def _work(tool: Tool, checked: CheckedCaching) -> int:
    from library.train import caching  # brings torch

    return (caching.cache_latents if tool.caches == "latents" else caching.cache_texts)(checked)


# ---------------------------------------------------------------------------------------------- options


def groups_that_count() -> tuple[type, ...]:
    """The option groups that a tool honours, in the order of its help; of some, only a part."""
    in_part = (group for group, _ in IN_PART.values())
    return (CachingOptions, FileOptions, *WHOLE.values(), *in_part, legacy.LegacyOptions)


def names_that_count() -> frozenset[str]:
    """The options that a tool honours."""
    whole = (option.name for group in (CachingOptions, FileOptions, *WHOLE.values()) for option in options_of(group))
    return frozenset(whole).union(*(names for _, names in IN_PART.values()), {"caption_extention"}) - {"output_config"}


def accepted_options() -> dict[str, Option]:
    """Every option that a tool takes, by name; of one that scripts declare differently, the widest form."""
    found: dict[str, Option] = {}
    for group in (*groups_that_count(), *OF_TRAINING):
        for option in options_of(group):
            known = found.get(option.name, option)
            if known.choices is not None and option.choices is not None:
                known = replace(known, choices=tuple(dict.fromkeys([*known.choices, *option.choices])))
            found[option.name] = known
    return found


def build_parser(tool: Tool) -> OptionParser:
    """A parser of every flag of training; the help shows those that count."""
    epilog = "All other flags of the training scripts are taken, and steer nothing here."
    parser = OptionParser(description=tool.description, epilog=epilog)
    parser.explain = foreign.why_not_here
    counting, seen = names_that_count(), set[str]()
    for group in (*groups_that_count(), *OF_TRAINING):
        add_arguments(parser, group, omitted=seen)
        seen |= {option.name for option in options_of(group)}
    options = accepted_options()
    for action in parser._actions:
        if action.dest in options:
            action.choices = options[action.dest].choices
            action.help = action.help if action.dest in counting else argparse.SUPPRESS
    return parser


def parse(tool: Tool, argv: Sequence[str] | None = None) -> tuple[RunConfig, CachingOptions, list[str]]:
    """(what of a training run's configuration counts here, what is to be done, sentences to print)."""
    parser = build_parser(tool)
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace, notes = parser.parse_strictly(argv), []
    if namespace.config_file:
        values, notes = read_config_file(config_path(namespace.config_file), accepted_options(), "sdxl")
        parser.set_defaults(**values)
        namespace = parser.parse_strictly(argv)
    values = legacy.translate(vars(namespace))
    options = build(CachingOptions, values)
    return _config(tool, values), options, [*notes, *options.notes()]


def _config(tool: Tool, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a training run with these options, which caches on disk; the rest as by default."""
    groups: dict[str, Any] = {name: build(group, values) for name, group in WHOLE.items()}
    for name, (group, part) in IN_PART.items():
        groups[name] = build(group, {each: values[each] for each in part})
    is_latents = tool.caches == "latents"
    groups["cache"] = replace(groups["cache"], cache_latents=False, cache_latents_to_disk=is_latents)
    groups["text_cache"] = replace(
        groups["text_cache"], cache_text_encoder_outputs=False, cache_text_encoder_outputs_to_disk=not is_latents
    )
    groups["saving"] = SavingOptions(output_dir=Path())
    others = {name: group() for name, group in CONFIG_GROUPS.items() if name not in groups}
    return RunConfig(**groups, **others, target=None)
