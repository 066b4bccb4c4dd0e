"""Generation with words of textual inversion: usual ones in both families, and those with a meaning for each layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import gen_img_diffusers
import sdxl_gen_img
from library.cli import embeddings, generation
from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.conditions import PromptEncoder
from library.generate.denoise import denoise
from library.generate.embedding_options import EmbeddingOptions
from library.generate.layered_words import cross_attention_layers
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from library.text.added_words import LAYERS

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler", "--sequential_file_name", "--seed", "1"]
REQUEST = GenerationRequest("a zwork (cat:1.2)", "zwork", 64, 64, 2, 7.5, 1, sampler="euler")


def run(*arguments: object, script: generation.Script = gen_img_diffusers.SCRIPT) -> int:
    return generation.run(script, [str(argument) for argument in arguments])


def picture(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def vectors(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_a_word_counts_where_it_stands(tiny_sd1_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"string_to_param": {"*": vectors(2, 64)}}, tmp_path / "Zwork.pt")
    word = ["--textual_inversion_embeddings", tmp_path / "Zwork.pt"]
    made = {}
    for name, prompt, flags in (
        ("without", "a zwork", []), ("with", "a zwork", word), ("elsewhere", "a cat", word), ("plain", "a cat", []),
        ("first", "a zwork1", word),
    ):  # fmt: skip
        arguments = ["--ckpt", tiny_sd1_path, "--prompt", prompt, *SMALL, "--outdir", tmp_path / name]
        assert run(*arguments, *flags) == 0
        made[name] = picture(tmp_path / name)
    assert np.array_equal(made["elsewhere"], made["plain"])
    for name in ("without", "first"):
        assert np.abs(made["with"] - made[name]).mean() > 0.5
    assert "Zwork in prompts stands for 2 vectors" in capsys.readouterr().err


def test_words_of_sdxl(tiny_sdxl_path: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):  # which differ in what they mean to the second encoder
        word = {"clip_l": vectors(1, 64), "clip_g": vectors(1, 128, seed=seed)}
        (tmp_path / name).mkdir()
        save_file(word, tmp_path / name / "zwork.safetensors")
        arguments = ["--ckpt", tiny_sdxl_path, "--prompt", "a zwork", *SMALL, "--outdir", tmp_path / name]
        flags = ["--textual_inversion_embeddings", tmp_path / name / "zwork.safetensors"]
        assert run(*arguments, *flags, script=sdxl_gen_img.SCRIPT) == 0
    assert np.abs(picture(tmp_path / "one") - picture(tmp_path / "two")).mean() > 0.5


# ---------------------------------------------------------------------------------------------- layers


def latents(path: Path, folder: Path, content: dict[str, torch.Tensor], *, is_layered: bool) -> torch.Tensor:
    """Of a picture that is asked for with a word of this content."""
    torch.save(content, folder / "zwork.pt")
    bundle, encoder, parts = with_word(path, folder / "zwork.pt", is_layered=is_layered)
    return denoise(StableDiffusion(), bundle, [REQUEST], encoder=encoder, parts=parts)


def with_word(path: Path, file: Path, *, is_layered: bool) -> tuple[ModelBundle, PromptEncoder, tuple]:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = StableDiffusion().load(ModelOptions(str(path)), AttentionOptions(), plan)
    name = "XTI_embeddings" if is_layered else "textual_inversion_embeddings"
    words = embeddings.read(EmbeddingOptions(**{name: (str(file),)}))
    embeddings.teach(words, bundle)
    encoder = PromptEncoder(StableDiffusion(), bundle)
    return bundle, encoder, embeddings.part_for(words, encoder)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_a_word_that_means_the_same_to_all_layers_is_a_usual_one(
    tiny_sd1_path: Path, tmp_path: Path, num_vectors: int
) -> None:
    meaning = vectors(num_vectors, 64)
    usual = latents(tiny_sd1_path, tmp_path, {"*": meaning}, is_layered=False)
    layered = latents(tiny_sd1_path, tmp_path, dict.fromkeys(LAYERS, meaning), is_layered=True)
    torch.testing.assert_close(layered, usual, atol=1e-3, rtol=1e-3)


def contexts_seen(path: Path, file: Path) -> list[torch.Tensor]:
    """What reaches the keys of each cross-attention layer, of the last step."""
    bundle, encoder, parts = with_word(path, file, is_layered=True)
    seen: dict[int, torch.Tensor] = {}
    transformers = cross_attention_layers(bundle.unet)
    for index, transformer in enumerate(transformers):
        keys = transformer.transformer_blocks[0].attn2.to_k
        keys.register_forward_pre_hook(lambda _module, inputs, index=index: seen.update({index: inputs[0]}))
    denoise(StableDiffusion(), bundle, [REQUEST], encoder=encoder, parts=parts)
    hooks = [len(transformer._forward_pre_hooks) for transformer in transformers]
    assert hooks == [0] * len(LAYERS), "the model is left as it was"
    return [seen[index] for index in range(len(LAYERS))]


def test_each_layer_sees_its_own_meaning(tiny_sd1_path: Path, tmp_path: Path) -> None:
    content = dict.fromkeys(LAYERS, vectors(1, 64))
    torch.save(content, tmp_path / "zwork.pt")
    before = contexts_seen(tiny_sd1_path, tmp_path / "zwork.pt")
    for layer in ("IN04", "MID", "OUT11"):
        torch.save(content | {layer: vectors(1, 64, seed=1)}, tmp_path / "zwork.pt")
        after = contexts_seen(tiny_sd1_path, tmp_path / "zwork.pt")
        changed = [name for name, *pair in zip(LAYERS, before, after, strict=True) if not torch.equal(*pair)]
        assert changed == [layer]
        assert before[0].shape == (2, 77, 64)


def test_layered_words_on_the_command_line(tiny_sd1_path: Path, tmp_path: Path) -> None:
    """Beside a usual word, in batches with prompts that lack it."""
    torch.save({name: vectors(1, 64, seed=index) for index, name in enumerate(LAYERS)}, tmp_path / "zwork.pt")
    torch.save({"*": vectors(1, 64, seed=99)}, tmp_path / "zwerk.pt")
    (tmp_path / "prompts.txt").write_text("a zwork --d 1\na zwork zwerk --d 1\na cat --d 1\n")
    words = ["--XTI_embeddings", tmp_path / "zwork.pt", "--textual_inversion_embeddings", tmp_path / "zwerk.pt"]
    made = {}
    for size in (1, 3):
        arguments = ["--ckpt", tiny_sd1_path, "--from_file", tmp_path / "prompts.txt", *SMALL, "--batch_size", size]
        assert run(*arguments, *words, "--outdir", tmp_path / str(size)) == 0
        made[size] = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / str(size)).glob("*.png"))]
    assert run("--ckpt", tiny_sd1_path, "--prompt", "a cat", *SMALL, "--outdir", tmp_path / "plain") == 0
    first, second, third = made[1]
    assert np.abs(first - second).mean() > 0.5 < np.abs(first - third).mean()
    assert np.abs(third - picture(tmp_path / "plain")).mean() < 0.05
    assert max(np.abs(one - other).mean() for one, other in zip(made[1], made[3], strict=True)) < 0.02


# ---------------------------------------------------------------------------------------------- mistakes


def test_each_mistake_is_one_sentence(
    tiny_sd1_path: Path, tiny_sdxl_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}, tmp_path / "zlarge.safetensors")
    torch.save({"*": vectors(1, 1024)}, tmp_path / "zsecond.pt")
    torch.save({"*": vectors(1, 64)}, tmp_path / "zwork.pt")
    torch.save({"*": vectors(1, 64)}, tmp_path / "cat.pt")
    torch.save({"*": vectors(1, 64)}, tmp_path / "ZWORK.bin")
    usual, layered = "--textual_inversion_embeddings", "--XTI_embeddings"
    cases = [
        ([usual, "missing.pt"], f"{usual}: missing.pt does not exist; check the path"),
        ([usual, tmp_path / "cat.pt"], "would be the word 'cat', which has a meaning already; rename the file"),
        ([usual, tmp_path / "zwork.pt", tmp_path / "ZWORK.bin"], "are the same word 'ZWORK'; rename one of them"),
        ([usual, tmp_path / "zwork.pt", tmp_path / "zwork.pt"], "zwork.pt is named twice; leave one out"),
        ([usual, tmp_path / "zlarge.safetensors"], "zlarge.safetensors was made for SDXL (vectors of 768 and 1280)"),
        ([usual, tmp_path / "zsecond.pt"], "zsecond.pt was made for SD 2.x (vectors of 1024), and the model is"),
        ([layered, "missing.pt"], f"{layered}: missing.pt does not exist"),
        ([layered, tmp_path / "zwork.pt"], "zwork.pt is no file of extended textual inversion"),
        (
            [layered, "x.pt", "--control_net_models", "y.pt", "--guide_image_path", "z.png"],
            f"{layered}: can't go together with --control_net_models",
        ),
    ]
    for flags, sentence in cases:
        capsys.readouterr()
        assert run("--ckpt", tiny_sd1_path, "--prompt", "a", *SMALL, "--outdir", tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in said and "Traceback" not in said
    model = ["--ckpt", tiny_sdxl_path, "--prompt", "a", *SMALL, "--outdir", tmp_path / "out"]
    assert run(*model, usual, tmp_path / "zwork.pt", script=sdxl_gen_img.SCRIPT) == 2
    assert "and the model is SDXL (vectors of 64 and 128)" in capsys.readouterr().err
