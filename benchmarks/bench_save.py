"""How long the loop waits while a LoRA of a full-size SD 1.5 model is saved: written, hashed, flushed to the disk.

Beside it the plain way: safetensors' own `save_file` of the same tensors without hashes, without flushing, straight to
its name; and the hashes of the trade by serialising the file once more in memory.

Run: python benchmarks/bench_save.py
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from table import median_seconds, print_table

from library.models.build import build_text_encoder, build_unet
from networks.lora import LoRANetwork, create_network
from tests.full_size import TEXT_ENCODERS, UNETS

METADATA = {"ss_network_dim": "32", "ss_tag_frequency": "{}" * 500}


def full_size_network(rank: int) -> LoRANetwork:
    """A LoRA on the shapes of SD 1.5; the model itself takes no memory."""
    with torch.device("meta"):
        unet, text_encoder = build_unet(UNETS["sd1"]), build_text_encoder(TEXT_ENCODERS["sd1"])
    network = create_network(1.0, rank, float(rank), None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    return network


def plain_save(network: LoRANetwork, path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, path, METADATA)


def plain_save_with_hashes(network: LoRANetwork, path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    content = safetensors.torch.save(tensors, METADATA)
    header = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[header:]).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    hashes = {"sshs_model_hash": digest, "sshs_legacy_hash": legacy}
    safetensors.torch.save_file(tensors, path, {**METADATA, **hashes})


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (8, 32, 128):
            network, path = full_size_network(rank), Path(folder) / "network.safetensors"
            ours = median_seconds(lambda n=network, p=path: n.save_weights(p, None, METADATA))[1]
            size = path.stat().st_size / 1e6
            plain = median_seconds(lambda n=network, p=path: plain_save(n, p))[1]
            hashed = median_seconds(lambda n=network, p=path: plain_save_with_hashes(n, p))[1]
            rows.append(
                [rank, f"{size:.0f} MB", f"{ours:.3f} s", f"{hashed:.3f} s", f"{plain:.3f} s", f"{ours / hashed:.2f} x"]
            )
    header = ["rank", "file", "ours", "plain with hashes", "plain, no hashes", "ours / plain with hashes"]
    print_table("Saving a LoRA of SD 1.5 in float32", header, rows)


if __name__ == "__main__":
    main()
