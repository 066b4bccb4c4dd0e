"""What a trained file says about itself, key by key: two datasets, regularisation images, flips; and a class folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import time

import pytest
from PIL import Image
from safetensors.torch import load_file, save

from tests.runs import metadata_of, train_network
from tests.tiny_data import tiny_images

WHATEVER = re.compile(r".+", re.DOTALL)
NUMBER = re.compile(r"\d+")
TIME = re.compile(r"\d{10}\.\d+")

SETTINGS = {
    "network_dim": 16, "network_alpha": 8, "network_dropout": 0.1, "network_args": ["conv_dim=2", "conv_alpha=1"],
    "max_train_steps": 4, "learning_rate": 1e-3, "text_encoder_lr": 5e-5, "unet_lr": 1e-4, "seed": 7,
    "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
    "optimizer_type": "AdamW", "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"], "max_grad_norm": 0.5,
    "mixed_precision": "bf16", "clip_skip": 2, "max_token_length": 150, "cache_latents": True,
    "noise_offset": 0.05, "adaptive_noise_scale": 0.01, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1,
    "caption_dropout_rate": 0.1, "caption_dropout_every_n_epochs": 3, "caption_tag_dropout_rate": 0.2,
    "prior_loss_weight": 0.5, "min_snr_gamma": 5, "scale_weight_norms": 1, "training_comment": "made by a test",
    "min_timestep": 10, "loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2,
    "metadata_author": "A. Uthor", "metadata_description": "of cats", "metadata_license": "CC0",
    "metadata_tags": "cats, dogs", "metadata_usage_hint": "weight 0.8", "metadata_trigger_phrase": "a cat",
    "metadata_merged_from": "nothing", "metadata_preprocessor": "none", "metadata_is_negative_embedding": "False",
}  # fmt: skip

ALWAYS = {
    "ss_session_id": NUMBER, "ss_training_started_at": TIME, "ss_training_finished_at": TIME,
    "ss_output_name": "net", "ss_learning_rate": "0.001", "ss_text_encoder_lr": "5e-05", "ss_unet_lr": "0.0001",
    "ss_gradient_checkpointing": "True", "ss_gradient_accumulation_steps": "2", "ss_max_train_steps": "4",
    "ss_steps": "4", "ss_lr_warmup_steps": "1", "ss_lr_scheduler": "cosine", "ss_network_module": "networks.lora",
    "ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_network_dropout": "0.1",
    "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1", "dropout": 0.1}',
    "ss_mixed_precision": "bf16", "ss_full_fp16": "False", "ss_v2": "False", "ss_base_model_version": "sd_v1",
    "ss_clip_skip": "2", "ss_max_token_length": "150", "ss_cache_latents": "True", "ss_seed": "7",
    "ss_lowram": "False", "ss_noise_offset": "0.05", "ss_adaptive_noise_scale": "0.01",
    "ss_multires_noise_iterations": "4", "ss_multires_noise_discount": "0.3", "ss_ip_noise_gamma": "0.1",
    "ss_zero_terminal_snr": "False", "ss_training_comment": "made by a test",
    "ss_sd_scripts_commit_hash": WHATEVER,
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))", "ss_max_grad_norm": "0.5",
    "ss_caption_dropout_rate": "0.1", "ss_caption_dropout_every_n_epochs": "3", "ss_caption_tag_dropout_rate": "0.2",
    "ss_face_crop_aug_range": "None", "ss_prior_loss_weight": "0.5", "ss_min_snr_gamma": "5.0",
    "ss_scale_weight_norms": "1.0", "ss_debiased_estimation": "False", "ss_noise_offset_random_strength": "False",
    "ss_ip_noise_gamma_random_strength": "False", "ss_loss_type": "huber", "ss_huber_schedule": "constant",
    "ss_huber_scale": "1.0", "ss_huber_c": "0.2", "ss_fp8_base": "False", "ss_fp8_base_unet": "False",
    "ss_num_validation_images": "0", "ss_validation_seed": "None", "ss_validation_split": "0.0",
    "ss_max_validation_steps": "None", "ss_validate_every_n_epochs": "None", "ss_validate_every_n_steps": "None",
    "ss_resize_interpolation": "None", "ss_ema_decay": "None",
    "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "diffusers", "modelspec.title": "net", "modelspec.author": "A. Uthor",
    "modelspec.description": "of cats", "modelspec.license": "CC0", "modelspec.tags": "cats, dogs",
    "modelspec.usage_hint": "weight 0.8", "modelspec.trigger_phrase": "a cat", "modelspec.merged_from": "nothing",
    "modelspec.preprocessor": "none", "modelspec.is_negative_embedding": "False",
    "modelspec.thumbnail": WHATEVER, "modelspec.date": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"),
    "modelspec.prediction_type": "epsilon", "modelspec.timestep_range": "10,1000", "modelspec.encoder_layer": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """6 + 3 training images and 2 of regularisation, each kind in all three sizes: 64x64, 96x64, 64x96."""
    top = tmp_path_factory.mktemp("data")
    tiny_images(top / "cats", 6, captions=["cat, sitting", "cat"])
    tiny_images(top / "dogs", 3, captions=["dog"], seed=20)
    tiny_images(top / "any", 2, captions=[], seed=40)
    return top


@pytest.fixture
def run(options, tmp_path, tiny_sd1_path):
    """Options common to both runs, and what is true of both files."""
    Image.effect_noise((400, 300), 50).convert("RGB").save(tmp_path / "cover.png")
    for name in ("enable_bucket", "min_bucket_reso", "max_bucket_reso"):
        del options[name]
    options |= SETTINGS | {"metadata_thumbnail": tmp_path / "cover.png"}
    raw = tiny_sd1_path.read_bytes()
    model = {
        "ss_sd_model_name": tiny_sd1_path.name,
        "ss_sd_model_hash": hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(raw).hexdigest(),
    }
    return options, ALWAYS | model


def check(file, expected) -> dict[str, str]:
    """Every key has its value and there is no other; returns the metadata."""
    metadata = metadata_of(file)
    hashes = independent_hashes(file)
    expected = expected | hashes | {"modelspec.hash_sha256": f"0x{hashes['sshs_model_hash']}"}
    assert set(metadata) == set(expected)
    for name, value in expected.items():
        is_right = value.fullmatch(metadata[name]) if isinstance(value, re.Pattern) else value == metadata[name]
        assert is_right, (name, metadata[name], value)
    return metadata


def independent_hashes(file) -> dict[str, str]:
    """Both sshs hashes, from bytes that the safetensors library writes with the ss_* metadata alone."""
    training = {name: value for name, value in metadata_of(file).items() if name.startswith("ss_")}
    whole = save(load_file(file), training)
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    assert len(whole) > 0x110000, "large enough to tell the short hash from that of nothing"
    return {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8],
    }


def test_two_datasets_with_regularisation_and_flips(run, tmp_path, folders):
    options, expected = run
    del options["train_data_dir"], options["resolution"]
    (tmp_path / "data.toml").write_text(f"""
        [general]
        caption_extension = ".txt"
        [[datasets]]
        resolution = 64
        batch_size = 2
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 128
        bucket_reso_steps = 16
        [[datasets.subsets]]
        image_dir = '{folders / "cats"}'
        num_repeats = 2
        flip_aug = true
        [[datasets.subsets]]
        image_dir = '{folders / "any"}'
        is_reg = true
        class_tokens = "animal"
        [[datasets]]
        resolution = [64, 96]
        [[datasets.subsets]]
        image_dir = '{folders / "dogs"}'
        shuffle_caption = true
        keep_tokens = 1
    """)
    started = time.time()
    assert train_network(**options, dataset_config=tmp_path / "data.toml") == 0
    buckets = {"0": {"resolution": [48, 80], "count": 4}, "1": {"resolution": [64, 64], "count": 10}}
    buckets["2"] = {"resolution": [80, 48], "count": 10}
    errors = 2 * [0, abs(80 / 48 - 96 / 64), abs(48 / 80 - 64 / 96)] + [0, abs(80 / 48 - 96 / 64)]
    first = {
        "is_dreambooth": True, "batch_size_per_device": 2, "num_train_images": 12, "num_reg_images": 2,
        "resolution": [64, 64], "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128,
        "tag_frequency": {"cats": {"cat": 6, "sitting": 3}, "any": {"animal": 2}},
        "bucket_info": {"buckets": buckets, "mean_img_ar_error": pytest.approx(sum(errors) / 8)},
        "subsets": [
            {
                "img_count": 6, "num_repeats": 2, "color_aug": False, "flip_aug": True, "random_crop": False,
                "shuffle_caption": False, "keep_tokens": 0, "image_dir": "cats", "class_tokens": None, "is_reg": False,
            },
            {
                "img_count": 2, "num_repeats": 1, "color_aug": False, "flip_aug": False, "random_crop": False,
                "shuffle_caption": False, "keep_tokens": 0, "image_dir": "any", "class_tokens": "animal",
                "is_reg": True,
            },
        ],
    }  # fmt: skip
    second = {
        "is_dreambooth": True, "batch_size_per_device": 2, "num_train_images": 3, "num_reg_images": 0,
        "resolution": [64, 96], "enable_bucket": False, "min_bucket_reso": None, "max_bucket_reso": None,
        "tag_frequency": {"dogs": {"dog": 3}}, "bucket_info": None,
        "subsets": [
            {
                "img_count": 3, "num_repeats": 1, "color_aug": False, "flip_aug": False, "random_crop": False,
                "shuffle_caption": True, "keep_tokens": 1, "image_dir": "dogs", "class_tokens": None, "is_reg": False,
            },
        ],
    }  # fmt: skip
    metadata = check(
        tmp_path / "out" / "net.safetensors",
        expected
        | {
            # 24 samples in batches of 2 within their buckets, and 3 samples in 2 batches
            "ss_num_train_images": "15", "ss_num_reg_images": "2", "ss_num_batches_per_epoch": "14",
            "ss_num_epochs": "1", "ss_epoch": "1", "modelspec.resolution": "64x64", "ss_datasets": WHATEVER,
            "ss_tag_frequency": json.dumps(
                {"dogs": {"dog": 3}, "cats": {"cat": 6, "sitting": 3}, "any": {"animal": 2}}
            ),
            "ss_dataset_dirs": json.dumps(
                {"cats": {"n_repeats": 2, "img_count": 6}, "dogs": {"n_repeats": 1, "img_count": 3}}
            ),
        },
    )  # fmt: skip
    assert json.loads(metadata["ss_datasets"]) == [first, second]
    times = [float(metadata[f"ss_training_{name}_at"]) for name in ("started", "finished")]
    assert started < times[0] < times[1] < time.time()
    kind, _, picture = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (256, 192)


def test_class_folders_and_another_vae(run, tmp_path, folders, tiny_sd2_path):
    options, expected = run
    (tmp_path / "train").mkdir()
    (tmp_path / "reg").mkdir()
    (tmp_path / "train" / "2_cat").symlink_to(folders / "cats")
    (tmp_path / "reg" / "1_animal").symlink_to(folders / "any")
    folders_given = {"train_data_dir": tmp_path / "train", "reg_data_dir": tmp_path / "reg"}
    data = {"resolution": "64,64", "train_batch_size": 3, "flip_aug": True, "caption_extension": ".txt"}
    given = {**options, **folders_given, **data, "vae": tiny_sd2_path, "metadata_thumbnail": "data:,x"}
    assert train_network(**given) == 0
    raw = tiny_sd2_path.read_bytes()
    check(
        tmp_path / "out" / "net.safetensors",
        expected
        | {
            "ss_num_train_images": "12", "ss_num_reg_images": "2", "ss_num_batches_per_epoch": "8",
            "ss_num_epochs": "1", "ss_epoch": "1", "modelspec.resolution": "64x64", "modelspec.thumbnail": "data:,x",
            "ss_batch_size_per_device": "3", "ss_total_batch_size": "6", "ss_resolution": "(64, 64)",
            "ss_color_aug": "False", "ss_flip_aug": "True", "ss_random_crop": "False", "ss_shuffle_caption": "False",
            "ss_keep_tokens": "0", "ss_enable_bucket": "False", "ss_bucket_no_upscale": "False",
            "ss_min_bucket_reso": "None", "ss_max_bucket_reso": "None", "ss_bucket_info": "null",
            "ss_dataset_dirs": json.dumps({"2_cat": {"n_repeats": 2, "img_count": 6}}),
            "ss_reg_dataset_dirs": json.dumps({"1_animal": {"n_repeats": 1, "img_count": 2}}),
            "ss_tag_frequency": json.dumps({"2_cat": {"cat": 6, "sitting": 3}, "1_animal": {"animal": 2}}),
            "ss_vae_name": tiny_sd2_path.name,
            "ss_vae_hash": hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8],
            "ss_new_vae_hash": hashlib.sha256(raw).hexdigest(),
        },
    )  # fmt: skip


def test_a_thumbnail_that_is_no_picture(options, tmp_path, capfd):
    (tmp_path / "cover.png").write_text("no picture")
    for name in ("cover.png", "nowhere.png"):
        assert train_network(**options, metadata_thumbnail=tmp_path / name) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert "--metadata_thumbnail" in line and name in line


def test_the_resolution_is_that_of_most_images(options, tmp_path, folders):
    del options["train_data_dir"], options["enable_bucket"], options["min_bucket_reso"]
    (tmp_path / "data.toml").write_text(f"""
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = '{folders / "dogs"}'
        [[datasets]]
        resolution = [96, 64]
        [[datasets.subsets]]
        image_dir = '{folders / "cats"}'
    """)
    assert train_network(**{**options, "max_train_steps": 1}, dataset_config=tmp_path / "data.toml") == 0
    assert metadata_of(tmp_path / "out" / "net.safetensors")["modelspec.resolution"] == "96x64"
