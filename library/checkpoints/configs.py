"""The configurations of a model's parts, as config.json of a Diffusers folder has them, from their sizes. No torch."""

from __future__ import annotations

from typing import Any

from library.checkpoints.architecture import (
    SIZE_WIDTH,
    ControlNetArchitecture,
    TextArchitecture,
    UNetArchitecture,
    VaeArchitecture,
)

VAE_SCALE = 0.18215
SDXL_VAE_SCALE = 0.13025


def unet_config(architecture: UNetArchitecture, *, sample_size: int = 64) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel; `sample_size` in latent pixels is only recorded."""
    has_attention = [depth > 0 for depth in architecture.transformer_depths]
    return {
        "sample_size": sample_size,
        "out_channels": architecture.out_channels,
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
        **_sizes_on_the_way_down(architecture),
    }


def control_net_config(architecture: ControlNetArchitecture) -> dict[str, Any]:
    """Of diffusers' ControlNetModel."""
    return {
        "conditioning_channels": architecture.image_channels,
        "conditioning_embedding_out_channels": architecture.hint_channels,
        **_sizes_on_the_way_down(architecture.unet),
    }


def _sizes_on_the_way_down(architecture: UNetArchitecture) -> dict[str, Any]:
    """What U-Nets and ControlNets have in common, in diffusers' words."""
    sizes: dict[str, Any] = dict(
        in_channels=architecture.in_channels,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if depth > 0 else "DownBlock2D" for depth in architecture.transformer_depths
        ),
        block_out_channels=architecture.channels,
        layers_per_block=architecture.resnets,
        cross_attention_dim=architecture.context_width,
        transformer_layers_per_block=tuple(max(depth, 1) for depth in architecture.transformer_depths),
        attention_head_dim=architecture.heads,  # diffusers' name for the number of heads
        use_linear_projection=architecture.linear_projection,
        upcast_attention=architecture.upcast_attention,
    )
    if architecture.vector_width:
        sizes |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=architecture.vector_width,
        )
    return sizes


def vae_config(architecture: VaeArchitecture, *, sample_size: int = 512, scale: float = VAE_SCALE) -> dict[str, Any]:
    """Of diffusers' AutoencoderKL; `sample_size` in pixels and `scale`, the family's, are only recorded."""
    levels = len(architecture.channels)
    return dict(
        in_channels=architecture.image_channels,
        out_channels=architecture.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=architecture.channels,
        layers_per_block=architecture.resnets,
        latent_channels=architecture.latent_channels,
        sample_size=sample_size,
        scaling_factor=scale,
    )


def text_config(architecture: TextArchitecture) -> dict[str, Any]:
    """Of transformers' CLIPTextModel; token ids are the trade's (they are not used)."""
    return dict(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.width,
        intermediate_size=architecture.mlp_width,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        max_position_embeddings=architecture.positions,
        hidden_act=architecture.activation,
        projection_dim=architecture.projection or (512 if architecture.activation == "gelu" else architecture.width),
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
