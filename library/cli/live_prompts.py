"""Prompts that show only while pictures are drawn: typed ones, and those of a Python file of the user's.

A Python file (--from_module) defines

    get_prompter(args, pipe, networks) -> prompter

where `args` has every flag of the script as an attribute, `pipe` is the loaded model (ModelBundle of
library.families.base: unet, text_encoders, vae, tokenizers) and `networks` are the NetworkFiles of --network_weights.
The prompter is called as

    prompter(args, pipe, seed_random, iter_seed, prompt_index, global_step) -> a prompt line, or None

`seed_random` is a random.Random that follows from --seed, `iter_seed` the seed of this repetition of the list
(--iter_same_seed) or None; `prompt_index` counts the prompts of this repetition and `global_step` those of the run,
from 0. None ends the list, which is gone through --n_iter times. A method `shuffle()` serves --shuffle_prompts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.generate.config import GenerationConfig
from library.generate.options import PromptOptions
from library.generate.prompt_line import OPTION_MARK, RawLine
from library.generate.request import BrokenLines, GenerationRequest, RequestMaker
from library.options import OptionError, options_of, require

if TYPE_CHECKING:
    from library.families.base import ModelBundle

logger = logging.getLogger(__name__)

MODULE = "--from_module"
MOST_BROKEN = 100  # lines in a row that can't be drawn, until a prompter is taken to make no others
QUESTION = "\nType prompt: "

GetPrompter = Callable[..., Any]  # see above
Check = Callable[[list[GenerationRequest]], None]  # raises OptionError, which names the line


def check(prompts: PromptOptions) -> None:
    """Raise OptionError where live prompts can't be had; say which flags have no effect."""
    if prompts.from_module is not None:
        is_file = Path(prompts.from_module).is_file()
        require(is_file, MODULE, f"{prompts.from_module} does not exist", "name a Python file that has get_prompter()")
    elif prompts.prompter_module_args is not None:
        logger.warning("--prompter_module_args has no effect without --from_module")
    if prompts.interactive:
        require(sys.stdin is not None, "--interactive", "there is nothing to read prompts from", "use --from_file")
    elif prompts.no_preview:
        logger.warning("--no_preview has no effect without --interactive")


@dataclass
class LivePrompts:
    """The requests of prompts that come one at a time; lines that are wrong are said and left out."""

    config: GenerationConfig
    maker: RequestMaker
    check: Check
    broken: BrokenLines  # gets what is wrong with lines of the module

    def typed(self) -> Iterator[list[GenerationRequest]]:
        """The pictures of each prompt that is typed, until the input ends."""
        mistakes = BrokenLines()  # whoever typed them sees them
        self.maker.begin_iteration()
        for line in typed_lines():
            made = self._made(line, mistakes)
            if made:
                yield made

    def of_module(self, get_prompter: GetPrompter, bundle: ModelBundle) -> Iterator[GenerationRequest]:
        """The pictures of the prompts that --from_module makes."""
        options = self.maker.prompts
        arguments, networks = flags_as_attributes(self.config), self.config.networks.files
        with blamed_on_file(str(options.from_module)):
            prompter = get_prompter(arguments, bundle, networks)
        require(callable(prompter), MODULE, f"get_prompter() of {options.from_module} returned {prompter!r}",
                "it returns a function that makes prompts")  # fmt: skip
        source = random.SystemRandom() if options.seed is None else random.Random(f"prompts, {options.seed}")
        global_step = 0
        for _ in range(options.n_iter):
            self.maker.begin_iteration()
            if options.shuffle_prompts and callable(getattr(prompter, "shuffle", None)):
                with blamed_on_file(str(options.from_module)):
                    prompter.shuffle()
            prompt_index = broken_in_a_row = 0
            iter_seed = self.maker.seeds.of_prompt(1)[0] if options.iter_same_seed else None
            while True:
                with blamed_on_file(str(options.from_module)):
                    text = prompter(arguments, bundle, source, iter_seed, prompt_index, global_step)
                if text is None:
                    break
                require(isinstance(text, str), MODULE, f"{options.from_module} made {text!r}", "prompts are texts")
                made = self._made(RawLine(text, f"{options.from_module}, prompt {prompt_index + 1}"), self.broken)
                broken_in_a_row = 0 if made else broken_in_a_row + 1
                require(broken_in_a_row < MOST_BROKEN, MODULE, f"{broken_in_a_row} prompts in a row can't be drawn")
                yield from made
                prompt_index += 1
                global_step += 1

    def _made(self, line: RawLine, broken: BrokenLines) -> list[GenerationRequest]:
        with broken.left_out():
            made = self.maker.of_line(line)
            self.check(made)
            return made
        return []


def typed_lines() -> Iterator[RawLine]:
    """Lines of the standard input until it ends; those with nothing in front of their options are asked for again."""
    number = 0
    while True:
        try:
            text = input(QUESTION)
        except EOFError:
            return
        except UnicodeDecodeError:
            logger.error("what was typed is not UTF-8 text")
            continue
        if f" {text.strip()}".split(OPTION_MARK)[0].strip():
            number += 1
            yield RawLine(text, f"typed prompt {number}")


def imported_prompter(options: PromptOptions) -> GetPrompter | None:
    """`get_prompter` of --from_module's file, None without that flag; OptionError where the file has none."""
    if options.from_module is None:
        return None
    path = Path(options.from_module)
    spec = importlib.util.spec_from_file_location("prompter", path)
    way_out = "name a Python file that has get_prompter(args, pipe, networks)"
    if spec is None or spec.loader is None:
        raise OptionError(MODULE, f"{path} is no Python file", way_out)
    module = importlib.util.module_from_spec(spec)
    with blamed_on_file(str(path)):
        spec.loader.exec_module(module)
    function = getattr(module, "get_prompter", None)
    require(callable(function), MODULE, f"{path} has no function get_prompter()", way_out)
    return function


@contextlib.contextmanager
def blamed_on_file(path: str) -> Iterator[None]:
    """What goes wrong in the user's Python file is said with the flag, the file and the line in it."""
    try:
        yield
    except SystemExit as end:
        raise OptionError(MODULE, f"{path} ends the program ({end})", "take that out of it") from None
    except SyntaxError as error:
        raise OptionError(MODULE, f"{error.filename}, line {error.lineno}: {error.msg}", "correct it") from None
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if Path(call.filename) == Path(path)]
        place = f"{path}, line {lines[-1]}" if lines else path
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(MODULE, f"{place}: {type(error).__name__}: {reason}", "correct it") from error


def flags_as_attributes(config: GenerationConfig) -> SimpleNamespace:
    """Every flag's value by its name, as Python files of users expect them."""
    groups = [getattr(config, group.name) for group in fields(config)]
    return SimpleNamespace(
        **{option.name: getattr(group, option.name) for group in groups for option in options_of(type(group))}
    )
