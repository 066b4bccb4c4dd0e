"""Options of the objective: noise, timesteps, loss."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require


@dataclass(frozen=True)
class NoiseOptions:
    """How noise and timesteps are drawn."""

    noise_offset: float | None = opt(help="shift of the noise mean per image and channel; 0.05-0.1 is usual")
    noise_offset_random_strength: bool = opt(
        False, help="draw the strength of the offset for each image, from 0 to --noise_offset"
    )
    adaptive_noise_scale: float | None = opt(
        help="strengthen --noise_offset by this times the absolute mean of the image's latents, per channel"
    )
    multires_noise_iterations: int | None = opt(
        help="add noise of lower and lower resolution, so many levels at most; 6-10 is usual (pyramid noise)"
    )
    multires_noise_discount: float = opt(
        0.3, help="strength of each level of pyramid noise as a share of the level before; 0.1-0.8 is usual"
    )
    ip_noise_gamma: float | None = opt(
        help="noise that the model sees but is not asked to predict, of this strength; 0.1 is usual (Ning et al. 2023)"
    )
    ip_noise_gamma_random_strength: bool = opt(
        False, help="draw the strength of that noise for each image, from 0 to --ip_noise_gamma"
    )
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
        require(
            not self.adaptive_noise_scale or self.noise_offset is not None,
            "--adaptive_noise_scale",
            "needs --noise_offset, which it changes",
            "add --noise_offset 0.05, or leave it out",
        )
        levels, discount, gamma = self.multires_noise_iterations, self.multires_noise_discount, self.ip_noise_gamma
        require(levels is None or levels >= 0, "--multires_noise_iterations", f"{levels} is negative", "use 6 to 10")
        require(0 <= discount <= 1, "--multires_noise_discount", f"{discount} is out of range", "use 0 to 1")
        require(gamma is None or gamma >= 0, "--ip_noise_gamma", f"{gamma} is negative", "use 0.1, or leave it out")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect without another."""
        discount_is_given = self.multires_noise_discount != NoiseOptions.multires_noise_discount
        rows = (
            ("adaptive_noise_scale", self.adaptive_noise_scale, "noise_offset"),
            ("noise_offset_random_strength", self.noise_offset_random_strength, "noise_offset"),
            ("multires_noise_discount", discount_is_given, "multires_noise_iterations"),
            ("ip_noise_gamma_random_strength", self.ip_noise_gamma_random_strength, "ip_noise_gamma"),
        )
        return [
            f"--{name} has no effect without --{needed}"
            for name, is_given, needed in rows
            if is_given and not getattr(self, needed)
        ]

    @property
    def offset_is_adaptive(self) -> bool:
        """Whether the strength of the noise offset depends on the latents."""
        return bool(self.noise_offset and self.adaptive_noise_scale)

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
    debiased_estimation_loss: bool = opt(
        False, help="weight timesteps by 1 / sqrt(SNR), for v-prediction by 1 / (SNR + 1) (Yu et al. 2023)"
    )
    loss_type: str = opt(
        "l2",
        help="how an error counts: squared (l2), absolute (l1), or squared while small and absolute beyond --huber_c",
        choices=("l1", "l2", "huber", "smooth_l1"),
    )
    huber_schedule: str = opt(
        "snr",
        help="how the bound of huber and smooth_l1 falls from clean to noisy timesteps (Khrapov et al. 2024)",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = opt(
        0.1, help="errors above this count by their absolute value; with a schedule, at the noisiest timestep"
    )
    huber_scale: float = opt(1.0, help="factor on the bound of huber and smooth_l1, save for the schedule snr")
    masked_loss: bool = opt(
        False, help="weight the error of each part of an image by a mask: see --conditioning_data_dir, --alpha_mask"
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
        require(self.huber_c > 0, "--huber_c", f"{self.huber_c} must be above 0", "0.1 is usual")
        require(self.huber_scale > 0, "--huber_scale", f"{self.huber_scale} must be above 0", "1 changes nothing")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect, or another than expected, beside the others."""
        notes = []
        given = [name for name in ("huber_schedule", "huber_c", "huber_scale") if self._is_given(name)]
        if given and not self.is_huber:
            flags = " and ".join(f"--{name}" for name in given)
            verb = "have" if len(given) > 1 else "has"
            notes.append(f"{flags} {verb} no effect with --loss_type {self.loss_type}")
        elif self._is_given("huber_scale") and self.huber_schedule == "snr":
            notes.append("--huber_scale has no effect with --huber_schedule snr")
        if self.debiased_estimation_loss and self.min_snr_gamma:
            notes.append(
                "--debiased_estimation_loss and --min_snr_gamma both weight timesteps: their weights are multiplied"
            )
        return notes

    @property
    def is_huber(self) -> bool:
        """Whether the error is bounded by a threshold."""
        return self.loss_type in ("huber", "smooth_l1")

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != getattr(LossOptions, name)
