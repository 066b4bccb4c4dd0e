"""Files of ControlNets (Zhang et al. 2023, arXiv:2302.05543) by their headers: their layout, sizes, what they fit to.

Read are: original files (`control_model.*`, alone or beside a whole model, and those that hold the difference to the
model), the same names without prefix (as the trade's own training writes them), and Diffusers' files and folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.architecture import ArchitectureError, ControlNetArchitecture, control_net_architecture
from library.checkpoints.keymaps import control_original_names
from library.checkpoints.probe import KIND_NAMES
from library.checkpoints.weights import Weights, open_component, open_weights
from library.options import OptionError

DIFFERENCE = "difference"  # a tensor of this name says that the file holds differences to the model's U-Net
STEM = "diffusion_pytorch_model"
MADE_FOR = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text states
OTHER_FILE = "use a ControlNet that was made for this kind of model"
LLLITE_PREFIX = "lllite_"


@dataclass(frozen=True)
class ControlNetFile:
    """What the header of a ControlNet's file tells."""

    names: Mapping[str, str]  # original name, without prefix -> key of the file
    architecture: ControlNetArchitecture
    holds_difference: bool  # of what the model's U-Net has, too


def open_control_net(path: Path, flag: str) -> Weights:
    """The weights of a file, or of a Diffusers folder; OptionError naming `flag` for what can't be read."""
    if not path.exists():
        raise OptionError(flag, f"{path} does not exist", "name a ControlNet's file or Diffusers folder")
    return open_component(path, STEM, flag) if path.is_dir() else open_weights(path, flag)


def read_control_net(weights: Weights, path: Path, kind: str, flag: str) -> ControlNetFile:
    """The content for a model of `kind` ("sd1" | "sd2" | "sdxl"); OptionError for anything but its ControlNet."""
    names = control_original_names(weights.shapes)
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    made_for = MADE_FOR.get(width, KIND_NAMES[kind])
    if made_for != KIND_NAMES[kind]:
        raise OptionError(flag, f"{path} was made for {made_for}, the model is {KIND_NAMES[kind]}", OTHER_FILE)
    try:
        architecture = control_net_architecture(shapes, kind)
    except ArchitectureError as error:
        is_lllite = any(key.startswith(LLLITE_PREFIX) for key in weights.shapes)
        way_out = "give it as --control_net_lllite_models" if is_lllite else ""
        raise OptionError(flag, f"{path} is no ControlNet: {error}", way_out) from None
    return ControlNetFile(names, architecture, DIFFERENCE in weights.shapes)


def check_control_net(path: Path | str, kind: str, flag: str) -> None:
    """Raise OptionError naming `flag` for what is no ControlNet of a model of `kind`; headers only."""
    path = Path(path).expanduser()
    with open_control_net(path, flag) as weights:
        read_control_net(weights, path, kind, flag)
