"""The sizes of a model, read from the names and shapes of its tensors in the original (LDM) single-file layout.

What tensors do not tell follows the rule of the family: 8 heads in the SD 1.x U-Net, heads of width 64 in the others
and in every text encoder; quick GELU in CLIP's own text encoder (SD 1.x, SDXL's first) and GELU in OpenCLIP's (SD 2.x,
SDXL's second); 256 sinusoids for each of SDXL's six sizes (Podell et al. 2023, 2.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from library.checkpoints.keymaps import (
    CLIP_PREFIX,
    HINT_CONVOLUTIONS,
    OPENCLIP_PREFIX,
    PROJECTION,
    SDXL_CLIP_PREFIX,
    SDXL_OPENCLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    count_items,
)

Shapes = Mapping[str, tuple[int, ...]]

SD1_HEADS = 8
HEAD_WIDTH = 64
OPENCLIP_H_USED_LAYERS = 23  # SD 2.x conditions on the last layer but one of 24
SIZE_WIDTH = 256  # sinusoids for each number of SDXL's size conditioning
SIZE_NUMBERS = 6  # original height and width, top and left of the crop, target height and width


class ArchitectureError(ValueError):
    """The tensors form no model of a known kind; the message says what is missing or odd."""


@dataclass(frozen=True)
class UNetArchitecture:
    """A Stable Diffusion U-Net. Tuples have one item per resolution level, from the finest."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    transformer_depths: tuple[int, ...]  # 0: no attention on this level
    resnets: int  # per level on the way down
    context_width: int
    linear_projection: bool  # proj_in and proj_out are Linear, not 1x1 convolutions
    upcast_attention: bool = False
    vector_width: int = 0  # SDXL: of the pooled text and the embedded sizes together; 0: the U-Net takes no vector

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text in the vector."""
        return self.vector_width - SIZE_NUMBERS * SIZE_WIDTH


@dataclass(frozen=True)
class ControlNetArchitecture:
    """A ControlNet: one half of a U-Net and what brings the guide image to it."""

    unet: UNetArchitecture
    image_channels: int  # of the guide image
    hint_channels: tuple[int, ...]  # of the guide image's convolutions, from the finest level


@dataclass(frozen=True)
class TextArchitecture:
    """A CLIP text encoder."""

    vocabulary: int
    positions: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    activation: str  # "quick_gelu" | "gelu"
    projection: int | None = None  # width of the projected pooled state; None: without it


@dataclass(frozen=True)
class VaeArchitecture:
    """An AutoencoderKL. `channels` has one item per resolution level, from the finest."""

    image_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    resnets: int  # per encoder level


def model_kind(shapes: Shapes) -> str:
    """ "sd1", "sd2", "sdxl" or "" for tensors that are no whole model."""
    if _any_starts(shapes, "conditioner.embedders."):
        return "sdxl"
    if f"{UNET_PREFIX}label_emb.0.0.weight" in shapes and not _any_starts(shapes, "cond_stage_model."):
        return "sdxl"  # its U-Net alone
    if f"{UNET_PREFIX}input_blocks.0.0.weight" not in shapes:
        return ""
    if _any_starts(shapes, OPENCLIP_PREFIX):
        return "sd2"
    if _any_starts(shapes, CLIP_PREFIX):
        embedding = f"{CLIP_PREFIX}text_model.embeddings.token_embedding.weight"
        return "sd2" if shapes.get(embedding, (0, 0))[1] == 1024 else "sd1"  # some tools rename SD 2.x's encoder
    context = _context_width(_below(shapes, UNET_PREFIX))
    return "sd2" if context == 1024 else "sd1"


def is_refiner(shapes: Shapes) -> bool:
    """Whether a file is SDXL's refiner: OpenCLIP as its first text encoder, and no other."""
    return _any_starts(shapes, "conditioner.embedders.0.model.")


