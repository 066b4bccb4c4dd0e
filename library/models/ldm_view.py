"""SDXL's U-Net under the module paths of the original (LDM) layout, which files of networks are named by.

The view owns nothing: its leaves are the layers of the U-Net itself, arranged by the key table. Class names of the
containers are those of diffusers, by which network modules, the project's own and other people's, find layers.
"""

from __future__ import annotations

from typing import Any

import torch

from library.checkpoints.keymaps import unet_layout, unet_paths

ORDER = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
IN_RESNET = ("in_layers", "emb_layers", "out_layers", "skip_connection")


class LdmView(torch.nn.Module):
    """The modules of a U-Net by their original paths: input_blocks.4.1.proj_in and so on, in the original order."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self._unet = (unet,)  # in a tuple: not a submodule, so that each layer has one path
        modules = dict(unet.named_modules())
        paths = unet_paths(unet_layout(key for key, _ in unet.named_parameters()))
        for ldm, ours in sorted(paths.items(), key=lambda pair: _place(pair[0])):
            if ours in modules:  # not every resnet has a skip connection
                self._add(ldm, ours, modules)

    def _add(self, ldm: str, ours: str, modules: dict[str, torch.nn.Module]) -> None:
        """Put a module at its original path; what leads there gets the class name of the diffusers container."""
        *above, name = ldm.split(".")
        container = type(modules[ours.rpartition(".")[0]]).__name__
        place: torch.nn.Module = self
        for depth, part in enumerate(above, start=1):
            if part not in place._modules:
                is_block = depth == (2 if above[0] == "middle_block" else 3)
                place.add_module(part, type(container, (torch.nn.Module,), {})() if is_block else torch.nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        place.add_module(name, modules[ours])

    @property
    def unet(self) -> Any:
        """The U-Net itself."""
        return self._unet[0]

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


def _place(path: str) -> tuple[int, tuple[int, ...], int]:
    """Where a module stands in the original order: its block, the numbers in its path, its place in a resnet."""
    head, *rest = path.split(".")
    numbers = tuple(int(part) for part in rest if part.isdigit())
    within = next((IN_RESNET.index(part) for part in rest if part in IN_RESNET), 0)
    return ORDER.index(head), numbers[: 1 if head == "middle_block" else 2], within


def block_of(path: str) -> int:
    """The block, 0 to 22, of a layer or parameter by its original path: embeddings, 9 input, 3 mid, 9 output, end."""
    head, number, *_ = [*path.split("."), ""]
    first = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
    return first[head] + (int(number) if head.endswith(("_blocks", "_block")) else 0)


def as_files_name_it(unet: torch.nn.Module) -> torch.nn.Module:
    """The U-Net as network modules shall see it: SDXL's under its original paths, any other as it is."""
    is_sdxl = not isinstance(unet, LdmView) and getattr(getattr(unet, "config", None), "addition_embed_type", None)
    return LdmView(unet) if is_sdxl == "text_time" else unet


def file_names(unet: torch.nn.Module) -> dict[str, str]:
    """Diffusers' path of each layer of an SDXL U-Net -> the path it has in files; empty for any other U-Net."""
    view = as_files_name_it(unet)
    if not isinstance(view, LdmView):
        return {}
    originals = {id(module): path for path, module in view.named_modules()}
    return {path: originals[id(module)] for path, module in view.unet.named_modules() if id(module) in originals}
