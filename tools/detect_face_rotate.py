"""Cut pictures around the faces in them, turned until the eyes are level. See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.output_places import output_folder
from library.cli.picture_folders import PictureFolder, work_through, write_picture
from library.cli.tools import Tool
from library.options import opt, require
from library.wording import counted

if TYPE_CHECKING:
    import numpy as np

    from library.data.face_crop import Face
    from library.data.face_detectors import Detector
    from library.data.face_pictures import FoundFace

logger = logging.getLogger(__name__)

SOURCE, TARGET = "--src_dir", "--dst_dir"
GREEN = (0, 255, 0)
LARGEST_SIDE = 100_000  # pixels, or sizes of a face


def _pair(kind: type[int] | type[float], example: str) -> Callable[[str], tuple[float, float]]:
    def parse(text: str) -> tuple[float, float]:
        try:
            first, second = (kind(part) for part in str(text).split(","))
        except ValueError:
            raise ValueError(f"is not of the form {example}") from None
        if not all(0 < side < LARGEST_SIDE for side in (first, second)):
            raise ValueError("is no size")
        return first, second

    return parse


@dataclass(frozen=True)
class FaceOptions:
    """Which faces are taken, and what is made of them."""

    src_dir: str = opt("", help="folder of the pictures")
    dst_dir: str = opt("", help="folder to write to: one .png for each face, named by the face's place in it")
    rotate: bool = opt(False, help="turn pictures until the line between the eyes is level")
    resize_fit: bool = opt(False, help="bring pictures to the smallest size that holds --crop_size")
    resize_face_size: int | None = opt(help="bring the longer side of the face to this many pixels")
    crop_size: tuple[int, int] | None = opt(
        help="width,height of what is cut out around the face, for example 512,512; small pictures are enlarged for it",
        cli=str,
        parse=_pair(int, "512,512"),
    )
    crop_ratio: tuple[float, float] | None = opt(
        help="the same in sizes of the face, for example 2,3; never resizes", cli=str, parse=_pair(float, "2,3")
    )
    min_size: int | None = opt(help="faces whose longer side has fewer pixels are left out")
    max_size: int | None = opt(help="faces whose longer side has this many pixels or more are left out")
    multiple_faces: bool = opt(False, help="number the faces of a picture, the largest first, in the names of files")
    debug: bool = opt(False, help="draw a box around the faces")
    detector: str | None = opt(
        help="file of OpenCV's YuNet (face_detection_yunet_2023mar.onnx), for photographs; without it, the package "
        "anime-face-detector, for drawings"
    )

    def __post_init__(self) -> None:
        one_of = "give one of them"
        for name in ("resize_face_size", "min_size", "max_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name}", f"{value} is no number of pixels")
        require(not (self.resize_fit and self.resize_face_size), "--resize_fit", "excludes --resize_face_size", one_of)
        for name in ("crop_size", "resize_face_size"):
            both = self.crop_ratio is not None and getattr(self, name) is not None
            require(not both, "--crop_ratio", f"excludes --{name}", one_of)
        lone = self.resize_fit and self.crop_size is None
        require(not lone, "--resize_fit", "has nothing to fit to", "give --crop_size")


def cut_faces(options: FaceOptions) -> None:
    """Raises OptionError for folders that can't be used, and, when all others are done, for pictures that can't."""
    found = PictureFolder.of(options.src_dir, SOURCE)
    from library.data.face_detectors import detector

    find = detector(options.detector)
    place = output_folder(options.dst_dir, TARGET, Path(options.src_dir).expanduser())
    cut_all(found, place, options, find)


def cut_all(found: PictureFolder, place: Path, options: FaceOptions, find: Detector) -> None:
    """The same, with any detector."""
    from library.data.images import upright_picture

    faces: list[int] = []

    def work(path: Path) -> None:
        image = upright_picture(str(path)).rgb_HWC
        chosen = [face for face in find(image) if _is_chosen(face, options)]
        faces.append(len(chosen))
        for number, face in enumerate(chosen, 1):
            suffix = f"_{number:02d}" if options.multiple_faces else ""
            _write(image, face, place / f"{path.stem}{suffix}", options)

    try:
        work_through(found.pictures, work, "faces", SOURCE)
    finally:
        without = sum(count == 0 for count in faces)
        logger.info("%s written, %s without one", counted(sum(faces), "face"), counted(without, "picture"))


def _is_chosen(face: FoundFace, options: FaceOptions) -> bool:
    return (options.min_size or 0) <= face.size and (options.max_size is None or face.size < options.max_size)


def _write(image: np.ndarray, face: FoundFace, stem: Path, options: FaceOptions) -> None:
    import cv2
    import numpy as np

    from library.data.face_pictures import FaceSettings, around_face

    settings = FaceSettings(
        options.rotate, options.crop_size, options.crop_ratio, options.resize_face_size, options.resize_fit
    )
    part, place = around_face(image, face, settings)
    bgr_HWC = np.ascontiguousarray(part[..., ::-1])
    if options.debug:
        cv2.rectangle(bgr_HWC, *_box(place), GREEN, 2)
    path = stem.with_name(f"{stem.name}_{place.x:04d}_{place.y:04d}_{place.width:04d}_{place.height:04d}.png")
    write_picture(path, cv2.imencode(".png", bgr_HWC)[1].tobytes(), TARGET)


def _box(place: Face) -> tuple[tuple[int, int], tuple[int, int]]:
    """Its upper left and its lower right corner."""
    left, top = place.x - place.width // 2, place.y - place.height // 2
    return (left, top), (left + place.width, top + place.height)


TOOL = Tool(__doc__, FaceOptions, cut_faces, required=("src_dir", "dst_dir"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
