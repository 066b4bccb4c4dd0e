"""Every flag of train_network.py with the value, the surroundings and the effect by which it is tested.

Texts in braces are places that the test fills in: models, networks, folders of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from library.data.images import usable_cores
from tests.flag_effects import (
    Check,
    both,
    computes_again,
    computes_attention_with,
    has_inside,
    learns_nearly_the_same,
    learns_otherwise,
    learns_the_same,
    marks,
    of_dtype,
    of_rank,
    only_parts,
    refuses,
    runs,
    says,
    says_less,
    writes,
    writes_no,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The flag's value, what it should do, and what else the runs are given."""

    value: Any
    shows: Check
    beside: Mapping[str, Any] = field(default_factory=dict)  # without and with the flag
    also: Mapping[str, Any] = field(default_factory=dict)  # with it only


WIDE = {"enable_bucket": True, "resolution": "256", "train_data_dir": "{wide}"}
EPOCHS = {"max_train_steps": 6}  # of 4 images x 1 in batches of 2: three epochs
ROWS: dict[str, Row] = {
    # the model
    "pretrained_model_name_or_path": Row("{other}", learns_otherwise),
    "v2": Row(True, refuses("--v2")),
    "v_parameterization": Row(True, both(learns_otherwise, marks(modelspec__prediction_type="v"))),
    "vae": Row("{other}", both(learns_otherwise, marks(ss_vae_name="other.safetensors"))),
    "no_half_vae": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "mem_eff_attn": Row(True, both(learns_nearly_the_same, has_inside(attention={"SlicedAttention"}))),
    "sdpa": Row(True, both(learns_the_same, computes_attention_with("Sdpa"))),
    "clip_skip": Row(2, both(learns_otherwise, marks(ss_clip_skip="2", modelspec__encoder_layer="2"))),
    "max_token_length": Row(150, both(learns_otherwise, marks(ss_max_token_length="150"))),
    # where the images are
    "train_data_dir": Row("{others}", learns_otherwise),
    "reg_data_dir": Row("{reg}", both(learns_otherwise, marks(ss_num_reg_images="2"))),
    "dataset_config": Row("{root}/data.toml", learns_otherwise),
    "in_json": Row("{root}/meta.json", learns_otherwise, also={"train_data_dir": "{data}/1_disc"}),
    "dataset_repeats": Row(
        3, marks(ss_num_train_images="12"), {"in_json": "{root}/meta.json", "train_data_dir": "{data}/1_disc"}
    ),
    "prior_loss_weight": Row(0.1, learns_otherwise, {"reg_data_dir": "{reg}"}),
    "on_bad_image": Row("skip", runs, {"train_data_dir": "{broken}"}),
    "alpha_mask": Row(True, learns_otherwise, {"train_data_dir": "{transparent}"}),
    "conditioning_data_dir": Row("{masks}", learns_otherwise, also={"masked_loss": True}),
    "masked_loss": Row(True, learns_otherwise, {"conditioning_data_dir": "{masks}"}),
    # sizes
    "resolution": Row("128,64", both(learns_otherwise, marks(ss_resolution="(128, 64)"))),
    "enable_bucket": Row(True, marks(ss_enable_bucket="True"), {"train_data_dir": "{wide}", "min_bucket_reso": 64}),
    "min_bucket_reso": Row(64, learns_otherwise, {**WIDE, "max_bucket_reso": 256}),
    "max_bucket_reso": Row(256, learns_otherwise, {**WIDE, "min_bucket_reso": 64}),
    "bucket_reso_steps": Row(32, learns_otherwise, {**WIDE, "min_bucket_reso": 64}),
    "bucket_no_upscale": Row(True, learns_otherwise, WIDE),
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
    "cache_latents": Row(True, both(learns_otherwise, has_inside(encoded=[1] * 4))),
    "cache_latents_to_disk": Row(True, has_inside(encoded=[1] * 4), {"train_data_dir": "{disk}"}),
    "vae_batch_size": Row(3, has_inside(encoded=[3, 1]), {"cache_latents": True}),
    # batches
    "train_batch_size": Row(1, both(learns_otherwise, marks(ss_batch_size_per_device="1"))),
    "max_data_loader_n_workers": Row(2, both(learns_the_same, has_inside(workers=min(2, usable_cores())))),
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
    "zero_terminal_snr": Row(
        True, both(learns_otherwise, marks(ss_zero_terminal_snr="True")), {"v_parameterization": True}
    ),
    "min_snr_gamma": Row(0.05, both(learns_otherwise, marks(ss_min_snr_gamma="0.05"))),
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
    "fused_backward_pass": Row(
        True, both(learns_the_same, has_inside(updates="FusedUpdates", gradients_left=0)), {"max_grad_norm": 0.0}
    ),
    "lr_scheduler": Row("linear", both(learns_otherwise, marks(ss_lr_scheduler="linear"))),
    "lr_warmup_steps": Row(
        2, both(learns_otherwise, marks(ss_lr_warmup_steps="2")), {"lr_scheduler": "constant_with_warmup"}
    ),
    "lr_scheduler_num_cycles": Row(3, learns_otherwise, {"lr_scheduler": "cosine_with_restarts", **EPOCHS}),
    "lr_scheduler_power": Row(3.0, learns_otherwise, {"lr_scheduler": "polynomial"}),
    "lr_scheduler_type": Row("ExponentialLR", learns_otherwise, also={"lr_scheduler_args": ["gamma=0.5"]}),
    "lr_scheduler_args": Row(["num_cycles=0.25"], learns_otherwise, {"lr_scheduler": "cosine"}),
    "lr_scheduler_min_lr_ratio": Row(0.5, runs, {"lr_scheduler": "cosine_with_min_lr"}),
    "lr_decay_steps": Row(2, learns_otherwise, {"lr_scheduler": "warmup_stable_decay"}),
    "lr_scheduler_timescale": Row(1, learns_otherwise, {"lr_scheduler": "inverse_sqrt"}),
    # the run
    "max_train_steps": Row(1, learns_otherwise),
    "max_train_epochs": Row(3, marks(ss_max_train_steps="6", ss_num_epochs="3")),
    "gradient_accumulation_steps": Row(2, both(learns_otherwise, marks(ss_gradient_accumulation_steps="2"))),
    "gradient_checkpointing": Row(True, both(learns_the_same, computes_again)),
    "mixed_precision": Row("bf16", both(learns_otherwise, marks(ss_mixed_precision="bf16"))),
    "full_bf16": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "fp8_base": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "fp8_base_unet": Row(True, learns_otherwise, {"mixed_precision": "bf16"}),
    "skip_until_initial_step": Row(
        True, both(learns_the_same, says("--skip_until_initial_step has no effect")), {"initial_step": 1}
    ),
    "initial_step": Row(1, learns_otherwise),
    "initial_epoch": Row(2, learns_otherwise, EPOCHS),
    # the network
    "network_module": Row("lycoris.kohya", learns_otherwise),
    "network_dim": Row(2, both(of_rank(2), marks(ss_network_dim="2"))),
    "network_alpha": Row(3.0, both(learns_otherwise, marks(ss_network_alpha="3.0"))),
    "network_dropout": Row(0.5, both(learns_otherwise, marks(ss_network_dropout="0.5"))),
    "network_args": Row(
        ["conv_dim=2"], both(learns_otherwise, marks(ss_network_args='{"conv_dim": "2", "dropout": null}'))
    ),
    "network_train_unet_only": Row(True, only_parts("unet")),
    "network_train_text_encoder_only": Row(True, only_parts("te")),
    "network_weights": Row("{network}", learns_otherwise),
    "dim_from_weights": Row(True, of_rank(3), {"network_weights": "{network3}", "network_dim": None}),
    "scale_weight_norms": Row(1e-3, both(learns_otherwise, marks(ss_scale_weight_norms="0.001"))),
    "base_weights": Row(["{network}"], learns_otherwise),
    "base_weights_multiplier": Row([0.5], learns_otherwise, {"base_weights": ["{network}"]}),
    # files
    "output_dir": Row("{out}/deeper", writes("deeper/net.safetensors")),
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
    "no_metadata": Row(True, says_less),
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
    "validation_split": Row(
        0.5, both(learns_otherwise, marks(ss_num_validation_images="2", ss_validation_split="0.5"))
    ),
    "validation_seed": Row(5, both(learns_otherwise, marks(ss_validation_seed="5")), {"validation_split": 0.5}),
    "validate_every_n_steps": Row(1, says("validation after step 1:"), {"validation_split": 0.25}),
    "early_stop_patience": Row(
        1,
        says("without a loss below"),
        {"validation_split": 0.5, "validate_every_n_steps": 1, "learning_rate": 0.5, "max_train_steps": 8},
    ),
    "ema_decay": Row(0.5, writes("net-ema.safetensors")),
    "skip_cache_check": Row(
        True,
        both(learns_the_same, says("taken unchecked")),
        {"cache_latents_to_disk": True, "train_data_dir": "{disk}"},
    ),
    "cache_format": Row(
        "packed",
        both(learns_the_same, says("of 4 images are in 1 pack")),
        {"cache_latents_to_disk": True, "train_data_dir": "{disk}"},
    ),
    "debug_dataset": Row(True, writes_no("net.safetensors")),
    "plan": Row(True, both(writes_no("net.safetensors"), writes("net-plan.txt"))),
    # of no effect here, and that is said
    "tokenizer_cache_dir": Row("{root}", both(learns_the_same, says("--tokenizer_cache_dir has no effect"))),
    "persistent_data_loader_workers": Row(
        True, both(learns_the_same, says("--persistent_data_loader_workers has no effect"))
    ),
    "lowram": Row(True, both(learns_the_same, marks(ss_lowram="True"), says("--lowram has no effect"))),
    "async_upload": Row(True, both(learns_the_same, says("--async_upload has no effect"))),
    "console_log_simple": Row(True, both(learns_the_same, says("--console_log_simple has no effect"))),
}  # fmt: skip

