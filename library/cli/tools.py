"""How a tool runs that is no trainer and no generator: its command line, its work, its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.cli.console import start_console
from library.cli.ending import Ending
from library.options import OptionParser, add_arguments, build, options_of

READER_GONE = 141  # exit code: as a shell says of a program that SIGPIPE ended


@dataclass(frozen=True)
class Tool:
    """A command: what it is told (a group of options) and what it does with that.

    The work begins after the command line was read; what it needs of torch it imports itself, so that help and
    mistakes are answered at once.
    """

    description: str | None
    group: type
    work: Callable[[Any], None]  # of an instance of the group
    positionals: Sequence[str] = ()  # options of the group that are given by place, in this order
    required: Sequence[str] = ()  # options of the group that have to be given
    short: Mapping[str, str] = field(default_factory=dict)  # option -> its short flag: {"show_all_keys": "-s"}
    renamed: Mapping[str, str] = field(default_factory=dict)  # in messages: names that shared code uses -> this tool's
    with_value: Sequence[str] = ()  # switches after which older command lines have True or False

    def parser(self) -> OptionParser:
        parser = OptionParser(description=self.description)
        options = {option.name: option for option in options_of(self.group)}
        for name in self.positionals:
            nargs = "*" if options[name].many else None
            parser.add_argument(name, type=options[name].kind, nargs=nargs, help=options[name].help)
        add_arguments(parser, self.group, omitted=(*self.positionals, *self.short, *self.with_value))
        for name, letter in self.short.items():
            parser.add_argument(letter, f"--{name}", action="store_true", help=options[name].help)
        for name in self.with_value:
            kind, default = options[name].kind, options[name].default
            parser.add_argument(
                f"--{name}", nargs="?", const=True, type=_truth(kind), default=default, help=options[name].help
            )
        return parser

    def run(self, argv: Sequence[str] | None = None) -> int:
        """0 when done, 2 for a mistake of the user's and for files that can't be used, 130 when interrupted, else 1."""
        parser = self.parser()
        values = vars(parser.parse_strictly(argv))
        for name in self.required:
            if values[name] in (None, "", (), []):
                parser.error(f"--{name} is needed; see {parser.prog} --help")
        start_console()
        with Ending(parser.prog, dict(self.renamed), is_tool=True) as ending:
            options = build(self.group, values, self._flag)
            try:
                self.work(options)
                sys.stdout.flush()
            except BrokenPipeError:  # whoever reads the output has seen enough, such as `head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
                return READER_GONE
        return ending.code

    def _flag(self, name: str) -> str:
        return name if name in self.positionals else f"--{name}"


def _truth(kind: type) -> Callable[[str], bool]:
    """For a switch that may have a value: what the word says, in any case of its letters."""

    def parse(word: str) -> bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
        if word.lower() not in known:
            raise ValueError
        return known[word.lower()]

    parse.__name__ = kind.__name__
    return parse
