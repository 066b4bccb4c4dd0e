"""Three hundred broken command lines and files: each ends with exit code 2 and one sentence, before torch is loaded.

Everything is drawn from fixed seeds. What is drawn is broken by construction: a name that nobody knows, a value that
its option can't have, a text that the TOML library refuses, a file that is not there.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import toml

import train_network as entry
from library.cli import training
from library.cli.config_file import OWN
from library.cli.foreign import note_on_key, why_not_here
from library.data.dataset_file import DATASET_KEYS, SUBSET_KEYS
from library.options import Option
from tests.runs import flags, script, train_network

OPTIONS = entry.SCRIPT.options()
NUMBERS_BELOW_ZERO = {"noise_offset", "sample_every_n_steps", "sample_every_n_epochs"}  # that may be negative
WRONG_WORDS = {int: ["five", "1.5", "", "0x10", "1e", "--"], float: ["five", "nan", "inf", "1e999", "1,5", ""]}
WRONG_VALUES = {
    bool: ["yes", 2, -1, 0.5, [True], {"a": 1}],
    int: ["five", 1.5, True, [1], {"a": 1}],
    float: ["five", True, [1.0], {"a": 1}, float("nan"), float("inf")],
    str: [5, 0.5, True, [1, 2], {"a": 1}],
    Path: [5, 0.5, True, [1, 2]],
}
NOWHERE = ("train_data_dir", "reg_data_dir", "pretrained_model_name_or_path", "vae", "network_weights", "resume",
           "dataset_config", "config_file", "log_tracker_config", "metadata_thumbnail")  # fmt: skip
MISFITS = (
    {"network_train_unet_only": True, "network_train_text_encoder_only": True},
    {"v2": True}, {"output_name": "a/b"}, {"dim_from_weights": True}, {"network_module": "networks.nothing"},
    {"network_args": "conv_dim"}, {"network_args": ["a=1", "a=2"]},
    {"network_args": "conv_dimm=4"}, {"resolution": "64x64"}, {"resolution": "100", "enable_bucket": False},
    {"resolution": "64,64,64"}, {"resolution": "0"}, {"use_8bit_adam": True, "use_lion_optimizer": True},
    {"optimizer_type": "Adamm"}, {"optimizer_args": "lr"}, {"lr_scheduler": "cosinus"},
    {"min_timestep": 900, "max_timestep": 5}, {"sample_prompts": "no/such.txt", "sample_every_n_steps": 1},
    {"train_data_dir": "x" * 300}, {"vae": "x" * 300},
    {"cache_latents": True, "color_aug": True}, {"huggingface_repo_id": "a//b"}, {"log_with": "tensorboard"},
    {"enable_bucket": True, "min_bucket_reso": 512}, {"enable_bucket": True, "max_bucket_reso": 32},
    {"validation_split": 1.5}, {"ema_decay": 1.0}, {"save_best": True}, {"early_stop_patience": 3},
    {"adaptive_noise_scale": 0.1}, {"caption_dropout_rate": 2}, {"network_dropout": 1}, {"clip_skip": 99},
)  # fmt: skip


@pytest.fixture
def stops_before_torch(monkeypatch):
    """A run that gets through all checks is the failure looked for; it need not be carried out."""

    def got_through(*_: Any) -> None:
        raise AssertionError("this was taken for a good configuration")

    monkeypatch.setattr(training, "_load", got_through)


def assert_refused(code: int, said: str, case: object) -> None:
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2, (case, said)
    assert "Traceback" not in said, (case, said)
    assert lines and ": " in lines[-1] and 15 < len(lines[-1]) < 600, (case, said)
    assert sum(line.startswith("__main__.py: ") for line in lines) <= 1, (case, said)


def misspelt(draw: random.Random, name: str, known: Callable[[str], bool]) -> str:
    """A name near to `name` that is not `known`."""
    while True:
        place, letter = draw.randrange(len(name)), draw.choice(string.ascii_lowercase)
        wrong = draw.choice(
            [
                name[:place] + letter + name[place:],
                name[:place] + name[place + 1 :],
                name[:place] + letter + name[place + 1 :],
            ]
        )
        if wrong and not known(wrong):
            return wrong


def is_known_flag(name: str) -> bool:
    """Also the beginning of a flag counts, as argparse has it."""
    return any(option.startswith(name) for option in [*OPTIONS, "help"]) or why_not_here(f"--{name}") is not None


# ---------------------------------------------------------------------------------------------- command lines


def broken_command_line(draw: random.Random, good: Mapping[str, Any]) -> list[str]:
    name = draw.choice(sorted(OPTIONS))
    option = OPTIONS[name]
    kind = draw.randrange(9)
    if kind == 0:
        return [*flags(**good), f"--{misspelt(draw, name, is_known_flag)}", "1"]
    if kind == 1:
        return [*flags(**good), draw.choice(["stray", "1", "--", "-x", "---", "–flag"]), "word"]
    if kind == 2:
        return flags(**{**good, draw.choice(NOWHERE): "no/such/place.toml"})
    if kind == 3:
        left_out = draw.choice(["pretrained_model_name_or_path", "train_data_dir", "output_dir", "network_module"])
        return flags(**{key: value for key, value in good.items() if key != left_out})
    if kind == 4:
        return flags(**{**good, **draw.choice(MISFITS)})
    if kind == 5 and option.kind is bool:
        return [*flags(**good), f"--{name}={draw.choice(['1', 'true', ''])}x"]
    if kind == 6 and option.kind in (int, float) and name not in NUMBERS_BELOW_ZERO and not option.many:
        return flags(**{**good, name: draw.choice([-7, "-0.5"])})
    return [*flags(**good), *wrong_words(draw)]


def wrong_words(draw: random.Random) -> list[str]:
    """A flag with a word it can't have, or without the word it needs."""
    option = draw.choice([option for option in OPTIONS.values() if option.kind is not bool])
    if option.choices:
        return [option.flag, draw.choice(["nothing_of_this_kind", "", "-"])]
    if option.kind in (int, float) and option.parse is None:
        return [option.flag, draw.choice(WRONG_WORDS[option.kind])]
    if not option.many:
        return [option.flag]
    return wrong_words(draw)


