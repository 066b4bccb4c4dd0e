"""Options of the tools that make metadata files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.data.option_values import parse_extension
from library.options import opt, path_of, require


@dataclass(frozen=True)
class MergeOptions:
    """Which texts go into a metadata file, and under which names."""

    in_json: Path | None = opt(
        cli=str,
        parse=path_of,
        help="metadata file (.json, .jsonl or .parquet) whose entries are kept; without it the file that is written, "
        "if it is there",
    )
    caption_extension: str = opt(".caption", parse=parse_extension, help="extension of the text files")
    full_path: bool = opt(False, help="name images by their paths, in place of their names without extension")
    recursive: bool = opt(False, help="look into sub-folders too; needs --full_path")
    on_missing_text: str = opt(
        "stop",
        choices=("stop", "skip", "empty"),
        help="images without a text file: list them and stop, leave them out, or enter them without a text",
    )
    debug: bool = opt(False, help="show each image with its text")

    def __post_init__(self) -> None:
        problem = "finds images of several folders, which may share their names"
        require(self.full_path or not self.recursive, "--recursive", problem, "add --full_path")


@dataclass(frozen=True)
class AliasOptions:
    """Old spellings."""

    caption_extention: str | None = opt(help="the same as --caption_extension, and counts before it")


@dataclass(frozen=True)
class CleanOptions:
    """What is said of the work."""

    debug: bool = opt(False, help="show each text that changes, before and after")
