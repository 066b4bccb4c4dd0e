"""Regions: networks that each have a part of the prompt and a place in the picture of their own.

The U-Net is given more rows of text than of hidden states: the parts of a picture's prompt stand one after the other
where the hidden states have one row. Every cross-attention compares that row with each part's text (its query is
repeated), and what comes out is put together by the networks' masks ("attention couple"). Elsewhere a network's change
is multiplied by its mask. What it changes in texts it changes in those of its own part.

Shape letters: B pictures, P parts of the prompt, R rows, T tokens (of hidden states or of text), C features, H W pixels
of the mask, h w latent pixels or those of a deeper level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from networks.layers import TEXT_PREFIX

if TYPE_CHECKING:
    from networks.injection import Adapter

LATENT_PIXEL = 8  # pixels
LEVELS = 4  # sizes of hidden states inside a U-Net, each half of the one before, rounded up
NEAR = 1.5  # largest ratio of two aspect ratios at which a number of tokens is still taken for a size
LEAST_WEIGHT = 1e-4  # of all masks together, where parts are averaged
EMBEDDINGS = ("time_emb", "emb_layers", "label_emb")  # layers whose inputs have no places


@dataclass(frozen=True)
class Generation:
    """The batch that is drawn."""

    batch: int  # B
    num_parts: int  # P
    height: int  # latent pixels
    width: int
    regions: dict[int, Region]  # those of all networks, by the part of the prompt

    def part_rows(self, rows: int, index: int) -> slice:
        """The rows of part `index` among rows of text: B of the negative prompts before them, if there are more."""
        begin = self._begin(rows)
        return slice(begin + index, begin + self.batch * self.num_parts, self.num_parts)

    def all_part_rows(self, rows: int) -> slice:
        begin = self._begin(rows)
        return slice(begin, begin + self.batch * self.num_parts)

    def _begin(self, rows: int) -> int:
        return self.batch if rows > self.batch * self.num_parts else 0

    def size_of(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of hidden states of so many tokens; None where nothing near the picture's shape fits."""
        height, width = self.height, self.width
        for _ in range(LEVELS):
            if height * width == tokens:
                return height, width
            height, width = -(-height // 2), -(-width // 2)
        shape = self.height / self.width
        found = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]

        def distance(size: tuple[int, int]) -> float:
            return max(size[0] / size[1] / shape, shape * size[1] / size[0])

        nearest = min(found, key=distance)
        return nearest if distance(nearest) <= NEAR else None


