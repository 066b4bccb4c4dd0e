"""The attention kernel of a U-Net and a VAE, chosen once after loading."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from library.options import OptionError

SLICE_ELEMENTS = 1 << 24  # attention scores held at a time by the sliced kernel


def apply(unet: Any, vae: Any, kind: str) -> None:
    """Let both models, of diffusers, use `kind`: "sdpa" (PyTorch's own), "xformers" or "sliced" (least memory)."""
    for model in (unet, vae):
        apply_to(model, kind)


def apply_to(model: Any, kind: str) -> None:
    """The same for one model: a U-Net, a VAE or a ControlNet."""
    if kind == "xformers":
        _import_xformers()
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ValueError, NotImplementedError) as error:
            raise OptionError("--xformers", f"xformers does not run here ({error})", "use --sdpa") from None
        return
    model.set_attn_processor({"sdpa": Sdpa, "sliced": SlicedAttention}[kind]())


def _import_xformers() -> None:
    """Raise OptionError for an xformers that does not fit to this PyTorch."""
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError) as error:
        problem = f"the package xformers can't be loaded ({error})"
        raise OptionError("--xformers", problem, "use --sdpa, or install a build for this version of PyTorch") from None


class Sdpa(AttnProcessor2_0):
    """diffusers' processor for PyTorch's own kernel; only its signature is known beforehand.

    diffusers reads the signature of a layer's processor at each call, which takes as long as a small kernel.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    __call__.__signature__ = inspect.signature(__call__)  # pyright: ignore[reportFunctionMemberAccess]


class SlicedAttention:
    """Attention over slices of the queries, so that the score matrix never exists as a whole, on any device.

    Follows diffusers' processor protocol. With `upcast_attention` scores are computed in float32.
    """

    def __call__(
        self,
        attn: Any,  # diffusers.models.attention_processor.Attention
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None, "Stable Diffusion's attention has no mask"
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:  # the VAE's: (B, C, H, W)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed = self.attend(query, key, value, attn.upcast_attention)
        output = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, upcast: bool) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) v of (B, heads, tokens, d) tensors."""
        return attend_in_slices(query, key, value, upcast)


def attend_in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, upcast: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, tokens, d) tensors, a few queries at a time."""
    dtype = query.dtype
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    scores_per_query = query.shape[0] * query.shape[1] * key.shape[2]
    step = max(1, SLICE_ELEMENTS // scores_per_query)
    with torch.autocast(query.device.type, enabled=False):
        slices = [F.scaled_dot_product_attention(part, key, value) for part in query.split(step, dim=2)]
    return torch.cat(slices, dim=2).to(dtype)
