"""Training data and its batches for tests, with everything random switched on."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch.nn.functional import avg_pool2d

from library.data.batch import Batch, Position
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.loading import RunFacts, load_batches
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
)
from library.diffusion.noise import NoiseSource
from library.diffusion.options import NoiseOptions
from library.text.tokens import Tokens

BUCKETS = BucketOptions((64, 64), True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
EVERYTHING = CaptionOptions(shuffle_caption=True, caption_dropout_rate=0.2, caption_tag_dropout_rate=0.2)
NO_MASKS = MaskOptions()


def letters(captions):
    """Stands for a tokenizer: the captions' characters in one window of 77."""
    codes = [[ord(letter) for letter in caption[:77].ljust(77)] for caption in captions]
    return Tokens((torch.tensor(codes)[:, None],))


def build(
    folder,
    reg=None,
    *,
    bucket=BUCKETS,
    caption=EVERYTHING,
    augment=None,
    masks=NO_MASKS,
    batch_size=2,
    on_bad_image="stop",
):
    configs = load_configs(
        SourceOptions(str(folder), reg and str(reg)),
        bucket,
        caption,
        augment or AugmentOptions(flip_aug=True, random_crop=True, color_aug=True),
        LoaderOptions(batch_size),
        masks=masks,
    )
    return TrainingData.build(configs, seed=1, on_bad_image=on_bad_image)


def run_facts(**changes):
    facts = {
        "draw": NoiseSource(NoiseOptions(), 1),
        "tokenize": letters,
        "accumulation": 1,
        "max_train_steps": 100,
        "epochs": 2,
        "process_index": 0,
        "num_processes": 1,
        "prior_loss_weight": 0.5,
    }
    return {**facts, **changes}


def batches(data, *, start=None, workers=0, **changes) -> dict[Position, Batch]:
    start = start or Position(1, 0)
    facts = RunFacts(**run_facts(**changes))
    return dict(load_batches(data._samples, data._store, facts, start=start, workers=workers, texts=data._texts))


def assert_equal(first: Batch, second: Batch):
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        elif isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor):
            assert all(map(torch.equal, a, b)), field.name
        else:
            assert a == b, field.name


def cache(data, **options):
    data.cache_latents(
        lambda images, noise: avg_pool2d(images, 8).mean(1, keepdim=True) + noise, "vae", CacheOptions(True, **options)
    )
