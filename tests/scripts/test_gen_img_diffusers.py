"""gen_img_diffusers.py as users run it: the flag table, pictures and their files, and one sentence for each mistake."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_img_diffusers import SCRIPT
from library.cli import generation
from networks.lora import create_network

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler"]


def run(*arguments: object) -> int:
    return generation.run(SCRIPT, [str(argument) for argument in arguments])


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def difference(one: Path, other: Path) -> float:
    """Mean difference of two folders' pictures, in steps of 1/255."""
    pairs = list(zip(pictures(one), pictures(other), strict=True))
    assert pairs
    return float(np.mean([np.abs(first - second).mean() for first, second in pairs]))


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "--max_embeddings_multiples"),
        (["--promt", "a"], 2, "--promt: unknown flag; did you mean --prompt?"),
        (["--steps", "many"], 2, "--steps: 'many' is not a whole number"),
        (["--prompt", "a"], 2, "--ckpt: no model given; name a .safetensors or .ckpt file"),
    ],
    ids=["help", "typo", "type", "no model"],
)
def test_what_needs_no_model_loads_no_torch(arguments: list[str], code: int, text: str) -> None:
    program = (
        "import sys, atexit, runpy; sys.argv = sys.argv[1:];"
        "atexit.register(lambda: print('HEAVY', [n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules]));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "gen_img_diffusers.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert "HEAVY []" in done.stdout
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- pictures


def test_a_prompt_file_becomes_pictures(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --n dog\n# left out\na (bird:1.4) --w 72 --s 1 --d 9\n", encoding="utf-8-sig")
    out = tmp_path / "out"
    arguments = ["--ckpt", tiny_sd1_path, "--from_file", prompts, "--outdir", out, *SMALL, "--sequential_file_name"]
    assert run(*arguments, "--images_per_prompt", 2, "--batch_size", 2, "--seed", 5, "--n_iter", 2) == 0
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == [f"im_{number:06d}.png" for number in range(1, 9)]
    assert "3 pictures will be equal to another one" in capsys.readouterr().err, "the line with --d asks for four"
    texts = [Image.open(path).text for path in paths]
    assert [text["prompt"] for text in texts] == (["a cat"] * 2 + ["a (bird:1.4)"] * 2) * 2
    assert [text["negative-prompt"] for text in texts] == (["dog"] * 2 + [""] * 2) * 2
    assert len({text["seed"] for text in texts[:2] + texts[4:6]}) == 4
    assert {text["seed"] for text in texts[2:4] + texts[6:]} == {"9"}
    assert Image.open(paths[0]).size == (64, 64)
    assert Image.open(paths[2]).size == (72, 64)
    assert "Model: tiny_sd1" in texts[0]["parameters"]


def test_pictures_do_not_depend_on_the_batch_size(tiny_sd1_path: Path, tmp_path: Path) -> None:
    for size in (1, 3):
        arguments = [
            "--ckpt",
            tiny_sd1_path,
            "--prompt",
            "a cat",
            "--outdir",
            tmp_path / str(size),
            "--seed",
            1,
            *SMALL,
        ]
        arguments += ["--sampler", "euler_a", "--images_per_prompt", 3, "--sequential_file_name"]
        assert run(*arguments, "--batch_size", size) == 0
    assert difference(tmp_path / "1", tmp_path / "3") < 0.02
    first, second, _third = pictures(tmp_path / "1")
    assert np.abs(first - second).mean() > 1


def test_lower_precision_is_nearly_the_same(tiny_sd1_path: Path, tmp_path: Path) -> None:
    for flags in ([], ["--bf16"], ["--bf16", "--no_half_vae"], ["--sdpa"]):
        out = tmp_path / "".join(flags)
        out = out if flags else tmp_path / "float32"
        assert run("--ckpt", tiny_sd1_path, "--prompt", "a cat", "--outdir", out, "--seed", 1, *SMALL, *flags) == 0
    for flags in ("--bf16", "--bf16--no_half_vae"):
        assert 0 < difference(tmp_path / "float32", tmp_path / flags) < 20
    assert difference(tmp_path / "float32", tmp_path / "--sdpa") == 0


def test_a_v2_model_and_another_vae(tiny_sd2_path: Path, tiny_sd1_path: Path, tmp_path: Path) -> None:
    arguments = ["--ckpt", tiny_sd2_path, "--v2", "--v_parameterization", "--prompt", "a", "--seed", 1, *SMALL]
    assert run(*arguments, "--outdir", tmp_path / "own") == 0
    assert run(*arguments, "--outdir", tmp_path / "other", "--vae", other_vae(tiny_sd1_path, tmp_path)) == 0
    assert difference(tmp_path / "own", tmp_path / "other") > 1


def other_vae(checkpoint: Path, folder: Path) -> Path:
    """A VAE file with other weights than `checkpoint`'s."""
    from safetensors.torch import load_file, save_file

    prefix = "first_stage_model."
    tensors = {
        key[len(prefix) :]: value * 1.1 for key, value in load_file(checkpoint).items() if key.startswith(prefix)
    }
    save_file(tensors, folder / "vae.safetensors")
    return folder / "vae.safetensors"


# ---------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def lora_path(tiny_sd1_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.models.options import AttentionOptions

    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    options = ModelOptions(pretrained_model_name_or_path=str(tiny_sd1_path))
    bundle = StableDiffusion().load(options, AttentionOptions(), plan)
    network = create_network(1.0, 4, 4.0, bundle.vae, bundle.text_encoders[0], bundle.unet)
    generator = torch.Generator().manual_seed(0)
    network.apply_to(bundle.text_encoders[0], bundle.unet)
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if "up" in name else 0.1)
    path = tmp_path_factory.mktemp("networks") / "lora.safetensors"
    network.save_weights(path, None, {})
    return path


def test_networks_are_applied_or_merged(tiny_sd1_path: Path, lora_path: Path, tmp_path: Path) -> None:
    arguments = ["--ckpt", tiny_sd1_path, "--prompt", "a cat", "--seed", 1, *SMALL]
    lora = ["--network_module", "networks.lora", "--network_weights", lora_path]
    twice = ["--network_module", *["networks.lora"] * 2, "--network_weights", lora_path, lora_path]
    assert run(*arguments, "--outdir", tmp_path / "plain") == 0
    assert run(*arguments, "--outdir", tmp_path / "zero", *lora, "--network_mul", 0) == 0
    assert run(*arguments, "--outdir", tmp_path / "applied", *lora) == 0
    assert run(*arguments, "--outdir", tmp_path / "merged", *lora, "--network_merge") == 0
    assert run(*arguments, "--outdir", tmp_path / "halves", *twice, "--network_mul", 0.5, 0.5) == 0
    texts = {name: Image.open(next((tmp_path / name).iterdir())).text["parameters"] for name in ("plain", "halves")}
    assert texts["halves"].startswith("a cat <lora:lora:0.5> <lora:lora:0.5>\n") and "<lora" not in texts["plain"]
    model_hash = hashlib.sha256(tiny_sd1_path.read_bytes()).hexdigest()[:10]
    assert all(f"Model hash: {model_hash}, Model: tiny_sd1" in text for text in texts.values())
    assert difference(tmp_path / "plain", tmp_path / "zero") == 0
    assert difference(tmp_path / "plain", tmp_path / "applied") > 2
    assert difference(tmp_path / "applied", tmp_path / "merged") < 0.2
    assert difference(tmp_path / "applied", tmp_path / "halves") < 0.2


# ---------------------------------------------------------------------------------------------- mistakes


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_each_mistake_is_one_sentence(tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--ckpt", tiny_sd1_path, "--outdir", tmp_path / "out", *SMALL]
    lora = ["--network_module", "networks.lora", "--network_weights"]
    (tmp_path / "file").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors in here")
    cases = [
        (["--ckpt", "missing.safetensors", "--prompt", "a"], "--ckpt: missing.safetensors does not exist"),
        ([*model], '--prompt: no prompt given; give --prompt "a photo of a cat"'),
        ([*model, "--prompt", "a", "--W", 65], "--W: 65 is not a multiple of 8; use 64 or 72"),
        ([*model, "--prompt", "a --h 100"], "--prompt: --h: 100 is not a multiple of 8"),
        ([*model, "--from_file", "missing.txt"], "--from_file: can't read missing.txt (No such file or directory)"),
        ([*model, "--prompt", "a", "--v2"], "--v2: the model"),
        ([*model, "--prompt", "a", "--vae", "missing.pt"], "--vae: missing.pt does not exist"),
        ([*model, "--prompt", "a", "--outdir", tmp_path / "file" / "x"], "--outdir: can't write to"),
        ([*model, "--prompt", "a", *lora, "missing.pt"], "--network_weights: missing.pt does not exist"),
        (
            [*model, "--prompt", "a", *lora[2:], "a.safetensors"],
            "--network_weights: no --network_module says what kind of network this is; add --network_module",
        ),
        ([*model, "--prompt", "a", *lora, "a", "b"], "--network_weights: 1 module but 2 files"),
        ([*model, "--prompt", "a", *lora, "a", "--network_mul", 1, 2], "--network_mul: 2 values for 1 network"),
        ([*model, "--prompt", "a", *lora, "a", "--network_args", "dim"], "--network_args: 'dim' is not of the form"),
        ([*model, "--prompt", "a", "--sampler", "pndm", "--steps", 3], "--steps: 3 is out of range for the sampler"),
        (
            [*model, "--prompt", "a", *lora, tiny_sd1_path, "--network_args", "conv_dimm=1"],
            "--network_args conv_dimm: unknown name; did you mean conv_dim?",
        ),
        ([*model, "--prompt", "a", "--seed", -1], "--seed: -1 is out of range; use 0 to 2^64 - 1, or leave it out"),
        ([*model, "--prompt", "a", "--outdir", ""], "--outdir: no folder named"),
        ([*model, "--prompt", "(" * 2000 + "a"], "--prompt: its brackets make an emphasis of"),
        ([*model, "--prompt", "a", *lora, tmp_path / "broken.safetensors"], f"--network_weights: {tmp_path}/broken"),
        (
            [*model, "--prompt", "a", "--network_module", "networks.lorra", "--network_weights", tiny_sd1_path],
            "--network_module: there is no Python module 'networks.lorra'; did you mean networks.lora?",
        ),
    ]  # fmt: skip
    for arguments, sentence in cases:
        said = refusal(capsys, *arguments)
        assert said.split(": ", 1)[1].startswith(sentence) or sentence in said, said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("out/*.png"))


def test_a_lora_of_another_model_is_refused(
    tiny_sd2_path: Path, tiny_sd1_path: Path, lora_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    tensors = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(4, 8),
        "lora_unet_nowhere.lora_up.weight": torch.ones(8, 4),
    }
    save_file(tensors, tmp_path / "other.safetensors")
    said = refusal(capsys, *with_network(tiny_sd1_path, tmp_path, tmp_path / "other.safetensors"))
    assert said.startswith("--network_weights", said.index(": ") + 2)
    assert "other.safetensors was made for another model family: none of its 1 modules is in this model" in said
    for merge in ([], ["--network_merge"]):
        said = refusal(capsys, *with_network(tiny_sd2_path, tmp_path, lora_path), *merge)
        assert "--network_weights" in said and "lora.safetensors was made for another model family: lora_" in said
        assert "--dim_from_weights" not in said


def with_network(model: Path, folder: Path, network: Path) -> list[object]:
    lora = ["--network_module", "networks.lora", "--network_weights", network]
    return ["--ckpt", model, "--prompt", "a", "--outdir", folder, *SMALL, *lora]


def test_a_damaged_lora_is_named(
    tiny_sd1_path: Path, lora_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(lora_path)
    torch.save({key: value * torch.nan for key, value in tensors.items()}, tmp_path / "nan.pt")
    torch.save({key: value for key, value in tensors.items() if "lora_up" not in key}, tmp_path / "half.pt")
    torch.save(tensors, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    for name, problem in (
        ("nan", "holds NaN or infinity"), ("half", "is incomplete: lora_te_"), ("cut", "is damaged or truncated"),
    ):  # fmt: skip
        said = refusal(capsys, *with_network(tiny_sd1_path, tmp_path / "out", tmp_path / f"{name}.pt"))
        assert f"--network_weights: {tmp_path / name}.pt {problem}" in said
    assert not list(tmp_path.glob("out/*.png"))


def test_unexpected_errors_go_to_a_log(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.families import sd

    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(sd.StableDiffusion, "predict", fail)
    assert run("--ckpt", tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path, *SMALL) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    (log,) = tmp_path.glob("*.log")
    assert said.endswith(f"RuntimeError: first line; the details are in {log}")
    assert "second line" in log.read_text(encoding="utf-8")


def test_weights_that_are_no_numbers_are_explained(
    tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.families import sd

    monkeypatch.setattr(sd.StableDiffusion, "predict", lambda _self, _unet, noised, *_: noised * torch.nan)
    said = refusal(capsys, "--ckpt", tiny_sd1_path, "--prompt", "a", "--outdir", tmp_path, *SMALL)
    assert "the model's output is not finite" in said
    assert not list(tmp_path.glob("*.png"))
