"""metadata_cache.json: sizes and captions of a folder's images in the trade's form, for other programs.

An object {image path: {"caption", "resolution"}}. It is only written: what another start needs is in the index.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from library.data.records import ImageRecord

logger = logging.getLogger(__name__)

NAME = "metadata_cache.json"


def write_info(folder: Path, images: Iterable[ImageRecord]) -> None:
    """Write the file, if it isn't there with the same content; a warning where that can't be."""
    path = folder / NAME
    content = json.dumps({image.path: _entry(image) for image in images})
    try:
        if path.read_text(encoding="utf-8") == content:
            return
    except (OSError, ValueError):
        pass
    temporary = folder / f"{NAME}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("--cache_info: can't write %s (%s)", path, error.strerror)
        with contextlib.suppress(OSError):  # a read-only disk says so here too
            temporary.unlink()


def _entry(image: ImageRecord) -> dict[str, object]:
    width, height = image.size_wh
    as_stored = [height, width] if image.orientation >= 5 else [width, height]
    return {"caption": image.caption, "resolution": as_stored}