@pytest.mark.parametrize("part", range(4))
def test_broken_command_lines(options, stops_before_torch, part, capfd):
    draw = random.Random(f"command lines {part}")
    for _ in range(30):
        words = broken_command_line(draw, options)
        assert_refused(train_network_words(words), capfd.readouterr().err, words)


def train_network_words(words: list[str]) -> int:
    try:
        return training.run(entry.SCRIPT, words)
    except SystemExit as end:
        return int(end.code or 0)


# ---------------------------------------------------------------------------------------------- files


def damaged(draw: random.Random, text: str) -> str:
    """A text that is no TOML any more."""
    while True:
        letters = list(text)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(letters))
            letters[place : place + draw.randint(0, 3)] = draw.choice(
                ["=", "[", '"', "]]", "\\", "\x00", "'", "{", ",,", "\n="]
            )
        wrong = "".join(letters)
        try:
            toml.loads(wrong)
        except Exception:  # the library lets everything out
            return wrong


def wrong_value(draw: random.Random, option: Option) -> Any:
    if option.choices and draw.random() < 0.5:
        return "nothing_of_this_kind"
    return draw.choice(WRONG_VALUES[option.kind])


def is_known_key(name: str) -> bool:
    return name in OPTIONS or note_on_key(name) is not None


def broken_config_file(draw: random.Random, good: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = {
        name: value if isinstance(value, (int, float)) else str(value) for name, value in good.items()
    }
    kind = draw.randrange(6)
    if kind == 0:
        return damaged(draw, toml.dumps({"section": content})).encode()
    if kind == 1:
        wrong = misspelt(draw, draw.choice(sorted(OPTIONS)), is_known_key)
        return toml.dumps({"section": content | {wrong: 1}}).encode()
    if kind == 2:
        return toml.dumps({"section": {"inner": content}}).encode()
    if kind == 3:
        return toml.dumps({"first": content, "second": [{"network_dim": 5}]}).encode()
    if kind == 4:
        return toml.dumps(content).encode() + b"output_name = '\xe4\xff'\n"
    apart = OWN | {"text_encoder_lr"}  # a GUI writes a list for the latter
    option = draw.choice(
        [each for each in OPTIONS.values() if each.parse is None and not each.many and each.name not in apart]
    )
    return toml.dumps({"section": content | {option.name: wrong_value(draw, option)}}).encode()


@pytest.mark.parametrize("part", range(3))
def test_broken_config_files(options, stops_before_torch, tmp_path, part, capfd):
    draw = random.Random(f"config files {part}")
    for _ in range(30):
        content = broken_config_file(draw, options)
        (tmp_path / "run.toml").write_bytes(content)
        code = train_network(config_file=tmp_path / "run.toml")
        assert_refused(code, capfd.readouterr().err, content)


def broken_dataset_file(draw: random.Random, folder: Path) -> bytes:
    subset: dict[str, Any] = {"image_dir": str(folder), "num_repeats": 2, "caption_extension": ".txt"}
    dataset: dict[str, Any] = {"resolution": 64, "batch_size": 2, "subsets": [subset]}
    general: dict[str, Any] = {"shuffle_caption": True, "keep_tokens": 1}
    content: dict[str, Any] = {"general": general, "datasets": [dataset]}
    place = draw.choice([general, dataset, subset])
    kind = draw.randrange(6)
    if kind == 0:
        return damaged(draw, toml.dumps(content)).encode()
    if kind == 1:
        known = DATASET_KEYS | SUBSET_KEYS | {"subsets"}
        place[misspelt(draw, draw.choice(sorted(known)), known.__contains__)] = 1
    elif kind == 2:
        wrong = {"shuffle_caption": "yes", "keep_tokens": -1, "caption_dropout_rate": 1.5, "num_repeats": "many",
                 "flip_aug": 3, "caption_extension": 5, "caption_prefix": 1, "token_warmup_step": -2,
                 "caption_tag_dropout_rate": [0.1], "color_aug": "no"}  # fmt: skip
        name = draw.choice(sorted(wrong))
        subset[name] = wrong[name]
    elif kind == 3:
        wrong = {"resolution": "wide", "batch_size": 0, "enable_bucket": 2, "min_bucket_reso": -64,
                 "max_bucket_reso": 10**6, "bucket_reso_steps": 0, "bucket_no_upscale": "x"}  # fmt: skip
        name = draw.choice(sorted(wrong))
        dataset.pop(name, None)
        draw.choice([general, dataset])[name] = wrong[name]
    elif kind == 4:
        change = draw.choice(
            [{"image_dir": str(folder / "nowhere")}, {"image_dir": 5}, {"metadata_file": str(folder / "nowhere.json")},
             {"image_dir": str(folder.parent / "empty")}, {"batch_size": 2}, {"resolution": 64}, {"is_reg": "maybe"}]
        )  # fmt: skip
        subset |= change
    else:
        change = draw.choice(
            [{"datasets": 3}, {"datasets": [3]}, {"general": []}, {"datasets": [{"resolution": 64, "subsets": 3}]},
             {"datasets": []}, {"subsets": [subset]}, {"datasets": [{"resolution": 64, "subsets": [{}]}]},
             {"datasets": [{"subsets": [{"image_dir": str(folder)}], "resolution": [64, 64, 64]}]}]
        )  # fmt: skip
        content |= change
    return toml.dumps(content).encode()


@pytest.mark.parametrize("part", range(3))
def test_broken_dataset_files(options, images, stops_before_torch, tmp_path, part, capfd):
    draw = random.Random(f"dataset files {part}")
    (folder,) = [child for child in images.iterdir() if child.is_dir()]
    del options["train_data_dir"], options["resolution"]
    for _ in range(30):
        content = broken_dataset_file(draw, folder)
        (tmp_path / "data.toml").write_bytes(content)
        code = train_network(**options, dataset_config=tmp_path / "data.toml")
        assert_refused(code, capfd.readouterr().err, content)


def test_a_handful_as_users_start_them(options, tmp_path):
    draw = random.Random("as users start them")
    for index in range(3):
        (tmp_path / f"{index}.toml").write_bytes(broken_config_file(draw, options))
        done = script("train_network.py", "--config_file", tmp_path / f"{index}.toml")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("train_network.py: "), done.stderr
