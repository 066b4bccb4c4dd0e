"""Pictures that a run is given: which files they are, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.options import OptionError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp"))  # what counts in a folder


def picture_paths(given: Sequence[str], flag: str) -> tuple[str, ...]:
    """The files themselves, and those of folders sorted by name, one after the other.

    Raises OptionError naming `flag` for a path that does not exist, a folder without pictures, a file that is none.
    """
    paths: list[Path] = []
    for text in given:
        path = Path(text).expanduser()
        if not path.exists():
            raise OptionError(flag, f"{path} does not exist", "name a picture, or a folder of them")
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix.lower() in EXTENSIONS and item.is_file())
            if not found:
                raise OptionError(flag, f"{path} holds no picture", f"pictures end in {', '.join(sorted(EXTENSIONS))}")
            paths += found
        else:
            paths.append(path)
    for path in paths:
        _check(path, flag)
    return tuple(map(str, paths))


def _check(path: Path, flag: str) -> None:
    """Raise OptionError unless the file begins as a picture does; its pixels are not read."""
    from PIL import Image

    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _broken(path, flag, error) from None


def read_picture(path: str, flag: str) -> Image.Image:
    """The picture as it is shown: turned as its camera was held, in RGB, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _broken(Path(path), flag, error) from None


def _broken(path: Path, flag: str, error: Exception) -> OptionError:
    reason = "it is no picture" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return OptionError(flag, f"{path} can't be read ({reason})", "copy or download it again, or leave it out")
