"""Start-up with 20,000 small images: list, read sizes and captions, sort into buckets, check for broken files.

"First" means that the system has nothing of the files in its memory, as far as it can be asked to forget them;
"second" that it has. Beside each stage stands the same work done the plain way, with glob and Pillow.

Run: python benchmarks/bench_data.py [number of images]
"""

from __future__ import annotations

import glob
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from table import print_table

from library.data.buckets import place_images
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.folder_scan import scan_folder
from library.data.images import find_broken
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from tests.tiny_data import tiny_image

DISTINCT = 60  # pictures made; the rest are copies under other names
BUCKETS = BucketOptions((512, 512), enable_bucket=True)


def write_images(folder: Path, count: int) -> None:
    """PNG, JPEG and WebP in turn, 64 to 128 pixels a side, with captions."""
    folder.mkdir()
    kinds = (".png", ".jpg", ".webp")
    contents = []
    for index in range(DISTINCT):
        path = folder / f"made{kinds[index % 3]}"
        tiny_image((64 + 7 * (index % 10), 64 + 11 * (index % 7)), seed=index).save(path)
        contents.append(path.read_bytes())
        path.unlink()
    for index in range(count):
        (folder / f"image_{index:06d}{kinds[index % 3]}").write_bytes(contents[index % DISTINCT])
        (folder / f"image_{index:06d}.txt").write_text(f"a picture, number {index}, small, of colours")


def forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for entry in os.scandir(folder):
        descriptor = os.open(entry.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_scan(folder: Path) -> list[tuple[int, int]]:
    """Sizes and captions the plain way."""
    sizes = []
    for path in sorted(sum((glob.glob(f"{folder}/*{kind}") for kind in (".png", ".jpg", ".webp")), [])):
        with Image.open(path) as image:
            sizes.append(image.size)
        caption = os.path.splitext(path)[0] + ".txt"
        if os.path.isfile(caption):
            with open(caption, encoding="utf-8") as file:
                file.readlines()
    return sizes


def plain_check(paths: list[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.load()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def first_and_second(action: Callable[[], object], folder: Path) -> tuple[float, float]:
    forget(folder)
    return seconds(action), seconds(action)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "1_picture"
        write_images(folder, count)
        records = scan_folder(folder, caption_extension=".txt", class_tokens=None).images
        sizes = [record.size_wh for record in records]
        paths = [record.path for record in records]
        configs = load_configs(
            SourceOptions(root), BUCKETS, CaptionOptions(caption_extension=".txt"), AugmentOptions(), LoaderOptions()
        )
        stages: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = [
            (
                "list, sizes, captions",
                lambda: scan_folder(folder, caption_extension=".txt", class_tokens=None),
                lambda: plain_scan(folder),
            ),
            ("buckets", lambda: place_images(sizes, BUCKETS), None),
            ("check every image", lambda: find_broken(paths), lambda: plain_check(paths)),
            ("all of it, and the samples", lambda: TrainingData.build(configs, seed=0, on_bad_image="stop"), None),
        ]
        rows = []
        for name, action, plain in stages:
            first, second = first_and_second(action, folder)
            rows.append([name, f"{first:.2f} s", f"{second:.2f} s", f"{count / second:,.0f}"])
            if plain is not None:
                first, second = first_and_second(plain, folder)
                rows.append(["  the plain way", f"{first:.2f} s", f"{second:.2f} s", f"{count / second:,.0f}"])
        print_table(f"{count:,} images", ["stage", "first", "second", "images/s"], rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
