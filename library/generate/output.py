"""Pictures as files: names, PNG metadata, writing in the background without ever losing or replacing a file."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from library.generate.infotext import infotext
from library.generate.model_names import ModelNames
from library.generate.options import OutputOptions
from library.generate.picture_texts import EXIF_FOLDER, USER_COMMENT, as_comment
from library.generate.request import GenerationRequest
from library.generate.sidecar import sidecar
from library.options import OptionError, require

if TYPE_CHECKING:
    from PIL import Image

FLAG = "--outdir"
# file name's suffix -> (Pillow's name of the format, settings); JPEG and WebP at their best quality
FORMATS = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"quality": 100}),
    ".jpg": ("JPEG", {"quality": 100, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 100, "subsampling": 0}),
}
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # file systems such as exFAT
MOST_WAITING = 16  # pictures that may wait for the disk before generation waits, too


def prepare_folder(path: str | Path, largest_bytes: int) -> Path:
    """Make the folder and try it; raises OptionError where it can't hold a picture of `largest_bytes`."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        way_out = "name a folder you may write to"
        raise OptionError(FLAG, f"can't write to {folder} ({error.strerror})", way_out) from None
    free = shutil.disk_usage(folder).free
    require(free > largest_bytes, FLAG, f"{folder} has {free >> 20} MiB left on its disk", "free some space")
    return folder


def time_names(request: GenerationRequest, index: int, moment: time.struct_time, stage: str = "") -> Iterator[str]:
    """im_{local time}_{stage}{index in the batch}_{seed}.png, and the same with _2, _3 ... behind it."""
    return numbered_names(f"im_{time.strftime('%Y%m%d%H%M%S', moment)}_{stage}{index:03d}_{request.seed}")


def numbered_names(stem: str, suffix: str = ".png") -> Iterator[str]:
    """{stem}.png, {stem}_2.png, {stem}_3.png ..."""
    yield f"{stem}{suffix}"
    number = 2
    while True:
        yield f"{stem}_{number}{suffix}"
        number += 1


def own_names(file_name: str, stage: str = "") -> Iterator[str]:
    """The name that a prompt's --f or a picture's source gives, then with _2, _3 ...

    Without a suffix of FORMATS it is a PNG file. First stages of highres fix ("0") get _1st.
    """
    stem, suffix = split_name(file_name)
    return numbered_names(f"{stem}_1st" if stage == "0" else stem, suffix)


def split_name(file_name: str) -> tuple[str, str]:
    """Stem and suffix of a name that prompts ask for; the suffix is one of FORMATS."""
    path = Path(file_name)
    return (path.stem, path.suffix) if path.suffix.lower() in FORMATS else (file_name, ".png")


def sequential_names(folder: Path, stage: str = "") -> Iterator[str]:
    """im_{stage}000001.png and on, behind the highest number that the folder holds."""
    pattern = re.compile(rf"im_{stage}(\d{{6,}})\.png")
    taken = [int(match[1]) for entry in os.scandir(folder) if (match := pattern.fullmatch(entry.name))]
    number = max(taken, default=0)
    while True:
        number += 1
        yield f"im_{stage}{number:06d}.png"


# PNG text chunks in the trade's order: what each says of a picture, None where it says nothing
TEXTS: Sequence[tuple[str, Callable[[GenerationRequest], str | None]]] = (
    ("prompt", lambda request: request.prompt),
    ("seed", lambda request: str(request.seed)),
    ("sampler", lambda request: request.sampler),
    ("steps", lambda request: str(request.steps)),
    ("scale", lambda request: str(request.scale)),
    ("negative-prompt", lambda request: request.negative_prompt),
    ("negative-scale", lambda request: None if request.negative_scale is None else str(request.negative_scale)),
    ("clip-prompt", lambda request: request.clip_prompt),
    ("raw-prompt", lambda request: request.raw_prompt or None),
)


def metadata(request: GenerationRequest, names: ModelNames) -> dict[str, str]:
    """Text chunks by name; the last one, `parameters`, is what web user interfaces read."""
    texts = {name: text for name, written in TEXTS if (text := written(request)) is not None}
    sizes = {name.replace("_", "-"): str(value) for name, value in request.sizes.given.items()}
    return {**texts, **sizes, "parameters": infotext(request, names)}


