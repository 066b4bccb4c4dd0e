"""The report before a run: how long people wait for it with 10,000 images.

The images are of two kinds: small ones, which cost little to decode, so that what remains is the report's own work, and
photographs of 768 x 512, where decoding for the check (which every first start does) takes the time.

Run: python benchmarks/bench_plan.py [number of small images] [number of photographs]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench_data import write_images
from PIL import Image
from table import ROOT, print_table, run_command

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.findings import Findings, find
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.data.thumbnails import thumbnails
from library.text.lengths import count_tokens
from library.text.tokens import ClipTokenizer
from tests.tiny_data import tiny_image

BUCKETS = BucketOptions((512, 512), enable_bucket=True)
STARTER = next((ROOT / "starter").rglob("*.safetensors"))


def write_photographs(folder: Path, count: int) -> None:
    """Noisy JPEGs of 768 x 512, thirty different ones, each file a little different."""
    folder.mkdir()
    pictures = []
    for seed in range(30):
        noise = Image.effect_noise((768, 512), 40).convert("RGB")
        Image.blend(tiny_image((768, 512), seed=seed), noise, 0.3).save(folder / "made.jpg", quality=90)
        pictures.append((folder / "made.jpg").read_bytes())
    (folder / "made.jpg").unlink()
    for index in range(count):
        content = pictures[index % 30] + index.to_bytes(1 + index % 7 + 3, "big")
        (folder / f"photo_{index:06d}.jpg").write_bytes(content)
        (folder / f"photo_{index:06d}.txt").write_text(f"a photograph, number {index}, noisy")


def seconds(action: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def measure(kind: str, count: int, write: Callable[[Path, int], None]) -> None:
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "1_picture", count)
        captions = CaptionOptions(caption_extension=".txt")
        configs = load_configs(SourceOptions(root), BUCKETS, captions, AugmentOptions(), LoaderOptions(4))
        build, data = seconds(lambda: TrainingData.build(configs, seed=0, on_bad_image="stop"))
        assert isinstance(data, TrainingData)
        counting = partial(count_tokens, ClipTokenizer())
        found, findings = seconds(
            lambda: find(data.datasets, data.scan, num_processes=1, token_limit=75, count_tokens=counting)
        )
        assert isinstance(findings, Findings)
        records = [image.record for image in findings.images.values()]
        small, _ = seconds(lambda: thumbnails(records[:: max(1, len(records) // 240)][:240]))
        command = [
            "train_network.py", "--plan", "--pretrained_model_name_or_path", STARTER, "--train_data_dir", root,
            "--resolution", "512", "--enable_bucket", "--caption_extension", ".txt", "--train_batch_size", "4",
            "--network_module", "networks.lora", "--learning_rate", "1e-4", "--output_dir", str(Path(root) / "out"),
        ]  # fmt: skip
        whole, result = seconds(lambda: run_command(*command))
        assert getattr(result, "returncode", 1) == 0, getattr(result, "stderr", "")
        rows = [
            ("find and check the images (part of every start)", f"{build:.2f} s"),
            ("facts: buckets, tokens, copies, pictures that look alike", f"{found:.2f} s"),
            ("240 thumbnails", f"{small:.2f} s"),
            ("--plan as a whole process", f"{whole:.2f} s"),
        ]
        print_table(f"{count:,} {kind}", ("stage", "time"), rows)


def main(num_small: int, num_photographs: int) -> None:
    measure("small images", num_small, write_images)
    measure("photographs", num_photographs, write_photographs)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (10_000, 2_000))
