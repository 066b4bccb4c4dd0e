"""Options of the training targets."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import OptionError, opt, require


@dataclass(frozen=True)
class NetworkOptions:
    """The network (LoRA and its relatives)."""

    network_module: str | None = opt(help="Python module of the network, for example networks.lora or lycoris.kohya")
    network_dim: int | None = opt(help="rank; 4 without this option")
    network_alpha: float = opt(1, help="alpha: the network's strength is alpha / rank")
    network_dropout: float | None = opt(help="share of the rank's activations dropped during training (0-1)")
    network_args: tuple[str, ...] | None = opt(help="further arguments of the network module, as name=value")
    network_weights: str | None = opt(help="network file to start from")
    dim_from_weights: bool = opt(False, help="take ranks and alphas from --network_weights")
    network_train_unet_only: bool = opt(False, help="train only the U-Net's part")
    network_train_text_encoder_only: bool = opt(False, help="train only the text encoder's part")
    unet_lr: float | None = opt(help="learning rate of the U-Net's part; --learning_rate without this option")
    text_encoder_lr: float | None = opt(
        help="learning rate of the text encoder's part; --learning_rate without this option"
    )
    base_weights: tuple[str, ...] | None = opt(help="network files merged into the base model before training")
    base_weights_multiplier: tuple[float, ...] | None = opt(
        help="a multiplier per file of --base_weights; 1.0 where missing"
    )
    scale_weight_norms: float | None = opt(
        help="limit of the Frobenius norm of each module's weight change (1 is a start)"
    )
    training_comment: str | None = opt(help="text written into the file's metadata")

    def __post_init__(self) -> None:
        require(
            bool(self.network_module), "--network_module", "no network module given", "use networks.lora for a LoRA"
        )
        require(
            self.network_dim is None or self.network_dim >= 1,
            "--network_dim",
            f"{self.network_dim} is no rank",
            "use 1 or more (4 to 128 is usual)",
        )
        require(
            not (self.network_train_unet_only and self.network_train_text_encoder_only),
            "--network_train_unet_only",
            "contradicts --network_train_text_encoder_only",
            "give one of them, or neither to train both",
        )
        require(
            not self.dim_from_weights or bool(self.network_weights),
            "--dim_from_weights",
            "needs --network_weights to take the ranks from",
        )
        dropout = self.network_dropout
        require(
            dropout is None or 0 <= dropout < 1, "--network_dropout", f"{dropout} is out of range", "use 0 to below 1"
        )
        limit = self.scale_weight_norms
        require(limit is None or limit > 0, "--scale_weight_norms", f"{limit} must be above 0")
        spare = len(self.base_weights_multiplier or ()) - len(self.base_weights or ())
        require(spare <= 0, "--base_weights_multiplier", "has more values than --base_weights has files")
        assert self.arguments is not None  # reading them checks their form

    @property
    def arguments(self) -> dict[str, str]:
        """--network_args by name; a value may contain "="."""
        pairs = [item.partition("=") for item in self.network_args or ()]
        for name, equals, _ in pairs:
            if not equals or not name:
                raise OptionError("--network_args", f"{name!r} is not of the form name=value")
        return {name: value for name, _, value in pairs}
