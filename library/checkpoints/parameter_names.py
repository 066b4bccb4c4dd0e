"""The parameter names of models of given sizes, by the names that diffusers and library.models give them. No torch.

What a header lacks is found by them without building a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from library.checkpoints.architecture import ControlNetArchitecture, UNetArchitecture, VaeArchitecture
from library.checkpoints.keymaps import FUSED_QKV, HINT_CONVOLUTIONS, PROJECTION

RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
VAE_ATTENTION = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYER = ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def unet_names(sizes: UNetArchitecture) -> set[str]:
    """Of diffusers' UNet2DConditionModel."""
    names = {*_way_down(sizes), *_both(["conv_norm_out", "conv_out"])}
    last = len(sizes.channels) - 1
    for i, depth in enumerate(reversed(sizes.transformer_depths)):
        for j in range(sizes.resnets + 1):
            names.update(_resnet(f"up_blocks.{i}.resnets.{j}", RESNET, has_shortcut=True))
            names.update(_transformer(f"up_blocks.{i}.attentions.{j}", depth))
        if i < last:
            names.update(_both([f"up_blocks.{i}.upsamplers.0.conv"]))
    return names


def control_net_names(sizes: ControlNetArchitecture) -> set[str]:
    """Of diffusers' ControlNetModel."""
    embedding = "controlnet_cond_embedding"
    hints = [f"{embedding}.blocks.{i}" for i in range(HINT_CONVOLUTIONS - 2)]
    levels, resnets = len(sizes.unet.channels), sizes.unet.resnets
    outputs = [f"controlnet_down_blocks.{i}" for i in range(1 + levels * resnets + levels - 1)]
    ends = [f"{embedding}.conv_in", *hints, f"{embedding}.conv_out", *outputs, "controlnet_mid_block"]
    return {*_way_down(sizes.unet), *_both(ends)}


def _way_down(sizes: UNetArchitecture) -> Iterator[str]:
    """Embeddings, the blocks on the way down and the middle."""
    embeddings = ["time_embedding", *(["add_embedding"] if sizes.vector_width else [])]
    yield from _both(["conv_in", *(f"{name}.linear_{n}" for name in embeddings for n in (1, 2))])
    last, before = len(sizes.channels) - 1, sizes.channels[0]
    for i, (width, depth) in enumerate(zip(sizes.channels, sizes.transformer_depths, strict=True)):
        for j in range(sizes.resnets):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", RESNET, has_shortcut=j == 0 and width != before)
            yield from _transformer(f"down_blocks.{i}.attentions.{j}", depth)
        before = width
        if i < last:
            yield from _both([f"down_blocks.{i}.downsamplers.0.conv"])
    for j in (0, 1):
        yield from _resnet(f"mid_block.resnets.{j}", RESNET)
    yield from _transformer("mid_block.attentions.0", max(sizes.transformer_depths[-1], 1))


def _transformer(path: str, depth: int) -> Iterator[str]:
    if depth:
        yield from _both([f"{path}.norm", f"{path}.proj_in", f"{path}.proj_out"])
    for n in range(depth):
        block = f"{path}.transformer_blocks.{n}"
        norms = [f"norm{number}" for number in (1, 2, 3)]
        yield from _both(
            f"{block}.{leaf}" for leaf in (*norms, "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
        )
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.to_{letter}.weight" for letter in "qkv")


def _resnet(path: str, leaves: Iterable[str], *, has_shortcut: bool = False) -> Iterator[str]:
    yield from _both(f"{path}.{leaf}" for leaf in (*leaves, *(["conv_shortcut"] if has_shortcut else [])))


def vae_names(sizes: VaeArchitecture) -> set[str]:
    """Of diffusers' AutoencoderKL."""
    names = {*_both(["quant_conv", "post_quant_conv"])}
    for half, blocks, sampler, channels, resnets in (
        ("encoder", "down_blocks", "downsamplers", sizes.channels, sizes.resnets),
        ("decoder", "up_blocks", "upsamplers", sizes.channels[::-1], sizes.resnets + 1),
    ):
        names.update(_both(f"{half}.{name}" for name in ("conv_in", "conv_norm_out", "conv_out")))
        names.update(_both(f"{half}.mid_block.attentions.0.{name}" for name in VAE_ATTENTION))
        for j in (0, 1):
            names.update(_resnet(f"{half}.mid_block.resnets.{j}", VAE_RESNET))
        before = channels[0]
        for i, width in enumerate(channels):
            for j in range(resnets):
                path = f"{half}.{blocks}.{i}.resnets.{j}"
                names.update(_resnet(path, VAE_RESNET, has_shortcut=j == 0 and width != before))
            before = width
            if i < len(channels) - 1:
                names.update(_both([f"{half}.{blocks}.{i}.{sampler}.0.conv"]))
    return names


def text_names(layers: int, *, is_projected: bool = False) -> set[str]:
    """Of library.models.text_encoder.TextEncoder: transformers' classic names."""
    embeddings = "text_model.embeddings"
    names = {f"{embeddings}.token_embedding.weight", f"{embeddings}.position_embedding.weight"}
    names.update(_both(["text_model.final_layer_norm"]))
    for layer in range(layers):
        path = f"text_model.encoder.layers.{layer}"
        names.update(_both(f"{path}.{leaf}" for leaf in (*TEXT_LAYER, *(f"self_attn.{name}" for name in FUSED_QKV))))
    return names | ({f"{PROJECTION}.weight"} if is_projected else set())


def _both(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield f"{path}.weight"
        yield f"{path}.bias"
