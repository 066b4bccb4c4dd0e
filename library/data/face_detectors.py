"""Detectors of faces and eyes: OpenCV's YuNet (Wu et al. 2023), and anime-face-detector for drawn faces.

A detector is a function from an (H, W, 3) uint8 RGB image to the faces in it, the largest first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from library.data.face_pictures import FoundFace
from library.options import OptionError
from library.packages import is_installed

Detector = Callable[[np.ndarray], list[FoundFace]]

FLAG = "--detector"
MIN_SCORE = 0.9
ANIME_PACKAGE = "anime_face_detector"
ANIME_EYES = (11, 19)  # of its 28 points: of the person's right eye and of the left one
# YuNet was trained on faces of 10 to 300 pixels: the first size of the longer side finds small faces, the second those
# that fill a picture
YUNET_SIDES = (1024, 320)
MAX_OVERLAP = 0.3  # of two boxes, intersection over union: above it they are one face
OF_YUNET = "name OpenCV's face_detection_yunet_2023mar.onnx"


def detector(file: str | None) -> Detector:
    """YuNet from its file, or anime-face-detector where none is named; OptionError where there is none."""
    if file is not None:
        return yunet(Path(file).expanduser())
    if not is_installed(ANIME_PACKAGE):
        problem = "no detector is named, and the package anime-face-detector is not installed"
        raise OptionError(FLAG, problem, f"{OF_YUNET} with {FLAG}, or install the package for drawn faces")
    return anime()


def anime() -> Detector:
    """The package's YOLOv3 with its 28 points on faces of drawings, on the GPU where there is one."""
    import anime_face_detector  # pyright: ignore[reportMissingImports]
    import torch

    find = anime_face_detector.create_detector("yolov3", device="cuda:0" if torch.cuda.is_available() else "cpu")

    def detect(image: np.ndarray) -> list[FoundFace]:
        return largest_first(_of_anime(found) for found in find(np.ascontiguousarray(image[..., ::-1])))

    return detect


def _of_anime(found: Any) -> FoundFace | None:
    left, top, right, bottom, score = (float(number) for number in found["bbox"])
    (right_x, right_y), (left_x, left_y) = (map(float, found["keypoints"][index][:2]) for index in ANIME_EYES)
    if score < MIN_SCORE:
        return None
    return FoundFace(left, top, right - left, bottom - top, (right_x, right_y), (left_x, left_y))


def yunet(file: Path) -> Detector:
    """OpenCV's own detector of faces in photographs; OptionError for a file that is none."""
    if not file.is_file():
        raise OptionError(FLAG, f"{file} is no file", OF_YUNET)
    level = cv2.utils.logging.getLogLevel()
    try:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of what nobody asked for
        network = cv2.FaceDetectorYN.create(str(file), "", (320, 320), MIN_SCORE, MAX_OVERLAP)
        network.detect(np.zeros((320, 320, 3), np.uint8))
    except cv2.error:
        raise OptionError(FLAG, f"{file} is no YuNet that this OpenCV ({cv2.__version__}) can use", OF_YUNET) from None
    finally:
        cv2.utils.logging.setLogLevel(level)

    def detect(image: np.ndarray) -> list[FoundFace]:
        rows = [row for side in YUNET_SIDES for row in _rows(network, image, side)]
        kept = cv2.dnn.NMSBoxes([row[:4] for row in rows], [row[14] for row in rows], MIN_SCORE, MAX_OVERLAP)
        return largest_first(_of_yunet(rows[int(index)]) for index in kept)

    return detect


def _rows(network: Any, image: np.ndarray, side: int) -> list[list[float]]:
    """What YuNet finds where the longer side has at most `side` pixels: box (left, top, width, height), right eye, left
    eye, nose, corners of the mouth, score; in pixels of `image`."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(width, height))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA) if scale < 1 else image
    network.setInputSize(size_wh)
    _, found = network.detect(np.ascontiguousarray(smaller[..., ::-1]))
    if found is None:
        return []
    across = np.array([width / size_wh[0], height / size_wh[1]] * 7 + [1.0])
    return (found * across).tolist()


def _of_yunet(row: list[float]) -> FoundFace:
    left, top, width, height, right_x, right_y, left_x, left_y = row[:8]
    return FoundFace(left, top, width, height, (right_x, right_y), (left_x, left_y))


def largest_first(faces: Any) -> list[FoundFace]:
    """Without those that are None."""
    return sorted((face for face in faces if face is not None), key=lambda face: face.size, reverse=True)
