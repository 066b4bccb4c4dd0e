"""Every flag of train_network.py changes what it should: two short runs, without and with it, side by side.

A flag has a row in ROWS, or, where a run on the tiny model can't show it, the name of the test that does in ELSEWHERE.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_network as entry
from library.cli.training import build_parser
from tests.runs import ROOT, metadata_of, train_network
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_models import tiny_sd_checkpoint

TAGS = ["one, two, three, four", "five, six, seven, eight"]


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    code: int
    folder: Path
    text: str  # of the console and the log

    @property
    def file(self) -> Path:
        return self.folder / "net.safetensors"

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.code == 0, self.text[-2000:]
        return load_file(self.file)

    def names(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


Check = Callable[[Outcome, Outcome], None]


@dataclass(frozen=True)
class Row:
    """The flag with its value, what it should do, and what else both runs are given."""

    value: Any
    shows: Check
    beside: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)  # given together with the flag only


# ---------------------------------------------------------------------------------------------- what can be seen


def learns_otherwise(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before)


def learns_the_same(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def learns_nearly_the_same(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-4) for name in before)


def writes(*patterns: str) -> Check:
    """Files that match, as paths below the output folder, are there with the flag only; training is the same."""

    def check(without: Outcome, with_: Outcome) -> None:
        for pattern in patterns:
            found = [{name for name in run.names() if re.fullmatch(pattern, name)} for run in (without, with_)]
            assert found[1] and not found[0], (pattern, found, with_.names())

    return check


def writes_no(pattern: str) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        writes(pattern)(with_, without)

    return check


def marks(**expected: Any) -> Check:
    """Metadata keys (`__` stands for a dot) have these values with the flag, and others without it."""

    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 0, with_.text[-2000:]
        before, after = metadata_of(without.file), metadata_of(with_.file)
        for key, value in expected.items():
            name = key.replace("__", ".")
            assert after.get(name) == value and before.get(name) != value, (name, before.get(name), after.get(name))

    return check


def says(text: str) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 0 and text in with_.text, with_.text[-3000:]
        assert text not in without.text

    return check


def refuses(text: str) -> Check:
    """With the flag the run does not start, and says why."""

    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 2 and text in with_.text, (with_.code, with_.text[-1000:])
        assert without.code == 0

    return check


def runs(without: Outcome, with_: Outcome) -> None:
    """With the flag the run works that it makes possible, and does not without it."""
    assert with_.code == 0, with_.text[-2000:]
    assert without.code == 2, without.code


def both(*checks: Check) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        for one in checks:
            one(without, with_)

    return check


def of_rank(rank: int) -> Check:
    def check(_: Outcome, with_: Outcome) -> None:
        assert {t.shape[0] for name, t in with_.tensors().items() if "lora_down" in name} == {rank}

    return check


def of_dtype(dtype: torch.dtype) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        assert {t.dtype for t in with_.tensors().values()} == {dtype} != {t.dtype for t in without.tensors().values()}

    return check


def only_parts(*parts: str) -> Check:
    def check(_: Outcome, with_: Outcome) -> None:
        assert {name.split("_")[1] for name in with_.tensors()} == set(parts)

    return check


# ---------------------------------------------------------------------------------------------- the table

EPOCHS = {"max_train_steps": 6}  # of 4 images x 1 in batches of 2: three epochs
ROWS: dict[str, Row] = {
    # the model
    "pretrained_model_name_or_path": Row("{other}", learns_otherwise),
    "v2": Row(True, refuses("--v2")),
    "v_parameterization": Row(True, both(learns_otherwise, marks(modelspec__prediction_type="v"))),
    "vae": Row("{other}", both(learns_otherwise, marks(ss_vae_name="other.safetensors"))),
    "no_half_vae": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "mem_eff_attn": Row(True, learns_nearly_the_same),
    "sdpa": Row(True, learns_the_same),
    "clip_skip": Row(2, both(learns_otherwise, marks(ss_clip_skip="2", modelspec__encoder_layer="2"))),
    "max_token_length": Row(150, both(learns_otherwise, marks(ss_max_token_length="150"))),
    # where the images are
    "train_data_dir": Row("{others}", learns_otherwise),
    "reg_data_dir": Row("{reg}", both(learns_otherwise, marks(ss_num_reg_images="2"))),
    "dataset_config": Row("{root}/data.toml", learns_otherwise),
    "in_json": Row("{root}/meta.json", learns_otherwise, also={"train_data_dir": "{data}/1_disc"}),
    "dataset_repeats": Row(3, marks(ss_num_train_images="12"), {"in_json": "{root}/meta.json", "train_data_dir": "{data}/1_disc"}),
    "prior_loss_weight": Row(0.1, learns_otherwise, {"reg_data_dir": "{reg}"}),
    "on_bad_image": Row("skip", runs, {"train_data_dir": "{broken}"}),
    "alpha_mask": Row(True, learns_otherwise, {"train_data_dir": "{transparent}"}),
    "masked_loss": Row(True, learns_otherwise, {"conditioning_data_dir": "{masks}"}),
    # sizes
    "resolution": Row("128,64", both(learns_otherwise, marks(ss_resolution="(128, 64)"))),
    "enable_bucket": Row(True, marks(ss_enable_bucket="True"), {"train_data_dir": "{wide}"}),
    "min_bucket_reso": Row(64, learns_otherwise, {"enable_bucket": True, "train_data_dir": "{wide}"}),
    "max_bucket_reso": Row(64, learns_otherwise, {"enable_bucket": True, "train_data_dir": "{wide}", "min_bucket_reso": 32}),
    "bucket_reso_steps": Row(8, learns_otherwise, {"enable_bucket": True, "train_data_dir": "{wide}", "min_bucket_reso": 32}),
    "bucket_no_upscale": Row(True, learns_otherwise, {"enable_bucket": True, "resolution": "128", "train_data_dir": "{wide}"}),
    "resize_interpolation": Row("nearest", learns_otherwise, {"train_data_dir": "{wide}"}),
    # captions
    "caption_extension": Row(".tags", learns_otherwise),
    "caption_extention": Row(".tags", learns_otherwise),
    "shuffle_caption": Row(True, learns_otherwise),
    "keep_tokens": Row(4, learns_otherwise, {"shuffle_caption": True}),
    "keep_tokens_separator": Row("three", learns_otherwise, {"shuffle_caption": True}),
    "caption_separator": Row("e", learns_otherwise, {"shuffle_caption": True}),
    "secondary_separator": Row("o", learns_otherwise, {"shuffle_caption": True}),
    "enable_wildcard": Row(True, learns_otherwise, {"caption_extension": ".wild"}),
    "caption_prefix": Row("best", learns_otherwise),
    "caption_suffix": Row("worst", learns_otherwise),
    "caption_dropout_rate": Row(1.0, both(learns_otherwise, marks(ss_caption_dropout_rate="1.0"))),
    "caption_dropout_every_n_epochs": Row(1, learns_otherwise),
    "caption_tag_dropout_rate": Row(0.9, learns_otherwise),
    "token_warmup_step": Row(100, learns_otherwise),
    "token_warmup_min": Row(3, learns_otherwise, {"token_warmup_step": 100}),
    "weighted_captions": Row(True, learns_otherwise, {"caption_extension": ".weighted"}),
    # images
    "flip_aug": Row(True, learns_otherwise),
    "color_aug": Row(True, learns_otherwise, {"max_train_steps": 4}),
    "random_crop": Row(True, learns_otherwise, {"train_data_dir": "{wide}"}),
    "face_crop_aug_range": Row("1.0,1.5", learns_otherwise, {"train_data_dir": "{faces}"}),
    "cache_latents": Row(True, says("caching latents")),
    "cache_latents_to_disk": Row(True, says("caching latents"), {"train_data_dir": "{disk}"}),
    # batches
    "train_batch_size": Row(1, both(learns_otherwise, marks(ss_batch_size_per_device="1"))),
    "max_data_loader_n_workers": Row(2, learns_the_same),
    "seed": Row(2, both(learns_otherwise, marks(ss_seed="2"))),
    # the objective
    "noise_offset": Row(0.1, both(learns_otherwise, marks(ss_noise_offset="0.1"))),
    "noise_offset_random_strength": Row(True, learns_otherwise, {"noise_offset": 0.1}),
    "adaptive_noise_scale": Row(0.5, learns_otherwise, {"noise_offset": 0.1}),
    "multires_noise_iterations": Row(4, learns_otherwise),
    "multires_noise_discount": Row(0.8, learns_otherwise, {"multires_noise_iterations": 4}),
    "ip_noise_gamma": Row(0.1, learns_otherwise),
    "ip_noise_gamma_random_strength": Row(True, learns_otherwise, {"ip_noise_gamma": 0.1}),
    "min_timestep": Row(900, both(learns_otherwise, marks(modelspec__timestep_range="900,1000"))),
    "max_timestep": Row(100, both(learns_otherwise, marks(modelspec__timestep_range="0,100"))),
    "zero_terminal_snr": Row(True, both(learns_otherwise, marks(ss_zero_terminal_snr="True")), {"v_parameterization": True}),
    "min_snr_gamma": Row(1.0, both(learns_otherwise, marks(ss_min_snr_gamma="1.0"))),
    "scale_v_pred_loss_like_noise_pred": Row(True, learns_otherwise, {"v_parameterization": True}),
    "v_pred_like_loss": Row(0.5, learns_otherwise),
    "debiased_estimation_loss": Row(True, learns_otherwise),
    "loss_type": Row("l1", learns_otherwise),
    "huber_schedule": Row("constant", learns_otherwise, {"loss_type": "huber"}),
    "huber_c": Row(0.5, learns_otherwise, {"loss_type": "huber"}),
    "huber_scale": Row(3.0, learns_otherwise, {"loss_type": "huber", "huber_schedule": "exponential"}),
    # the optimizer
    "optimizer_type": Row("SGDNesterov", learns_otherwise),
    "optimizer_args": Row(["weight_decay=0.5", "betas=0.5,0.6"], learns_otherwise),
    "use_8bit_adam": Row(True, marks(ss_optimizer="bitsandbytes.optim.adamw.AdamW8bit")),
    "use_lion_optimizer": Row(True, marks(ss_optimizer="lion_pytorch.lion_pytorch.Lion")),
    "learning_rate": Row(1e-2, both(learns_otherwise, marks(ss_learning_rate="0.01"))),
    "unet_lr": Row(1e-2, both(learns_otherwise, marks(ss_unet_lr="0.01"))),
    "text_encoder_lr": Row(1e-2, both(learns_otherwise, marks(ss_text_encoder_lr="0.01"))),
    "max_grad_norm": Row(1e-3, learns_otherwise, {"optimizer_type": "SGDNesterov"}),
    "fused_backward_pass": Row(True, learns_the_same, {"max_grad_norm": 0.0}),
    "lr_scheduler": Row("linear", both(learns_otherwise, marks(ss_lr_scheduler="linear"))),
    "lr_warmup_steps": Row(2, both(learns_otherwise, marks(ss_lr_warmup_steps="2")), {"lr_scheduler": "constant_with_warmup"}),
    "lr_scheduler_num_cycles": Row(3, learns_otherwise, {"lr_scheduler": "cosine_with_restarts", **EPOCHS}),
    "lr_scheduler_power": Row(3.0, learns_otherwise, {"lr_scheduler": "polynomial"}),
    "lr_scheduler_type": Row("ExponentialLR", learns_otherwise, also={"lr_scheduler_args": ["gamma=0.5"]}),
    "lr_scheduler_args": Row(["num_cycles=0.25"], learns_otherwise, {"lr_scheduler": "cosine"}),
    "lr_scheduler_min_lr_ratio": Row(0.5, learns_otherwise, {"lr_scheduler": "cosine_with_min_lr"}),
    "lr_decay_steps": Row(2, learns_otherwise, {"lr_scheduler": "warmup_stable_decay"}),
    "lr_scheduler_timescale": Row(1, learns_otherwise, {"lr_scheduler": "inverse_sqrt"}),
    # the run
    "max_train_steps": Row(1, learns_otherwise),
    "max_train_epochs": Row(3, marks(ss_max_train_steps="6", ss_num_epochs="3")),
    "gradient_accumulation_steps": Row(2, both(learns_otherwise, marks(ss_gradient_accumulation_steps="2"))),
    "gradient_checkpointing": Row(True, both(learns_the_same, marks(ss_gradient_checkpointing="True"))),
    "cpu_offload_checkpointing": Row(True, learns_the_same, {"gradient_checkpointing": True}),
    "mixed_precision": Row("bf16", both(learns_otherwise, marks(ss_mixed_precision="bf16"))),
    "full_bf16": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "fp8_base": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "fp8_base_unet": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "skip_until_initial_step": Row(True, learns_otherwise, {"initial_step": 1}),
    "initial_step": Row(1, learns_otherwise),
    "initial_epoch": Row(2, learns_otherwise, EPOCHS),
    # the network
    "network_module": Row("lycoris.kohya", learns_otherwise),
    "network_dim": Row(2, both(of_rank(2), marks(ss_network_dim="2"))),
    "network_alpha": Row(3.0, both(learns_otherwise, marks(ss_network_alpha="3.0"))),
    "network_dropout": Row(0.5, both(learns_otherwise, marks(ss_network_dropout="0.5"))),
    "network_args": Row(["conv_dim=2"], both(learns_otherwise, marks(ss_network_args='{"conv_dim": "2", "dropout": null}'))),
    "network_train_unet_only": Row(True, only_parts("unet")),
    "network_train_text_encoder_only": Row(True, only_parts("te")),
    "network_weights": Row("{network}", learns_otherwise),
    "dim_from_weights": Row(True, of_rank(3), {"network_weights": "{network3}", "network_dim": None}),
    "scale_weight_norms": Row(1e-3, both(learns_otherwise, marks(ss_scale_weight_norms="0.001"))),
    "base_weights": Row(["{network}"], learns_otherwise),
    "base_weights_multiplier": Row([0.5], learns_otherwise, {"base_weights": ["{network}"]}),
    # files
    "output_name": Row("foo", writes("foo.safetensors")),
    "save_precision": Row("fp16", of_dtype(torch.float16)),
    "save_model_as": Row("ckpt", writes("net.ckpt")),
    "save_every_n_epochs": Row(1, writes("net-000001.safetensors", "net-000002.safetensors"), EPOCHS),
    "save_every_n_steps": Row(1, writes("net-step00000001.safetensors")),
    "save_n_epoch_ratio": Row(3, writes("net-000002.safetensors"), EPOCHS),
    "save_last_n_epochs": Row(1, writes_no("net-000001.safetensors"), {"save_every_n_epochs": 1, **EPOCHS}),
    "save_last_n_epochs_state": Row(
        1, writes_no("net-000001-state"), {"save_every_n_epochs": 1, "save_state": True, **EPOCHS}
    ),
    "save_last_n_steps": Row(1, writes_no("net-step00000001.safetensors"), {"save_every_n_steps": 1, **EPOCHS}),
    "save_last_n_steps_state": Row(
        1, writes_no("net-step00000001-state"), {"save_every_n_steps": 1, "save_state": True, **EPOCHS}
    ),
    "save_state": Row(True, writes("net-state")),
    "save_state_on_train_end": Row(True, writes("net-state")),
    "save_best": Row(True, writes("net-best.safetensors"), {"validation_split": 0.5}),
    "no_metadata": Row(True, lambda without, with_: says_less(without, with_)),
    "training_comment": Row("hello", marks(ss_training_comment="hello")),
    "metadata_title": Row("T", marks(modelspec__title="T")),
    "metadata_author": Row("A", marks(modelspec__author="A")),
    "metadata_description": Row("D", marks(modelspec__description="D")),
    "metadata_license": Row("L", marks(modelspec__license="L")),
    "metadata_tags": Row("x,y", marks(modelspec__tags="x,y")),
    "metadata_usage_hint": Row("U", marks(modelspec__usage_hint="U")),
    "metadata_merged_from": Row("M", marks(modelspec__merged_from="M")),
    "metadata_trigger_phrase": Row("P", marks(modelspec__trigger_phrase="P")),
    "metadata_preprocessor": Row("C", marks(modelspec__preprocessor="C")),
    # logs, previews, validation
    "logging_dir": Row("{out}/log", writes(r"log/.*tfevents.*")),
    "log_prefix": Row("run-", writes(r"log/run-.*"), {"logging_dir": "{out}/log"}),
    "log_tracker_name": Row("mine", writes(r"log/.*/mine/.*"), {"logging_dir": "{out}/log"}),
    "console_log_file": Row("{out}/console.txt", writes("console.txt")),
    "sample_every_n_steps": Row(1, writes(r"sample/.*\.png"), {"sample_prompts": "{root}/prompts.txt"}),
    "sample_every_n_epochs": Row(1, writes(r"sample/.*\.png"), {"sample_prompts": "{root}/prompts.txt"}),
    "sample_at_first": Row(
        True, writes(r"sample/.*_000000_.*\.png"), {"sample_every_n_steps": 2, "sample_prompts": "{root}/prompts.txt"}
    ),
    "validation_split": Row(0.5, says("validation"), {"output_name": "net"}),
    "ema_decay": Row(0.5, writes("net-ema.safetensors")),
    "debug_dataset": Row(True, writes_no("net.safetensors")),
    "plan": Row(True, both(writes_no("net.safetensors"), writes("net-plan.txt"))),
    # of no effect here, and that is said
    "tokenizer_cache_dir": Row("{root}", both(learns_the_same, says("--tokenizer_cache_dir has no effect"))),
    "persistent_data_loader_workers": Row(True, both(learns_the_same, says("--persistent_data_loader_workers has no effect"))),
    "lowram": Row(True, both(learns_the_same, says("--lowram has no effect"))),
}  # fmt: skip

ELSEWHERE = {
    "config_file": "tests/scripts/test_train_network.py::test_config_file_is_the_same_as_flags",
    "output_config": "tests/scripts/test_train_network.py::test_output_config_round_trip_without_secrets",
    "output_dir": "tests/scripts/test_train_network.py::test_files_and_metadata",
    "resume": "tests/scripts/test_train_network_resume.py::test_resume_in_mid_epoch_ends_in_the_same_weights",
    "max_nonfinite_steps": "tests/scripts/test_train_network_mistakes.py::"
    "test_a_run_without_finite_losses_stops_and_says_why",
}


def says_less(without: Outcome, with_: Outcome) -> None:
    before, after = (
        {name for name in metadata_of(run.file) if name.startswith("ss_")} for run in (without, with_)
    )  # fmt: skip
    assert after < before and len(after) <= 6


# ---------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_path: Path) -> dict[str, Path]:
    """Models, networks and folders of images by name."""
    root = tmp_path_factory.mktemp("flags")
    here = {
        name: root / name
        for name in ("data", "others", "reg", "broken", "transparent", "wide", "faces", "masks", "disk")
    }
    here |= {"root": root, "model": tiny_sd1_path, "other": tiny_sd_checkpoint(root / "other.safetensors", seed=7)}
    square = [(64, 64)]
    for name, seed in (("data", 0), ("others", 20), ("disk", 0)):
        tiny_images(here[name] / "1_disc", 4, square, TAGS, seed=seed)
    tiny_images(here["reg"] / "1_thing", 2, square, [], seed=40)
    tiny_images(here["wide"] / "1_disc", 4, [(112, 64), (200, 90)], TAGS)
    tiny_images(here["broken"] / "1_disc", 4, square, TAGS)
    (here["broken"] / "1_disc" / "broken.png").write_bytes(b"no picture")
    for folder, text in (
        (".tags", "quite other tags"),
        (".wild", "{{a|b|c|d|e|f|g|h}}"),
        (".weighted", "(one:1.9), two"),
    ):
        for image in (here["data"] / "1_disc").glob("image*.txt"):
            image.with_suffix(folder).write_text(text.replace("{{", "{").replace("}}", "}"), encoding="utf-8")
    for index in range(4):
        picture = tiny_image((64, 64), seed=index)
        alpha = Image.linear_gradient("L").resize((64, 64)).rotate(90 * index)
        for folder in ("transparent", "masks", "faces"):
            (here[folder] / "1_disc").mkdir(parents=True, exist_ok=True)
        picture.putalpha(alpha)
        picture.save(here["transparent"] / "1_disc" / f"image_{index:03d}.png")
        alpha.save(here["masks"] / f"image_{index:03d}.png")
        tiny_image((160, 120), seed=index).save(here["faces"] / "1_disc" / f"image{index}_70_60_50_50.png")
    entries = {f"image_{index:03d}": {"caption": "one", "tags": "two, three"} for index in range(4)}
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    (root / "data.toml").write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{here['others'] / '1_disc'}'\n",
        encoding="utf-8",
    )
    (root / "prompts.txt").write_text("a disc --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    return here


def with_places(value: Any, places: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [with_places(item, places) for item in value]
    return value.format(**places) if isinstance(value, str) and "{" in value else value


@pytest.fixture(scope="module")
def outcome_of(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """A short run with these settings; equal settings run once."""
    done: dict[str, Outcome] = {}
    networks: dict[str, str] = {}

    def network(name: str, **settings: Any) -> str:
        if name not in networks:
            networks[name] = str(outcome(learning_rate=1e-1, **settings).file)
        return networks[name]

    def outcome(**settings: Any) -> Outcome:
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            if "{network" in key:
                places["network"], places["network3"] = network("4"), network("3", network_dim=3)
            done[key] = run(folder, settings)
        return done[key]

    def run(folder: Path, settings: Mapping[str, Any]) -> Outcome:
        base = {
            "pretrained_model_name_or_path": "{model}", "train_data_dir": "{data}", "output_dir": "{out}",
            "output_name": "net", "network_module": "networks.lora", "network_dim": 4, "resolution": "64",
            "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3, "seed": 1,
            "max_data_loader_n_workers": 0,
        }  # fmt: skip
        names = {**places, "out": folder}
        options = {name: with_places(value, names) for name, value in {**base, **settings}.items()}
        console = io.StringIO()
        handler = logging.StreamHandler(console)
        logging.getLogger().addHandler(handler)
        try:
            with contextlib.redirect_stderr(console), contextlib.redirect_stdout(console):
                code = train_network(**options)
        finally:
            logging.getLogger().removeHandler(handler)
        return Outcome(code, folder, console.getvalue())

    return outcome


@pytest.mark.parametrize("flag", ROWS)
def test_the_flag_changes_what_it_should(flag, outcome_of):
    row = ROWS[flag]
    row.shows(outcome_of(**row.beside), outcome_of(**{**row.beside, **row.also, flag: row.value}))


def test_every_flag_has_its_test():
    """Each flag of the parser is in one of the tables, and each test named in ELSEWHERE is there and names its flag."""
    flags = {
        word.removeprefix("--") for action in build_parser(entry.SCRIPT)._actions for word in action.option_strings
    }
    assert flags - {"-h", "help"} == set(ROWS) | set(ELSEWHERE)
    assert not set(ROWS) & set(ELSEWHERE)
    for flag, test in ELSEWHERE.items():
        path, _, name = test.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source and flag in source, test
