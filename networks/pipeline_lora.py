"""LoRA files on the models of plain diffusers pipelines: networks.lora under the names its models have there.

This is what networks.lora_diffusers gives to others; see there for how it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.weights import load_tensors
from networks import lora
from networks.injection import Network
from networks.key_names import PEFT_KEY
from networks.layers import TextEncoders
from networks.lora_files import in_our_names

logger = logging.getLogger(__name__)

SOURCE = "the LoRA"  # what messages call weights that come from no file


class LoRANetwork(torch.nn.Module):
    """A LoRA for a pipeline's models: hooked to them, or merged into them, and taken out again."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.is_applied = False
        self.merged_with = 0.0  # the multiplier of what is in the weights now

    @property
    def multiplier(self) -> float:
        return self.network.adapters[0].multiplier

    def set_multiplier(self, multiplier: float) -> None:
        """How strong the hooked change is: 0 for none, 1 for all of it, at once."""
        self.network.set_multiplier(multiplier)

    def load_state_dict(self, weights_sd: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # pyright: ignore
        """Load a LoRA's tensors, whatever names they have; torch's (missing_keys, unexpected_keys)."""
        names = [adapter.name for adapter in self.network.adapters]
        return self.network.load_state_dict(in_our_names(weights_sd, names, self.network.other_names), strict=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors by the trade's names."""
        return self.network.state_dict(*args, **kwargs)

    def apply_to(self, multiplier: float = 1.0, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Hook the layers of the models; nothing of their weights changes."""
        assert not self.is_applied, "the LoRA is applied already"
        self.set_multiplier(multiplier)
        network = self.network
        for is_applied, adapters in (
            (apply_text_encoder, network.text_adapters),
            (apply_unet, network.unet_adapters),
        ):
            for adapter in adapters if is_applied else ():
                adapter.enabled = True
                adapter.hook()
        self.is_applied = True

    def unapply_to(self) -> None:
        """Let the models work as before, whatever else was hooked to them since."""
        for adapter in self.network.adapters:
            adapter.unhook()
        self.is_applied = False

    unapply_from = unapply_to

    def merge_to(self, multiplier: float = 1.0) -> None:
        """Add the change to the models' weights, summed in float32."""
        self._add(multiplier)
        self.merged_with += multiplier

    def restore_from(self, multiplier: float = 1.0) -> None:
        """Take the change out of the weights again; of half-precision weights the last digit may differ then."""
        self._add(-multiplier)
        self.merged_with -= multiplier

    @torch.no_grad()
    def _add(self, multiplier: float) -> None:
        kept = self.multiplier
        self.set_multiplier(multiplier)
        for adapter in self.network.adapters:
            adapter.merge()
        self.set_multiplier(kept)


def create_network_from_weights(
    text_encoder: TextEncoders | None,
    unet: torch.nn.Module | None,
    weights_sd: Mapping[str, torch.Tensor] | Path | str,
    multiplier: float = 1.0,
) -> LoRANetwork:
    """A network with the modules, ranks and weights of a LoRA, not yet applied.

    `text_encoder` is one of transformers' CLIP models, or a list of SDXL's two; `unet` diffusers' U-Net; `weights_sd` a
    LoRA's file, or its tensors, in the trade's form or in diffusers'. Tensors alone lack what a file's header says,
    where diffusers' form has its alphas. Raises OptionError for a LoRA of another model.
    """
    encoders, source, given = _classic(text_encoder), SOURCE, weights_sd
    if isinstance(given, str | Path):
        source, given = str(given), load_tensors(Path(given).expanduser())
    elif not any(key.endswith("alpha") for key in given) and any(map(PEFT_KEY.fullmatch, given)):
        logger.warning("tensors in diffusers' form without alphas: each is taken for the rank. A file has them in its "
                       "header: give its path in place of its tensors")  # fmt: skip
    network, tensors = lora.create_network_from_weights(
        multiplier, source, None, encoders, unet, weights_sd=given, for_inference=True
    )
    network.load_state_dict(tensors, strict=False)
    like: Any = unet if unet is not None else text_encoder[0] if isinstance(text_encoder, Sequence) else text_encoder
    made = LoRANetwork(network).to(like.device, like.dtype).eval().requires_grad_(False)
    logger.info("a LoRA of %d modules", len(network.adapters))
    return made


def merge_lora_weights(
    pipeline: Any, weights_sd: Mapping[str, torch.Tensor] | Path | str, multiplier: float = 1.0
) -> LoRANetwork:
    """Merge a LoRA, a file or its tensors, into the models of a pipeline; the network that can take it out again."""
    network = create_network_from_weights(text_encoders_of(pipeline), pipeline.unet, weights_sd, multiplier)
    network.merge_to(multiplier)
    return network


def text_encoders_of(pipeline: Any) -> Any:
    """A pipeline's text encoder, or the list of SDXL's two."""
    second = getattr(pipeline, "text_encoder_2", None)
    return pipeline.text_encoder if second is None else [pipeline.text_encoder, second]


class _Classic(torch.nn.Module):
    """A text encoder under its classic path; transformers 5 left out the level that files know."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def _classic(text_encoder: Any) -> Any:
    if isinstance(text_encoder, Sequence):
        return [_classic(encoder) for encoder in text_encoder]
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        return text_encoder
    return _Classic(text_encoder)
