"""Uploads to the hub and states from there, against a server on this machine that answers like it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import train_db
from library.train import hub
from tests.hub_stand_in import TOKEN, HubStandIn
from tests.runs import ENVIRONMENT, ROOT, equal_files, flags, metadata_of, run_script, train_network

REPO = {"huggingface_repo_id": "me/cats", "huggingface_token": TOKEN}


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = HubStandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    address = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(hub, "PAUSES", (0.1, 0.1))
    with server.running():
        yield server


def test_every_saved_file_and_state_arrives(options, tmp_path, stand_in, capfd):
    options |= {"save_every_n_steps": 1, "save_last_n_steps": 1, "save_state": True, "save_state_to_huggingface": True}
    assert train_network(**options, **REPO, huggingface_path_in_repo="loras/cat", log_config=True) == 0
    said = capfd.readouterr().err
    out, top = tmp_path / "out", "me/cats/loras/cat"
    names = {name for name in stand_in.files if name.endswith(".safetensors") and "-state" not in name}
    assert names == {f"{top}/net-step0000000{n}.safetensors" for n in (1, 2)} | {f"{top}/net.safetensors"}
    assert stand_in.files[f"{top}/net.safetensors"] == (out / "net.safetensors").read_bytes()
    assert stand_in.files[f"{top}/net-state/train_state.json"] == (out / "net-state" / "train_state.json").read_bytes()
    assert stand_in.private == {"me/cats": True}, "private unless asked otherwise"
    assert said.strip().splitlines()[-1].endswith("model saved."), "what wrappers wait for stays the last line"
    assert not list(out.glob(".upload-*"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written and TOKEN not in said


def test_a_model_that_is_a_folder_arrives_without_its_state(options, stand_in):
    plain = {name: value for name, value in options.items() if not name.startswith("network_")}
    form = {"save_model_as": "diffusers_safetensors", "save_state": True, "max_train_steps": 1}
    assert run_script(train_db, {**plain, **REPO, **form}) == 0
    assert "me/cats/net/unet/diffusion_pytorch_model.safetensors" in stand_in.files
    assert not any("-state" in name for name in stand_in.files)


def test_a_public_data_set_repository(options, stand_in):
    extra = {"huggingface_repo_type": "dataset", "huggingface_repo_visibility": "public", "max_train_steps": 1}
    assert train_network(**{**options, **REPO, **extra}) == 0
    assert stand_in.private == {"me/cats": False} and "me/cats/net.safetensors" in stand_in.files
    assert any(request.startswith("POST /api/datasets/me/cats/commit") for request in stand_in.requests)


def test_an_upload_that_fails_at_first_is_tried_again(options, stand_in, capfd):
    stand_in.failures, stand_in.status = 1, 429
    assert train_network(**{**options, **REPO, "max_train_steps": 1}) == 0
    assert "me/cats/net.safetensors" in stand_in.files and "was not uploaded" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("token", "status", "reason"), [("hf_wrong", 0, "401"), (TOKEN, 400, "400"), (TOKEN, 403, "403")]
)
def test_a_refused_upload_is_said_once_and_training_goes_on(options, tmp_path, stand_in, token, status, reason, capfd):
    stand_in.failures, stand_in.status = (1000, status) if status else (0, 0)
    extra = {"save_every_n_steps": 1, "huggingface_token": token}
    assert train_network(**{**options, **REPO, **extra}) == 0
    said = capfd.readouterr().err
    assert said.count("training goes on") == 1 and reason in said and token not in said
    names = "net-step00000001.safetensors, net-step00000002.safetensors, net.safetensors"
    assert f"not uploaded to me/cats: {names}" in said
    assert (tmp_path / "out" / "net.safetensors").exists() and not stand_in.files


def test_a_slow_hub_does_not_delay_the_steps(options, tmp_path, stand_in):
    stand_in.delay = 1.0
    uploader = hub.HubUploader(hub.HubOptions(**REPO), "net", is_stopping=lambda: False)
    (tmp_path / "a.safetensors").write_bytes(b"first")
    uploader.on_saved(tmp_path / "a.safetensors")
    assert not stand_in.files, "nobody waited for the upload"
    (tmp_path / "a.safetensors").unlink()  # as --save_last_n_steps does
    uploader.close()
    assert stand_in.files == {"me/cats/a.safetensors": b"first"}


def test_a_run_that_is_stopped_does_not_wait_long(tmp_path, stand_in, monkeypatch, caplog):
    monkeypatch.setattr(hub, "PATIENCE_WHEN_STOPPED", 0.2)
    stand_in.delay = 3.0
    uploader = hub.HubUploader(hub.HubOptions(**REPO), "net", is_stopping=lambda: True)
    for name in "ab":
        (tmp_path / name).write_bytes(b"content")
        uploader.on_saved(tmp_path / name)
    start = time.monotonic()
    uploader.close()
    assert time.monotonic() - start < 2.5
    assert "not uploaded to me/cats: a, b" in caplog.text


def test_a_hub_that_is_down_is_tried_once_for_each_further_file(tmp_path, stand_in, caplog):
    stand_in.failures = 1000
    uploader = hub.HubUploader(hub.HubOptions(**REPO), "net", is_stopping=lambda: False)
    for name in "abc":
        (tmp_path / name).write_bytes(b"content")
        uploader.on_saved(tmp_path / name)
    uploader.close()
    assert "not uploaded to me/cats: a, b, c" in caplog.text
    assert 1000 - stand_in.failures == 3 + 1 + 1
    stand_in.failures = 0
    uploader.on_saved(tmp_path / "c")
    uploader.close()
    assert stand_in.files == {"me/cats/c": b"content"}, "it is back"


def test_nobody_waits_for_ever(tmp_path, stand_in, monkeypatch, caplog):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    stand_in.delay = 1.0
    uploader = hub.HubUploader(hub.HubOptions(**REPO), "net", is_stopping=lambda: False)
    (tmp_path / "a").write_bytes(b"content")
    uploader.on_saved(tmp_path / "a")
    uploader.close()
    assert "not uploaded to me/cats: a" in caplog.text


def test_what_a_killed_run_left_is_removed(tmp_path):
    for name in (".upload-net-abcdef12", ".upload-net-2-abcdef12", ".upload-other-abcdef12"):
        (tmp_path / name).mkdir()
    hub.remove_leftovers(tmp_path, "net")
    assert {path.name for path in tmp_path.iterdir()} == {".upload-net-2-abcdef12", ".upload-other-abcdef12"}


def test_going_on_with_a_state_from_the_hub(options, tmp_path, stand_in, capfd):
    straight = tmp_path / "straight"
    assert train_network(**{**options, "output_dir": straight}) == 0
    first = {"max_train_steps": 2, "save_state": True, "save_state_to_huggingface": True}
    assert train_network(**{**options, **first}, **REPO, huggingface_path_in_repo="states") == 0
    resumed = {"output_dir": tmp_path / "resumed", "resume": "me/cats/states/net-state", "huggingface_token": TOKEN}
    assert train_network(**{**options, **resumed}, resume_from_huggingface=True) == 0
    assert equal_files(straight / "net.safetensors", tmp_path / "resumed" / "net.safetensors")
    assert metadata_of(tmp_path / "resumed" / "net.safetensors")["ss_steps"] == "3"
    for name, words in {
        "me/cats/nowhere": ["no folder nowhere"],
        "me/dogs/net-state": ["me/dogs/net-state", "can't be fetched"],
        "me/cats": ["names no folder", "owner/name/folder"],
    }.items():
        assert train_network(**{**options, **resumed, "resume": name}, resume_from_huggingface=True) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert all(word in line for word in ["--resume", *words]) and TOKEN not in line, line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"huggingface_repo_id": "a/b/c"}, ["--huggingface_repo_id", "a/b/c", "owner/name"]),
        ({"huggingface_repo_id": "me/bad--name"}, ["--huggingface_repo_id", "me/bad--name"]),
        ({"huggingface_repo_type": "modell"}, ["--huggingface_repo_type", "modell", "did you mean model"]),
        ({"huggingface_path_in_repo": "../up"}, ["--huggingface_path_in_repo", ".."]),
    ],
)
def test_what_can_be_known_is_said_before_the_start(options, change, words, capfd):
    assert train_network(**{**options, **REPO, **change}) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_as_users_start_it_with_a_hub_that_can_not_be_reached(options, tmp_path):
    """Nobody listens on port 9: the run is as long and as good as without the hub."""
    environment = {**ENVIRONMENT, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    code = (
        "import sys; sys.argv[0] = 'train_network.py'\n"
        "import train_network\nfrom library.cli.training import run\nfrom library.train import hub\n"
        "hub.PAUSES = (0.1,)\nsys.exit(run(train_network.SCRIPT))"
    )
    words = flags(**{**options, "huggingface_repo_id": "me/cats", "max_train_steps": 1})
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training goes on") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "net.safetensors").exists()
