"""Windows that show a picture until a key is pressed, where there is a screen and OpenCV can draw on it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from PIL import Image

from library.generate.request import GenerationRequest

logger = logging.getLogger(__name__)

LONGEST_TITLE = 128  # characters
WAIT = 100  # milliseconds between two looks at the keyboard; Ctrl-C is noticed in between


class PreviewWindows:
    """Shows pictures one by one; where that can't be done it is said once, and nothing more is tried."""

    def __init__(self) -> None:
        self._is_possible = True

    def show(self, pictures: Sequence[tuple[GenerationRequest, Image.Image]]) -> None:
        for request, picture in pictures:
            if not self._is_possible:
                return
            reason = _show(request.prompt[:LONGEST_TITLE], picture)
            if reason:
                self._is_possible = False
                logger.warning("no windows with pictures: %s (--no_preview leaves them out)", reason)


def _show(title: str, picture: Image.Image) -> str:
    """Show a picture until a key is pressed or its window is closed; what stands in the way, or ""."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no screen"
    try:
        import cv2
        import numpy as np
    except ImportError:
        return "they need the package opencv-python"
    try:
        cv2.imshow(title, np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1]))  # blue first
        while cv2.waitKey(WAIT) < 0 and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) >= 1:
            pass
        cv2.destroyAllWindows()
    except cv2.error:
        return "this OpenCV has no windows (opencv-python-headless); opencv-python has"
    return ""
