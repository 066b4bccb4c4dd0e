"""ControlNets (Zhang et al. 2023, arXiv:2302.05543) of any size: diffusers' module from all kinds of files.

Which these are is told in library.checkpoints.control_net.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel

from library.checkpoints.control_net import OTHER_FILE, ControlNetFile, open_control_net, read_control_net
from library.checkpoints.keymaps import control_slots
from library.checkpoints.probe import read_config
from library.checkpoints.weights import Weights
from library.models.build import build_control_net, build_from_config, fill
from library.options import OptionError

# of a U-Net's configuration: what decides the shapes of the skip connections, and of what it is told
SHARED_SIZES = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
VECTOR_WIDTH = "projection_class_embeddings_input_dim"  # SDXL


def load_control_net(
    path: Path | str, unet: Any, kind: str, *, dtype: torch.dtype, device: torch.device, flag: str
) -> ControlNetModel:
    """A ControlNet on its device, frozen and in eval mode.

    `unet`, of `kind` ("sd1" | "sd2" | "sdxl"), is the U-Net that it shall steer; a file of differences is added to its
    weights. Raises OptionError naming `flag` for what is no ControlNet, and for one of another kind of model.
    """
    path = Path(path).expanduser()
    with open_control_net(path, flag) as weights:
        file = read_control_net(weights, path, kind, flag)
        with torch.device("meta"):
            if path.is_dir():
                net: Any = build_from_config(ControlNetModel, read_config(path / "config.json", flag))
            else:
                net = build_control_net(file.architecture)
        _check_sizes(net, unet, path, flag)
        fill(net, _reader(net, unet, weights, file, f"{flag}: {path}"), dtype=dtype, device=device)
    return net


def _check_sizes(net: Any, unet: Any, path: Path, flag: str) -> None:
    if net.config.conditioning_channels != 3:
        raise OptionError(flag, f"{path} takes pictures of {net.config.conditioning_channels} channels, not RGB")
    for name in (*SHARED_SIZES, VECTOR_WIDTH):
        own, theirs = net.config.get(name), unet.config.get(name)
        own, theirs = (tuple(value) if isinstance(value, list) else value for value in (own, theirs))
        if name == "in_channels" and theirs == 9:  # an inpainting model: its ControlNets see the latents alone
            continue
        if own != theirs:
            raise OptionError(flag, f"{path} does not fit the model ({name} is {own}, not {theirs})", OTHER_FILE)


def _reader(
    net: torch.nn.Module, unet: torch.nn.Module, weights: Weights, file: ControlNetFile, subject: str
) -> Callable[[str], torch.Tensor]:
    """A function from a parameter name to its tensor; OptionError where the file lacks some or has too many."""
    slots = {name: slot.key for name, slot in control_slots(net.state_dict()).items()}
    missing = sorted(set(slots.values()) - set(file.names))
    if missing:
        problem = f"{subject} lacks {len(missing)} tensors of a ControlNet ({missing[0]} ...)"
        raise OptionError("", problem, "copy or download it again")
    unknown = sorted(name for name in set(file.names) - set(slots.values()) if _is_weight(name))
    if unknown:
        problem = f"{subject} holds {len(unknown)} tensors that no plain ControlNet has ({unknown[0]} ...)"
        raise OptionError("", problem, "unions of several ControlNets can't be used")
    own = unet.state_dict() if file.holds_difference else {}

    def read(name: str) -> torch.Tensor:
        tensor = weights.tensor(file.names[slots[name]])
        if name not in own:
            return tensor
        weight = own[name].detach().to("cpu", torch.float32)
        return weight + tensor.float().reshape(weight.shape)

    return read


def _is_weight(name: str) -> bool:
    """Not a mark such as `difference`, nor what a whole model's file holds beside the ControlNet."""
    return name.endswith((".weight", ".bias")) and not name.startswith(("model.", "first_stage_", "cond_stage_"))
