"""Training sizes for a metadata file's images, and their latents beside them, as fine-tuning takes them up."""

from __future__ import annotations

import logging
from functools import partial

import torch
from accelerate import PartialState

from library.checkpoints.architecture import model_kind
from library.checkpoints.probe import check_vae
from library.checkpoints.weights import open_weights
from library.data.cache import fill_disk
from library.data.preparation import Prepared, find_images, write_sizes
from library.families.base import LoadPlan
from library.families.sd_parts import load_vae
from library.models import vae
from library.train.placement import WEIGHT_DTYPES
from library.train.preparing_options import PreparedFiles, PreparingOptions

logger = logging.getLogger(__name__)


def prepare(files: PreparedFiles, options: PreparingOptions) -> None:
    """Encode what has no valid file yet, every process its share; then write the metadata."""
    state = PartialState()
    prepared = find_images(files.in_json, files.train_data_dir, options.bucket, on_bad_image=options.on_bad_image)
    _report(prepared)
    model = _loaded(files.model_name_or_path, torch.device(state.device or "cpu"))
    others = tuple(vae.fingerprint(model, dtype) for dtype in WEIGHT_DTYPES.values())
    torch.nn.Module.to(model, _precision(files.model_name_or_path, options.mixed_precision))
    fill_disk(
        prepared.items(flipped_too=options.flip_aug, alpha_too=bool(options.alpha_mask), other_precisions=others),
        partial(vae.encode, model),
        options.batch_size,
        vae_fingerprint=vae.fingerprint(model),
        trusts_others=options.skip_existing,
        process_index=state.process_index,
        num_processes=state.num_processes,
    )
    if state.is_main_process:
        write_sizes(files.in_json, files.out_json, prepared)
        logger.info("train_resolution of %d images written to %s", len(prepared.sizes), files.out_json)
    if state.num_processes > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _loaded(path: str, device: torch.device) -> torch.nn.Module:
    """In float32, from which all other precisions follow."""
    full = torch.float32
    return load_vae(path, LoadPlan(unet=full, text_encoders=full, vae=full, device=device))


def _precision(path: str, name: str) -> torch.dtype:
    """As a training run with this --mixed_precision has the VAE: that of an SDXL model is never in float16."""
    if name == "fp16" and _is_of_sdxl(path):
        logger.info("--mixed_precision fp16: the VAE of SDXL overflows in it and computes in float32")
        return torch.float32
    return WEIGHT_DTYPES[name]


def _is_of_sdxl(path: str) -> bool:
    """Whether a VAE comes with an SDXL model; of one on its own nobody can tell."""
    found = check_vae(path)
    if found.is_dir():
        return (found.parent / "text_encoder_2").is_dir()
    with open_weights(found) as weights:
        return model_kind(weights.shapes) == "sdxl"


def _report(prepared: Prepared) -> None:
    """Say which sizes there are, and what was left aside."""
    for (width, height), count in prepared.counts():
        logger.info("  %5d x %-5d %6d", width, height, count)
    logger.info(
        "%d images, aspect ratios %.4f off their buckets' on average", len(prepared.images), prepared.aspect_error()
    )
