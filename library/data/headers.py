"""Size and orientation of image files from their headers, over one small read.

Formats are told by their first bytes, not by the file's name. PNG, JPEG, WebP and BMP are read here (PNG: W3C PNG 3rd
edition; JPEG: ITU-T T.81 with Exif 2.32; WebP: RFC 9649); everything else, and rare variants, by Pillow.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import struct
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

PLUGINS = (("pillow_avif", "pillow_avif"), ("pillow_jxl", "pillow_jxl"), ("jxlpy", "jxlpy.JXLImagePlugin"))
HEAD_BYTES = 4096  # covers nearly every header, and a page of the disk is read in any case
MAX_SIDE = 20_000  # an image of this width and height is the largest that is read
MAX_TEXT_BYTES = 64 * 2**20  # of one text in a PNG; image generators keep whole workflows there
ORIENTATION_TAG = 0x0112
PACKED = struct.Struct("<IIB?Q")
PNG_ALPHA_TYPES = (4, 6)  # grey and colour with alpha; others may have a tRNS chunk
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:="|>)([1-8])""")
JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))


class BadImage(ValueError):
    """Why a file can't be used as an image."""


class Header(NamedTuple):
    """What is known of an image without decoding it."""

    size_wh: tuple[int, int]  # upright: after the rotation that `orientation` asks for
    orientation: int  # of Exif or XMP: 1 (upright) to 8
    num_bytes: int  # of the file
    has_alpha: bool = False  # whether it can have transparent parts

    def packed(self) -> bytes:
        """As an index keeps it."""
        return PACKED.pack(*self.size_wh, self.orientation, self.has_alpha, self.num_bytes)

    @classmethod
    def unpacked(cls, packed: bytes) -> Header | None:
        """None for what was not packed so."""
        if len(packed) != PACKED.size:
            return None
        width, height, orientation, has_alpha, num_bytes = PACKED.unpack(packed)
        return cls((width, height), orientation, num_bytes, has_alpha)


Stored = tuple[tuple[int, int], int, bool]  # (width, height) as stored, orientation, whether it has alpha


class _Unknown(Exception):
    """Not one of the formats read here."""


def read_header(path: str) -> Header:
    """The header of an image file; raises BadImage with the reason."""
    try:
        with open(path, "rb", buffering=0) as file:
            view = _View(file)
            try:
                size, orientation, has_alpha = _reader(view)(view)
            except _Unknown:
                size, orientation, has_alpha = _read_with_pillow(path)
    except OSError as error:
        raise BadImage(error.strerror or "can't be read") from None
    except (struct.error, IndexError):
        raise BadImage("cut off within its header") from None
    check_size(size)
    return Header((size[1], size[0]) if orientation >= 5 else size, orientation, view.length, has_alpha)


def check_size(size_wh: tuple[int, int]) -> None:
    """Raise BadImage for sizes that no picture has, before memory is taken for it."""
    width, height = size_wh
    if min(size_wh) < 1:
        raise BadImage("says that it has no pixels")
    if width * height > MAX_SIDE**2:
        raise BadImage(f"says that it has {width}x{height} pixels; {MAX_SIDE}x{MAX_SIDE} is the largest that is read")


class _View:
    """Random access to a file whose beginning is at hand."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.head = file.read(HEAD_BYTES)
        self.length = os.fstat(file.fileno()).st_size

    def at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, or fewer at the end of the file."""
        if offset + count <= len(self.head):
            return self.head[offset : offset + count]
        self.file.seek(offset)
        return self.file.read(count)


def _reader(view: _View) -> Callable[[_View], Stored]:
    head = view.head
    if not head:
        raise BadImage("is empty")
    if head.startswith(PNG_SIGNATURE):
        return _png
    if head.startswith(b"\xff\xd8"):
        return _jpeg
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp
    if head.startswith(b"BM"):
        return _bmp
    raise _Unknown


def open_image(source: str | BinaryIO) -> Image:
    """Pillow's image, not yet decoded, with the plug-ins for AVIF and JPEG XL that are installed.

    Raises BadImage for one that is too large, and whatever Pillow raises.
    """
    from PIL import Image

    _prepare_pillow()
    image = Image.open(source)
    check_size(image.size)
    return image


