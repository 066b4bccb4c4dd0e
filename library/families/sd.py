"""Stable Diffusion 1.x and 2.x.

Shape letters: B samples, C channels, H W latent pixels, N windows of text, T tokens, D features.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.diffusers_folder import EXTRAS, save_diffusers_folder
from library.checkpoints.probe import KIND_NAMES, MODEL_FLAG, probe, resolve_model
from library.checkpoints.sd import ModelState, save_single_file
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import Weights, open_weights
from library.families.base import Conditioning, LoadPlan, ModelBundle
from library.families.options import ModelOptions, TextOptions
from library.families.sd_parts import (
    empty_parts_of_file,
    empty_parts_of_folder,
    empty_vae,
    load_from_file,
    load_from_folder,
    load_vae,
)
from library.models import attention as attention_kernels
from library.models.build import VAE_SCALE
from library.models.options import AttentionOptions
from library.models.text_encoder import encode_windows, join_windows
from library.options import OptionError
from library.text.tokens import ClipTokenizer, Tokens
from library.text.weighted_tokens import apply_weights, weighted_windows

logger = logging.getLogger(__name__)


class StableDiffusion:
    """SD 1.x / 2.x as library.families.base.ModelFamily; the kind is found from the model itself."""

    name = "sd"
    latent_scale = VAE_SCALE
    bucket_step = 8  # the VAE's factor

    def load(self, options: ModelOptions, attention: AttentionOptions, plan: LoadPlan) -> ModelBundle:
        """The model on its device, frozen and in eval mode; raises OptionError on a wrong file or flag."""
        found, source = self._found(options)
        vae = load_vae(options.vae, plan) if options.vae else None
        if found.is_dir():
            unet, text_encoder, vae = load_from_folder(found, vae, plan, MODEL_FLAG)
        else:
            unet, text_encoder, vae = load_from_file(found, source.kind, vae, plan, MODEL_FLAG)
        attention_kernels.apply(unet, vae, attention.kind)
        return ModelBundle(unet, (text_encoder,), vae, (self._tokenizer(source),), source)

    def outline(self, options: ModelOptions, plan: LoadPlan) -> ModelBundle:
        """The model on the meta device, frozen and in eval mode: names, sizes and precisions without weights."""
        found, source = self._found(options)
        vae = empty_vae(options.vae) if options.vae else None
        if found.is_dir():
            unet, text_encoder, vae = empty_parts_of_folder(found, vae, MODEL_FLAG)
        else:
            unet, text_encoder, vae = empty_parts_of_file(found, source.kind, vae, MODEL_FLAG)
        for part, dtype in ((unet, plan.unet), (text_encoder, plan.text_encoders), (vae, plan.vae)):
            torch.nn.Module.to(part, dtype).requires_grad_(False).eval()
        return ModelBundle(unet, (text_encoder,), vae, (self._tokenizer(source),), source)

    def _found(self, options: ModelOptions) -> tuple[Path, ModelSource]:
        """The model's file or folder, and what it is."""
        path = options.pretrained_model_name_or_path
        assert path is not None  # ModelOptions checks it
        found = resolve_model(path)
        source = replace(probe(str(found), v2=options.v2), path=path)
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
        if weighted:
            return weighted_windows(tokenizers, captions, windows)
        return Tokens(tuple(tokenizer.windows(captions, windows) for tokenizer in tokenizers))

    def encode_text(
        self,
        text_encoders: Sequence[torch.nn.Module],
        token_ids: Sequence[torch.Tensor],
        text: TextOptions,
        token_weights: Sequence[torch.Tensor] | None = None,
    ) -> Conditioning:
        """Conditioning of (B, N, 77) ids: (B, 75 N + 2, D) states of the chosen layer, through the final norm.

        With weights, each state is then multiplied by that of its token, and the mean of a sample is kept.
        """
        (encoder,), (ids,) = text_encoders, token_ids
        context_BTD = encode_windows(encoder, ids, text.clip_skip)
        if token_weights is not None:
            (weights_BNT,) = token_weights
            context_BTD = apply_weights(context_BTD, join_windows(weights_BNT.unsqueeze(-1)).squeeze(-1))
        return Conditioning(context_BTD)

    def predict(
        self, unet: torch.nn.Module, noised_BCHW: torch.Tensor, timesteps_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The U-Net's output, shaped like `noised_BCHW`: noise, or velocity for a v-prediction model."""
        return unet(noised_BCHW, timesteps_B, conditioning.context_BTD, return_dict=False)[0]

    def save(
        self,
        bundle: ModelBundle,
        path: Path,
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        as_diffusers: bool,
    ) -> None:
        """Write a single file (.safetensors, or .ckpt by extension) or a Diffusers folder, atomically.

        What a single-file source holds beside the model goes along unchanged. In a .ckpt, `ss_epoch` and `ss_steps` of
        `metadata` are added to the source's counters.
        """
        unet, (text_encoder,), vae = bundle.unet, bundle.text_encoders, bundle.vae
        model = ModelState(bundle.source.kind, unet.state_dict(), text_encoder.state_dict(), vae.state_dict())
        with _source_weights(bundle.source) as source:
            if not as_diffusers:
                counters = int(metadata.get("ss_epoch", 0)), int(metadata.get("ss_steps", 0))
                save_single_file(model, path, source=source, dtype=dtype, metadata=metadata, counters=counters)
                return
            save_diffusers_folder(
                model,
                (unet.config, text_encoder.config, vae.config),
                path,
                source=source,
                dtype=dtype,
                v_prediction=bundle.source.v_prediction,
                template=_folder_of(bundle.source),
            )

    def describe(self, bundle: ModelBundle) -> dict[str, Any]:
        """ss_v2 and ss_base_model_version, and the kind and prediction type that modelspec asks for."""
        source = bundle.source
        version = "sd_v2" if source.kind == "sd2" else "sd_v1"
        return {
            "ss_v2": source.kind == "sd2",
            "ss_base_model_version": version + ("_v" if source.v_prediction else ""),
            "kind": source.kind,
            "v_prediction": source.v_prediction,
            "kind_name": KIND_NAMES[source.kind],
        }


def _folder_of(source: ModelSource) -> Path | None:
    """The Diffusers folder the model came from."""
    return None if source.is_single_file else resolve_model(source.path)


@contextlib.contextmanager
def _source_weights(source: ModelSource) -> Iterator[Weights | None]:
    """What the model's source holds for saving: its single file, or what a Diffusers folder keeps of one."""
    try:
        found = resolve_model(source.path)
    except OptionError:
        logger.warning("%s is gone: what it held beside the model can't be saved", source.path)
        yield None
        return
    file = found if found.is_file() else found / EXTRAS
    if not file.is_file():
        yield None
        return
    with open_weights(file) as weights:
        yield weights
