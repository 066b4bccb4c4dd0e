"""Put the tags beside images into a metadata file. See docs/finetuning_data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.metadata_tools import MergeTool  # noqa: E402

TOOL = MergeTool(description=__doc__, field="tags", defaults={"caption_extension": ".txt"})

if __name__ == "__main__":
    sys.exit(TOOL.run())
