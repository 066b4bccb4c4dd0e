"""The command lines of the tools that make and clean metadata files."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.cli.console import start_console
from library.cli.ending import Ending
from library.data.metadata_options import AliasOptions, CleanOptions, MergeOptions
from library.data.metadata_tables import check_kind
from library.options import OptionError, OptionParser, add_arguments, build, require

logger = logging.getLogger(__name__)

OUTPUT_HELP = "metadata file to write: .json, .jsonl or .parquet"
INPUT_HELP = "metadata file (.json, .jsonl or .parquet)"


@dataclass(frozen=True)
class MergeTool:
    """A tool that puts the texts beside images into a metadata file."""

    description: str
    field: str  # of an image's entry: what the texts become
    defaults: Mapping[str, Any] | None = None
    groups: Collection[type] = (MergeOptions,)

    def parser(self) -> OptionParser:
        parser = OptionParser(description=self.description)
        parser.add_argument("train_data_dir", help="folder of the images, with a text file beside each")
        parser.add_argument("out_json", help=OUTPUT_HELP)
        for group in self.groups:
            add_arguments(parser, group, self.defaults)
        return parser

    def run(self, argv: Sequence[str] | None = None) -> int:
        """0 when done, 2 for a mistake of the user's, 130 when interrupted, 1 for anything else."""
        parser = self.parser()
        values = vars(parser.parse_strictly(argv))
        start_console()
        with Ending(parser.prog) as ending:
            from library.data.metadata_merging import merge_texts

            if AliasOptions in self.groups and build(AliasOptions, values).caption_extention:
                values["caption_extension"] = values["caption_extention"]
            merge_texts(
                Path(values["train_data_dir"]), _output(values["out_json"]), self.field, build(MergeOptions, values)
            )
        return ending.code


def clean_parser(description: str | None) -> OptionParser:
    parser = OptionParser(description=description)
    parser.add_argument("in_json", help=INPUT_HELP)
    parser.add_argument("out_json", help=OUTPUT_HELP)
    parser.add_argument("older", nargs="?", metavar="out_json", help="where a folder stands before the two files, as "
                        "in an older form of the command: the file to write")  # fmt: skip
    add_arguments(parser, CleanOptions)
    return parser


def clean(description: str | None, argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for a mistake of the user's, 130 when interrupted, 1 for anything else."""
    parser = clean_parser(description)
    values = vars(parser.parse_strictly(argv))
    start_console()
    with Ending(parser.prog) as ending:
        from library.data.metadata_merging import clean_metadata

        source, output = values["in_json"], values["out_json"]
        if values["older"] is not None:
            logger.warning("the folder of images (%s) is not needed any more, and has no effect", source)
            source, output = output, values["older"]
        clean_metadata(Path(source), _output(output), shows_changes=build(CleanOptions, values).debug)
    return ending.code


def _output(name: str) -> Path:
    """Raises OptionError for a place where no file can be written, before any work is done."""
    path = Path(name)
    folder = path.parent
    require(folder.is_dir(), "out_json", f"there is no folder {str(folder)!r}", "make it, or choose another place")
    if path.is_dir():
        raise OptionError("out_json", f"{name!r} is a folder", "name a file in it, such as metadata.json")
    check_kind(path, "out_json")
    return path
