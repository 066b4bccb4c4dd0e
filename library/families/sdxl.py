"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952).

Shape letters: B samples, C channels, H W latent pixels, N windows of text, T tokens, D features, P pooled features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.probe import probe, resolve_model
from library.checkpoints.source import ModelSource
from library.families.base import Conditioning, LoadPlan, ModelBundle, PictureSizes
from library.families.options import SDXL_BUCKET_STEP, ModelOptions, TextOptions
from library.families.saving import save_model
from library.families.sd_parts import empty_parts, load_parts
from library.models import attention as attention_kernels
from library.models.build import SDXL_VAE_SCALE
from library.models.options import AttentionOptions
from library.models.text_encoder import join_windows
from library.text.states import TextStates
from library.text.tokens import ClipTokenizer, Tokens
from library.text.weighted_tokens import apply_weights, caption_tokens

logger = logging.getLogger(__name__)

CONDITIONING_LAYER = 2  # from the end, in both encoders, without the final norm


class StableDiffusionXL:
    """SDXL as library.families.base.ModelFamily."""

    name = "sdxl"
    latent_scale = SDXL_VAE_SCALE
    bucket_step = SDXL_BUCKET_STEP

    def load(self, options: ModelOptions, attention: AttentionOptions, plan: LoadPlan) -> ModelBundle:
        """The model on its device, frozen and in eval mode; raises OptionError on a wrong file or flag."""
        found, source = self._found(options)
        parts = load_parts(found, source.kind, options.vae, _without_overflow(plan))
        attention_kernels.apply(parts.unet, parts.vae, attention.kind)
        return ModelBundle(*parts, self._tokenizers(), source)

    def outline(self, options: ModelOptions, plan: LoadPlan) -> ModelBundle:
        """The model on the meta device, frozen and in eval mode: names, sizes and precisions without weights."""
        found, source = self._found(options)
        parts = empty_parts(found, source.kind, options.vae, _without_overflow(plan))
        return ModelBundle(*parts, self._tokenizers(), source)

    def _found(self, options: ModelOptions) -> tuple[Path, ModelSource]:
        """The model's file or folder, and what it is."""
        path = options.pretrained_model_name_or_path
        assert path is not None  # ModelOptions checks it
        found = resolve_model(path)
        source = probe(str(found), family=self.name, v2=options.v2, may_inpaint=options.may_inpaint)
        source = replace(source, path=path)
        return found, replace(source, v_prediction=source.v_prediction or options.v_parameterization)

    def _tokenizers(self) -> tuple[ClipTokenizer, ClipTokenizer]:
        return ClipTokenizer("eos"), ClipTokenizer("zero")

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], windows: int, *, weighted: bool = False
    ) -> Tokens:
        """Ids (B, N, 77) per tokenizer, and weights where captions hold emphasis."""
        return caption_tokens(tokenizers, captions, windows, weighted=weighted)

    def encode_text(
        self,
        text_encoders: Sequence[torch.nn.Module],
        token_ids: Sequence[torch.Tensor],
        text: TextOptions,
        token_weights: Sequence[torch.Tensor] | None = None,
    ) -> TextStates:
        """(B, 75 N + 2, D) states of both encoders, of the last layer but one, and the second one's pooled text.

        A clip skip of n takes the n-th layer from the end of both, without the final norm, in place of that one.

        The pooled text is that of the first window. Weights act on the states as in SD 1.x / 2.x, not on the pooled
        text.
        """
        first, second = text_encoders
        B, N, T = token_ids[0].shape
        first_ids, second_ids = (ids.reshape(B * N, T) for ids in token_ids)
        layer = text.clip_skip or CONDITIONING_LAYER
        states = first(first_ids, layer_from_end=layer, normalized=False)
        second_states, pooled_BNP = second(second_ids, layer_from_end=layer, normalized=False)
        by_encoder = tuple(join_windows(part.reshape(B, N, T, -1)) for part in (states, second_states))
        if token_weights is not None:
            by_encoder = tuple(
                apply_weights(states_BTD, join_windows(weights_BNT.unsqueeze(-1)).squeeze(-1))
                for states_BTD, weights_BNT in zip(by_encoder, token_weights, strict=True)
            )
        return TextStates(by_encoder, pooled_BNP.reshape(B, N, -1)[:, 0])

    def condition(self, text: TextStates, sizes: PictureSizes) -> Conditioning:
        """Both encoders' states side by side, the pooled text, and the sizes (Podell et al. 2023, 2.2).

        sizes_B6: original height and width, top and left of the crop, target height and width, in pixels. The U-Net
        turns each into 256 sinusoids, cosines first, of periods up to 2 pi 10000.
        """
        sizes_B6 = torch.cat([sizes.original_hw_B2, sizes.crop_yx_B2, sizes.target_hw_B2], dim=1).float()
        return Conditioning(text.context_BTD, text.pooled_BP, sizes_B6)

    def predict(
        self, unet: torch.nn.Module, noised_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The U-Net's output, shaped like `noised_BCHW`: noise, or velocity for a v-prediction model."""
        dtype = noised_BCHW.dtype  # conditioning from a cache may be of another
        more = {"added_cond_kwargs": conditioning.added_inputs(dtype), **conditioning.residual_inputs}
        return unet(noised_BCHW, timesteps_B, conditioning.context_BTD.to(dtype), return_dict=False, **more)[0]

    save = staticmethod(save_model)  # whole models of both families are written by the same code

    def describe(self, bundle: ModelBundle) -> dict[str, Any]:
        """ss_v2 and ss_base_model_version."""
        return {"ss_v2": False, "ss_base_model_version": "sdxl_base_v1-0"}


def _without_overflow(plan: LoadPlan) -> LoadPlan:
    """SDXL's own VAE overflows in float16: it computes in float32 there; bfloat16 has float32's range."""
    return replace(plan, vae=torch.float32) if plan.vae is torch.float16 else plan
