"""Contact sheets of a run: which weights are compared, and which picture stands where.

A sheet has a block for each prompt, with the same seeds in all of its rows and columns:

* with networks to compare, a column for each; rows are models, multipliers and seeds;
* with models alone, a column for each; rows are seeds;
* with neither, a column for each seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.generate.grid_options import GridOptions
from library.generate.request import GenerationRequest


@dataclass(frozen=True)
class Variant:
    """Weights that pictures are drawn with."""

    ckpt: str
    network: str = ""  # its file; "": none beside those of the whole run
    multiplier: float = 1.0

    @property
    def as_drawn(self) -> Variant:
        """The same for variants that make the same pictures: no network counts with a multiplier of 0."""
        return Variant(self.ckpt) if self.multiplier == 0 else self


@dataclass(frozen=True)
class Axes:
    """What is compared."""

    ckpts: tuple[str, ...]
    networks: tuple[str, ...]  # empty: none are compared
    multipliers: tuple[float, ...]

    @classmethod
    def of(cls, ckpt: str, options: GridOptions) -> Axes:
        """Raises OptionError for networks that are not there."""
        ckpts = tuple(dict.fromkeys((ckpt, *(options.grid_ckpts or ()))))
        return cls(ckpts, options.network_files(), options.multipliers)

    def variants(self, ckpt: str) -> list[Variant]:
        """Those that are drawn with a model, each once."""
        if not self.networks:
            return [Variant(ckpt)]
        pairs = itertools.product(self.networks, self.multipliers)
        return list(dict.fromkeys(Variant(ckpt, network, multiplier).as_drawn for network, multiplier in pairs))


@dataclass(frozen=True)
class Row:
    """Pictures side by side, None where one is not finished."""

    label: str
    pictures: tuple[Path | None, ...]


@dataclass(frozen=True)
class Block:
    """All pictures of one prompt."""

    title: str
    subtitle: str
    columns: tuple[str, ...]  # their labels
    rows: tuple[Row, ...]


Drawn = Mapping[Variant, Sequence[Path]]  # the pictures of all requests, in their order


def blocks(axes: Axes, requests: Sequence[GenerationRequest], drawn: Drawn) -> list[Block]:
    """One for each run of requests that differ in their seeds alone."""
    groups = itertools.groupby(enumerate(requests), key=lambda item: _without_seed(item[1]))
    return [_block(axes, list(group), drawn) for _, group in groups]


def _without_seed(request: GenerationRequest) -> tuple[object, ...]:
    # a dynamic prompt's pictures have a block each: their texts differ
    return (request.prompt, request.negative_prompt, request.image, request.batch_key)


def _block(axes: Axes, group: Sequence[tuple[int, GenerationRequest]], drawn: Drawn) -> Block:
    request = group[0][1]

    def picture(variant: Variant, index: int) -> Path | None:
        paths = drawn.get(variant.as_drawn)
        return paths[index] if paths and index < len(paths) else None

    if not axes.networks and len(axes.ckpts) == 1:
        row = Row("", tuple(picture(Variant(axes.ckpts[0]), index) for index, _ in group))
        return Block(request.prompt, subtitle(request), tuple(f"seed {item.seed}" for _, item in group), (row,))
    seeds = f", seed {request.seed}" if len(group) == 1 else ""
    rows, columns = [], axes.networks or axes.ckpts
    compared = itertools.product(axes.ckpts, axes.multipliers, group) if axes.networks else (
        ("", 1.0, item) for item in group
    )  # fmt: skip
    for ckpt, multiplier, (index, item) in compared:
        of_column = (Variant(ckpt, name, multiplier) if axes.networks else Variant(name) for name in columns)
        label = [
            Path(ckpt).stem if axes.networks and len(axes.ckpts) > 1 else "",
            f"multiplier {multiplier:g}" if len(axes.multipliers) > 1 else "",
            f"seed {item.seed}" if len(group) > 1 else "",
        ]
        rows.append(Row("\n".join(filter(None, label)), tuple(picture(variant, index) for variant in of_column)))
    names = tuple(Path(name).stem or name for name in columns)
    return Block(request.prompt, subtitle(request) + seeds, names, tuple(rows))


def subtitle(request: GenerationRequest) -> str:
    """How a prompt's pictures were made, in one line."""
    parts = [
        f"negative: {request.negative_prompt}" if request.negative_prompt else "",
        f"{request.width}x{request.height}",
        f"{request.steps} steps of {request.sampler}",
        f"scale {request.scale:g}",
    ]
    return ", ".join(filter(None, parts))
