"""The tools of low-rank algebra as commands, one after the other: extract, resize, merge."""

import subprocess
import sys

from library.checkpoints.weights import load_tensors
from tests.rules.source_files import ROOT
from tests.tiny_models import tiny_sd_checkpoint


def run(*words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_lora_is_extracted_resized_and_merged(tmp_path):
    org, tuned = (tiny_sd_checkpoint(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1))
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("extracted", "resized", "merged"))
    said = run("networks/extract_lora_from_models.py", "--model_org", org, "--model_tuned", tuned, "--dim", 8,
               "--save_to", first, "--device", "cpu")  # fmt: skip
    assert "text encoders: a largest difference of" in said and "total" in said
    run("networks/resize_lora.py", "--model", first, "--new_rank", 4, "--save_to", second, "--plot", tmp_path / "p.png")
    run("networks/svd_merge_lora.py", "--models", first, second, "--ratios", 0.5, 0.5, "--new_rank", 6,
        "--save_to", third)  # fmt: skip
    ranks = [len(load_tensors(path)["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"])
             for path in (first, second, third)]  # fmt: skip
    assert ranks == [8, 4, 6]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"0.safetensors", "1.safetensors", "p.png", first.name, second.name, third.name}
