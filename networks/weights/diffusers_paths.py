"""The paths that modules of networks have in diffusers' models, from their names in the trade's files. No torch.

A name is a path with "_" for ".", so words that hold a "_" themselves have to be known.
"""

from __future__ import annotations

import functools

from library.checkpoints.keymaps import translate, unet_paths
from library.options import OptionError
from networks.layers import TEXT_PREFIX, UNET_PREFIX
from networks.weights.network_file import SDXL_LAYOUT

WORDS = frozenset((
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k",
    "to_v", "to_out", "time_emb_proj", "conv_shortcut", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "conv_in", "conv_out", "conv_norm_out", "input_blocks", "middle_block", "output_blocks",
    "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embed", "label_emb", "text_model",
    "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection",
))  # fmt: skip
LONGEST = 3  # parts of such a word
PARTS = {
    f"{UNET_PREFIX}_": "unet",
    f"{TEXT_PREFIX}_": "text_encoder",
    f"{TEXT_PREFIX}1_": "text_encoder",
    f"{TEXT_PREFIX}2_": "text_encoder_2",
}
UNET_ROOTS = (
    "down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.",
)  # fmt: skip
MATRICES = ("proj_in", "proj_out")  # Linear in SD 2.x and SDXL, 1x1 convolutions in SD 1.x
ALWAYS_CONV = "conv_shortcut"


def diffusers_path(name: str, file: str) -> str:
    """ "lora_unet_mid_block_attentions_0_proj_in" -> "unet.mid_block.attentions.0.proj_in".

    SDXL's original names become diffusers' by the key table. Raises OptionError, which names the file, for a name of
    no layer.
    """
    for prefix, part in PARTS.items():
        if not name.startswith(prefix):
            continue
        path = dotted(name.removeprefix(prefix))
        if part == "unet":
            path = translate(path, _original_paths()) or path
        if path.startswith(UNET_ROOTS if part == "unet" else "text_model."):
            return f"{part}.{path}"
    raise OptionError("", f"{file}: {name} is the name of no layer of Stable Diffusion", "check the file")


def dotted(name: str) -> str:
    """A name with its points: "to_out_0" -> "to_out.0"."""
    parts, path = name.split("_"), []
    while parts:
        count = next((n for n in range(LONGEST, 1, -1) if "_".join(parts[:n]) in WORDS), 1)
        path.append("_".join(parts[:count]))
        del parts[:count]
    return ".".join(path)


def dimensions(path: str, kind: str) -> int | None:
    """How many dimensions the factors of a layer have in diffusers' model, where programs differ about it."""
    leaf = path.rpartition(".")[2]
    if leaf == ALWAYS_CONV:
        return 4
    return {"sd1": 4, "sd2": 2, "sdxl": 2}.get(kind) if leaf in MATRICES else None


@functools.cache
def _original_paths() -> dict[str, str]:
    return unet_paths(SDXL_LAYOUT)
