"""Files given as --config_file: those of a GUI, keys of other scripts, and what is wrong in one."""

from __future__ import annotations

from pathlib import Path

import pytest

import sdxl_train_network
from library.cli.training import parse
from tests.runs import metadata_of, script, train_network

GUI_FILE = Path(__file__).parents[1] / "data" / "gui_lora.toml"  # the keys and forms of the kohya_ss GUI


def assert_said_last(capfd, words) -> None:
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_a_file_of_the_gui_trains(tmp_path, images, tiny_sd1_path, capfd):
    text = GUI_FILE.read_text(encoding="utf-8")
    for name, value in {
        "images": images,
        "model": tiny_sd1_path,
        "out": tmp_path / "out",
        "logs": tmp_path / "logs",
    }.items():
        text = text.replace(f"{{{name}}}", value.as_posix())
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    assert train_network(config_file=tmp_path / "config.toml") == 0
    said = capfd.readouterr().err
    for line in (
        "epoch has no effect",
        "noise_offset_type has no effect",
        "t5xxl has no effect for SD1/SD2",
        "cache_text_encoder_outputs has no effect for SD1/SD2",
        "text_encoder_lr: 5e-05 is used",
        "--bucket_reso_steps 1: 8 is used",
    ):
        assert said.count(line) == 1, (line, said)
    metadata = metadata_of(tmp_path / "out" / "gui.safetensors")
    expected = {
        "ss_steps": "2", "ss_text_encoder_lr": "5e-05", "ss_unet_lr": "0.0001", "ss_min_snr_gamma": "None",
        "ss_scale_weight_norms": "None", "ss_network_dim": "8", "ss_keep_tokens": "0", "ss_seed": "1234",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution = '64'\n[a.b]\nseed = 1", ["a.b", "table inside a table", "[b]"]),
        ("[[datasets]]\nresolution = 64", ["datasets", "--dataset_config"]),
        ("[[lora]]\nresolution = 64", ["lora", "one pair of brackets"]),
        ("network_dimm = 4", ["network_dimm", "unknown key", "network_dim"]),
        ("batch_size = 4", ["batch_size", "unknown key"]),
        ("train_batch_size = 1.5", ["train_batch_size", "1.5"]),
        ("learning_rate = nan", ["learning_rate", "nan"]),
        ("flip_aug = 2", ["flip_aug", "2"]),
        ("network_args = [[1]]", ["network_args", "[1]"]),
    ],
)
def test_mistakes_in_a_file_name_the_key(options, tmp_path, text, words, capfd):
    (tmp_path / "run.toml").write_text(text)
    assert train_network(config_file=tmp_path / "run.toml", **options) == 2
    assert_said_last(capfd, [*words, "run.toml"])


def test_a_key_in_two_sections_counts_as_the_later_one(options, tmp_path, capfd):
    (tmp_path / "run.toml").write_text(
        "seed = 3\nhuggingface_token = 'secret1'\n[a]\nnetwork_dim = 2\nseed = 1\n"
        "[b]\nnetwork_dim = 3\nseed = 1\nhuggingface_token = 'secret2'\n"
    )
    del options["network_dim"], options["seed"]
    assert train_network(config_file=tmp_path / "run.toml", **{**options, "max_train_steps": 1}) == 0
    said = capfd.readouterr().err
    assert said.count("network_dim = 2 in [a] has no effect, network_dim = 3 in [b] comes later") == 1
    assert said.count("seed = 3 outside the sections has no effect, seed = 1 in [a] comes later") == 1
    assert "huggingface_token outside the sections has no effect" in said and "secret" not in said
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_seed"]) == ("3", "1")


def test_files_that_are_no_configuration(options, tmp_path, capfd):
    (tmp_path / "latin.toml").write_bytes(b"output_name = 'caf\xe9'")
    for name, words in {
        "nowhere": ["nowhere.toml", "does not exist"],
        "preset.json": ["preset.json", "not TOML"],
        "latin.toml": ["latin.toml", "UTF-8"],
    }.items():
        assert train_network(config_file=tmp_path / name, **options) == 2
        assert_said_last(capfd, ["--config_file", *words])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("t5xxl", ["--t5xxl", "other model families", "remove it"]),
        ("cache_text_encoder_outputs", ["--cache_text_encoder_outputs", "sdxl_train_network.py"]),
        ("learning_rate_te", ["--learning_rate_te", "fine_tune.py and train_db.py"]),
        ("steps", ["--steps", "gen_img_diffusers.py"]),
    ],
)
def test_a_flag_of_another_script_is_named_with_its_owner(options, flag, words, capfd):
    assert train_network(**{**options, flag: 4}) == 2
    assert_said_last(capfd, words)


def test_zero_switches_off_what_has_a_zero_in_batch_files(options, tmp_path):
    off = {"min_snr_gamma": 0, "scale_weight_norms": 0, "save_every_n_steps": 0, "max_train_epochs": 0, "clip_skip": 0}
    assert train_network(**{**options, "max_train_steps": 1}, **off) == 0
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    assert {metadata[f"ss_{name}"] for name in ("min_snr_gamma", "scale_weight_norms", "clip_skip")} == {"None"}


def test_written_files_hold_no_tokens_and_never_replace_others(tmp_path, capfd):
    file = tmp_path / "written.toml"
    words = ["--config_file", file, "--output_config", "--network_dim", "8"]
    secrets = ["--wandb_api_key", "secret", "--huggingface_token", "secret"]
    assert script("train_network.py", *words, *secrets).returncode == 0
    assert "network_dim = 8" in file.read_text() and "secret" not in file.read_text()
    done = script("train_network.py", *words)
    assert done.returncode == 2 and "exists already" in done.stderr and "Traceback" not in done.stderr


def test_several_rates_of_text_encoders_on_the_command_line(options, capfd, tmp_path):
    """As later scripts of the trade take them; the first one counts."""
    assert train_network(**options, text_encoder_lr=[1e-5, 5e-5], plan=True) == 0
    messages = capfd.readouterr().err
    assert "text_encoder_lr: 1e-05 is used" in messages and "learning rate 1e-05" in messages
    assert train_network(**options, text_encoder_lr=[1e-5, 1e-5], plan=True) == 0
    assert "is used" not in capfd.readouterr().err
    assert train_network(**options, text_encoder_lr=["high"], plan=True) == 2


def test_keys_of_other_scripts_in_a_file_for_sdxl(tmp_path):
    """Nothing is said about SD1/SD2 there; what is SDXL's own counts, rates come as a list."""
    (tmp_path / "run.toml").write_text(
        "cache_text_encoder_outputs = true\nlearning_rate_te = 1e-5\nt5xxl = 'x'\ntext_encoder_lr = [1e-5, 2e-5]\n"
        "network_module = 'networks.lora'\npretrained_model_name_or_path = 'x'\noutput_dir = 'out'\n"
    )
    config, notes = parse(sdxl_train_network.SCRIPT, ["--config_file", str(tmp_path / "run.toml")])
    assert config.text_cache.cache_text_encoder_outputs and config.target.text_encoder_lr == (1e-5, 2e-5)
    assert [note for note in notes if "SD1/SD2" in note] == []
    assert sum("has no effect" in note for note in notes) == 2
