"""What is written in pictures: text chunks of PNG files, and the EXIF comment of JPEG and WebP files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.options import OptionError

EXIF_FOLDER = 0x8769  # of EXIF's own tags among those of TIFF
USER_COMMENT = 0x9286
UNICODE = b"UNICODE\0"  # how a comment begins that is UTF-16, here with the high byte first, as the web UIs write it
ASCII = b"ASCII\0\0\0"


def picture_texts(path: str | Path, flag: str) -> dict[str, str]:
    """Texts by name, `parameters` among them where a web user interface or this program made the picture.

    Raises OptionError, which names `flag`, for files that are no pictures.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
            texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
            comment = comment_of(image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT))
    except FileNotFoundError:
        raise OptionError(flag, f"{path} does not exist", "check the path") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise OptionError(flag, f"{path} can't be read as a picture ({error})") from None
    return texts if "parameters" in texts or not comment else {**texts, "parameters": comment}


def as_comment(text: str) -> bytes:
    """A text as an EXIF comment."""
    return UNICODE + text.encode("utf-16-be", errors="replace")


def comment_of(value: Any) -> str:
    """The text of an EXIF comment; "" where there is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return ""
    if value.startswith(UNICODE):
        text = value[len(UNICODE) :]
        # latin text has its zeros first with the high byte first; some programs write it the other way round
        order = "utf-16-le" if text[1::2].count(0) > text[::2].count(0) else "utf-16-be"
        return text.decode(order, errors="replace").strip("\0")
    return value.removeprefix(ASCII).decode("utf-8", errors="replace").strip("\0")
