"""Options of text that is encoded once, before training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require

FLAG = "--cache_text_encoder_outputs"


@dataclass(frozen=True)
class TextCacheOptions:
    """Caching of encoded captions."""

    cache_text_encoder_outputs: bool = opt(
        False,
        help="encode every caption once, before training, and keep the results in memory; the text encoders then leave "
        "the GPU. They can't be trained then: sdxl_train_network.py needs --network_train_unet_only with it",
    )
    cache_text_encoder_outputs_to_disk: bool = opt(
        False, help="keep the encoded captions in _te_outputs.npz files next to the images"
    )
    text_variations: int | None = opt(
        help="encode this many versions of every caption that is shuffled or thinned out, and train on one of them at "
        "a time; for --cache_text_encoder_outputs"
    )

    def __post_init__(self) -> None:
        count = self.text_variations
        require(count is None or count >= 1, "--text_variations", f"{count} is out of range", "use 1 or more")

    @property
    def enabled(self) -> bool:
        """Whether text is cached at all: on disk implies it."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def notes(self) -> list[str]:
        if self.text_variations is not None and not self.enabled:
            return [f"--text_variations has no effect without {FLAG}: captions are made anew in every draw"]
        return []
