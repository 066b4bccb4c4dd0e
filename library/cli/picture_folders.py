"""What tools for folders of pictures have in common."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.cli.output_places import ANOTHER_FOLDER
from library.data.headers import BadImage
from library.data.listing import entries_of, is_file, is_image
from library.options import OptionError
from library.progress import progress_bar
from library.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

BEST = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}  # colours in full resolution


@dataclass(frozen=True)
class PictureFolder:
    """What lies directly in a folder, by its paths."""

    pictures: tuple[Path, ...]
    others: tuple[Path, ...]  # other files

    @classmethod
    def of(cls, name: str, flag: str) -> PictureFolder:
        """OptionError naming `flag` where there are no pictures, and for two that would become one file."""
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise OptionError(flag, f"{folder} is no folder", "name the folder of the pictures")
        paths = [Path(entry.path) for entry in entries_of(folder, flag) if is_file(entry)]
        pictures = tuple(path for path in paths if is_image(path.name))
        if not pictures:
            raise OptionError(flag, f"{folder} holds no pictures", "name the folder that they are directly in")
        refuse_equal(pictures, lambda path: path.stem, flag)
        return cls(pictures, tuple(path for path in paths if not is_image(path.name)))

    def beside(self, picture: Path) -> Iterator[Path]:
        """Files of the picture's name with other extensions."""
        return (path for path in self.others if path.stem == picture.stem)


class LeftOutError(OptionError):
    """Some pictures can't be used; all others are done."""

    exit_code = 1


class LeftOut:
    """Pictures that can't be used, each named when it turns up."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def note(self, path: Path, error: BadImage) -> None:
        self.reasons.append(f"{path.name} ({error})")
        logger.warning("left out: %s", self.reasons[-1])

    def tell(self, of: int, flag: str) -> None:
        """LeftOutError naming `flag` where there are any, of so many."""
        if self.reasons:
            problem = f"{len(self.reasons)} of {counted(of, 'picture')} can't be used and were left out"
            raise LeftOutError(flag, f"{problem}: {self.reasons[0]}", "mend or remove them")


def refuse_equal(pictures: Sequence[Path], name_of: Callable[[Path], str], flag: str) -> None:
    """OptionError naming `flag` for pictures that become files of one name, on systems that don't see capitals too."""
    by_name: dict[str, Path] = {}
    for path in pictures:
        other = by_name.setdefault(name_of(path).lower(), path)
        if other is not path:
            raise OptionError(flag, f"{other} and {path} would become one file", "rename one of them")


def work_through(
    pictures: Sequence[Path], work: Callable[[Path], object], what: str, flag: str, *, threads: int = 1
) -> None:
    """Do `work` for each picture; one for which it raises BadImage is left out, and LeftOutError tells at the end.

    `what` is shown beside the progress, `flag` named the folder.
    """
    left_out = LeftOut()

    def done(path: Path) -> BadImage | None:
        try:
            work(path)
        except BadImage as error:
            return error
        return None

    with progress_bar(desc=what, total=len(pictures), unit="picture") as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for path, error in zip(pictures, pool.map(done, pictures), strict=True):
                bar.update()
                if error:
                    left_out.note(path, error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    left_out.tell(len(pictures), flag)


def encoded(image: Image, extension: str) -> bytes:
    """A file of the picture in the format of an extension, at its best quality; BadImage for a format that can't be."""
    from PIL import Image as pillow

    kind = pillow.registered_extensions().get(extension.lower(), "")
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **BEST.get(kind, {}))
    except (OSError, KeyError, ValueError) as error:
        raise BadImage(f"can't be written as {extension}: {error}") from None
    return buffer.getvalue()


def write_picture(path: Path, data: bytes, flag: str) -> None:
    """A file of which a program that is interrupted leaves nothing; OptionError naming `flag` where it can't be.

    Unlike `atomic_file` it does not wait for the disk: pictures are many, and made again in no time.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OptionError(flag, f"{path} can't be written ({error.strerror})", ANOTHER_FOLDER) from None
        raise
