"""Stable Diffusion 1.x and 2.x.

Shape letters: B samples, C channels, H W latent pixels, N windows of text, T tokens, D features.
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
from library.families.options import ModelOptions, TextOptions
from library.families.saving import save_model
from library.families.sd_parts import empty_parts, load_parts
from library.models import attention as attention_kernels
from library.models.build import VAE_SCALE
from library.models.options import AttentionOptions
from library.models.text_encoder import encode_windows, join_windows
from library.text.states import TextStates
from library.text.tokens import ClipTokenizer, Tokens
from library.text.weighted_tokens import apply_weights, caption_tokens

logger = logging.getLogger(__name__)


class StableDiffusion:
    """SD 1.x / 2.x as library.families.base.ModelFamily; the kind is found from the model itself."""

    name = "sd"
    latent_scale = VAE_SCALE
    bucket_step = 8  # the VAE's factor

    def load(self, options: ModelOptions, attention: AttentionOptions, plan: LoadPlan) -> ModelBundle:
        """The model on its device, frozen and in eval mode; raises OptionError on a wrong file or flag."""
        found, source = self._found(options)
        parts = load_parts(found, source.kind, options.vae, plan)
        attention_kernels.apply(parts.unet, parts.vae, attention.kind)
        return ModelBundle(*parts, (self._tokenizer(source),), source)

    def outline(self, options: ModelOptions, plan: LoadPlan) -> ModelBundle:
        """The model on the meta device, frozen and in eval mode: names, sizes and precisions without weights."""
        found, source = self._found(options)
        parts = empty_parts(found, source.kind, options.vae, plan)
        return ModelBundle(*parts, (self._tokenizer(source),), source)

    def _found(self, options: ModelOptions) -> tuple[Path, ModelSource]:
        """The model's file or folder, and what it is."""
        path = options.pretrained_model_name_or_path
        assert path is not None  # ModelOptions checks it
        found = resolve_model(path)
        source = replace(probe(str(found), v2=options.v2, may_inpaint=options.may_inpaint), path=path)
        return found, self._with_prediction_type(source, options)

    def _tokenizer(self, source: ModelSource) -> ClipTokenizer:
        return ClipTokenizer("zero" if source.kind == "sd2" else "eos")

    def _with_prediction_type(self, source: ModelSource, options: ModelOptions) -> ModelSource:
        if source.kind == "sd2" and source.is_single_file and not (source.v_prediction or options.v_parameterization):
            logger.info(
                "%s does not say what it predicts: noise is assumed; 768-v models need --v_parameterization",
                source.path,
            )
        return replace(source, v_prediction=source.v_prediction or options.v_parameterization)

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
        """(B, 75 N + 2, D) states of (B, N, 77) ids: those of the chosen layer, through the final norm.

        With weights, each state is then multiplied by that of its token, and the mean of a sample is kept.
        """
        (encoder,), (ids,) = text_encoders, token_ids
        context_BTD = encode_windows(encoder, ids, text.clip_skip)
        if token_weights is not None:
            (weights_BNT,) = token_weights
            context_BTD = apply_weights(context_BTD, join_windows(weights_BNT.unsqueeze(-1)).squeeze(-1))
        return TextStates((context_BTD,))

    def condition(self, text: TextStates, sizes: PictureSizes) -> Conditioning:
        """The text alone: these models know nothing of sizes."""
        return Conditioning(text.context_BTD)

    def predict(
        self, unet: torch.nn.Module, noised_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The U-Net's output, shaped like `noised_BCHW`: noise, or velocity for a v-prediction model."""
        more = conditioning.residual_inputs
        return unet(noised_BCHW, timesteps_B, conditioning.context_BTD, return_dict=False, **more)[0]

    save = staticmethod(save_model)  # whole models of both families are written by the same code

    def describe(self, bundle: ModelBundle) -> dict[str, Any]:
        """ss_v2 and ss_base_model_version."""
        source = bundle.source
        version = "sd_v2" if source.kind == "sd2" else "sd_v1"
        version += "_v" if source.v_prediction else ""
        return {"ss_v2": source.kind == "sd2", "ss_base_model_version": version}
