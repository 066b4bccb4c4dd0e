"""Networks while generating, as users ask for them: multipliers per prompt, merging, regions, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from library.families.base import LoadPlan
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
from networks.lora import create_network
from tests.tiny_networks import perturb

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler", "--sequential_file_name"]


@dataclasses.dataclass(frozen=True)
class Set:
    """A script, a model and three LoRAs for it."""

    script: generation.Script
    model: Path
    loras: list[Path]

    def run(self, folder: Path, *arguments: object) -> int:
        words = ["--ckpt", self.model, "--outdir", folder, "--seed", 1, *SMALL, *arguments]
        return generation.run(self.script, [str(word) for word in words])

    def draw(self, folder: Path, *arguments: object) -> list[np.ndarray]:
        assert self.run(folder, *arguments) == 0
        return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]

    def networks(self, *multipliers: float, module: str = "networks.lora") -> list[object]:
        count = len(multipliers)
        words = ["--network_module", *[module] * count, "--network_weights", *self.loras[:count]]
        return [*words, "--network_mul", *multipliers]


def loras_for(family: Any, model: Path, folder: Path) -> list[Path]:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = family.load(ModelOptions(pretrained_model_name_or_path=str(model)), AttentionOptions(), plan)
    encoders = list(bundle.text_encoders)
    files = []
    for seed in range(3):
        network = create_network(1.0, 4, 4.0, bundle.vae, encoders[0] if len(encoders) == 1 else encoders, bundle.unet)
        perturb(network, seed=seed, std=0.15)
        files.append(folder / f"lora{seed}.safetensors")
        network.save_weights(files[-1], None, {"ss_network_dim": "4", "ss_tag_frequency": '{"cat": 3}'})
    return files


@pytest.fixture(scope="module")
def sd1(tiny_sd1_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Set:
    files = loras_for(StableDiffusion(), tiny_sd1_path, tmp_path_factory.mktemp("sd1"))
    return Set(gen_img_diffusers.SCRIPT, tiny_sd1_path, files)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Set:
    files = loras_for(StableDiffusionXL(), tiny_sdxl_path, tmp_path_factory.mktemp("sdxl"))
    return Set(sdxl_gen_img.SCRIPT, tiny_sdxl_path, files)


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Red on the left, green in the middle, yellow on the right."""
    pixels = np.repeat(np.array([[(255, 0, 0)] * 24 + [(0, 255, 0)] * 24 + [(255, 255, 0)] * 16], np.uint8), 64, axis=0)
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    return tmp_path / "stripes.png"


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


# ---------------------------------------------------------------------------------------------- multipliers and merging


