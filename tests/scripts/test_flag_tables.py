"""The flags of every script are declared as the trade declares them: name, type, default, choices, nargs.

tests/data/cli_<script>.json holds the trade's declarations of the flags that the script has; a default that is not
listed there is one of None, 0, False and the empty text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import fine_tune
import gen_img_diffusers
import sdxl_gen_img
import sdxl_minimal_inference
import sdxl_train
import sdxl_train_network
import train_db
import train_network
from finetune import merge_captions_to_metadata, merge_dd_tags_to_metadata
from library.cli import caching, generation, metadata_tools, preparing, training
from tests.tools import all_tools
from tools import cache_latents, cache_text_encoder_outputs

DATA = Path(__file__).parents[1] / "data"
PARSERS = {
    "train_network": lambda: training.build_parser(train_network.SCRIPT),
    "sdxl_train_network": lambda: training.build_parser(sdxl_train_network.SCRIPT),
    "train_db": lambda: training.build_parser(train_db.SCRIPT),
    "fine_tune": lambda: training.build_parser(fine_tune.SCRIPT),
    "sdxl_train": lambda: training.build_parser(sdxl_train.SCRIPT),
    "gen_img_diffusers": lambda: generation.build_parser(gen_img_diffusers.SCRIPT),
    "sdxl_gen_img": lambda: generation.build_parser(sdxl_gen_img.SCRIPT),
    "sdxl_minimal_inference": sdxl_minimal_inference.build_parser,
    "merge_captions_to_metadata": merge_captions_to_metadata.TOOL.parser,
    "merge_dd_tags_to_metadata": merge_dd_tags_to_metadata.TOOL.parser,
    "clean_captions_and_tags": lambda: metadata_tools.clean_parser(None),
    "cache_latents": lambda: caching.build_parser(cache_latents.TOOL),
    "cache_text_encoder_outputs": lambda: caching.build_parser(cache_text_encoder_outputs.TOOL),
    "prepare_buckets_latents": lambda: preparing.build_parser(None),
}
PARSERS |= {name.partition(".")[2]: tool.parser for name, tool in all_tools().items()}
OF_TRAINING = {
    "--on_bad_image", "--max_nonfinite_steps", "--save_best", "--early_stop_patience", "--ema_decay", "--plan",
    "--data_index", "--cache_format",
}  # fmt: skip
# flags that the trade gave to its scripts for networks alone
OF_NETWORKS = {
    "--validation_split", "--validation_seed", "--validate_every_n_steps", "--validate_every_n_epochs",
    "--max_validation_steps", "--initial_step", "--initial_epoch", "--skip_until_initial_step",
    "--cpu_offload_checkpointing",
}  # fmt: skip
# of later versions of the trade's generator, and --skip_errors, which is of this project
OF_PROMPTS = {"--from_module", "--prompter_module_args", "--skip_errors"}
# of later versions of the trade's generators
OF_GENERATION = {
    "--force_scheduler_zero_steps_offset", "--zero_terminal_snr", "--pyramid_noise_prob",
    "--pyramid_noise_discount_range", "--noise_offset_prob", "--noise_offset_range",
}  # fmt: skip
RESOLUTION = {
    "--ds_depth_1", "--ds_timesteps_1", "--ds_depth_2", "--ds_timesteps_2", "--ds_ratio", "--gradual_latent_timesteps",
    "--gradual_latent_ratio", "--gradual_latent_ratio_step", "--gradual_latent_every_n_steps",
    "--gradual_latent_s_noise", "--gradual_latent_unsharp_params",
}  # fmt: skip
WEIGHING = {"--emb_normalize_mode", "--sigmas"}
CRITICS = {
    "--clip_guidance_scale", "--clip_image_guidance_scale", "--vgg16_guidance_scale", "--vgg16_guidance_layer",
}  # fmt: skip
# of this project: several ControlNets at once; weights of what looks at pictures, which are never fetched unasked
OF_CONTROL = {"--control_net_mode", "--clip_guidance_model", "--vgg16_model"}
CONTROL_OF_SD = OF_CONTROL | {"--control_net_multipliers"}  # the name of later versions of the trade's generators
# of the trade's other generator
CONTROL_OF_SDXL = OF_CONTROL | CRITICS | {
    "--control_net_models", "--control_net_preps", "--control_net_weights", "--clip_vision_model",
}  # fmt: skip
# contact sheets, and texts beside pictures
SHEETS = {
    "--grid", "--grid_networks", "--grid_multipliers", "--grid_ckpts", "--grid_network_module", "--sidecar",
}  # fmt: skip
OF_MERGING = {"--exact", "--ignore_unmatched", "--plot"}
OF_GENERATORS = OF_PROMPTS | OF_GENERATION | SHEETS | RESOLUTION | WEIGHING
OWN = {
    "train_network": OF_TRAINING,
    "sdxl_train_network": OF_TRAINING | {"--text_variations"},
    "train_db": OF_TRAINING | OF_NETWORKS,
    "fine_tune": OF_TRAINING | OF_NETWORKS | {"--conditioning_data_dir", "--masked_loss"},
    "sdxl_train": OF_TRAINING | OF_NETWORKS | {"--text_variations", "--prior_loss_weight"},
    "gen_img_diffusers": OF_PROMPTS
    | OF_GENERATION
    | SHEETS
    | RESOLUTION
    | WEIGHING
    | CONTROL_OF_SD
    | {"--no_half_vae"},
    "sdxl_gen_img": OF_PROMPTS
    | OF_GENERATION
    | SHEETS
    | RESOLUTION
    | WEIGHING
    | CONTROL_OF_SDXL
    | {"--v_parameterization", "--shuffle_prompts"},
    "sdxl_minimal_inference": {"--steps", "--seed", "--width", "--height"},
    "merge_captions_to_metadata": {"--on_missing_text"},
    "merge_dd_tags_to_metadata": {"--on_missing_text"},
    "clean_captions_and_tags": set(),
    "prepare_buckets_latents": {"--on_bad_image"},
    "convert_diffusers20_original_sd": set(),
    "extract_lora_from_dylora": set(),
    "check_lora_weights": set(),
    "lora_interrogator": set(),
    "lora_diffusers": {"--output_dir", "--steps"},
    "merge_models": {"--add_metadata"},
    "show_metadata": {"--readable"},
    "canny": set(),
    "resize_images_to_resolution": set(),
    "latent_upscaler": set(),
    "detect_face_rotate": {"--detector"},
    "merge_lora": OF_MERGING | {"--lbws"},
    "sdxl_merge_lora": OF_MERGING,
    "merge_lora_old": set(),
    "resize_lora": {"--exact_rank", "--ignore_unmatched", "--plot"},
    "extract_lora_from_models": {"--svd_method", "--ignore_unmatched", "--plot"},
    "svd_merge_lora": {"--clamp_quantile", "--ignore_unmatched", "--plot"},
}
OF_THIS_PROJECT = {"convert_lora", "verify_model"}  # tools that the trade does not have
TAKE_ALL = {"cache_latents", "cache_text_encoder_outputs"}  # every flag of the training scripts

MORE_CHOICES = {  # values that the trade's scripts don't know, or only know in files
    "--max_token_length": [75],
    "--resize_interpolation": ["box"],
    "--save_precision_as": ["no"],
    "--sampler": ["dpmsolver++_sde"],
    "--sample_sampler": ["dpmsolver++_sde"],
    "--interpolation": ["lanczos", "bicubic", "bilinear", "linear", "box", "nearest"],
}
# taken as texts, because a share such as "10%" will do as well as a number
WIDER_TYPES = {"--lr_warmup_steps": "str", "--lr_decay_steps": "str"}
# a rate for each text encoder, as later versions of the trade's script take them
SEVERAL = {("sdxl_train_network", "--text_encoder_lr")}
# one or more: that there is one is checked behind the parser
SEVERAL |= {("merge_models", "--models"), ("merge_models", "--ratios")}


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("script", sorted(set(PARSERS) - OF_THIS_PROJECT))
def test_flags_are_declared_as_the_trade_declares_them(script):
    actions = flags_of(PARSERS[script]())
    declared = json.loads((DATA / f"cli_{script}.json").read_text(encoding="utf-8"))
    if script in TAKE_ALL:
        assert set(actions) > set(declared)
        assert {"--network_dim", "--block_lr", "--optimizer_type", "--verify"} < set(actions)
    else:
        assert set(actions) == set(declared) | OWN[script] | {"--help"}
    for flag, facts in declared.items():
        action = actions[flag]
        if facts.get("action") == "store_true":
            assert (action.nargs, action.const, action.default) == (0, True, False), flag
            continue
        assert getattr(action.type, "__name__", None) == WIDER_TYPES.get(flag, facts["type"]), flag
        assert (action.default or None) == (facts.get("default") or None), flag
        assert action.nargs == ("*" if (script, flag) in SEVERAL else facts.get("nargs")), flag
        choices = [choice for choice in action.choices or () if choice not in MORE_CHOICES.get(flag, ())]
        assert (choices or None) == facts.get("choices"), flag


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_has_a_help_text(script):
    assert all(action.help for action in flags_of(PARSERS[script]()).values())
