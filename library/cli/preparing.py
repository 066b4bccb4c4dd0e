"""The command line of the tool that prepares a metadata file's images."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from library.checkpoints.probe import VAE_FLAG, check_vae
from library.cli.console import start_console
from library.cli.ending import Ending, leave
from library.cli.stopping import stoppable
from library.data.metadata_file import metadata_entries
from library.data.metadata_tables import check_kind
from library.options import OptionError, OptionParser, add_arguments, build, options_of
from library.train.preparing_options import PreparedFiles, PreparingOptions

logger = logging.getLogger(__name__)

MODEL = "model_name_or_path"


def main(description: str | None, argv: Sequence[str] | None = None) -> None:
    """Run the tool and end the program with its exit code."""
    leave(run(description, argv))


def run(description: str | None, argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for a mistake of the user's, 128 + n when stopped by signal n, 1 for anything else."""
    with Ending(Path(sys.argv[0]).name, renamed={VAE_FLAG: MODEL, "--resolution": "--max_resolution"}) as ending:
        values = vars(build_parser(description).parse_strictly(argv))
        files, options = build(PreparedFiles, values, str), build(PreparingOptions, values)
        start_console()
        for note in options.notes():
            logger.info(note)
        _check(files)
        with stoppable(ending):
            from library.train.preparing import prepare  # brings torch

            prepare(files, options)
    return ending.code


def build_parser(description: str | None) -> OptionParser:
    """A parser of four words and one flag per option."""
    parser = OptionParser(description=description)
    for option in options_of(PreparedFiles):
        parser.add_argument(option.name, type=str, help=option.help)
    add_arguments(parser, PreparingOptions, {"max_resolution": "512,512"})
    return parser


def _check(files: PreparedFiles) -> None:
    """Raise OptionError for what can't work."""
    if not files.train_data_dir.is_dir():
        raise OptionError("train_data_dir", f"{str(files.train_data_dir)!r} is not a folder", "name that of the images")
    if not any(metadata_entries(files.in_json, "in_json")):
        raise OptionError("in_json", f"{files.in_json} has no entries", "make them with merge_captions_to_metadata.py")
    if files.out_json.is_dir() or not files.out_json.absolute().parent.is_dir():
        problem = f"{str(files.out_json)!r} is a folder, or in one that is not there"
        raise OptionError("out_json", problem, "name a file")
    check_kind(files.out_json, "out_json")
    check_vae(files.model_name_or_path)
