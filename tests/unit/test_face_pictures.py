"""Pictures around faces: where a face is found, what is cut out, and where the face is in that."""

from __future__ import annotations

import sys
from types import ModuleType

import cv2
import numpy as np
import pytest

from library.data import face_detectors
from library.data.face_crop import Face, face_in_name
from library.data.face_pictures import FaceSettings, FoundFace, around_face, cut_around, scale_of
from library.options import OptionError

GREY, RED, BLUE = (90, 90, 90), (255, 0, 0), (0, 0, 255)


def picture(width: int = 200, height: int = 120, centre=(100, 60), tilt: float = 0.0) -> tuple[np.ndarray, FoundFace]:
    """Grey with a red right eye and a blue left one, 20 pixels from the middle of a face of 40 x 50 pixels; `tilt` in
    degrees with the clock."""
    image = np.full((height, width, 3), GREY, np.uint8)
    across = 20 * np.cos(np.radians(tilt)), 20 * np.sin(np.radians(tilt))
    eyes = [(centre[0] - across[0], centre[1] - across[1]), (centre[0] + across[0], centre[1] + across[1])]
    for (x, y), colour in zip(eyes, (RED, BLUE), strict=True):
        cv2.circle(image, (round(x), round(y)), 3, colour, -1)
    return image, FoundFace(centre[0] - 20, centre[1] - 25, 40, 50, *eyes)


def spot(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """The middle, x and y, of what has about this colour."""
    near = np.abs(image.astype(int) - colour).max(axis=2) < 80
    return tuple(float(places.mean()) for places in np.nonzero(near)[::-1])


def test_what_is_told_of_a_face():
    _, face = picture(tilt=30)
    assert face.size == 50 and face.place == Face(100, 60, 40, 50)
    assert face.angle == pytest.approx(30)
    assert picture(tilt=-15)[1].angle == pytest.approx(-15)
    assert FoundFace(1.9, 2.9, 10.7, 9.9, (0, 0), (1, 0)).place == Face(7, 7, 10, 9)  # truncated


@pytest.mark.parametrize("tilt", [30, -20, 90])
def test_eyes_are_levelled_around_the_face(tilt):
    image, face = picture(tilt=tilt)
    made, place = around_face(image, face, FaceSettings(levels_eyes=True))
    assert made.shape == image.shape and place == face.place
    middle = made[30:90, 70:130]  # outside of it are reflections of the eyes
    assert spot(middle, RED) == pytest.approx((10, 30), abs=1) and spot(middle, BLUE) == pytest.approx((50, 30), abs=1)
    assert tuple(made[0, 0]) == tuple(made[-1, -1]) == GREY  # what comes in is a reflection, not black
    same, _ = around_face(image, face, FaceSettings())
    assert np.array_equal(same, image)


def test_the_crop_keeps_inside():
    image, face = picture(centre=(190, 10))
    made, place = around_face(image, face, FaceSettings(crop_size=(80, 60)))
    assert made.shape == (60, 80, 3) and np.array_equal(made, image[:60, 120:])
    assert (place.x, place.y) == (70, 10)
    assert np.array_equal(cut_around(image, (0, 119), (50, 50))[0], image[70:, :50])
    whole, left, top = cut_around(image, (100, 60), (999, 50))
    assert whole.shape == (50, 200, 3) and (left, top) == (0, 35)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (FaceSettings(), 1),
        (FaceSettings(crop_size=(80, 60)), 1),  # pictures are not made smaller for a crop
        (FaceSettings(crop_size=(400, 60)), 2),  # but larger
        (FaceSettings(crop_size=(100, 120)), 1),
        (FaceSettings(crop_size=(100, 60), fits=True), 0.5),
        (FaceSettings(crop_size=(100, 90), fits=True), 0.75),
        (FaceSettings(crop_size=(400, 600), fits=True), 5),
        (FaceSettings(face_size=100), 2),
        (FaceSettings(face_size=25), 0.5),
        (FaceSettings(face_size=40, crop_size=(100, 60)), 0.8),
        (FaceSettings(face_size=10, crop_size=(100, 60)), 0.5),  # it would not hold the crop
        (FaceSettings(crop_ratio=(9, 9)), 1),
    ],
)
def test_scales(settings, scale):
    assert scale_of((200, 120), settings.crop_size, 50, settings) == pytest.approx(scale)


def test_resized_and_cut():
    image, face = picture()
    made, place = around_face(image, face, FaceSettings(face_size=100, crop_size=(300, 200)))
    assert made.shape == (200, 300, 3) and place == Face(150, 100, 80, 100)
    assert spot(made, RED) == pytest.approx((110, 100), abs=1.5)
    assert face_in_name("x/name_{:04d}_{:04d}_{:04d}_{:04d}.png".format(*place)) == place


def test_a_crop_in_sizes_of_the_face():
    image, face = picture()
    made, place = around_face(image, face, FaceSettings(crop_ratio=(1.5, 2)))
    assert made.shape == (100, 75, 3) and place == Face(37, 50, 40, 50)
    made, _ = around_face(image, face, FaceSettings(crop_ratio=(9, 1)))
    assert made.shape == (50, 200, 3)


def test_faces_of_drawings(monkeypatch):
    """Against a stand-in for the package, with its result's form: boxes with scores, and 28 points."""
    points = np.zeros((28, 3))
    points[11], points[19] = (10, 20, 0.9), (30, 22, 0.9)
    seen = []

    def create_detector(name: str, device: str):
        assert name == "yolov3" and device

        def detect(image_bgr):
            seen.append(image_bgr)
            boxes = ([5, 10, 25, 40, 0.95], [0, 0, 90, 90, 0.89], [0, 0, 60, 50, 0.9])
            return [{"bbox": np.array(box), "keypoints": points} for box in boxes]

        return detect

    package = ModuleType("anime_face_detector")
    package.create_detector = create_detector
    monkeypatch.setitem(sys.modules, "anime_face_detector", package)
    found = face_detectors.anime()(picture()[0])
    assert [face.size for face in found] == [60, 30]
    assert found[1] == FoundFace(5, 10, 20, 30, (10, 20), (30, 22))
    assert spot(seen[0], BLUE) == pytest.approx((80, 60), abs=1)  # it sees blue, green, red


def test_yunets_rows_are_of_the_whole_picture():
    """Against a stand-in with OpenCV's interface: its results are in pixels of what it is shown."""

    class Network:
        def setInputSize(self, size_wh):
            self.size_wh = size_wh

        def detect(self, image):
            assert image.shape == (self.size_wh[1], self.size_wh[0], 3)
            row = [16, 8, 32, 40, 20, 20, 40, 20, 30, 30, 22, 40, 38, 40, 0.95]
            return 1, np.array([row], np.float32)

    rows = face_detectors._rows(Network(), np.zeros((400, 640, 3), np.uint8), 320)
    assert rows[0][:8] == [32, 16, 64, 80, 40, 40, 80, 40] and rows[0][14] == pytest.approx(0.95)
    assert face_detectors._rows(Network(), np.zeros((100, 90, 3), np.uint8), 320)[0][:4] == [16, 8, 32, 40]


def test_detectors_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(face_detectors, "ANIME_PACKAGE", "no_such_package")
    with pytest.raises(OptionError, match="anime-face-detector is not installed; name OpenCV's face_detection_yunet"):
        face_detectors.detector(None)
    with pytest.raises(OptionError, match=r"none.onnx is no file"):
        face_detectors.detector(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(OptionError, match=r"text.onnx is no YuNet that this OpenCV"):
        face_detectors.detector(str(tmp_path / "text.onnx"))
