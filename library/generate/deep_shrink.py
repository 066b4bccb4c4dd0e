"""Deep Shrink: in early steps the U-Net sees the picture smaller, from one of its blocks on.

Large pictures then get the composition of small ones. As PatchModelAddDownscale by Kohya S. (2023): before a block of
the way down hidden states are made smaller, and on the way up they are enlarged wherever the ones they are joined with
come from before that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import interpolate

from library.families.base import Conditioning
from library.generate.drawing import Drawing, Part
from library.generate.resolution_options import DeepShrinkOptions

HIDDEN = "hidden_states"  # as the forwards of diffusers' blocks name what goes through them
SKIPPED = "res_hidden_states_tuple"  # what the way up is joined with, taken from its end


class DeepShrink(Part):
    """Puts hooks on the U-Net's blocks while a batch that asks for it is drawn; steps without it are as ever."""

    def __init__(self) -> None:
        self._depth: int | None = None  # of the step at hand

    @contextmanager
    def taking_part(self, drawing: Drawing) -> Iterator[None]:
        options = drawing.first.deep_shrink
        if options == DeepShrinkOptions():
            yield
            return
        with ExitStack() as hooks:
            for hook in self._hooks(drawing, options.ds_ratio):
                hooks.callback(hook.remove)
            yield

    def condition(self, drawing: Drawing, conditioning: Conditioning) -> Conditioning:
        self._depth = drawing.first.deep_shrink.depth_at(float(drawing.timestep))
        return conditioning

    def _hooks(self, drawing: Drawing, ratio: float) -> list[Any]:
        unet: Any = drawing.bundle.unet

        def shrink_before(depth: int) -> Callable[..., Any]:
            def shrink(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
                if self._depth != depth:
                    return None
                return _replaced(inputs, named, lambda hidden_BCHW: _scaled(hidden_BCHW, ratio))

            return shrink

        blocks = entries(unet, drawing.family.name)
        hooks = [
            block.register_forward_pre_hook(shrink_before(depth), with_kwargs=True)
            for depth, block in enumerate(blocks)
        ]
        for block in unet.up_blocks:
            hooks += _joining_hooks(block)
        return [*hooks, *_output_hooks(unet)]


def entries(unet: Any, family_name: str) -> list[Any]:
    """The modules before which hidden states can be made smaller, by depth.

    SD 1.x / 2.x: the blocks of the way down. SDXL: the input blocks of the original layout, of which the first one is
    the convolution that the picture enters by.
    """
    if family_name != "sdxl":
        return list(unet.down_blocks)
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        modules += [*block.resnets, *(block.downsamplers or ())]
    return modules


def _joining_hooks(block: Any) -> list[Any]:
    """Hooks by which hidden states get the size of what they are joined with, before each layer of a block."""
    sizes: list[torch.Size] = []  # of what is still to be joined; the next one is the last

    def enter(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        skipped = named[SKIPPED] if SKIPPED in named else inputs[1]
        sizes[:] = [tensor.shape[2:] for tensor in skipped[-len(block.resnets) :]]
        return _replaced(inputs, named, lambda hidden_BCHW: _of_size(hidden_BCHW, sizes.pop()))

    def leave_layer(_module: Any, _inputs: Any, output: Any) -> Any:
        if not sizes:  # the last layer: what follows is the next block's
            return None
        if isinstance(output, tuple):
            return (_of_size(output[0], sizes.pop()), *output[1:])
        return _of_size(output, sizes.pop())

    layers = getattr(block, "attentions", None) or block.resnets
    hooks = [layer.register_forward_hook(leave_layer) for layer in layers]
    return [block.register_forward_pre_hook(enter, with_kwargs=True), *hooks]


def _output_hooks(unet: Any) -> list[Any]:
    """Hooks by which the U-Net's output has the size of its input, also where that was made smaller at once."""
    size: list[torch.Size] = []

    def enter(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        size[:] = [(inputs[0] if inputs else named["sample"]).shape[2:]]

    def leave(_module: Any, _inputs: Any, output_BCHW: torch.Tensor) -> torch.Tensor:
        return _of_size(output_BCHW, size[0])

    return [
        unet.register_forward_pre_hook(enter, with_kwargs=True),
        unet.conv_out.register_forward_hook(leave),
    ]


def _replaced(
    inputs: tuple[Any, ...], named: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments with its hidden states changed; they are its first one, or named."""
    if inputs:
        return (change(inputs[0]), *inputs[1:]), named
    return inputs, {**named, HIDDEN: change(named[HIDDEN])}


def _scaled(hidden_BCHW: torch.Tensor, ratio: float) -> torch.Tensor:
    height, width = (max(1, int(side * ratio)) for side in hidden_BCHW.shape[2:])
    return _of_size(hidden_BCHW, (height, width))


def _of_size(hidden_BCHW: torch.Tensor, size_hw: torch.Size | tuple[int, int]) -> torch.Tensor:
    if tuple(hidden_BCHW.shape[2:]) == tuple(size_hw):
        return hidden_BCHW
    resized = interpolate(hidden_BCHW.float(), tuple(size_hw), mode="bicubic", align_corners=False)
    return resized.to(hidden_BCHW.dtype)
