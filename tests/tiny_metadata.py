"""Small metadata files for tests."""

from __future__ import annotations

import json
from pathlib import Path


def tiny_metadata(folder: Path, file: Path, **more: object) -> Path:
    """A metadata file of all images of a folder with the captions that lie beside them; `more` is in every entry."""
    entries = {}
    for text in sorted(folder.glob("*.txt")):
        entries[text.stem] = {"caption": text.read_text(encoding="utf-8"), **more}
    file.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    return file
