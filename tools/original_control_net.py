"""ControlNets for programs that draw by themselves, with the U-Net of SD 1.x or 2.x in diffusers' form.

    net_unet, net = load_control_net(v2, unet, "control.safetensors")
    infos = [ControlNetInfo(net_unet, net, load_preprocess("canny"), weight=1.0, ratio=1.0)]
    hints = get_guided_hints(infos, num_latent_input, b_size, [preprocess_ctrl_net_hint_image(picture)])
    output = call_unet_and_control_net(
        step, num_latent_input, unet, infos, hints, step / steps, latents, timestep, context
    )

The work is done where the generators have it: library.models.control_net, library.generate.control and hints.
Shape letters: B pictures, R = groups x B rows of the U-Net, C channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from library.families.base import Conditioning
from library.families.control import control_residuals
from library.generate.control import has_say
from library.generate.control_options import Preprocessor
from library.generate.hints import preprocessed, to_hint
from library.models import control_net


class ControlNetInfo(NamedTuple):
    """A ControlNet and how it is used."""

    unet: Any  # its half of the U-Net: the same module as `net` here
    net: Any  # diffusers' ControlNetModel
    prep: Callable[[Any], np.ndarray] | None = None  # see load_preprocess
    weight: float = 1.0
    ratio: float = 1.0  # the share of the steps, from the first one on, in which it takes part


def load_control_net(v2: bool, unet: torch.nn.Module, model: str) -> tuple[Any, Any]:
    """The ControlNet of a file or folder, of any layout that the generators read, on the U-Net's device and in its
    precision.

    It is given twice, for programs that keep its half of the U-Net and the rest apart. A file of differences is added
    to the weights of `unet`. Raises OptionError for what is no ControlNet of SD 1.x or, with `v2`, 2.x.
    """
    weight = next(unet.parameters())
    kind = "sd2" if v2 else "sd1"
    net = control_net.load_control_net(model, unet, kind, dtype=weight.dtype, device=weight.device, flag="model")
    return net, net


def load_preprocess(prep_type: str) -> Callable[[Any], np.ndarray] | None:
    """A function from an RGB picture, of Pillow's or (H, W, 3) uint8, to what the network is shown, in the same form.

    None for "none"; "canny", "canny_63" or "canny_63_191" for edges. Raises OptionError for anything else.
    """
    preprocessor = Preprocessor.parse(prep_type)
    if preprocessor.thresholds is None:
        return None
    return lambda picture: preprocessed(_pixels(picture), preprocessor)


def preprocess_ctrl_net_hint_image(image: Image.Image | np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) float32 in [0, 1] of an RGB picture of the size that is drawn."""
    return to_hint(_pixels(image))[None]


def _pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    return np.array(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)


def get_guided_hints(
    control_nets: Sequence[ControlNetInfo], num_latent_input: int, b_size: int, hints: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each ControlNet the guide images of all rows, (R, 3, H, W), where R = `num_latent_input` x `b_size`.

    `hints` are (1, 3, H, W) each: the first picture's for each network in turn, then the second one's; with those of
    one picture alone, all pictures have them.
    """
    count = len(control_nets)
    assert len(hints) in (count, count * b_size), f"{len(hints)} hints for {count} ControlNets and {b_size} pictures"
    guided = []
    for index, info in enumerate(control_nets):
        hint_BCHW = torch.cat(list(hints[index::count]))
        hint_BCHW = hint_BCHW.expand(b_size, -1, -1, -1) if len(hint_BCHW) == 1 else hint_BCHW
        weight = next(info.net.parameters())
        guided.append(hint_BCHW.to(weight.device, weight.dtype).repeat(num_latent_input, 1, 1, 1))
    return guided


def call_unet_and_control_net(
    step: int,
    num_latent_input: int,
    original_unet: Any,
    control_nets: Sequence[ControlNetInfo],
    guided_hints: Sequence[torch.Tensor],
    current_ratio: float,
    *inputs: Any,
) -> Any:
    """The U-Net's output (diffusers' object, with `sample`) for `inputs`: latents (R, C, h, w), timestep, context
    (R, T, D).

    Several ControlNets take turns from step to step; a turn is left out where its network has had its share of the
    steps, of which `current_ratio` are done. `num_latent_input` is in the shapes already.
    """
    sample_RChw, timestep, context_RTD = inputs
    conditioning = Conditioning(context_RTD)
    turn = step % len(control_nets)
    info = control_nets[turn]
    if has_say(info.weight, info.ratio, current_ratio):
        timesteps_R = torch.as_tensor(timestep, device=sample_RChw.device).expand(len(sample_RChw))
        residuals = control_residuals(info.net, sample_RChw, timesteps_R, conditioning, guided_hints[turn], info.weight)
        conditioning = Conditioning(context_RTD, residuals=residuals)
    return original_unet(sample_RChw, timestep, context_RTD, **conditioning.residual_inputs)
