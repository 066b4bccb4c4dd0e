"""Tiny ControlNets, ControlNet-LLLites and guide images for tests: real layouts, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from library.checkpoints.architecture import ControlNetArchitecture
from library.checkpoints.keymaps import CONTROL_PREFIX, control_slots
from library.checkpoints.safetensors_io import save_file
from library.models.build import build_control_net, build_unet
from networks.control_net_lllite import ControlNetLLLite
from tests.tiny_models import UNETS


def tiny_control_net(kind: str = "sd1", seed: int = 0) -> Any:
    """A ControlNet for the tiny model of `kind` that changes its pictures a good deal: nothing in it is zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = build_control_net(ControlNetArchitecture(UNETS[kind], 3, (16, 16, 32, 32)))
        for name, parameter in net.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid")):
                torch.nn.init.normal_(parameter, std=0.1)
            elif name.startswith("controlnet_cond_embedding") and name.endswith("weight"):
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu").mul_(1.5)
    return net.eval().requires_grad_(False)


def original_names(net: Any, prefix: str = CONTROL_PREFIX) -> dict[str, torch.Tensor]:
    """A ControlNet's tensors as the original programs name them."""
    state = net.state_dict()
    return {slot.key: state[name] for name, slot in control_slots(state, prefix).items()}


def control_net_file(folder: Path, kind: str = "sd1", seed: int = 0, name: str = "control") -> Path:
    path = folder / f"{name}.safetensors"
    save_file(original_names(tiny_control_net(kind, seed)), path)
    return path


def tiny_lllite(path: Path, *, is_zero: bool = False, seed: int = 0) -> Mapping[str, torch.Tensor]:
    """Write a ControlNet-LLLite file for the tiny SDXL model, with `is_zero` as in the beginning; the tensors."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = ControlNetLLLite(build_unet(UNETS["sdxl"]), cond_emb_dim=8, mlp_dim=6)
        for name, parameter in network.named_parameters():
            if ".up." in name and is_zero:
                parameter.data.zero_()
            elif parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu").mul_(2)
    network.save_weights(path, None, {})
    return network.state_dict()


def guide_image(path: Path, seed: int = 0, size: tuple[int, int] = (80, 96)) -> Path:
    """A picture with shapes in it, of another size than what is drawn."""
    generator = torch.Generator().manual_seed(seed)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for left, top, *color in torch.randint(0, 60, (5, 5), generator=generator).tolist():
        draw.rectangle((left, top, left + 30, top + 20), fill=tuple(4 * part for part in color))
    picture.save(path)
    return path