def unet_architecture(shapes: Shapes, kind: str, prefix: str = UNET_PREFIX) -> UNetArchitecture:
    """The U-Net under `prefix`; raises ArchitectureError if its parts do not fit together."""
    inner = _below(shapes, prefix)
    stem = _shape(inner, "input_blocks.0.0.weight")
    channels, depths, resnets = _walk_down(inner)
    if kind == "sd1":
        heads = tuple(SD1_HEADS for _ in channels)
        odd = [width for width in channels if width % SD1_HEADS]
    else:
        heads = tuple(max(width // HEAD_WIDTH, 1) for width in channels)
        odd = [width for width, depth in zip(channels, depths, strict=True) if depth and width % HEAD_WIDTH]
    if odd:
        raise ArchitectureError(f"U-Net channels {odd} don't divide into attention heads")
    projections = [shape for key, shape in inner.items() if key.endswith(".proj_in.weight")]
    return UNetArchitecture(
        in_channels=stem[1],
        out_channels=_shape(inner, "out.2.weight")[0],
        channels=channels,
        heads=heads,
        transformer_depths=depths,
        resnets=resnets,
        context_width=_context_width(inner),
        linear_projection=kind != "sd1" or any(len(shape) == 2 for shape in projections),
        upcast_attention=kind == "sd2",  # SD 2.1-768 overflows half precision where scores are stored
        vector_width=inner.get("label_emb.0.0.weight", (0, 0))[1],
    )


def control_net_architecture(shapes: Shapes, kind: str) -> ControlNetArchitecture:
    """The ControlNet whose tensors have these original names, without prefix; ArchitectureError if it is none."""
    stem = _shape(shapes, "input_hint_block.0.weight")
    last = 2 * HINT_CONVOLUTIONS - 2
    hints = (stem[0], *(_shape(shapes, f"input_hint_block.{i}.weight")[0] for i in range(4, last, 4)))
    # it ends in the middle: what its U-Net gives out has as many channels as what it takes in
    shapes = {**shapes, "out.2.weight": _shape(shapes, "input_blocks.0.0.weight")[1:]}
    return ControlNetArchitecture(unet_architecture(shapes, kind, prefix=""), stem[1], hints)


def _walk_down(inner: Shapes) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(channels, transformer depths) per level and the number of resnets per level, along input_blocks."""
    levels: list[list[tuple[int, int]]] = [[]]
    blocks = count_items(inner, r"input_blocks\.(\d+)\.")
    for i in range(1, blocks):
        if f"input_blocks.{i}.0.op.weight" in inner:
            levels.append([])
        else:
            width = _shape(inner, f"input_blocks.{i}.0.in_layers.2.weight")[0]
            depth = count_items(inner, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
            levels[-1].append((width, depth))
    if any(not level or len(set(level)) != 1 or len(level) != len(levels[0]) for level in levels):
        raise ArchitectureError("the levels of the U-Net differ in their number of blocks")
    return tuple(level[0][0] for level in levels), tuple(level[0][1] for level in levels), len(levels[0])


def _context_width(inner: Shapes) -> int:
    return next((shape[1] for key, shape in inner.items() if key.endswith("attn2.to_k.weight")), 0)


def text_architectures(shapes: Shapes, kind: str) -> tuple[TextArchitecture, ...]:
    """The text encoders of a file: two in SDXL, one in the others; ArchitectureError if one is missing or odd.

    SD 2.x files hold one layer more than is used, unless they were pruned to 23.
    """
    if kind == "sdxl":
        if not (_any_starts(shapes, SDXL_CLIP_PREFIX) and _any_starts(shapes, SDXL_OPENCLIP_PREFIX)):
            raise ArchitectureError("it lacks SDXL's two text encoders")
        second = _openclip(_below(shapes, SDXL_OPENCLIP_PREFIX))
        if second.projection is None:
            raise ArchitectureError(f"the tensor {SDXL_OPENCLIP_PREFIX}{PROJECTION} is missing")
        return _clip(_below(shapes, SDXL_CLIP_PREFIX)), second
    if _any_starts(shapes, OPENCLIP_PREFIX):
        architecture = replace(_openclip(_below(shapes, OPENCLIP_PREFIX)), projection=None)
    elif _any_starts(shapes, "cond_stage_model."):
        architecture = _clip(_below(shapes, CLIP_PREFIX))
    else:
        raise ArchitectureError("it has no text encoder")
    if kind == "sd2":
        is_pruned = architecture.layers == OPENCLIP_H_USED_LAYERS
        layers = architecture.layers if is_pruned else architecture.layers - 1
        architecture = replace(architecture, layers=layers, activation="gelu")
    if architecture.layers < 1:
        raise ArchitectureError("its text encoder has no layers")
    return (architecture,)


def _clip(inner: Shapes) -> TextArchitecture:
    """A text encoder with Hugging Face names."""
    inner = {key.removeprefix("text_model."): shape for key, shape in inner.items()}
    return _text_sizes(
        embedding=_shape(inner, "embeddings.token_embedding.weight"),
        positions=_shape(inner, "embeddings.position_embedding.weight"),
        mlp=_shape(inner, "encoder.layers.0.mlp.fc1.weight"),
        layers=count_items(inner, r"encoder\.layers\.(\d+)\."),
        activation="quick_gelu",
    )


def _openclip(inner: Shapes) -> TextArchitecture:
    """A text encoder with OpenCLIP names."""
    architecture = _text_sizes(
        embedding=_shape(inner, "token_embedding.weight"),
        positions=_shape(inner, "positional_embedding"),
        mlp=_shape(inner, "transformer.resblocks.0.mlp.c_fc.weight"),
        layers=count_items(inner, r"transformer\.resblocks\.(\d+)\."),
        activation="gelu",
    )
    if PROJECTION in inner:
        return replace(architecture, projection=inner[PROJECTION][1])
    if f"{PROJECTION}.weight" in inner:  # a Linear, see keymaps
        return replace(architecture, projection=inner[f"{PROJECTION}.weight"][0])
    return architecture


def _text_sizes(
    embedding: tuple[int, ...], positions: tuple[int, ...], mlp: tuple[int, ...], layers: int, activation: str
) -> TextArchitecture:
    if embedding[1] % HEAD_WIDTH or layers < 1:
        raise ArchitectureError(f"a text encoder of width {embedding[1]} with {layers} layers fits no CLIP model")
    return TextArchitecture(
        vocabulary=embedding[0],
        positions=positions[0],
        width=embedding[1],
        mlp_width=mlp[0],
        layers=layers,
        heads=embedding[1] // HEAD_WIDTH,
        activation=activation,
    )


def vae_architecture(shapes: Shapes, prefix: str = VAE_PREFIX) -> VaeArchitecture:
    """The VAE under `prefix`, in the original layout or in that of Diffusers."""
    inner = _below(shapes, prefix)
    is_original = any(key.startswith("encoder.down.") for key in inner)
    down, block = ("down", "block") if is_original else ("down_blocks", "resnets")
    stem = _shape(shapes, f"{prefix}encoder.conv_in.weight")
    levels = count_items(inner, rf"encoder\.{down}\.(\d+)\.")
    return VaeArchitecture(
        image_channels=stem[1],
        latent_channels=_shape(shapes, f"{prefix}post_quant_conv.weight")[0],
        channels=tuple(_shape(inner, f"encoder.{down}.{i}.{block}.0.conv1.weight")[0] for i in range(levels)),
        resnets=count_items(inner, rf"encoder\.{down}\.0\.{block}\.(\d+)\."),
    )


def vae_prefix(keys: Iterable[str]) -> str:
    """Where a file holds its VAE: a checkpoint under a prefix, a file of a VAE alone without one."""
    return VAE_PREFIX if f"{VAE_PREFIX}encoder.conv_in.weight" in keys else ""


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _any_starts(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ArchitectureError(f"the tensor {key} is missing")
    return shapes[key]
