"""Training a model's own weights: its U-Net, and its text encoders where asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.families.base import ModelBundle, ModelFamily
from library.families.options import TextOptions
from library.models.ldm_view import LdmView, block_of
from library.models.norms import mend_norms
from library.targets.base import ParamGroup, TrainTarget
from library.targets.full_options import FullOptions
from library.targets.reach import reached_by_text

logger = logging.getLogger(__name__)

UNET, TEXT = "unet", "text encoder"


class FullTarget(TrainTarget):
    """The weights of a model of any family: float32 masters, or half-precision ones where the run asks for them."""

    adapter = None
    saves_beside_training = True

    def __init__(self, options: FullOptions, text: TextOptions | None = None, file_format: str | None = None) -> None:
        """`file_format` as in --save_model_as; a single file, whose extension decides, without it."""
        self.options = options
        self.text = text or TextOptions()
        self.trains_whole = frozenset({"unet", "text_encoders"} if options.trains_text else {"unet"})
        self.skips_parameters = 0 < options.text_updates < float("inf")
        self.as_diffusers = file_format in ("diffusers", "diffusers_safetensors")
        self.safe_serialization = file_format != "diffusers"

    @classmethod
    def of(cls, config: Any) -> FullTarget:
        return cls(config.target, config.text, config.saving.save_model_as)

    # ------------------------------------------------------------------ setting up

    def setup(self, family: ModelFamily, bundle: ModelBundle, *, gradient_checkpointing: bool) -> None:
        self.family, self.bundle = family, bundle
        encoders, count = bundle.text_encoders, len(bundle.text_encoders)
        names = [TEXT] if count == 1 else [f"{TEXT} {number}" for number in range(1, count + 1)]
        self._encoders = {
            name: (encoder, rate)
            for name, encoder, rate in zip(names, encoders, self.options.text_rates(count), strict=True)
            if self.options.trains_text and rate != 0
        }
        parts = {UNET: bundle.unet} if self._trains_unet else {}
        parts |= {name.replace(" ", "_"): encoder for name, (encoder, _) in self._encoders.items()}
        self._module = torch.nn.ModuleDict(parts)
        self._module.requires_grad_(True)
        self._module.train()
        self._freeze_unreached_text(family, bundle)

    @property
    def _trains_unet(self) -> bool:
        rates = self.options.block_rates
        return rates is None or any(rates)

    def _freeze_unreached_text(self, family: ModelFamily, bundle: ModelBundle) -> None:
        """Freeze layers behind the one that conditions: no gradient ever reaches them."""
        parameters = [parameter for encoder, _ in self._encoders.values() for parameter in encoder.parameters()]
        reached = reached_by_text(family, bundle, self.text, parameters)
        for parameter, is_reached in zip(parameters, reached, strict=True):
            parameter.requires_grad_(is_reached)

    # ------------------------------------------------------------------ what is trained

    def trained_module(self) -> torch.nn.Module:
        return self._module

    def param_groups(self, default_lr: float) -> list[ParamGroup]:
        """One group for all that shares the U-Net's rate, one per block and encoder that has its own.

        Groups with a rate of 0 are left out, and whatever is in no group is frozen.
        """
        first, *others = self._unet_groups()
        joined = [UNET]
        for name, (encoder, rate) in self._encoders.items():
            parameters = tuple(parameter for parameter in encoder.parameters() if parameter.requires_grad)
            if rate is None and self.options.block_rates is None:
                joined.append(name)
                first = replace(first, parameters=(*first.parameters, *parameters))
            else:
                others.append(ParamGroup(name, parameters, rate, f"lr/text_encoder{name[len(TEXT) :].strip()}"))
        if len(joined) > 1:
            first = replace(first, name=" and ".join(joined))
        groups = [group for group in (first, *others) if (default_lr if group.lr is None else group.lr) != 0]
        trained = {id(parameter) for group in groups for parameter in group.parameters}
        for parameter in self._module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if self.options.block_rates is not None:
            mend_norms(self.bundle.unet)  # blocks may learn whose inputs need no gradient
        return [group for group in groups if group.parameters]

    def _unet_groups(self) -> Iterator[ParamGroup]:
        rates = self.options.block_rates
        if rates is None:
            yield ParamGroup(UNET, tuple(self.bundle.unet.parameters()), None, "lr")
            return
        blocks: list[list[torch.nn.Parameter]] = [[] for _ in rates]
        for name, parameter in LdmView(self.bundle.unet).named_parameters():
            blocks[block_of(name)].append(parameter)
        for block, (rate, parameters) in enumerate(zip(rates, blocks, strict=True)):
            yield ParamGroup(f"unet block {block}", tuple(parameters), rate, f"lr/block{block}")

    def trains_text(self, step: int) -> bool:
        return bool(self._encoders) and step < self.options.text_updates

    def on_step_start(self, step: int) -> None:
        if step == self.options.text_updates and self._encoders:
            logger.info("the text encoder has been trained for %d steps and stays as it is from here on", step)

    # ------------------------------------------------------------------ files

    def saved_tensors(self) -> Iterator[torch.Tensor]:
        for part in (self.bundle.unet, self.bundle.vae, *self.bundle.text_encoders):
            yield from part.state_dict().values()

    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the whole model; in a single file beside it only modelspec.*, as the trade does."""
        self.family.save(
            self.bundle,
            path,
            dtype=dtype,
            metadata=metadata,
            as_diffusers=self.as_diffusers,
            safe_serialization=self.safe_serialization,
        )