@functools.cache
def _prepare_pillow() -> None:
    """Register plug-ins and replace Pillow's limits by the ones here; Pillow offers no way to do that per image.

    Its limit on pixels would refuse, or warn of, pictures that people do train on; its limit on texts, pictures that
    hold a long workflow. Its warnings are about files that the check finds broken, or that are well.
    """
    from PIL import Image, PngImagePlugin

    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_MEMORY = 4 * MAX_TEXT_BYTES
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for package, module in PLUGINS:
        if importlib.util.find_spec(package):
            importlib.import_module(module)


def _read_with_pillow(path: str) -> Stored:
    from PIL import UnidentifiedImageError

    try:
        with open_image(path) as image:
            orientation = image.getexif().get(ORIENTATION_TAG, 1)
            size, has_alpha = image.size, image.has_transparency_data
    except UnidentifiedImageError:
        raise BadImage("is not an image, or of a kind that this Pillow can't read") from None
    except Exception as error:  # plug-ins raise whatever they like on broken files
        raise BadImage(f"can't be read ({error})") from None
    return size, orientation if orientation in range(1, 9) else 1, has_alpha


# ---------------------------------------------------------------------------------------------- formats


def _png(view: _View) -> Stored:
    size = struct.unpack(">II", view.at(16, 8))
    has_alpha = view.at(25, 1)[0] in PNG_ALPHA_TYPES
    orientation, offset = 1, 33
    while True:
        length, kind = struct.unpack(">I4s", view.at(offset, 8))
        has_alpha |= kind == b"tRNS"
        if kind == b"eXIf":
            orientation = _tiff_orientation(view.at(offset + 8, length))
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and orientation == 1:
            text = view.at(offset + 8, min(length, 22))
            if text.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
                raise _Unknown  # Exif or XMP in text form, maybe compressed
        elif kind in (b"IDAT", b"IEND"):
            break
        offset += 12 + length
    return size, orientation, has_alpha


def _jpeg(view: _View) -> Stored:
    orientation = xmp_orientation = 1
    offset = 2
    while True:
        fill, marker, length = struct.unpack(">BBH", view.at(offset, 4))
        if fill != 0xFF:
            raise BadImage("is a damaged JPEG: no marker where one belongs")
        if marker == 0xFF or marker in JPEG_BARE_MARKERS:  # a fill byte, or a marker without content
            offset += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            raise BadImage("is a damaged JPEG: its pixels begin before its size is told")
        if marker == 0xE1:
            start = view.at(offset + 4, 6)
            if start == b"Exif\0\0":
                orientation = _tiff_orientation(view.at(offset + 10, length - 8))
            elif start == b"http:/":
                found = XMP_ORIENTATION.search(view.at(offset + 4, length - 2))
                xmp_orientation = int(found[1]) if found else xmp_orientation
        elif marker in JPEG_SIZE_MARKERS:
            height, width = struct.unpack(">HH", view.at(offset + 5, 4))
            break
        offset += 2 + length
    return (width, height), xmp_orientation if orientation == 1 else orientation, False


def _webp(view: _View) -> Stored:
    kind = view.at(12, 4)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", view.at(26, 4))
        return (width & 0x3FFF, height & 0x3FFF), 1, False
    if kind == b"VP8L":
        bits = struct.unpack("<I", view.at(21, 4))[0]
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), 1, bool(bits >> 28 & 1)
    if kind != b"VP8X":
        raise _Unknown
    flags, size = view.at(20, 1)[0], view.at(24, 6)
    width, height = (int.from_bytes(part, "little") + 1 for part in (size[:3], size[3:]))
    if len(size) < 6:
        raise BadImage("cut off within its header")
    return (width, height), _webp_orientation(view) if flags & 0x08 else 1, bool(flags & 0x10)


def _webp_orientation(view: _View) -> int:
    offset = 12
    while offset + 8 <= view.length:
        kind, length = struct.unpack("<4sI", view.at(offset, 8))
        if kind == b"EXIF":
            return _tiff_orientation(view.at(offset + 8, length).removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    return 1


def _bmp(view: _View) -> Stored:
    if struct.unpack("<I", view.at(14, 4))[0] < 40:
        raise _Unknown  # the OS/2 variant
    width, height = struct.unpack("<ii", view.at(18, 8))
    return (width, abs(height)), 1, False


def _tiff_orientation(block: bytes) -> int:
    """The orientation in a TIFF block, as Exif holds it; 1 where it says nothing valid."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, directory)
        for index in range(count):
            tag, kind = struct.unpack_from(f"{order}HH", block, directory + 2 + 12 * index)
            if tag == ORIENTATION_TAG:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", block, directory + 10 + 12 * index)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a damaged block: the picture itself may be well
    return 1
