"""A network's file written a tensor at a time is byte-equal to one written whole."""

import pytest
import torch

from library.checkpoints.hashed_file import write_hashed_entries
from library.checkpoints.safetensors_io import NonFiniteError, entry_of, read_header
from networks.injection import write_network_file


@pytest.mark.parametrize("metadata", [{}, {"ss_network_dim": "4", "other": "x"}, {"modelspec.sai_model_spec": "1.0.1"}])
@pytest.mark.parametrize("rows", [2, 600_000])  # the older hash looks behind the first MiB
def test_as_written_whole(tmp_path, metadata, rows):
    tensors = {
        "m.alpha": torch.tensor(4.0),
        "m.lora_down.weight": torch.arange(rows * 1.0)[None],
        "a.x": torch.ones(3).half(),
    }
    whole, streamed = tmp_path / "whole.safetensors", tmp_path / "streamed.safetensors"
    write_network_file(tensors, whole, metadata)
    write_hashed_entries([entry_of(name, tensor) for name, tensor in tensors.items()], streamed, metadata)
    assert read_header(whole).metadata == read_header(streamed).metadata
    assert whole.read_bytes() == streamed.read_bytes()


def test_nothing_is_left_of_a_file_with_nan(tmp_path):
    entries = [entry_of("m.x", torch.tensor([float("nan")]))]
    with pytest.raises(NonFiniteError):
        write_hashed_entries(entries, tmp_path / "n.safetensors", {})
    assert not list(tmp_path.iterdir())
