"""What all networks share: hooking the layers of a model, merging into them, files of weights.

A network is a set of adapters, each hooked to one layer by replacing the `forward` of that instance, so it survives
gradient checkpointing and wrappers around the model, and no weight of the model moves.
"""

from __future__ import annotations

import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from library.checkpoints.network_kind import KIND_NAMES, kind_by_names
from library.checkpoints.safetensors_io import (
    NonFiniteError,
    atomic_file,
    is_finite,
    save_file,
    sshs_hashes,
)
from library.checkpoints.weights import load_tensors
from library.options import OptionError
from networks.layers import TextEncoders
from networks.regional import Region, couple_attention, output_in_region

logger = logging.getLogger(__name__)

OTHER_NETWORK = "use a network that was made for this kind of model"


# ---------------------------------------------------------------------------------------------- adapters


class Adapter(torch.nn.Module, ABC):
    """One layer's change. Subclasses say what the layer computes with it, and what it adds to the weight."""

    def __init__(self, name: str, layer: torch.nn.Module, multiplier: float) -> None:
        super().__init__()
        self.name = name
        self.multiplier = multiplier
        self.enabled = True
        self.region: Any = None  # a Region, in regional use
        self._layer = (layer,)  # in a tuple: not a submodule, so not in the state dict
        self._base_forward: Any = None
        self._base_is_plain = False

    @property
    def layer(self) -> Any:
        """The hooked layer."""
        return self._layer[0]

    def hook(self) -> None:
        """Take over the layer's forward. Several adapters may stand on each other."""
        assert self._base_forward is None, f"{self.name} is hooked already"
        self._base_is_plain = "forward" not in vars(self.layer)
        self._base_forward = self.layer.forward
        self.layer.forward = self._hooked_forward

    def unhook(self) -> None:
        """Leave the layer, also from under adapters that were hooked later; without effect for one that is not hooked.

        Under a hook of somebody else's it stays, and adds nothing.
        """
        if self._base_forward is None:
            return
        above, current = None, self.layer.forward
        while (holder := getattr(current, "__self__", None)) is not self:
            if not isinstance(holder, Adapter):
                self.enabled = False
                return
            above, current = holder, holder._base_forward
        if above is not None:
            above._base_forward, above._base_is_plain = self._base_forward, self._base_is_plain
        elif self._base_is_plain:
            del self.layer.forward
        else:
            self.layer.forward = self._base_forward
        self._base_forward = None

    def _hooked_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.region is None or self.region.generation is None:
            return self.forward(x)
        return output_in_region(self, x)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output without the change, but with that of adapters hooked before."""
        return self._base_forward(x)

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the change."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """What the change adds to the layer's output at the adapter's multiplier; regions ask for it."""
        return self.forward(x) - self.base(x)

    @abstractmethod
    def weight_change(self) -> torch.Tensor:
        """What the adapter, as it is now and at its multiplier, adds to the layer's weight: float32, of its shape.

        Where that depends on the weight, it is the one that adapters hooked or merged before have left.
        """

    def bias_change(self) -> torch.Tensor | None:
        """The same with the layer's bias; None where it stays as it is."""
        return None

    def _below(self) -> list[Adapter]:
        """The adapters hooked before that change the layer now, the first one first; none where regions divide them."""
        found: list[Adapter] = []
        if self.region is not None and self.region.generation is not None:
            return found
        holder = getattr(self._base_forward, "__self__", None)
        while isinstance(holder, Adapter):
            if holder.enabled and holder.multiplier != 0:
                found.insert(0, holder)
            holder = getattr(holder._base_forward, "__self__", None)
        return found

    def weight_below(self) -> torch.Tensor:
        """The layer's weight as adapters hooked before have left it; the weight itself where there are none."""
        weight = self.layer.weight.detach()
        for adapter in self._below():
            change = adapter.weight_change()
            weight = change + weight.to(change.device)
        return weight

    def bias_below(self) -> torch.Tensor | None:
        """The same of the bias; None where the layer has none."""
        if self.layer.bias is None:
            return None
        bias = self.layer.bias.detach()
        for adapter in self._below():
            if (change := adapter.bias_change()) is not None:
                bias = change + bias.to(change.device)
        return bias

    def merge(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Add the change to the layer's weight: summed in float32 on `device`, stored as `dtype` (None: as before)."""
        weight = self.layer.weight
        where = weight.device if device is None else device
        merged = weight.detach().to(where, torch.float32) + self.weight_change().to(where)
        weight.data = merged.to(weight.device, weight.dtype if dtype is None else dtype)

    def back_up(self) -> None:
        """Keep a copy of the layer's weight at the layer, once, whatever the number of networks."""
        if not hasattr(self.layer, "weight_backup"):
            self.layer.weight_backup = self.layer.weight.detach().clone()

    def restore(self) -> None:
        """Put the kept weight back and work as a hook again."""
        if hasattr(self.layer, "weight_backup"):
            self.layer.weight.data.copy_(self.layer.weight_backup)
        self.enabled = True


def product(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a layer computes of x with another weight and bias; both linear in them, also for normalisations."""
    if isinstance(layer, torch.nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    if isinstance(layer, torch.nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, torch.nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(x, weight, bias)


class Network(torch.nn.Module):
    """The adapters of a model's text encoders and U-Net, as trainers and generators see any network."""

    other_names: Mapping[str, str] = {}  # names by which files of other programs call layers -> ours

    def __init__(self, text_adapters: Sequence[Adapter], unet_adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.text_adapters = list(text_adapters)
        self.unet_adapters = list(unet_adapters)
        self.region: Region | None = None
        self._unet: tuple[torch.nn.Module | None] = (None,)  # in a tuple: not a submodule
        self._is_coupled = False
        names = [adapter.name for adapter in self.adapters]
        assert len(names) == len(set(names)), "two layers of the model have the same name"
        for adapter in self.adapters:
            self.add_module(adapter.name, adapter)

    @property
    def adapters(self) -> list[Adapter]:
        """Text encoders first: the order of keys and of optimizer parameters."""
        return [*self.text_adapters, *self.unet_adapters]

    # ------------------------------------------------------------------ use

    def apply_to(
        self,
        text_encoder: TextEncoders | None = None,
        unet: torch.nn.Module | None = None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Hook the layers; the part that is not applied leaves the network and its files."""
        for is_applied, adapters in ((apply_text_encoder, self.text_adapters), (apply_unet, self.unet_adapters)):
            if not is_applied:
                for adapter in adapters:
                    del self._modules[adapter.name]
                adapters.clear()
        for adapter in self.adapters:
            adapter.hook()
        self._unet = (unet,)

    def set_multiplier(self, multiplier: float) -> None:
        for adapter in self.adapters:
            adapter.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        for adapter in self.adapters:
            adapter.enabled = is_enabled

    # ------------------------------------------------------------------ regions

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: torch.Tensor) -> None:
        """Give the network a part of the prompt and a place: a mask (H, W), 0 to 1, on the U-Net's device.

        A mask of zeros stands for the whole picture. The network that was applied last has to be the last one.
        """
        if self.region is None:
            self.region = Region()
            for adapter in self.adapters:
                adapter.region = self.region
        self.region.place(sub_prompt_index, is_last_network, mask)
        (unet,) = self._unet
        if is_last_network and not self._is_coupled and unet is not None:
            couple_attention(unet, self.region)
            self._is_coupled = True

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[Any, Any],
        ds_ratio: Any = None,
    ) -> None:
        """A batch begins, of pictures of `width` and `height` pixels; `shared` is one dictionary for all networks.

        From here on the U-Net takes rows of text as networks.regional says. Other sizes inside the U-Net, such as those
        of a deep shrink (`ds_ratio`), are found by themselves.
        """
        assert self.region is not None, "set_region comes first"
        self.region.begin(batch_size, num_sub_prompts, width, height, shared)

    def leave_region(self) -> None:
        """Work everywhere again, until the next `set_current_generation`."""
        if self.region is not None:
            self.region.generation = None

    # ------------------------------------------------------------------ merging

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self,
        text_encoder: TextEncoders | None = None,
        unet: torch.nn.Module | None = None,
        weights_sd: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the change of each layer named in `weights_sd` (None: all, as they are) to the model's weights."""
        named = None
        if weights_sd is not None:
            self.load_state_dict(weights_sd, strict=False)
            named = {key.partition(".")[0] for key in weights_sd}
        merged = [adapter for adapter in self.adapters if named is None or adapter.name in named]
        for adapter in merged:
            adapter.merge(dtype, device)
        logger.info("merged %d modules into the model", len(merged))

    def backup_weights(self) -> None:
        """Keep a copy of every weight that merging would change."""
        for adapter in self.adapters:
            adapter.back_up()

    def restore_weights(self) -> None:
        """Take all merged changes out again and work through hooks."""
        for adapter in self.adapters:
            adapter.restore()

    def pre_calculation(self) -> None:
        """Merge into the kept-aside weights and switch the hooks off: no cost per step until `restore_weights`."""
        for adapter in self.adapters:
            adapter.back_up()
            adapter.merge()
            adapter.enabled = False

    # ------------------------------------------------------------------ training

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: hooks are recomputed with the blocks they sit in."""

    def prepare_grad_etc(self, text_encoder: TextEncoders | None, unet: torch.nn.Module | None) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: TextEncoders | None, unet: torch.nn.Module | None) -> None:
        self.train()

    def get_trainable_params(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    # ------------------------------------------------------------------ files

    def load_weights(self, file: Path | str) -> Any:
        """Load a file's weights for the modules that both have; returns torch's (missing_keys, unexpected_keys)."""
        return self.load_state_dict(read_network_file(file), strict=False)

    def save_weights(
        self, file: Path | str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write all tensors (cast to `dtype` if given) atomically: .safetensors with metadata and hashes, or a pickle.

        Raises NonFiniteError rather than write NaN.
        """
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        write_network_file(tensors, file, metadata)


# ---------------------------------------------------------------------------------------------- files


def read_network_file(file: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a network file (.safetensors or pickle); OptionError when it can't be read."""
    return load_tensors(file)


def write_network_file(
    tensors: Mapping[str, torch.Tensor], file: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a network file atomically; a .safetensors file's metadata gets both hashes of the trade."""
    if Path(file).suffix.lower() == ".safetensors":
        metadata = dict(metadata or {})
        metadata["sshs_model_hash"], metadata["sshs_legacy_hash"] = sshs_hashes(tensors, metadata)
        if "modelspec.sai_model_spec" in metadata:
            metadata["modelspec.hash_sha256"] = f"0x{metadata['sshs_model_hash']}"
        save_file(tensors, file, metadata)
        return
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFiniteError(f"{key} holds NaN or infinity; the file was not written")
    content = io.BytesIO()  # torch.save hides a full disk behind errors of its own
    torch.save(dict(tensors), content)
    with atomic_file(file, content.tell()) as opened:
        opened.write(content.getbuffer())


def modules_of_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> its tensors by what follows the name's dot."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, dot, rest = key.partition(".")
        if dot:
            modules.setdefault(name, {})[rest] = tensor
    return modules


def check_names(in_file: Iterable[str], in_model: Iterable[str], file: str) -> None:
    """OptionError when no module of a file is in the model; a warning when some are not."""
    wanted, present = list(in_file), frozenset(in_model)
    missing = [name for name in wanted if name not in present]
    if wanted and len(missing) == len(wanted):
        family = KIND_NAMES.get(kind_by_names(wanted), "another model family")
        problem = f"none of its {len(wanted)} modules is in this model (the first is {wanted[0]})"
        raise OptionError("", f"{file} was made for {family}: {problem}", OTHER_NETWORK)
    if missing:
        logger.warning("%s: %d of %d modules are not in this model and were left out, the first is %s",
                       file, len(missing), len(wanted), missing[0])  # fmt: skip
