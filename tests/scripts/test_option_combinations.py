"""Options side by side: any two settings of different matters train together, or one sentence says why they can't.

The runs are few: each has one setting of every matter, chosen so that every pair of settings is in one of them (all
pairs, as in Cohen et al. 1997, "The AETG system"). Pairs that contradict each other are in REFUSED, with what is said.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.runs import train_network
from tests.tiny_data import tiny_image

VELOCITY = {"v_parameterization": True}
HALF = {"mixed_precision": "bf16"}
# matter -> setting -> flags; texts in braces are places
MATTERS: dict[str, dict[str, dict[str, Any]]] = {
    "objective": {
        "noise": {},
        "v, zero SNR": VELOCITY | {"zero_terminal_snr": True, "scale_v_pred_loss_like_noise_pred": True},
        "v, min-SNR": VELOCITY | {"min_snr_gamma": 5, "min_timestep": 100, "max_timestep": 900},
        "debiased": {"debiased_estimation_loss": True, "v_pred_like_loss": 0.5},
        "huber, min-SNR": {"loss_type": "huber", "huber_schedule": "exponential", "min_snr_gamma": 5},
    },
    "captions": {
        "plain": {},
        "shuffled": {"shuffle_caption": True, "keep_tokens": 1, "token_warmup_step": 10},
        "dropped": {"caption_dropout_rate": 0.5, "caption_tag_dropout_rate": 0.5},
        "wildcards": {"enable_wildcard": True, "caption_prefix": "best"},
        "weighted": {"weighted_captions": True},
    },
    "optimizer": {
        "AdamW": {},
        "AdamW8bit": {"use_8bit_adam": True, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        "AdaFactor": {"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=True"]},
        "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    },
    "precision": {
        "full": {},
        "bf16": HALF,
        "full bf16": HALF | {"full_bf16": True},
        "8 bits": HALF | {"fp8_base_unet": True, "no_half_vae": True},
    },
    "noise": {
        "plain": {},
        "offset": {"noise_offset": 0.1, "adaptive_noise_scale": 0.1},
        "pyramid": {"multires_noise_iterations": 4},
        "perturbed": {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    },
    "beside": {
        "nothing": {},
        "validation": {"validation_split": 0.25, "save_best": True, "validate_every_n_steps": 1},
        "average": {"ema_decay": 0.9, "save_every_n_steps": 1, "save_state": True},
        "previews": {"sample_prompts": "{prompts}", "sample_every_n_steps": 2},
    },
    "source": {
        "folder": {},
        "dataset file": {"train_data_dir": None, "dataset_config": "{dataset}"},
        "metadata": {"train_data_dir": "{images}/1_disc", "in_json": "{metadata}"},
    },
    "network": {
        "both parts": {},
        "U-Net": {"network_train_unet_only": True, "network_args": ["conv_dim=2"]},
        "text encoder": {"network_train_text_encoder_only": True, "network_dropout": 0.2},
    },
    "sizes": {
        "one": {},
        "buckets": {"enable_bucket": True, "min_bucket_reso": 64},
        "never larger": {"enable_bucket": True, "min_bucket_reso": 64, "bucket_no_upscale": True},
    },
    "cache": {
        "none": {},
        "memory": {"cache_latents": True, "vae_batch_size": 2},
        "disk": {"cache_latents_to_disk": True},
    },
    "images": {
        "as they are": {},
        "colour": {"color_aug": True},
        "flip": {"flip_aug": True},
        "crop": {"random_crop": True},
    },
    "masks": {
        "none": {},
        "files": {"masked_loss": True, "conditioning_data_dir": "{masks}"},
        "alpha": {"alpha_mask": True},
    },
    "updates": {
        "batch": {},
        "accumulated": {"gradient_accumulation_steps": 2},
        "fused": {"fused_backward_pass": True, "max_grad_norm": 0},
    },
    "files": {
        "safetensors": {},
        "fp16 ckpt": {"save_model_as": "ckpt", "save_precision": "fp16"},
        "pt": {"save_model_as": "pt", "save_precision": "bf16", "no_metadata": True},
    },
    "tokens": {"75": {}, "225": {"max_token_length": 225}},
    "layer": {"last": {}, "skipped": {"clip_skip": 2}},
    "model": {"SD 1": {}, "SD 2": {"pretrained_model_name_or_path": "{sd2}", "v2": True}},
    "memory": {"kept": {}, "checkpoints": {"gradient_checkpointing": True}, "slices": {"mem_eff_attn": True}},
    "regularisation": {"none": {}, "folder": {"reg_data_dir": "{reg}"}},
}  # fmt: skip

Setting = tuple[str, str]  # matter, setting
Pair = frozenset[Setting]


def pair(first: Setting, second: Setting) -> Pair:
    return frozenset((first, second))


REFUSED: dict[Pair, str] = {
    pair(("cache", "memory"), ("images", "colour")): "--cache_latents",
    pair(("cache", "disk"), ("images", "colour")): "--cache_latents",
    pair(("cache", "memory"), ("images", "crop")): "--cache_latents",
    pair(("cache", "disk"), ("images", "crop")): "--cache_latents",
    pair(("updates", "fused"), ("optimizer", "Prodigy")): "--fused_backward_pass",
    pair(("updates", "fused"), ("optimizer", "schedule-free")): "--fused_backward_pass",
    pair(("beside", "average"), ("optimizer", "schedule-free")): "--ema_decay",
    pair(("objective", "debiased"), ("model", "SD 2")): "--v_pred_like_loss",
}


def all_pairs(matters: Mapping[str, Iterable[str]], excluded: Iterable[Pair]) -> list[dict[str, str]]:
    """Cases, each with a setting of every matter, in which every pair of settings occurs that is not excluded.

    Greedy: a case begins with a pair that is still missing; each further matter takes the setting that brings most of
    the missing pairs, the first of equals. Raises AssertionError where no setting goes with those chosen before.
    """
    settings = [[(matter, name) for name in names] for matter, names in matters.items()]
    forbidden = set(excluded)
    missing = {
        pair(one, other): None
        for first, second in itertools.combinations(settings, 2)
        for one, other in itertools.product(first, second)
        if pair(one, other) not in forbidden
    }
    cases = []
    while missing:
        chosen = sorted(next(iter(missing)))
        for choices in settings:
            if choices[0][0] in (matter for matter, _ in chosen):
                continue
            possible = [s for s in choices if not any(pair(s, other) in forbidden for other in chosen)]
            assert possible, (choices, chosen)
            chosen.append(max(possible, key=lambda s: sum(pair(s, other) in missing for other in chosen)))
        for one, other in itertools.combinations(chosen, 2):
            missing.pop(pair(one, other), None)
        cases.append(dict(chosen))
    return cases


CASES = all_pairs(MATTERS, REFUSED)


def test_the_cases_hold_every_pair_that_is_not_refused():
    found = {pair(*two) for case in CASES for two in itertools.combinations(case.items(), 2)}
    settings = [[(matter, name) for name in names] for matter, names in MATTERS.items()]
    every = {pair(*two) for a, b in itertools.combinations(settings, 2) for two in itertools.product(a, b)}
    assert found == every - set(REFUSED) and set(REFUSED) <= every
    assert all(case.keys() == MATTERS.keys() for case in CASES)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_path: Path, tiny_sd2_path: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("combinations")
    names = ("images", "reg", "masks", "prompts.txt", "dataset.toml", "metadata.json")
    here = {Path(name).stem: root / name for name in names} | {"sd1": tiny_sd1_path, "sd2": tiny_sd2_path}
    for folder in (here["images"] / "1_disc", here["reg"] / "1_thing", here["masks"]):
        folder.mkdir(parents=True)
    for index in range(4):
        picture, alpha = tiny_image(((64, 64), (80, 64))[index % 2], seed=index), Image.linear_gradient("L")
        picture.putalpha(alpha.resize(picture.size).rotate(90 * index))
        path = here["images"] / "1_disc" / f"image_{index}.png"
        picture.save(path)
        path.with_suffix(".txt").write_text("one, (two:1.2), {three|four}, five", encoding="utf-8")
        alpha.resize(picture.size).save(here["masks"] / path.name)
    tiny_image((64, 64), seed=9).save(here["reg"] / "1_thing" / "thing.png")
    entries = {f"image_{index}": {"caption": "a disc", "tags": "(two:1.2), {three|four}"} for index in range(4)}
    here["metadata"].write_text(json.dumps(entries), encoding="utf-8")
    subset = f"[[datasets.subsets]]\nimage_dir = '{(here['images'] / '1_disc').as_posix()}'\n"
    here["dataset"].write_text(f"[[datasets]]\n{subset}", encoding="utf-8")
    here["prompts"].write_text("a disc --w 64 --h 64 --s 1\n", encoding="utf-8")
    return here


def run(folder: Path, places: Mapping[str, Path], case: Mapping[str, str]) -> int:
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": "{sd1}", "train_data_dir": "{images}", "output_dir": folder,
        "output_name": "net", "network_module": "networks.lora", "network_dim": 2, "resolution": "64",
        "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3, "seed": 1, "max_data_loader_n_workers": 0,
    }  # fmt: skip
    for matter, setting in case.items():
        options |= MATTERS[matter][setting]
    return train_network(
        **{name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()}
    )


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_settings_train_together(case, places, tmp_path, capfd):
    code = run(tmp_path, places, case)
    assert code == 0, (capfd.readouterr().err[-1500:], case)
    (file,) = tmp_path.glob("net.*t*")  # not the log
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_up" in name), "something was learned"


@pytest.mark.parametrize("two", REFUSED, ids=lambda two: " and ".join(sorted(f"{m} {s}" for m, s in two)))
def test_settings_that_contradict_each_other_are_refused_in_a_sentence(two, places, tmp_path, capfd):
    assert run(tmp_path, places, dict(sorted(two))) == 2
    lines = capfd.readouterr().err.splitlines()
    program = f"{Path(sys.argv[0]).name}: "
    assert lines[-1].startswith(f"{program}{REFUSED[two]}")
    assert sum(line.startswith(program) for line in lines) == 1 and not any("Traceback" in x for x in lines)
    assert not list(tmp_path.glob("net.*t*"))