def test_multipliers_of_a_prompt(sd1: Set, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ["a cat", "a cat --am 0", "a cat --am 0.5,-0.5", "a cat --am 1,0", "a cat --am 1,0,7"]
    prompts.write_text("\n".join(f"{line} --d 3" for line in lines))
    got = sd1.draw(tmp_path / "am", *sd1.networks(1.0, 0.5), "--from_file", prompts, "--batch_size", 2)
    bare, *_ = sd1.draw(tmp_path / "bare", "--prompt", "a cat --d 3")
    halves, *_ = sd1.draw(tmp_path / "halves", *sd1.networks(0.5, -0.5), "--prompt", "a cat --d 3")
    one, *_ = sd1.draw(tmp_path / "one", *sd1.networks(1.0), "--prompt", "a cat --d 3")
    texts = [Image.open(path).text["parameters"] for path in sorted((tmp_path / "am").glob("*.png"))]
    assert texts[0].startswith("a cat <lora:lora0:1> <lora:lora1:0.5>\n")
    assert texts[2].startswith("a cat <lora:lora0:0.5> <lora:lora1:-0.5>\n")
    assert difference(got[1], bare) == 0
    assert difference(got[2], halves) == 0
    assert difference(got[3], one) == 0 and difference(got[4], one) == 0
    assert min(difference(got[0], other) for other in got[1:]) > 1


def test_networks_that_work_together_are_all_there(sdxl: Set, tmp_path: Path) -> None:
    pictures = {
        count: sdxl.draw(tmp_path / str(count), *sdxl.networks(*[0.7] * count), "--prompt", "a cat")[0]
        for count in (1, 2, 3)
    }
    assert min(difference(pictures[1], pictures[2]), difference(pictures[2], pictures[3])) > 0.5


@pytest.mark.parametrize(
    "flags", [["--network_merge"], ["--network_merge_n_models", 1], ["--network_pre_calc"]], ids=str
)
def test_the_faster_ways_draw_the_same(sd1: Set, tmp_path: Path, flags: list[object]) -> None:
    networks = sd1.networks(1.0, 0.5)
    applied = sd1.draw(tmp_path / "applied", *networks, "--prompt", "a cat --n dog")
    other = sd1.draw(tmp_path / "other", *networks, "--prompt", "a cat --n dog", *flags)
    assert difference(applied[0], other[0]) < 0.2


def test_the_first_n_are_merged_and_the_others_follow_the_prompt(
    sd1: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = [*sd1.networks(1.0, 0.5), "--network_merge_n_models", 1]
    (got,) = sd1.draw(tmp_path / "merged", *networks, "--prompt", "a cat --am 0")
    said = capsys.readouterr().err
    assert "lora0.safetensors: merged with multiplier 1" in said
    assert "lora1.safetensors: applied with multiplier 0.5" in said
    (alone,) = sd1.draw(tmp_path / "alone", *sd1.networks(1.0), "--prompt", "a cat")
    assert difference(got, alone) < 0.2
    assert sd1.run(tmp_path / "idle", *networks[:-1], 2, "--prompt", "a cat --am 0.5") == 0
    assert "--am: 1 multiplier for 0 networks, the rest has no effect; 2 networks merged" in capsys.readouterr().err


def test_pre_calculated_weights_follow_the_prompt(sd1: Set, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --am 1,0 --d 3\na cat --am 0 --d 3\na cat --d 3\n")
    words = [*sd1.networks(1.0, 0.5), "--from_file", prompts]
    applied = sd1.draw(tmp_path / "applied", *words)
    calculated = sd1.draw(tmp_path / "calculated", *words, "--network_pre_calc")
    assert max(map(difference, applied, calculated)) < 0.2
    assert difference(applied[0], applied[1]) > 1


def test_metadata_is_shown(sd1: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sd1.run(tmp_path / "out", *sd1.networks(1.0), "--prompt", "a", "--network_show_meta") == 0
    said = capsys.readouterr().err
    assert "lora0.safetensors:" in said and "ss_network_dim: 4" in said and 'ss_tag_frequency: {"cat": 3}' in said


# ---------------------------------------------------------------------------------------------- parts of a prompt


def test_composition_from_the_command_line(sdxl: Set, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ["a cat", "a cat AND a dog :0", "a cat AND a dog", "a dog AND a cat", "a cat AND a dog :0.5"]
    prompts.write_text("\n".join(f"{line} --d 3 --n blurry" for line in lines))
    got = sdxl.draw(tmp_path / "out", "--from_file", prompts, "--batch_size", 4)
    assert difference(got[0], got[1]) < 0.1
    assert difference(got[2], got[3]) < 0.1, "the order of parts means nothing"
    assert difference(got[0], got[2]) > 0.5 and difference(got[2], got[4]) > 0.5
    assert Image.open(tmp_path / "out" / "im_000005.png").text["prompt"] == "a cat AND a dog :0.5"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_regions(kind: str, stripes: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    studio: Set = request.getfixturevalue(kind)
    regional = [*studio.networks(1.0, 1.0), "--mask_path", stripes]
    prompt = "a cat AND a dog AND a house"
    drawn = {
        name: studio.draw(tmp_path / name, *regional, *more)[0]
        for name, more in {
            "channels": ["--prompt", prompt],
            "codes": ["--prompt", prompt, "--network_regional_mask_max_color_codes", 7],
            "other text": ["--prompt", "a cat AND a tree AND a house"],
            "other network": ["--prompt", f"{prompt} --am 1,0"],
            "unguided": ["--prompt", prompt, "--scale", 1],
        }.items()
    }
    for name in ("codes", "other text", "other network", "unguided"):
        assert difference(drawn["channels"], drawn[name]) > 0.2, name
    assert difference(drawn["channels"], studio.draw(tmp_path / "again", *regional, "--prompt", prompt)[0]) == 0


def test_the_third_part_has_no_effect_without_a_network(sd1: Set, stripes: Path, tmp_path: Path) -> None:
    regional = [*sd1.networks(1.0, 1.0), "--mask_path", stripes]
    (one,) = sd1.draw(tmp_path / "one", *regional, "--prompt", "a cat AND a dog AND a house")
    (other,) = sd1.draw(tmp_path / "other", *regional, "--prompt", "a cat AND a dog AND a tree")
    assert difference(one, other) < 0.1


def test_a_folder_of_masks_gives_its_first_picture(sd1: Set, stripes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    Image.open(stripes).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    words = [*sd1.networks(1.0, 1.0), "--prompt", "a cat AND a dog", "--mask_path"]
    one, other = (sd1.draw(tmp_path / f"out_{path.stem}", *words, path)[0] for path in (stripes, folder))
    assert difference(one, other) == 0


def test_merged_networks_have_no_region(sd1: Set, stripes: Path, tmp_path: Path) -> None:
    """One network is merged, one is left: one part is enough for it."""
    words = [*sd1.networks(1.0, 1.0), "--prompt", "a cat", "--mask_path", stripes, "--network_merge_n_models", 1]
    (got,) = sd1.draw(tmp_path / "merged", *words)
    (everywhere,) = sd1.draw(tmp_path / "plain", *sd1.networks(1.0, 1.0), "--prompt", "a cat")
    assert difference(got, everywhere) > 0.2


# ---------------------------------------------------------------------------------------------- mistakes


def refusal(capsys: pytest.CaptureFixture[str], studio: Set, folder: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert studio.run(folder, *arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_mistakes_are_told_before_the_model_is_loaded(
    sd1: Set, stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "load", None)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    two = sd1.networks(1.0, 1.0)
    parts = [*two, "--prompt", "a AND b", "--mask_path"]
    cases = [
        (
            [*two, "--prompt", 'a "cat"', "--mask_path", stripes],
            '--network_weights: 2 networks for 1 part of the prompt "a \\"cat\\""; with --mask_path write a part',
        ),
        ([*parts, tmp_path / "none.png"], f"--mask_path: {tmp_path}/none.png does not exist"),
        ([*parts, tmp_path / "broken.png"], f"--mask_path: {tmp_path}/broken.png is no picture that can be read"),
        ([*parts, tmp_path / "empty"], f"--mask_path: the folder {tmp_path}/empty holds no picture"),
        ([*parts, stripes, "--network_pre_calc"], "--network_pre_calc: weights that are calculated beforehand know no"),
        ([*two, "--prompt", "a", "--network_merge_n_models", 3], "--network_merge_n_models: 3 of 2 networks can't be"),
        (["--prompt", "a", "--network_pre_calc"], "--network_pre_calc: there is no network"),
        (
            [*two, "--prompt", "a", "--network_regional_mask_max_color_codes", 8],
            "--network_regional_mask_max_color_codes: 8 is out of range; use 1 to 7",
        ),
        ([*two, "--prompt", "a --am x"], "--prompt: --am 'x' is not a multiplier or several joined by commas"),
    ]
    for arguments, sentence in cases:
        said = refusal(capsys, sd1, tmp_path / "out", *arguments)
        assert sentence in said, said
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.parametrize(
    ("key", "inputs", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 2048, "SDXL"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 768, "SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 2048, "SDXL"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.hada_w1_b", 1024, "SD 2.x"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", 1024, "SD 2.x"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", 768, "SD 1.x"),
    ],
)
def test_a_network_for_another_family_is_told_by_its_keys(
    sd1: Set, sdxl: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    key: str, inputs: int, family: str,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    for loader in (StableDiffusion, StableDiffusionXL):
        monkeypatch.setattr(loader, "load", None)
    save_file({key: torch.ones(4, inputs)}, tmp_path / "other.safetensors")
    studio, own = (sdxl, "SDXL") if family == "SD 1.x" else (sd1, "SD 1.x")
    words = ["--network_module", "networks.lora", "--network_weights", tmp_path / "other.safetensors", "--prompt", "a"]
    said = refusal(capsys, studio, tmp_path / "out", *words)
    assert f"other.safetensors was made for {family}, and the model is {own}; use a network that was made" in said


# ---------------------------------------------------------------------------------------------- other people's modules

RECORDER = """
    import torch
    import networks.lora

    calls = []


    class Recorder(torch.nn.Module):
        '''The trade's contract around a LoRA: writes down what it is told.'''

        def __init__(self, network):
            super().__init__()
            self.network = network

        def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
            self.network.apply_to(text_encoder, unet)

        def load_weights(self, file):
            return self.network.load_weights(file)

        def set_multiplier(self, multiplier):
            calls.append(("set_multiplier", multiplier))
            self.network.set_multiplier(multiplier)

        def prepare_optimizer_params(self, *rates): ...
        def prepare_grad_etc(self, text_encoder, unet): ...
        def on_epoch_start(self, text_encoder, unet): ...
        def save_weights(self, file, dtype, metadata): ...

        def set_region(self, sub_prompt_index, is_last_network, mask):
            calls.append(("set_region", sub_prompt_index, is_last_network, tuple(mask.shape)))
            self.network.set_region(sub_prompt_index, is_last_network, mask)

        def set_current_generation(self, batch_size, num_sub_prompts, width, height, shared, ds_ratio=None):
            calls.append(("set_current_generation", batch_size, num_sub_prompts, width, height))
            self.network.set_current_generation(batch_size, num_sub_prompts, width, height, shared)


    def create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None, **kwargs):
        network, tensors = networks.lora.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet, weights_sd, **kwargs
        )
        return Recorder(network), tensors
"""


@pytest.fixture
def written_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        sys.modules.pop(name, None)
        return name

    return write


def test_other_peoples_modules_are_asked_by_the_same_contract(
    sd1: Set, stripes: Path, tmp_path: Path, written_module: Any
) -> None:
    name = written_module("recorder", RECORDER)
    words = ["--mask_path", stripes, "--prompt", "a cat AND a dog --n blurry"]
    (theirs,) = sd1.draw(tmp_path / "theirs", *sd1.networks(1.0, 0.5, module=name), *words)
    calls = sys.modules[name].calls
    (ours,) = sd1.draw(tmp_path / "ours", *sd1.networks(1.0, 0.5), *words)
    assert difference(theirs, ours) == 0
    whole = [call for call in calls if call[0] == "set_region" and call[-1] == (64, 64)]
    assert whole == [("set_region", 0, False, (64, 64)), ("set_region", 1, True, (64, 64))]
    assert [call for call in calls if call[0] == "set_current_generation"][-2:] == [
        ("set_current_generation", 1, 2, 64, 64)
    ] * 2
    assert ("set_multiplier", 0.0) in calls, "negative prompts know no network"


def test_modules_that_can_not_do_it_are_named(
    sd1: Set, stripes: Path, tmp_path: Path, written_module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a cat AND a dog", "--mask_path", stripes]
    without = written_module("without_regions", RECORDER.replace("def set_region(", "def something_else("))
    said = refusal(capsys, sd1, tmp_path / "out", *sd1.networks(1.0, module=without), *words)
    assert "--network_module: the network of without_regions has no method set_region, which this run needs" in said
    name = written_module("recorder", RECORDER)
    mixed = ["--network_module", "networks.lora", name, "--network_weights", *sd1.loras[:2]]
    said = refusal(capsys, sd1, tmp_path / "out", *mixed, *words)
    assert "--network_module: networks of networks.lora, recorder divide a picture in ways that don't fit" in said
    fixed = written_module("fixed", RECORDER.replace("def set_multiplier(", "def something_else("))
    said = refusal(capsys, sd1, tmp_path / "out", *sd1.networks(1.0, module=fixed), "--prompt", "a --am 0.5")
    assert "--network_module: the network of fixed has no method set_multiplier, which this run needs" in said
    assert sd1.run(tmp_path / "plain", *sd1.networks(1.0, module=fixed), "--prompt", "a", "--network_pre_calc") == 0
    assert "lora0.safetensors can't be calculated beforehand and is applied instead" in capsys.readouterr().err
