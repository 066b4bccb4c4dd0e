"""The metadata of a trained file: ss_* keys as the trade's tools read them, and modelspec.*.

Values are texts made by str(), as the format asks: None is "None", booleans are "True" and "False".
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageOps

from library.checkpoints.model_spec import ModelSpec, model_spec_metadata
from library.checkpoints.safetensors_io import file_sha256, legacy_model_hash
from library.checkpoints.source import ModelSource
from library.data.headers import BadImage, open_image
from library.data.images import to_rgb
from library.options import OptionError
from library.train.config import RunConfig
from library.train.plan import TrainPlan

THUMBNAIL_SIDE = 256  # pixels
# what --no_metadata keeps: without these a file can't be loaded rightly
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# ss_<name> keys that hold the option of that name as it was given
PLAIN = (
    "gradient_checkpointing", "gradient_accumulation_steps", "lr_warmup_steps", "mixed_precision", "clip_skip",
    "max_token_length", "cache_latents", "noise_offset", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight",
    "min_snr_gamma", "scale_weight_norms", "learning_rate", "text_encoder_lr", "unet_lr", "output_name",
    "face_crop_aug_range", "resize_interpolation",
    "multires_noise_iterations", "multires_noise_discount", "adaptive_noise_scale", "ip_noise_gamma",
    "noise_offset_random_strength", "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale",
    "huber_c", "validation_split", "validation_seed", "validate_every_n_steps", "validate_every_n_epochs",
    "max_validation_steps", "ema_decay", "full_fp16", "fp8_base", "fp8_base_unet", "lowram",
)  # fmt: skip
# None where the optimizer chooses its own rate
RATES = ("ss_learning_rate", "ss_text_encoder_lr", "ss_unet_lr")


@dataclass(frozen=True)
class FileFacts:
    """What metadata needs to know of a run beside its options."""

    config: RunConfig
    plan: TrainPlan
    seed: int
    session_id: int
    started_at: float  # unix time
    optimizer: str
    lr_scheduler: str
    source: ModelSource  # of the base model
    family: Mapping[str, Any]  # family.describe()
    adapter: str | None  # target.adapter
    target: Mapping[str, Any]  # target.describe()
    data: Mapping[str, Any]  # TrainingData.metadata()
    resolution: tuple[int, int] | None  # (width, height) of most training images
    thumbnail: str | None  # data URL
    version: str


def constant_metadata(facts: FileFacts) -> dict[str, str]:
    """The ss_* keys that stay the same for every file of the run; files of whole models have none."""
    if facts.adapter is None:
        return {}
    options = facts.config.values()
    values: dict[str, Any] = {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_num_batches_per_epoch": facts.plan.batches_per_epoch,
        "ss_num_epochs": facts.plan.epochs,
        "ss_max_train_steps": facts.plan.steps,
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_sd_scripts_commit_hash": facts.version,
        **{f"ss_{name}": options[name] for name in PLAIN if name in options},
        **_rates_as_list(options),
        **(dict.fromkeys(RATES) if facts.config.optimizer.picks_own_rate else {}),
        "ss_debiased_estimation": options["debiased_estimation_loss"],
        **facts.family,
        **facts.target,
        **facts.data,
        **_file_keys(
            options["pretrained_model_name_or_path"], "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash"
        ),
    }
    if options["vae"]:
        values |= _file_keys(options["vae"], "ss_vae_name", "ss_vae_hash", "ss_new_vae_hash")
    return {name: _text(value) for name, value in values.items()}


def _rates_as_list(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of several text encoders in the form of the trade."""
    rates = options.get("text_encoder_lr")
    return {"ss_text_encoder_lr": list(rates)} if isinstance(rates, tuple) else {}


def file_metadata(
    facts: FileFacts, constant: Mapping[str, str], *, step: int, epoch: int, ending: str
) -> dict[str, str]:
    """All metadata of one file, saved after `step` updates in or after `epoch` (from 1).

    `ending`: of the titles of the averaged and of the best weights, by which user interfaces tell them from others.
    """
    metadata = dict(constant)
    metadata |= {"ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(time.time())}
    if facts.config.saving.no_metadata:
        metadata = {name: metadata[name] for name in MINIMUM if name in metadata}
    return metadata | model_spec_metadata(_model_spec(facts, ending))


def _model_spec(facts: FileFacts, ending: str) -> ModelSpec:
    options, texts = facts.config.values(), facts.config.metadata
    title = texts.metadata_title or options["output_name"]
    low, high = options["min_timestep"], options["max_timestep"]
    given = low is not None or high is not None
    return ModelSpec(
        kind=facts.source.kind,
        v_prediction=facts.source.v_prediction,
        adapter=facts.adapter,
        title=f"{title}{ending}" if title else None,
        resolution=facts.resolution,
        author=texts.metadata_author,
        description=texts.metadata_description,
        license=texts.metadata_license,
        tags=texts.metadata_tags,
        usage_hint=texts.metadata_usage_hint,
        trigger_phrase=texts.metadata_trigger_phrase,
        thumbnail=facts.thumbnail,
        merged_from=texts.metadata_merged_from,
        preprocessor=texts.metadata_preprocessor,
        is_negative_embedding=texts.metadata_is_negative_embedding,
        timestep_range=facts.config.noise.timestep_range if given else None,
        clip_skip=options["clip_skip"],
    )


def data_url(picture: str | None) -> str | None:
    """A picture as a data URL: a JPEG of at most 256 x 256 pixels, as the standard asks; a data URL as it is.

    Raises OptionError for a file that is no picture.
    """
    if not picture or picture.startswith("data:"):
        return picture
    try:
        with open_image(picture) as image:
            upright = to_rgb(ImageOps.exif_transpose(image))
    except (BadImage, OSError) as error:
        problem = f"{picture} is no picture ({error})"
        raise OptionError("--metadata_thumbnail", problem, "name an image file") from None
    upright.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    upright.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _file_keys(path_text: str, name_key: str, legacy_key: str, sha_key: str) -> dict[str, str]:
    """Name and hashes of a model file; only the name for folders and hub ids. Never a path."""
    path = Path(path_text)
    if not path.exists():
        return {name_key: path_text}
    keys = {name_key: path.name}
    if path.is_file():
        keys |= {legacy_key: legacy_model_hash(path), sha_key: file_sha256(path)}
    return keys


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
