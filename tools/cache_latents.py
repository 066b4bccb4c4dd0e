"""Encode the images of a data set once, into .npz files next to them. See docs/caching.md."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.caching import Tool, main

TOOL = Tool(description=__doc__, caches="latents")

if __name__ == "__main__":
    main(TOOL)
