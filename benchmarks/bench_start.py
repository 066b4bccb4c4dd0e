"""How long people wait: --help, a typo, and from the command to the first training step on the starter model.

Run: python benchmarks/bench_start.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import ROOT, median_seconds, print_table, run_command


def first_step_seconds() -> tuple[float, float]:
    """(seconds to the first finished step, seconds of a bare `import torch, diffusers, transformers, accelerate`)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train_network.py", "--config_file", "starter/train.toml",
            "--pretrained_model_name_or_path", str(next((ROOT / "starter").rglob("*.safetensors"))),
            "--dataset_config", "starter/dataset.toml", "--output_dir", folder, "--max_train_steps", "3",
            "--lr_warmup_steps", "0",
        ]  # fmt: skip
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            seen, seconds = "", None
            assert process.stderr is not None
            while character := process.stderr.read(1):
                seen += character
                if seconds is None and re.search(r"steps:[^\r\n]* [1-9]\d*/3 ", seen):
                    seconds = time.perf_counter() - start
        if process.returncode or seconds is None:
            raise SystemExit(seen)
    start = time.perf_counter()
    run_command("-c", "import torch, diffusers.models, transformers.models.clip, accelerate")
    return seconds, time.perf_counter() - start


def main() -> None:
    rows = []
    for name, words in (
        ("train_network.py --help", ("train_network.py", "--help")),
        ("train_network.py --netwrok_dim 4", ("train_network.py", "--netwrok_dim", "4")),
        ("gen_img_diffusers.py --help", ("gen_img_diffusers.py", "--help")),
        ("bare interpreter", ("-c", "pass")),
        ("import torch", ("-c", "import torch")),
    ):
        low, median, high = median_seconds(lambda words=words: run_command(*words))
        rows.append((name, f"{low:.3f}", f"{median:.3f}", f"{high:.3f}"))
    print_table("Whole process, wall seconds of 5 runs", ("command", "min", "median", "max"), rows)
    step, imports = zip(*[first_step_seconds() for _ in range(3)], strict=True)
    print_table(
        "From the command to the first finished training step (starter model, 2 cores), best of 3",
        ("what", "seconds"),
        [("first step done", f"{min(step):.2f}"), ("importing the libraries alone", f"{min(imports):.2f}")],
    )


if __name__ == "__main__":
    Path(tempfile.gettempdir()).mkdir(exist_ok=True)
    main()
