"""Whole models on their way to the disk, for every family: all forms, disks that fail, weights that are only read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from library.checkpoints.own_folders import MODEL_FOLDER
from library.families.base import LoadPlan, ModelBundle, ModelFamily
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models import float8
from library.models.options import AttentionOptions
from library.options import OptionError

WEIGHTS = {
    True: {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"},
    False: {"unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"},
}


def family_of(kind: str) -> ModelFamily:
    return StableDiffusionXL() if kind == "sdxl" else StableDiffusion()


def load(path: Path, kind: str) -> ModelBundle:
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    return family_of(kind).load(ModelOptions(str(path)), AttentionOptions(), plan)


def parts_of(bundle: ModelBundle) -> list[torch.nn.Module]:
    return [bundle.unet, *bundle.text_encoders, bundle.vae]


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture()
def source(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{kind}_path")


@pytest.mark.parametrize("form", ["net.safetensors", "folder"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_what_is_kept_in_8_bits_is_saved_as_it_was_read(kind: str, source: Path, tmp_path: Path, form: str, dtype):
    """All in the precision asked for; without one the text encoders are in their own."""
    family, half = family_of(kind), torch.bfloat16
    plan = LoadPlan(torch.float32, half, torch.float32, torch.device("cpu"))
    bundle = family.load(ModelOptions(str(source)), AttentionOptions(), plan)
    settings = {"dtype": dtype, "metadata": {}, "as_diffusers": form == "folder"}
    family.save(bundle, tmp_path / "before" / form, **settings)
    assert all(float8.store(encoder) for encoder in bundle.text_encoders)
    family.save(bundle, tmp_path / "after" / form, **settings)
    names = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()]
    assert names and all((tmp_path / "after" / n).read_bytes() == (tmp_path / "before" / n).read_bytes() for n in names)


def test_what_is_kept_in_8_bits_is_saved_without_its_source(tiny_sdxl_path: Path, tmp_path: Path, caplog):
    """Then with 4 significant bits, which is all that is left of it."""
    source, file = tmp_path / "source.safetensors", tmp_path / "net.safetensors"
    source.write_bytes(tiny_sdxl_path.read_bytes())
    bundle = load(source, "sdxl")
    for encoder in bundle.text_encoders:
        float8.store(encoder)
    source.unlink()
    family_of("sdxl").save(bundle, file, dtype=torch.float16, metadata={}, as_diffusers=False)
    written, before = load_file(file), load_file(tiny_sdxl_path)
    for name in (name for name in before if name.startswith("conditioner.") and name.endswith("weight")):
        assert written[name].dtype is torch.float16
        assert torch.allclose(written[name].float(), before[name].float(), rtol=2**-4, atol=1e-4), name
    assert "text_encoder_2 is saved as it is kept, in 8 bits" in caplog.text


@pytest.mark.parametrize("safe", [True, False])
def test_both_forms_of_diffusers_folders_load_in_diffusers(kind: str, source: Path, tmp_path: Path, safe: bool):
    bundle, folder = load(source, kind), tmp_path / "folder"
    family_of(kind).save(bundle, folder, dtype=None, metadata={}, as_diffusers=True, safe_serialization=safe)
    texts = ["text_encoder", "text_encoder_2"][: len(bundle.text_encoders)]
    wanted = WEIGHTS[safe] | {f"{text}/{'model.safetensors' if safe else 'pytorch_model.bin'}" for text in texts}
    weights = {str(path.relative_to(folder)) for path in folder.glob("*/*") if path.suffix in (".safetensors", ".bin")}
    assert weights == wanted
    assert MODEL_FOLDER.foreign_in(folder) is None, "a later save may replace it"

    pipeline_class = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, use_safetensors=safe)
    for part, mine in (("unet", bundle.unet), ("vae", bundle.vae)):
        theirs = getattr(pipeline, part).state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.state_dict().items()), part
    for text, encoder in zip(texts, bundle.text_encoders, strict=True):
        file = folder / text / ("model.safetensors" if safe else "pytorch_model.bin")
        content = load_file(file) if safe else torch.load(file, weights_only=True)
        assert set(content) == set(encoder.state_dict()) and "text_model.final_layer_norm.weight" in content
        theirs = {name.removeprefix("text_model."): t for name, t in getattr(pipeline, text).state_dict().items()}
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(theirs[name.removeprefix("text_model.")], tensor), name


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_either_form_comes_back_bit_equal(kind: str, source: Path, tmp_path: Path, safe: bool):
    family, folder = family_of(kind), tmp_path / "folder"
    family.save(load(source, kind), folder, dtype=None, metadata={}, as_diffusers=True, safe_serialization=safe)
    family.save(load(folder, kind), tmp_path / "back.safetensors", dtype=None, metadata={}, as_diffusers=False)
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_saving_only_reads_the_weights(kind: str, source: Path, tmp_path: Path):
    """Nothing is moved, cast or replaced: training may go on with the same storage meanwhile."""
    bundle = load(source, kind)
    places = [(p.data_ptr(), p.dtype, p._version) for part in parts_of(bundle) for p in part.parameters()]
    for name, dtype in (("a.safetensors", torch.float16), ("b.ckpt", torch.bfloat16), ("c", torch.float16)):
        as_diffusers = not Path(name).suffix
        family_of(kind).save(bundle, tmp_path / name, dtype=dtype, metadata={}, as_diffusers=as_diffusers)
    assert places == [(p.data_ptr(), p.dtype, p._version) for part in parts_of(bundle) for p in part.parameters()]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """A disk that takes no file beyond `size` bytes."""
    resource = pytest.importorskip("resource")  # not on Windows
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("name", "safe"), [("x.safetensors", True), ("x.ckpt", True), ("x", True), ("x", False)])
def test_a_disk_that_fills_up_while_writing(tiny_sd1_path: Path, tmp_path: Path, name: str, safe: bool):
    bundle, as_diffusers = load(tiny_sd1_path, "sd1"), not Path(name).suffix
    with disk_of(200_000), pytest.raises(OptionError, match=rf"^can't write .*{name} \(File too large\); free some"):
        family_of("sd1").save(
            bundle, tmp_path / name, dtype=None, metadata={}, as_diffusers=as_diffusers, safe_serialization=safe
        )
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_put_in_place_of_a_file(tiny_sd1_path: Path, tmp_path: Path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OptionError, match="x is a file; choose another output name"):
        family_of("sd1").save(load(tiny_sd1_path, "sd1"), tmp_path / "x", dtype=None, metadata={}, as_diffusers=True)
    assert (tmp_path / "x").read_text() == "mine" and os.listdir(tmp_path) == ["x"]
