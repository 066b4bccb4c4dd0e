"""Options of decoding: how much the VAE takes at once."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require


@dataclass(frozen=True)
class VaeOptions:
    """How much the VAE takes at once."""

    vae_batch_size: float | None = opt(
        help="pictures that the VAE decodes at once: 1 or more as a number, less than 1 as a share of the batch; all of "
        "the batch without this option"
    )
    vae_slices: int | None = opt(
        help="strips in which the VAE computes its layers, 16 or 32: far less GPU memory for the same picture, slower"
    )

    def __post_init__(self) -> None:
        size, slices = self.vae_batch_size, self.vae_slices
        require(size is None or size > 0, "--vae_batch_size", f"{size} is out of range", "use 1, or 0.5 for a half")
        require(slices is None or slices >= 1, "--vae_slices", f"{slices} is out of range", "use 16 or 32")

    def at_once(self, batch: int) -> int:
        """Pictures of a batch that are decoded at once."""
        if self.vae_batch_size is None:
            return batch
        return max(1, int(self.vae_batch_size * (batch if self.vae_batch_size < 1 else 1)))
