"""Time and peak memory of loading a full-size SD 1.5 file: ours beside the plain way, each in a process of its own.

    python benchmarks/bench_load.py [--kind sd1|sd2|sdxl] [--repeats 3] [--file MODEL.safetensors] [--ways ours]
                                    [--dtypes float16 bfloat16 float32]

Without --file, a file with random fp16 weights is made first (2 or 7 GB in the temporary folder). "plain" builds the
modules with random weights, reads the whole file into a dictionary and copies it over, as trainers long did. The file
is read once before, so that both find it in the system's cache. Imports are not part of the time, but of the memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def load_ours(path: Path, dtype_name: str) -> None:
    import torch

    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions

    dtype = getattr(torch, dtype_name)
    plan = LoadPlan(dtype, dtype, dtype, torch.device("cpu"))
    family = StableDiffusionXL() if kind_of(path) == "sdxl" else StableDiffusion()
    family.load(ModelOptions(str(path)), AttentionOptions(), plan)


def kind_of(path: Path) -> str:
    from library.checkpoints.architecture import model_kind
    from library.checkpoints.weights import open_weights

    with open_weights(path) as weights:
        return model_kind(weights.shapes)


def load_plain(path: Path, dtype_name: str) -> None:
    import torch
    from safetensors.torch import load

    from library.checkpoints.architecture import model_kind, text_architectures, unet_architecture, vae_architecture
    from library.checkpoints.sd import part_slots
    from library.models.build import build_text_encoder, build_unet, build_vae

    state = load(path.read_bytes())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kind = model_kind(shapes)
    modules = {
        "unet": build_unet(unet_architecture(shapes, kind)),
        "vae": build_vae(vae_architecture(shapes)),
    }
    for part, architecture in zip(("text_encoder", "text_encoder_2"), text_architectures(shapes, kind), strict=False):
        modules[part] = build_text_encoder(architecture)
    for part, module in modules.items():
        own = module.state_dict()
        converted = {}
        for name, slot in part_slots(part, own, kind=kind, file_keys=shapes).items():
            tensor = state[slot.key].T if slot.is_transposed else state[slot.key]
            tensor = tensor if slot.part is None else tensor.chunk(3)[slot.part]
            converted[name] = tensor.reshape(own[name].shape)
        module.load_state_dict(converted)
        module.to(getattr(torch, dtype_name))


WAYS = {"ours": load_ours, "plain": load_plain}


def measure(way: str, path: Path, dtype_name: str) -> None:
    """In the child: load once, after all imports, and write seconds and peak memory as JSON."""
    import library.families.sd
    import library.families.sdxl  # noqa: F401

    start = time.perf_counter()
    WAYS[way](path, dtype_name)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak}))


def run(way: str, path: Path, dtype_name: str, repeats: int) -> tuple[float, float]:
    """(best seconds, highest peak in GB) of several child processes."""
    command = [sys.executable, __file__, "--measure", way, "--file", str(path), "--dtype", dtype_name]
    results = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    return min(result["seconds"] for result in results), max(result["peak"] for result in results) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--kind", choices=["sd1", "sd2", "sdxl"], default="sd1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.file, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.file
        if path is None:
            from tests.full_size import write_full_size

            path = write_full_size(Path(folder) / "model.safetensors", options.kind)
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB")
        print(f"{'to':>10} {'way':>6} {'seconds':>8} {'peak GB':>8}")
        for dtype_name in options.dtypes:
            for way in options.ways:
                seconds, peak = run(way, path, dtype_name, options.repeats)
                print(f"{dtype_name:>10} {way:>6} {seconds:8.2f} {peak:8.2f}")


if __name__ == "__main__":
    main()
