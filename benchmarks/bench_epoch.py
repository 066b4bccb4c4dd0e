"""One shuffled epoch of 10,000 cached latents (512 x 512 px), in batches of 4, as the training loop receives them.

Noise, timesteps, captions and token ids are part of a batch. Beside it the plain way: a torch DataLoader that reads the
same .npz files with numpy in a shuffled order and leaves noise and text to the training step.

Run: python benchmarks/bench_epoch.py [number of images]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from table import print_table
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from library.data.batch import Position
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    SourceOptions,
)
from library.diffusion.noise import NoiseSource
from library.diffusion.options import NoiseOptions
from library.families.sd import StableDiffusion
from library.text.tokens import ClipTokenizer
from tests.tiny_data import tiny_image

BATCH = 4


def write_images(folder: Path, count: int) -> None:
    """Small pictures under many names; the cache holds latents of 64 x 64 for each."""
    folder.mkdir(parents=True)
    tiny_image((64, 64)).save(folder / "made.png")
    content = (folder / "made.png").read_bytes()
    (folder / "made.png").unlink()
    for index in range(count):
        (folder / f"image_{index:06d}.png").write_bytes(content)
        (folder / f"image_{index:06d}.txt").write_text(f"a picture, number {index}, small, with some more words")


def cached_data(folder: Path, *, on_disk: bool, cache_format: str = "npz") -> TrainingData:
    configs = load_configs(
        SourceOptions(str(folder)),
        BucketOptions((512, 512)),
        CaptionOptions(caption_extension=".txt", shuffle_caption=True),
        AugmentOptions(),
        LoaderOptions(BATCH),
    )
    data = TrainingData.build(configs, seed=1, on_bad_image="stop")
    cache = CacheOptions(True, on_disk, vae_batch_size=8, cache_format=cache_format)
    data.cache_latents(lambda images, noise: avg_pool2d(images, 8).mean(1, keepdim=True) + noise, "bench", cache)
    return data


def ours(data: TrainingData, workers: int) -> Iterable[object]:
    family, tokenizer = StableDiffusion(), ClipTokenizer()
    return data.loader(
        start=Position(1, 0),
        workers=workers,
        draw=NoiseSource(NoiseOptions(), 1),
        tokenize=partial(family.tokenize, (tokenizer,), windows=1),
        accumulation=1,
        max_train_steps=10**6,
        epochs=1,
        prior_loss_weight=1.0,
    )


class PlainFiles(Dataset):
    """One cached latent per item, as numpy reads it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.npz"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with np.load(self.files[index]) as content:
            return torch.from_numpy(content["latents"])


def seconds(make: Callable[[], Iterable[object]]) -> float:
    start = time.perf_counter()
    for _ in make():
        pass
    return time.perf_counter() - start


def main(count: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root) / "1_picture", count)
        disk, memory = cached_data(Path(root), on_disk=True), cached_data(Path(root), on_disk=False)
        packed = cached_data(Path(root), on_disk=True, cache_format="packed")
        plain = PlainFiles(Path(root))
        for workers in (0, 1, 2):
            plain_loader = DataLoader(plain, BATCH, shuffle=True, num_workers=workers)
            times = seconds(lambda w=workers: ours(disk, w)), seconds(lambda loader=plain_loader: loader)
            rows.append(["disk", workers, *(f"{count / t:,.0f}" for t in times), f"{times[0]:.1f} s"])
        for workers in (0, 1, 2):
            time_packed = seconds(lambda w=workers: ours(packed, w))
            rows.append(["packed", workers, f"{count / time_packed:,.0f}", "", f"{time_packed:.1f} s"])
        time_in_memory = seconds(lambda: ours(memory, 0))
        rows.append(["memory", 0, f"{count / time_in_memory:,.0f}", "", f"{time_in_memory:.1f} s"])
    header = ["latents", "workers", "ours, images/s", "plain reading, images/s", "the epoch"]
    print_table(f"A shuffled epoch of {count:,} cached latents, batches of {BATCH}", header, rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
