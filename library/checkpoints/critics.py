"""CLIP and VGG16, which look at pictures while they are drawn: where their weights are. Headers only.

Nothing is fetched unless the user names a hub id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.checkpoints.hub import fetch_clip
from library.checkpoints.probe import HUB_ID, read_config
from library.checkpoints.weights import open_component, open_weights
from library.options import OptionError, require

CLIP_STEM = "model"
VISION = "clip_vision_model"  # what the configuration of an image encoder alone calls itself
VGG16_BLOCKS = (2, 2, 3, 3, 3)  # convolutions between poolings (Simonyan and Zisserman 2015, table 1, column D)
VGG16_LAYERS = 31


def find_clip(path: str, flag: str) -> Path:
    """The folder of a CLIP model, of Hugging Face form, by path or hub id; OptionError for what is none."""
    folder = Path(path).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(path):
        folder = fetch_clip(path, flag)
    require(folder.exists(), flag, f"{path} does not exist", "name a folder with config.json and weights, or a hub id")
    require(folder.is_dir(), flag, f"{path} is a file", "name the folder it is in, with its config.json")
    read_clip_config(folder, flag)
    with open_component(folder, CLIP_STEM, flag):
        pass
    return folder


def read_clip_config(folder: Path, flag: str) -> dict[str, Any]:
    """The configuration of a CLIP model, or of an image encoder alone."""
    config = read_config(folder / "config.json", flag)
    if config.get("model_type") != VISION and "vision_config" not in config:
        kind = config.get("model_type", "another kind of model")
        raise OptionError(flag, f"{folder} is no CLIP model (it is {kind})", "name one that knows pictures")
    return config


def vgg16_convolutions() -> dict[int, int]:
    """Place of each convolution among the layers of VGG16 -> the number of its block."""
    places: dict[int, int] = {}
    place = 0
    for block, count in enumerate(VGG16_BLOCKS):
        for _ in range(count):
            places[place] = block
            place += 2  # it and its ReLU
        place += 1  # the pooling
    return places


def check_vgg16(path: str, layer: int, flag: str) -> Path:
    """The file of VGG16's weights; OptionError where it lacks what is needed up to `layer`."""
    found = Path(path).expanduser()
    require(found.is_file(), flag, f"{path} is no file", "name torchvision's weights, vgg16-397923af.pth")
    with open_weights(found, flag) as weights:
        needed = [f"features.{place}.weight" for place in vgg16_convolutions() if place <= layer]
        missing = [name for name in needed if name not in weights.shapes]
        way_out = "name torchvision's weights, vgg16-397923af.pth"
        require(not missing, flag, f"{path} is no VGG16: it has no {', '.join(missing[:1])}", way_out)
    return found
