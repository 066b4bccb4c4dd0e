"""Which files of a hub model are fetched, against a server on this machine that answers like the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from library.checkpoints.hub import fetch_clip, fetch_model
from tests.hub_stand_in import TOKEN, HubStandIn

REPO = "somebody/xl"
CONFIGS = [
    "unet/config.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer_2/merges.txt",
    "text_encoder_2/config.json",
]
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    from huggingface_hub import constants

    server = HubStandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    address = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with server.running():
        yield server


def weights(variant: str, suffix: str) -> list[str]:
    return [f"{part}/{stem}{variant}.{suffix}" for part, stem in WEIGHTS.items()]


def fetched(hub: HubStandIn, names: list[str]) -> set[str]:
    """The files of a repository with `names` that arrive here."""
    hub.private[REPO] = False
    hub.files = {f"{REPO}/{name}": name.encode() for name in (*CONFIGS, *names)}
    folder = fetch_model(REPO, "--pretrained_model_name_or_path")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_plain_weights_of_every_part_and_nothing_twice(hub: HubStandIn):
    plain = weights("", "safetensors")
    others = [*weights(".fp16", "safetensors"), *weights("", "bin"), "xl_base.safetensors", "unet/model.onnx"]
    assert fetched(hub, [*plain, *others]) == {*CONFIGS, *plain}


def test_half_precision_where_a_part_has_nothing_else(hub: HubStandIn):
    half = weights(".fp16", "safetensors")
    assert fetched(hub, [*half, *weights("", "bin")]) == {*CONFIGS, *half}


def test_pickles_where_there_is_nothing_else(hub: HubStandIn):
    assert fetched(hub, [*weights("", "bin"), *weights(".fp16", "bin")]) == {*CONFIGS, *weights("", "bin")}


@pytest.mark.parametrize(
    "best",
    [
        ["model.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ["pytorch_model.bin"],
    ],
    ids=["one file", "several files", "pickle"],
)
def test_the_best_weights_of_a_clip_model(hub: HubStandIn, best: list[str]):
    others = ["open_clip_pytorch_model.bin", "tokenizer.json", "model.fp16.safetensors", "flax_model.msgpack"]
    pickles = ["pytorch_model.bin"]
    hub.private[REPO] = False
    hub.files = {f"{REPO}/{name}": name.encode() for name in ("config.json", *others, *pickles, *best)}
    folder = fetch_clip(REPO, "--clip_guidance_model")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"config.json", *best}