ELSEWHERE = {
    "ddp_timeout": "tests/scripts/test_train_network_continued.py::test_two_processes_equal_one",
    "ddp_gradient_as_bucket_view": "tests/scripts/test_train_network_continued.py::test_two_processes_equal_one",
    "ddp_static_graph": "tests/scripts/test_train_network_continued.py::test_two_processes_equal_one",
    "deepspeed": "tests/unit/test_zero.py::test_the_settings_reach_deepspeed",
    "zero_stage": "tests/unit/test_zero.py::test_the_settings_reach_deepspeed",
    "offload_optimizer_device": "tests/unit/test_zero.py::test_the_settings_reach_deepspeed",
    "offload_optimizer_nvme_path": "tests/unit/test_zero.py::test_the_settings_reach_deepspeed",
    "offload_param_device": "tests/unit/test_zero.py::test_weights_on_the_disk",
    "offload_param_nvme_path": "tests/unit/test_zero.py::test_weights_on_the_disk",
    "fp16_master_weights_and_gradients": "tests/unit/test_zero.py::"
    "test_weights_in_16_bits_and_trained_parameters_whole",
    "zero3_init_flag": "tests/unit/test_memory_options.py::test_settings_without_effect_are_named",
    "zero3_save_16bit_model": "tests/unit/test_memory_options.py::test_settings_without_effect_are_named",
    "full_fp16": "tests/unit/test_placement.py::test_what_is_trained_is_cast_as_asked",
    "highvram": "tests/unit/test_placement.py::test_a_vae_without_work_leaves_the_device",
    "cpu_offload_checkpointing": "tests/unit/test_placement.py::test_checkpoints_go_to_the_cpu_from_elsewhere",
    "validate_every_n_epochs": "tests/scripts/test_train_network_validation.py::"
    "test_after_every_epoch_unless_told_otherwise",
    "max_validation_steps": "tests/scripts/test_train_network_validation.py::"
    "test_the_number_depends_on_weights_and_validation_seed_alone",
    "dataset_class": "tests/scripts/test_train_network_datasets.py::test_a_class_of_ones_own",
    "cache_info": "tests/unit/test_info_cache.py::test_the_file_is_that_of_the_trade",
    "data_index": "tests/unit/test_index.py::test_when_an_index_is_kept",
    "config_file": "tests/scripts/test_train_network.py::test_config_file_is_the_same_as_flags",
    "output_config": "tests/scripts/test_train_network.py::test_output_config_round_trip_without_secrets",
    "resume": "tests/scripts/test_train_network_resume.py::test_resume_in_mid_epoch_ends_in_the_same_weights",
    "sample_prompts": "tests/scripts/test_previews.py::test_names_and_what_web_user_interfaces_read",
    "sample_sampler": "tests/scripts/test_previews.py::test_names_and_what_web_user_interfaces_read",
    "huggingface_repo_id": "tests/scripts/test_hub.py::test_every_saved_file_and_state_arrives",
    "huggingface_token": "tests/scripts/test_hub.py::test_every_saved_file_and_state_arrives",
    "huggingface_path_in_repo": "tests/scripts/test_hub.py::test_every_saved_file_and_state_arrives",
    "save_state_to_huggingface": "tests/scripts/test_hub.py::test_every_saved_file_and_state_arrives",
    "huggingface_repo_type": "tests/scripts/test_hub.py::test_a_public_data_set_repository",
    "huggingface_repo_visibility": "tests/scripts/test_hub.py::test_a_public_data_set_repository",
    "resume_from_huggingface": "tests/scripts/test_hub.py::test_going_on_with_a_state_from_the_hub",
    "console_log_level": "tests/scripts/test_logging.py::"
    "test_the_level_leaves_lighter_messages_out_of_the_screen_and_not_out_of_the_log",
    "log_with": "tests/scripts/test_logging.py::test_weights_and_biases",
    "wandb_api_key": "tests/scripts/test_logging.py::test_weights_and_biases",
    "wandb_run_name": "tests/scripts/test_logging.py::test_weights_and_biases",
    "log_config": "tests/scripts/test_logging.py::test_settings_at_tensorboard",
    "log_tracker_config": "tests/scripts/test_logging.py::test_a_tracker_is_given_its_arguments",
    "metadata_is_negative_embedding": "tests/scripts/test_metadata.py::test_two_datasets_with_regularisation_and_flips",
    "metadata_thumbnail": "tests/scripts/test_metadata.py::test_two_datasets_with_regularisation_and_flips",
    "torch_compile": "tests/unit/test_compilation.py::test_a_compiled_block_computes_the_same",
    "dynamo_backend": "tests/unit/test_compilation.py::test_an_unknown_backend_is_refused_by_name",
    "xformers": "tests/unit/test_vae_and_attention.py::test_xformers_is_switched_on_in_both_models",
    "max_nonfinite_steps": "tests/scripts/test_train_network_mistakes.py::"
    "test_a_run_without_finite_losses_stops_and_says_why",
}
