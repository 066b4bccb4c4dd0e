"""Full-size SD 1.5, 2.1 and XL in float16: single file -> Diffusers folder -> single file, and .ckpt, bit-equal.

Each way is a process of its own that may take little more memory than the file has bytes; the folders load in
diffusers. 2.1, 2.6 and 6.9 GB a copy.
"""

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
from tests.full_size import meta_modules, require_room, write_full_size

ROOT = Path(__file__).resolve().parents[2]
LDM = {"model.diffusion_model.": 686, "first_stage_model.": 248}
TENSORS = {  # of the published files
    "sd1": {**LDM, "cond_stage_model.": 197},  # with position ids
    "sd2": {**LDM, "cond_stage_model.": 294},  # with the unused layer, the projection and the logit scale
    "sdxl": {
        "model.diffusion_model.": 1680,
        "conditioner.embedders.0.transformer.": 197,
        "conditioner.embedders.1.model.": 390,
        "first_stage_model.": 248,
    },
}
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
}
SIZES = {"sd1": (2.1e9, 2.2e9), "sd2": (2.5e9, 2.7e9), "sdxl": (6.9e9, 7e9)}  # bytes
COPIES = 2.1  # on the disk at a time
MEMORY = 1.2  # of the file
# Loads a model and writes it in another form; prints the most memory that took, in KiB, beside what the libraries take.
CONVERT = """
import sys
from pathlib import Path
import torch
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
def memory(name):
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else [f"{name}: 0"]
    return [int(line.split()[1]) for line in lines if line.startswith(name)][0]
source, target = map(Path, sys.argv[2:])
family = StableDiffusionXL() if sys.argv[1] == "sdxl" else StableDiffusion()
before, half = memory("VmRSS"), torch.float16
bundle = family.load(ModelOptions(str(source)), AttentionOptions(), LoadPlan(half, half, half, torch.device("cpu")))
assert bundle.source.kind == sys.argv[1]
family.save(bundle, target, dtype=half, metadata={}, as_diffusers=not target.suffix)
print(memory("VmHWM") - before)
"""
# Loads a Diffusers folder as its users do and compares every tensor with the folder's files.
LOAD = """
import sys
from pathlib import Path
import torch
import diffusers
from library.checkpoints.weights import open_component
kind, folder = sys.argv[1], Path(sys.argv[2])
pipeline_class = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
pipeline = pipeline_class.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
    module = getattr(pipeline, part, None)
    if module is None:
        continue
    is_text = part.startswith("text_")
    file = open_component(folder / part, "model" if is_text else "diffusion_pytorch_model")
    if is_text:
        assert all(name.startswith(("text_model.", "text_projection.")) for name in file.shapes)
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    names = {name.removeprefix("text_model."): name for name in file.shapes}
    assert names.keys() == theirs.keys() - {"embeddings.position_ids"}, names.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        assert name not in names or torch.equal(file.tensor(names[name]), tensor), name
"""


@pytest.fixture()
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep gigabytes of several runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def in_a_process(code: str, *words: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_sizes_of_the_published_models(kind: str):
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in meta_modules(kind).items()}
    assert counted == PARAMETERS[kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.full_size) for kind in ("sd2", "sdxl"))]
)
def test_round_trip(kind: str, scratch: Path):
    require_room(scratch, disk=COPIES * SIZES[kind][1], memory=1.4 * SIZES[kind][1])
    source, folder, pickle = (scratch / name for name in ("source.safetensors", "folder", "pickle.ckpt"))
    write_full_size(source, kind, torch.float16)
    size, before = source.stat().st_size, digests(source)
    for prefix, count in TENSORS[kind].items():
        assert sum(name.startswith(prefix) for name in before) == count
    assert SIZES[kind][0] < size < SIZES[kind][1]

    peaks = [int(in_a_process(CONVERT, kind, source, folder))]
    source.unlink()  # the way back must not need it
    in_a_process(LOAD, kind, folder)
    peaks.append(int(in_a_process(CONVERT, kind, folder, pickle)))
    shutil.rmtree(folder)
    in_a_process(CONVERT, kind, pickle, scratch / "back.safetensors")  # maps the file, so its memory can't be told
    assert digests(scratch / "back.safetensors") == before
    assert max(peaks) * 1024 < MEMORY * size, [f"{peak * 1024 / size:.2f}" for peak in peaks]
    print([f"{peak * 1024 / size:.3f}" for peak in peaks])
