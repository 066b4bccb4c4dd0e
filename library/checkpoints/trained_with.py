"""What the header of a file says of its training, in readable lines: the trade's ss_* entries and modelspec.*."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MOST_TAGS = 12
LONGEST = 200  # letters of a value
LABELS = {
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.license": "license",
    "modelspec.architecture": "architecture",
    "modelspec.prediction_type": "predicts",
    "modelspec.resolution": "resolution",
    "modelspec.date": "written",
    "modelspec.merged_from": "merged from",
    "modelspec.trigger_phrase": "trigger phrase",
    "modelspec.usage_hint": "usage hint",
    "ss_output_name": "name",
    "ss_training_comment": "comment",
    "ss_sd_model_name": "trained on",
    "ss_base_model_version": "base model",
    "ss_v2": "v2",
    "ss_network_module": "network module",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_network_args": "network arguments",
    "ss_num_train_images": "images",
    "ss_num_reg_images": "regularization images",
    "ss_dataset_dirs": "folders",
    "ss_resolution": "training resolution",
    "ss_batch_size_per_device": "batch size",
    "ss_gradient_accumulation_steps": "accumulation",
    "ss_num_epochs": "epochs planned",
    "ss_epoch": "epoch",
    "ss_max_train_steps": "steps planned",
    "ss_steps": "steps",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate, U-Net",
    "ss_text_encoder_lr": "learning rate, text encoder",
    "ss_lr_scheduler": "schedule",
    "ss_lr_warmup_steps": "warmup steps",
    "ss_mixed_precision": "mixed precision",
    "ss_clip_skip": "clip skip",
    "ss_noise_offset": "noise offset",
    "ss_min_snr_gamma": "min SNR gamma",
    "ss_seed": "seed",
    "ss_training_started_at": "started",
    "ss_training_finished_at": "finished",
    "ss_tag_frequency": "most frequent tags",
}
NOTHING = ("", "None", "null", "{}", "[]")


def trained_with(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, value) of what a header says, in a fixed order; empty where it says nothing."""
    lines = [(label, _readable(key, metadata[key])) for key, label in LABELS.items() if key in metadata]
    return [(label, value) for label, value in lines if value not in NOTHING]


def _readable(key: str, text: str) -> str:
    value = text
    if key.endswith("_at"):
        value = _time(text)
    elif key == "ss_tag_frequency":
        value = _tags(_unfolded(text))
    elif key == "ss_dataset_dirs":
        value = _folders(_unfolded(text))
    value = " ".join(str(value).split())
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def _unfolded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _time(text: str) -> str:
    try:
        return datetime.fromtimestamp(float(text)).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return text


def _tags(content: Any) -> str:
    """The tags of all folders together with their numbers."""
    counts: Counter[str] = Counter()
    for tags in content.values() if isinstance(content, dict) else ():
        if isinstance(tags, dict):
            counts.update({tag.strip(): number for tag, number in tags.items() if isinstance(number, int)})
    return ", ".join(f"{tag} {number}" for tag, number in counts.most_common(MOST_TAGS))


def _folders(content: Any) -> str:
    """ "10_cat (20 images x 10)"."""
    if not isinstance(content, dict):
        return ""
    return ", ".join(
        f"{name} ({row.get('img_count', '?')} images x {row.get('n_repeats', '?')})"
        for name, row in content.items()
        if isinstance(row, dict)
    )
