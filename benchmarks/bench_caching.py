"""Filling caches: 200 pictures of 512 px with a tiny and with a full-size VAE, and 2,000 captions.

"CPU" is the processor time of a stage, one picture after the other; "the pipeline" is what the tool does, all stages at
the same time. Weights are random, so numbers are those of speed alone. On a machine with a GPU the models are there.

Run: python benchmarks/bench_caching.py [pictures] [captions] [pictures for the full-size VAE, 0 for none]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from table import print_table
from torch.nn.functional import avg_pool2d

from library.checkpoints.architecture import VaeArchitecture
from library.data import cache_files, text_cache
from library.data.buckets import Placement, central_cut, covering
from library.data.cache import Encode, fill_disk, posterior_noise
from library.data.cache_files import CacheItem, SourceBytes, latent_shape
from library.data.images import cut_out, load_picture, to_tensor
from library.data.text_cache_files import TextItem
from library.models import vae
from library.models.build import build_text_encoder, build_vae
from library.text.states import TextStates
from library.text.tokens import ClipTokenizer
from tests.tiny_data import tiny_image
from tests.tiny_models import SECOND_TEXT_ENCODER, TEXT_ENCODERS, VAE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL_VAE = VaeArchitecture(3, 4, (128, 256, 512, 512), resnets=2)
SIZE = (768, 640)  # of the pictures, which become 512 x 512


def write_pictures(folder: Path, count: int) -> list[CacheItem]:
    """PNG and JPEG in turn."""
    items = []
    for index in range(count):
        path = folder / f"picture_{index:04d}{('.png', '.jpg')[index % 2]}"
        tiny_image(SIZE, seed=index % 20).save(path)
        items.append(CacheItem(str(path), SIZE, 1, covering(SIZE, (512, 512)), False, f"{path}.npz"))
    return items


class Stages:
    """Processor time and wall time by stage."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = action()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        return result


def one_by_one(items: list[CacheItem], encode: Encode) -> Stages:
    """The same work without overlap, stage after stage."""
    stages = Stages()
    for item in items:
        content = stages.run("read", Path(item.path).read_bytes)
        picture = stages.run("decode", partial(load_picture, content, 1))
        pixels = stages.run("resize and cut", partial(_cut, picture.rgb_HWC, item.placement))
        source = SourceBytes(stages.run("hash", partial(cache_files.hash_of, content)), len(content), 0, 0)
        latents = stages.run("encode", partial(_encoded, encode, pixels, source.hash))
        noted = cache_files.fingerprint_of(item, source, "vae")
        stages.run("write", partial(cache_files.write, item, {False: latents[0].numpy()}, noted))
    return stages


def _cut(rgb_HWC: Any, placement: Placement) -> torch.Tensor:
    return to_tensor(cut_out(rgb_HWC, central_cut(placement), None))


def _encoded(encode: Encode, pixels_CHW: torch.Tensor, content_hash: str) -> torch.Tensor:
    noise = posterior_noise(latent_shape((512, 512)), content_hash, flipped=False)
    return encode(pixels_CHW[None], noise[None]).cpu()


def encoder(architecture: VaeArchitecture) -> Encode:
    """A VAE of random weights."""
    return partial(vae.encode, build_vae(architecture).to(DEVICE).requires_grad_(False).eval())


def averages(images_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> torch.Tensor:
    """In place of a VAE that takes no time."""
    return avg_pool2d(images_BCHW, 8).mean(1, keepdim=True) + noise_BCHW


def latents(name: str, encode: Encode, count: int, batch_size: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        items = write_pictures(Path(root), count)
        few = items[: min(40, count)]
        stages = one_by_one(few, encode)
        for item in few:
            Path(item.npz).unlink()
        start = time.perf_counter()
        fill_disk(items, encode, batch_size, vae_fingerprint="vae")
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        fill_disk(items, encode, batch_size, vae_fingerprint="vae")
        again = time.perf_counter() - start
    total = sum(stages.cpu.values())
    rows = [
        [
            stage,
            f"{1000 * cpu / len(few):.1f} ms",
            f"{cpu / total:.0%}",
            f"{1000 * stages.wall[stage] / len(few):.1f} ms",
        ]
        for stage, cpu in stages.cpu.items()
    ]
    rows.append(
        ["all, one after the other", _each(total, len(few)), "100%", _each(sum(stages.wall.values()), len(few))]
    )
    rows.append(["the pipeline", "", "", f"{_each(seconds, count)} ({count / seconds:,.1f} images/s)"])
    rows.append(["once more, all valid", "", "", f"{_each(again, count)} ({count / again:,.0f} images/s)"])
    title = f"{count} pictures of {SIZE[0]} x {SIZE[1]} at 512 x 512, {name} on {DEVICE}, {batch_size} at once"
    print_table(title, ["stage", "CPU per image", "share", "time per image"], rows)


def _each(seconds: float, count: int) -> str:
    return f"{1000 * seconds / count:.1f} ms"


def texts(count: int) -> None:
    """A quarter of the captions are of their own kind, as where many pictures share one."""
    distinct = max(1, count // 4)
    captions = [
        f"a picture of number {index % distinct}, painted, in many colours, of a disc" for index in range(count)
    ]
    tokenizers = ClipTokenizer("eos"), ClipTokenizer("zero")
    encoders = [build_text_encoder(each).to(DEVICE).eval() for each in (TEXT_ENCODERS["sdxl"], SECOND_TEXT_ENCODER)]

    @torch.no_grad()
    def encode(batch: Any) -> TextStates:
        ids = [tokenizer.windows(list(batch), 1)[:, 0].to(DEVICE) for tokenizer in tokenizers]
        first = encoders[0](ids[0], layer_from_end=2, normalized=False)
        second, pooled = encoders[1](ids[1], layer_from_end=2, normalized=False)
        return TextStates((first.cpu(), second.cpu()), pooled.cpu())

    with tempfile.TemporaryDirectory() as root:
        items = [
            TextItem(f"{root}/{index}.png", (caption,), caption, (), f"{root}/{index}_te_outputs.npz")
            for index, caption in enumerate(captions)
        ]
        rows = []
        for name in ("filled", "once more, all valid"):
            start = time.perf_counter()
            text_cache.fill_disk(items, encode, "encoders")
            seconds = time.perf_counter() - start
            rows.append([name, f"{seconds:.2f} s", f"{count / seconds:,.0f}"])
        start = time.perf_counter()
        for caption in captions[: min(200, count)]:
            encode([caption])
        seconds = (time.perf_counter() - start) * count / min(200, count)
        rows.append(["encoding alone, one at a time", f"{seconds:.2f} s", f"{count / seconds:,.0f}"])
    title = f"{count:,} captions, {distinct:,} of them different, two tiny text encoders on {DEVICE}, files of each"
    print_table(title, ["", "time", "captions/s"], rows)


def main(pictures: int, captions: int, full: int) -> None:
    latents("averages in place of a VAE", averages, pictures, 4)
    latents("a tiny VAE", encoder(VAE), pictures, 4)
    if full:
        latents("the full-size VAE", encoder(FULL_VAE), full, 1)
    texts(captions)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [200, 2000, 200 if DEVICE.type == "cuda" else 4][len(numbers) :]))
