"""Encoding the captions of a run before its first step, so that the text encoders can leave the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator

from library.checkpoints.safetensors_io import raw_bytes
from library.data.dataset import TrainingData
from library.data.dataset_class import ForeignData
from library.families.base import ModelBundle, ModelFamily
from library.families.options import TextOptions
from library.text.states import TextStates
from library.train.config import RunConfig
from library.train.memory_estimate import text_encoders_stay


def cache_texts(
    config: RunConfig,
    data: TrainingData | ForeignData,
    family: ModelFamily,
    bundle: ModelBundle,
    accelerator: Accelerator,
) -> None:
    """Fill the cache of encoded captions if asked; text encoders without work leave the device."""
    cache = config.text_cache
    if not cache.enabled or isinstance(data, ForeignData):
        return
    data.cache_texts(
        partial(encoded, family, bundle, config.text),
        fingerprint(bundle.text_encoders, config.text) if cache.cache_text_encoder_outputs_to_disk else "",
        cache,
        is_checked=not config.cache.skip_cache_check,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    if text_encoders_stay(config):
        return
    for encoder in bundle.text_encoders:
        encoder.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def encoded(family: ModelFamily, bundle: ModelBundle, text: TextOptions, captions: Sequence[str]) -> TextStates:
    """What the text encoders say of captions, on the CPU, in their precision."""
    tokens = family.tokenize(bundle.tokenizers, captions, text.token_windows, weighted=text.weighted_captions)
    device = next(bundle.text_encoders[0].parameters()).device
    states = family.encode_text(bundle.text_encoders, [ids.to(device) for ids in tokens.ids], text, tokens.weights)
    pooled = states.pooled_BP
    return TextStates(tuple(part.cpu() for part in states.by_encoder), None if pooled is None else pooled.cpu())


def fingerprint(encoders: Sequence[torch.nn.Module], text: TextOptions) -> str:
    """A hash of what makes text states of captions: names, precision and values of the weights, and the options."""
    digest = hashlib.blake2b(repr(text).encode(), digest_size=16)
    for encoder in encoders:
        for name, tensor in encoder.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()
