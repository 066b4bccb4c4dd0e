"""Give every image of a metadata file its training size, and encode it into a .npz file next to it. See
docs/caching.md."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.preparing import main

if __name__ == "__main__":
    main(__doc__)
