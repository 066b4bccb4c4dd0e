"""Full-size SDXL, 6.9 GB in float16: load, save to Diffusers and back, bit-equal, with little more memory than that."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.checkpoints.safetensors_io import raw_bytes
from library.checkpoints.weights import SafetensorsWeights
from tests.full_size import meta_modules, write_full_size

ROOT = Path(__file__).resolve().parents[2]
PARTS = {  # tensors of the published file
    "model.diffusion_model.": 1680,
    "conditioner.embedders.0.transformer.": 197,
    "conditioner.embedders.1.model.": 390,
    "first_stage_model.": 248,
}
PARAMETERS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}
DISK = 15 << 30  # bytes: two of the three copies at a time
MEMORY = 1.2  # of the file
# Loads a model and writes it in the other format, in a process of its own; prints the most memory it had, in KiB.
CONVERT = """
import sys
from pathlib import Path
import torch
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
source, target = map(Path, sys.argv[1:])
half = torch.float16
plan = LoadPlan(half, half, half, torch.device("cpu"))
bundle = StableDiffusionXL().load(ModelOptions(str(source)), AttentionOptions(), plan)
StableDiffusionXL().save(bundle, target, dtype=half, metadata={}, as_diffusers=not target.suffix)
status = Path("/proc/self/status")
print([line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")][0]
      if status.exists() else 0)
"""


@pytest.fixture()
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep gigabytes of several runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def convert(source: Path, target: Path) -> int:
    """The most memory the conversion took, in bytes; 0 where the system does not tell."""
    words = [sys.executable, "-c", CONVERT, str(source), str(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


def digests(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Data type, shape and hash of the content of each tensor."""
    with SafetensorsWeights(path) as weights:
        return {
            name: (
                weights.dtypes[name],
                shape,
                hashlib.blake2b(raw_bytes(weights.tensor(name)), digest_size=16).digest(),
            )
            for name, shape in weights.shapes.items()
        }


def test_sizes_of_the_published_model():
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in meta_modules("sdxl").items()}
    assert counted == PARAMETERS


@pytest.mark.slow
def test_round_trip_through_diffusers(scratch: Path):
    if shutil.disk_usage(scratch).free < DISK:
        pytest.skip(f"needs {DISK >> 30} GiB of disk")
    source = write_full_size(scratch / "source.safetensors", "sdxl", torch.float16)
    size, before = source.stat().st_size, digests(source)
    for prefix, count in PARTS.items():
        assert sum(name.startswith(prefix) for name in before) == count
    assert 6.9e9 < size < 7e9

    peaks = [convert(source, scratch / "folder")]
    source.unlink()  # the way back must not need it
    peaks.append(convert(scratch / "folder", scratch / "back.safetensors"))
    assert digests(scratch / "back.safetensors") == before
    assert max(peaks) < MEMORY * size, [f"{peak / size:.2f}" for peak in peaks]
