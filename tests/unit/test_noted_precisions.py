"""Latents made for a metadata file: which VAEs they may go with, and for whom."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from library.data.buckets import Placement
from library.data.cache_files import read_latents, state_of
from library.data.newer_names import newer_name
from library.options import OptionError
from tests.unit.test_cache import TinyEncoder, cached, make_item


@pytest.fixture
def item(tmp_path):
    """As the tool makes it: with the fingerprints of its VAE in three precisions."""
    item = replace(make_item(tmp_path / "a.png"), other_precisions=("full", "half", "bfloat"))
    cached([item], vae="full")
    return item


def test_the_file_notes_them(item):
    with np.load(item.npz) as arrays:
        noted = json.loads(str(arrays["fingerprint"]))
    assert noted["vae"] == "full" and noted["vae_in_other_precisions"] == ["full", "half", "bfloat"]


@pytest.mark.parametrize(("vae", "reason"), [("full", "valid"), ("half", "valid"), ("another", "other VAE")])
def test_a_dataset_that_brings_them_takes_any(item, vae, reason):
    brought = replace(item, given_with=0, other_precisions=())
    assert state_of(brought, vae).reason == reason
    brought = replace(brought, placement=Placement((64, 48), (70, 57)))
    assert state_of(brought, vae).reason == reason, "and any scale before the cut"
    if reason == "valid":
        read_latents(brought, flipped=False, vae_fingerprint=vae, image_hash=None)
    else:
        with pytest.raises(OptionError):
            read_latents(brought, flipped=False, vae_fingerprint=vae, image_hash=None)


def test_a_cache_is_of_one_precision_and_scale(item):
    plain = replace(item, other_precisions=())
    assert state_of(plain, "full").reason == "valid"
    assert state_of(plain, "half").reason == "other VAE"
    assert state_of(replace(plain, placement=Placement((64, 48), (70, 57))), "full").reason == "other size"


@pytest.mark.parametrize("vae", ["full", "half"])
def test_a_copied_image_leaves_the_notes_alone(item, vae):
    """The image's time has changed, its bytes have not."""
    os.utime(item.path, (1, 1))
    encode = TinyEncoder()
    cached([replace(item, other_precisions=(), given_with=0 if vae == "half" else None)], encode, vae=vae)
    test_the_file_notes_them(item)
    assert encode.num_images == 0 and state_of(replace(item, given_with=0), "bfloat").reason == "valid"


def test_metadata_lead_to_the_older_name(item):
    assert newer_name(item) is None
    assert newer_name(replace(item, other_precisions=())) == f"{item.path[:-4]}_0080x0065_sd.npz"


def test_notes_that_are_none_count_for_nothing(item):
    with np.load(item.npz) as arrays:
        content = dict(arrays)
    noted = json.loads(str(content["fingerprint"])) | {"vae_in_other_precisions": 5}
    np.savez(item.npz, **{**content, "fingerprint": np.array(json.dumps(noted))})
    brought = replace(item, given_with=0, other_precisions=())
    assert state_of(brought, "full").reason == "valid" and state_of(brought, "half").reason == "other VAE"
