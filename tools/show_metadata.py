"""Show the metadata of a .safetensors file as JSON. See docs/models_and_loras.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.safetensors_io import read_header
from library.cli.tools import Tool
from library.options import opt


@dataclass(frozen=True)
class ShowOptions:
    """What is shown."""

    model: str = opt("", help=".safetensors file whose metadata is shown")
    readable: bool = opt(False, help="for people: texts that hold JSON unfolded, letters of all languages as they are")


def show(options: ShowOptions) -> None:
    """Print the metadata; OptionError for what is no such file."""
    metadata = read_header(Path(options.model).expanduser(), "--model").metadata
    print(text_of(metadata, is_readable=options.readable))


def text_of(metadata: Mapping[str, str], *, is_readable: bool = False) -> str:
    """Metadata as JSON with sorted keys; those that are `is_readable` can't be told from what they were as texts."""
    if not metadata:
        return "No metadata found"
    content = {key: unfolded(text) for key, text in metadata.items()} if is_readable else metadata
    return json.dumps(content, indent=4, sort_keys=True, ensure_ascii=not is_readable)


def unfolded(text: str) -> Any:
    """The object or list whose JSON a text is, or the text."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


TOOL = Tool(__doc__, ShowOptions, show, required=("model",))

if __name__ == "__main__":
    sys.exit(TOOL.run())
