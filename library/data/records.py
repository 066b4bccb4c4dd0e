"""What is known of one training image before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A picture that says which parts of an image count: white all, black not at all."""

    path: str
    size_wh: tuple[int, int]  # upright
    orientation: int
    num_bytes: int  # of the file


@dataclass(frozen=True, slots=True)
class FromMetadata:
    """What a metadata file says of its image, and the latents that lie beside it."""

    tags: str  # what its tag statistics count
    train_wh: tuple[int, int] | None  # the size to train at
    npz: str | None = None  # latents
    flipped_npz: str | None = None  # those of the mirrored image, where older tools gave them a file of their own
    has_image: bool = True  # False: there are only latents, and the record's path is theirs


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file as found in its folder, or by its metadata."""

    path: str
    size_wh: tuple[int, int]  # upright
    orientation: int  # of Exif, 1-8
    caption: str
    num_bytes: int  # of the file
    has_alpha: bool = False  # whether its kind of file can be transparent
    mask: MaskFile | None = None
    metadata: FromMetadata | None = None
