"""Clean the tags and captions of a metadata file. See docs/finetuning_data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.metadata_tools import clean  # noqa: E402

if __name__ == "__main__":
    sys.exit(clean(__doc__))
