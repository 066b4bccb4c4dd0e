"""Options of the objective: noise, timesteps, loss."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require


@dataclass(frozen=True)
class NoiseOptions:
    """How noise and timesteps are drawn."""

    noise_offset: float | None = opt(help="shift of the noise mean per image and channel; 0.05-0.1 is usual")
    zero_terminal_snr: bool = opt(
        False, help="rescale betas so that the last timestep is pure noise (for v-prediction)"
    )
    min_timestep: int | None = opt(help="lowest timestep drawn (0-999)")
    max_timestep: int | None = opt(help="timesteps are drawn below this one (1-1000)")

    def __post_init__(self) -> None:
        low, high = self.timestep_range
        require(0 <= low < 1000, "--min_timestep", f"{low} is out of range", "use 0 to 999")
        require(1 <= high <= 1000, "--max_timestep", f"{high} is out of range", "use 1 to 1000")
        require(low <= high, "--min_timestep", f"{low} is above --max_timestep {high}")

    @property
    def timestep_range(self) -> tuple[int, int]:
        """(lowest, upper bound exclusive); equal bounds mean that one timestep."""
        return (
            0 if self.min_timestep is None else self.min_timestep,
            1000 if self.max_timestep is None else self.max_timestep,
        )


@dataclass(frozen=True)
class LossOptions:
    """How the error becomes the loss."""

    prior_loss_weight: float = opt(1.0, help="loss weight of regularisation images")
    min_snr_gamma: float | None = opt(help="weight timesteps by min(SNR, gamma) / SNR; 5 is usual (Hang et al. 2023)")
    scale_v_pred_loss_like_noise_pred: bool = opt(
        False, help="v-prediction: weight timesteps as noise prediction would"
    )
    v_pred_like_loss: float | None = opt(
        help="noise prediction: add this share of the loss weighted as v-prediction would"
    )

    def __post_init__(self) -> None:
        require(self.prior_loss_weight >= 0, "--prior_loss_weight", f"{self.prior_loss_weight} is negative")
        share = self.v_pred_like_loss
        require(share is None or share >= 0, "--v_pred_like_loss", f"{share} is negative")
        require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            "--min_snr_gamma",
            f"{self.min_snr_gamma} must be above 0",
            "leave the option out to switch it off",
        )
