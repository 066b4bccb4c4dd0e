"""Small pictures for reports, as data URLs, made in threads."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from library.data.headers import open_image
from library.data.images import UPRIGHT, to_rgb, usable_cores
from library.data.records import ImageRecord

SIDE = 128  # pixels of the longer side
QUALITY = 72  # of JPEG
MADE_TOGETHER = 16  # images between two looks at the clock


def thumbnails(records: Sequence[ImageRecord], seconds: float = float("inf")) -> dict[str, str]:
    """Path -> data URL of the upright picture, in the order of `records` until `seconds` are used up.

    Pictures that can't be read are left out.
    """
    made: dict[str, str] = {}
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(records), MADE_TOGETHER):
            if time.perf_counter() > end:
                break
            chunk = records[start : start + MADE_TOGETHER]
            for record, url in zip(chunk, pool.map(_data_url, chunk), strict=True):
                if url is not None:
                    made[record.path] = url
    return made


def _data_url(record: ImageRecord) -> str | None:
    try:
        with open_image(record.path) as image:
            image.draft(image.mode, (SIDE, SIDE))  # a JPEG is decoded at no more than the size that is needed
            picture = to_rgb(image)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
            upright = UPRIGHT.get(record.orientation)
            content = io.BytesIO()
            (picture if upright is None else picture.transpose(upright)).save(content, "JPEG", quality=QUALITY)
    except Exception:  # Pillow's plug-ins raise whatever they like; a report can do without a picture
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