class Region:
    """The place of one network, shared by its adapters; without a generation they work as if there were none."""

    def __init__(self) -> None:
        self.index = 0
        self.is_last = False  # of the networks in use: its couplings are those that work
        self.generation: Generation | None = None
        self.aside: dict[torch.nn.Module, torch.Tensor] = {}  # changes of outputs of attention, of this network's rows
        self._mask_HW = torch.ones(1, 1)
        self._resized: dict[tuple[int, int], torch.Tensor] = {}

    def place(self, index: int, is_last: bool, mask_HW: torch.Tensor) -> None:
        """Give the network the part `index` and a mask, 0 to 1; a mask of zeros stands for the whole picture."""
        self.index, self.is_last, self.generation = index, is_last, None
        self._mask_HW = mask_HW.float() if bool(mask_HW.any()) else torch.ones_like(mask_HW, dtype=torch.float32)
        self._resized.clear()

    def begin(self, batch: int, num_parts: int, width: int, height: int, shared: dict[int, Region]) -> None:
        """A batch of pictures of `width` and `height` pixels begins; `shared` is one dictionary for all networks."""
        shared[self.index] = self
        self.aside.clear()
        self.generation = Generation(batch, num_parts, height // LATENT_PIXEL, width // LATENT_PIXEL, shared)

    def mask_hw(self, size: tuple[int, int]) -> torch.Tensor:
        if size not in self._resized:
            self._resized[size] = F.interpolate(self._mask_HW[None, None], size, mode="bilinear")[0, 0]
        return self._resized[size]

    def mask_like(self, output: torch.Tensor) -> torch.Tensor:
        """The mask for (R, C, h, w) or (R, T, C), ready to be multiplied with it."""
        assert self.generation is not None
        if output.ndim == 4:
            mask_hw = self.mask_hw((output.shape[2], output.shape[3]))
            return mask_hw[None, None].to(output)
        size = self.generation.size_of(output.shape[1])
        if size is None:  # every network the same share
            return output.new_full((1, 1, 1), 1 / self.generation.num_parts)
        return self.mask_hw(size).reshape(1, -1, 1).to(output)


# ---------------------------------------------------------------------------------------------- adapters

Rule = Callable[["Adapter", torch.Tensor], torch.Tensor]


def output_in_region(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """What a hooked layer puts out while a generation with regions is under way."""
    if not adapter.enabled or adapter.multiplier == 0:
        return adapter.base(x)
    return rule_of(adapter.name)(adapter, x)


def rule_of(name: str) -> Rule:
    """How a layer of this name follows regions. Text encoders are lora_te, lora_te1 and lora_te2."""
    if name.startswith(TEXT_PREFIX):
        return _of_own_text
    if name.endswith(("attn2_to_k", "attn2_to_v")):
        return _of_own_context
    if name.endswith("attn2_to_out_0"):
        return _put_aside
    return _everywhere if any(word in name for word in EMBEDDINGS) else _masked


def _everywhere(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    return adapter.forward(x)


def _masked(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    output, change = adapter.base(x), adapter.change(x)
    return output + change * adapter.region.mask_like(change)


def _of_own_text(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """A text encoder's batch: negative prompts are as many as pictures; anything else is the parts of each picture."""
    generation = adapter.region.generation
    if len(x) == generation.batch:
        return adapter.base(x)
    return _on_rows(adapter, x, slice(adapter.region.index, None, generation.num_parts))


def _of_own_context(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    return _on_rows(adapter, x, adapter.region.generation.part_rows(len(x), adapter.region.index))


def _on_rows(adapter: Adapter, x: torch.Tensor, rows: slice) -> torch.Tensor:
    output = adapter.base(x).clone()
    output[rows] += adapter.change(x[rows])
    return output


def _put_aside(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """The coupling adds the change, after the parts are put together."""
    region = adapter.region
    rows = region.generation.part_rows(len(x), region.index)
    region.aside[adapter.layer] = adapter.change(x[rows])
    return adapter.base(x)


# ---------------------------------------------------------------------------------------------- coupled attention


def couple_attention(unet: torch.nn.Module, region: Region) -> None:
    """Hook every cross-attention of a U-Net; the hooks work while `region` is the last one of a generation."""
    for path, module in unet.named_modules():
        if path.rpartition(".")[2] == "attn2":
            attention: Any = module
            _hook(attention.to_q, lambda layer, y: _queries_of_parts(region, y), region)
            _hook(attention.to_out[0], lambda layer, y: _put_together(region, layer, y), region)


def _hook(layer: Any, coupled: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor], region: Region) -> None:
    base = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        output = base(x)
        return coupled(layer, output) if region.is_last and region.generation is not None else output

    layer.forward = forward


def _queries_of_parts(region: Region, query_RTC: torch.Tensor) -> torch.Tensor:
    """Each picture's query once for every part of its prompt; those of negative and empty prompts stay single."""
    generation = region.generation
    assert generation is not None
    begin = generation.batch if len(query_RTC) > generation.batch else 0
    end = begin + generation.batch
    of_parts = query_RTC[begin:end].repeat_interleave(generation.num_parts, dim=0)
    return torch.cat([query_RTC[:begin], of_parts, query_RTC[end:]])


def _put_together(region: Region, layer: torch.nn.Module, output_RTC: torch.Tensor) -> torch.Tensor:
    """The mean of the parts' rows by the networks' masks, plus each network's change by its mask.

    A part without a network has the mask 0.
    """
    generation = region.generation
    assert generation is not None
    rows = generation.all_part_rows(len(output_RTC))
    parts_BPTC = output_RTC[rows].unflatten(0, (generation.batch, generation.num_parts))
    total, mixed_BTC, changes_BTC = torch.zeros((), device=output_RTC.device), 0.0, 0.0
    for index, other in generation.regions.items():
        part_BTC = parts_BPTC[:, index]
        mask = other.mask_like(part_BTC)
        total, mixed_BTC = total + mask, mixed_BTC + part_BTC * mask
        if (change_BTC := other.aside.pop(layer, None)) is not None:
            changes_BTC = changes_BTC + change_BTC * mask
    together_BTC = mixed_BTC / total.clamp(min=LEAST_WEIGHT) + changes_BTC
    return torch.cat([output_RTC[: rows.start], together_BTC.to(output_RTC.dtype), output_RTC[rows.stop :]])