def encode(image: Image.Image, texts: dict[str, str], suffix: str) -> bytes:
    """The picture as a file of the format that goes with `suffix`.

    JPEG and WebP have no text chunks: there `parameters` stands in the EXIF comment, where web user interfaces look.
    """
    kind, settings = FORMATS[suffix.lower()]
    if kind == "PNG":
        return encode_png(image, texts)
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = as_comment(texts["parameters"])
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **settings)
    return buffer.getvalue()


def encode_png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """The picture as a PNG file with text chunks, in this order."""
    from PIL import PngImagePlugin  # here, because command lines import this file to check the folder

    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_new(folder: Path, names: Iterator[str], data: bytes, flag: str = FLAG) -> Path:
    """Write `data` under the first free name, whole or not at all; raises OptionError when the disk won't take it.

    The data is on the disk before it gets its name, so a program that is killed leaves no broken picture. `flag` named
    the folder.
    """
    with _written(folder, data, flag) as temporary:
        return _take_name(temporary, folder, names)


def replace_file(path: Path, data: bytes, flag: str = FLAG) -> None:
    """Write `data` as `path`, whole or not at all, in place of what may be there; see :func:`write_new`."""
    with _written(path.parent, data, flag) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def _written(folder: Path, data: bytes, flag: str) -> Iterator[Path]:
    """A file with `data`, to be renamed inside the block; errors of the disk become OptionError."""
    temporary = folder / f".{secrets.token_hex(8)}.part"  # not by tempfile, whose files are private
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        way_out = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OptionError(flag, f"can't write to {folder} ({error.strerror})", way_out) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class PictureWriter:
    """Encodes and writes pictures in a background thread, in order; leaving the context waits for the last one.

    An error of the disk is raised by the next `write`, or on leaving.
    """

    def __init__(
        self,
        folder: Path,
        options: OutputOptions,
        model_names: Callable[[], ModelNames],
        paths: list[Path] | None = None,
    ) -> None:
        """`model_names` is asked in the background: a hash takes its time. `paths` gets what is written."""
        self.folder = folder
        self._model_names = functools.cache(model_names)
        self.paths: list[Path] = [] if paths is None else paths
        self._options = options
        self._running: dict[str, Iterator[str]] = {}  # by stage
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        self._waiting: deque[Future[Path]] = deque()

    def write(self, image: Image.Image, request: GenerationRequest, index: int, stage: str = "") -> None:
        """Hand over one picture; `index` is its place in the batch, `stage` goes into its name."""
        self._collect(MOST_WAITING)
        names = self._names(request, index, stage)

        def to_disk() -> Path:
            suffix, weights = split_name(request.file_name)[1], self._model_names()
            path = write_new(self.folder, names, encode(image, metadata(request, weights), suffix))
            if self._options.sidecar:
                write_new(self.folder, numbered_names(path.name, ".json"), sidecar(request, weights).encode())
            return path

        self._waiting.append(self._pool.submit(to_disk))

    def _names(self, request: GenerationRequest, index: int, stage: str) -> Iterator[str]:
        """What the picture may be called, the best name first."""
        if request.file_name:
            return own_names(request.file_name, stage)
        source = (request.first_stage or request).image
        if self._options.use_original_file_name and source:
            return own_names(f"{Path(source).stem}.png", stage)
        if self._options.sequential_file_name:
            return self._running.setdefault(stage, sequential_names(self.folder, stage))
        return time_names(request, index, time.localtime(), stage)

    def _collect(self, most: int) -> None:
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self.paths.append(self._waiting.popleft().result())

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            self._collect(0)


def _take_name(temporary: Path, folder: Path, names: Iterator[str]) -> Path:
    """Give a file the first name that is free, in one step of the file system that never replaces another file."""
    while True:
        path = folder / next(names)
        try:
            _rename_to_new(temporary, path)
        except FileExistsError:
            continue
        return path


def _rename_to_new(source: Path, path: Path) -> None:
    if os.name == "nt":
        os.rename(source, path)  # fails there where the name is taken
        return
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        path.open("xb").close()  # without hard links: the name first; it is empty until the next line
        os.replace(source, path)
