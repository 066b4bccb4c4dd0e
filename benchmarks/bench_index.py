"""A large folder of images: how long a start takes until the data are ready, and how much memory, with an index.

Tiny PNGs with captions in one folder: a thousand pictures; of the others every tenth is a file of its own content, the
rest are hard links to these. Each start is a process of its own; the file system is warm, as it is when a run is
started again.

Run: python benchmarks/bench_index.py [number of images]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from table import print_table, run_command

from library.data.config import load_configs
from library.data.metadata_file import common_train_sizes, metadata_entries
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from tests.tiny_data import tiny_image

BUCKETS = BucketOptions((512, 512), enable_bucket=True)
SIZES = ((64, 64), (96, 64), (64, 96))
PICTURES = 1000
STAGES = ("list, sizes, captions, check, samples", "equal files, look-alikes, lengths", "both", "processor", "memory")


def write_folder(folder: Path, count: int) -> None:
    """A hard link counts as a file of its own; a file system takes some thousand links to one file."""
    folder.mkdir()
    originals = []
    for index in range(count):
        if index % 10 == 0 or len(originals) < PICTURES:
            path = folder / f"image_{index:07d}.png"
            if len(originals) < PICTURES:
                tiny_image(SIZES[index % 3], seed=index).save(path)
                originals.append(path.read_bytes())
            else:
                path.write_bytes(originals[index % PICTURES] + index.to_bytes(1 + index % 9 + 3, "big"))
        else:
            os.link(folder / f"image_{index - index % 10:07d}.png", folder / f"image_{index:07d}.png")
        (folder / f"image_{index:07d}.txt").write_text(f"a picture, number {index}, of many")


def start(root: str, policy: str) -> dict[str, float]:
    """Seconds and megabytes of one start, less the libraries'."""
    from library.data.dataset import TrainingData
    from library.data.findings import find

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, processor = time.perf_counter(), time.process_time()
    captions = CaptionOptions(caption_extension=".txt", data_index=policy)
    configs = load_configs(SourceOptions(root), BUCKETS, captions, AugmentOptions(), LoaderOptions(4))
    data = TrainingData.build(configs, seed=0, on_bad_image="stop")
    built = time.perf_counter()
    find(
        data.datasets,
        data.scan,
        num_processes=1,
        token_limit=75,
        count_tokens=lambda texts: [9] * len(texts),
        counter="nines",
    )
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = (built - begun, end - built, end - begun, time.process_time() - processor)
    return dict(zip(STAGES, (*seconds, (peak - before) / 1024), strict=True))


def read_metadata(path: str, how: str) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    if how == "stream":
        common_train_sizes(metadata_entries(Path(path), "in_json"))
    else:
        json.loads(Path(path).read_text())
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def in_a_process(*words: str) -> dict[str, float]:
    result = run_command(__file__, *words)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "1_picture"
        write_folder(folder, count)
        time.sleep(3)  # an index leaves out files that have just changed
        starts = {
            "without an index": in_a_process("start", root, "off"),
            "first": in_a_process("start", root, "on"),
            "second": in_a_process("start", root, "on"),
            "third": in_a_process("start", root, "on"),
        }
        rows = [
            (
                stage,
                *(f"{each[stage]:.0f} MB" if stage == "memory" else f"{each[stage]:.2f} s" for each in starts.values()),
            )
            for stage in STAGES
        ]
        print_table(f"{count:,} images with captions", ("stage", *starts), rows)
        size = next(folder.glob(".image_index*")).stat().st_size
        print(f"\nThe index takes {size / count:.0f} bytes per image.")
        metadata = Path(root) / "meta.json"
        entry = {
            "caption": "a picture of a cat on a sofa, with a blanket",
            "tags": "1girl, solo",
            "train_resolution": [512, 768],
        }
        metadata.write_text(json.dumps({f"image_{index:07d}": entry for index in range(10 * count)}, indent=2))
        ways = {how: in_a_process("metadata", str(metadata), how) for how in ("stream", "json.loads")}
        rows = [(how, f"{each['seconds']:.2f} s", f"{each['memory']:.0f} MB") for how, each in ways.items()]
        title = f"Metadata of {10 * count:,} images, {metadata.stat().st_size / 1e6:.0f} MB of JSON"
        print_table(title, ("way", "time", "memory"), rows)


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind == "start":
        print(json.dumps(start(*sys.argv[2:])))
    elif kind == "metadata":
        print(json.dumps(read_metadata(*sys.argv[2:])))
    else:
        main(int(kind or 100_000))
