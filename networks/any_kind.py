"""Networks of files of any kind, for generation and for merging: LoHa, LoKr, DoRA, LoCon, differences and mixtures.

What such a module adds to its layer is computed from its parts when the layer is called: no more is kept than the file
has. Merged, or calculated beforehand, it costs nothing at all. Plain LoRA modules of such a file work as in any LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from library.models.ldm_view import as_files_name_it
from library.models.precision import compute_dtype
from library.options import OptionError
from networks.injection import Adapter, Network, check_names, modules_of_file, product, read_network_file
from networks.key_names import DOWN
from networks.layers import LEAVES, UNET_PREFIX, TextEncoders, text_encoder_prefixes
from networks.lora_creation import model_layers
from networks.lora_files import in_our_names
from networks.weight_changes import (
    NUMBERS,
    Parts,
    bias_change,
    check_module,
    depends_on_weight,
    is_plain_lora,
    weight_change,
)

NORMS = ("GroupNorm", "LayerNorm")

Layer = tuple[str, torch.nn.Module]
PlainLora = Callable[..., Adapter]  # as networks.lora.LoRAModule: (name, layer, rank=, alpha=, multiplier=)


def every_layer(root: torch.nn.Module, prefix: str) -> Iterator[Layer]:
    """(name, layer) of every layer and normalisation of a model, wherever it stands; some kinds change them all."""
    for path, module in root.named_modules():
        if type(module).__name__ in (*LEAVES, *NORMS):
            yield f"{prefix}.{path}".replace(".", "_"), module


def network_of_any_kind(
    multiplier: float,
    source: tuple[Path | str, Mapping[str, torch.Tensor]],
    models: tuple[TextEncoders | None, torch.nn.Module | None],
    plain_lora: PlainLora,
) -> tuple[AnyKindNetwork, Mapping[str, torch.Tensor]] | None:
    """(network, tensors by our names) for a file and its tensors, to be used on (text encoder, U-Net).

    None for a file of plain LoRA alone, on no other layers than LoRA usually has. Raises OptionError, which names the
    file and a module, for kinds that are not known and for modules that don't fit.
    """
    (file, tensors), (text_encoder, unet) = source, models
    usual = model_layers(*models, has_convs=True)
    tensors = in_our_names(tensors, [name for name, _ in usual.all], usual.other_names, file)
    modules = modules_of_file(tensors)
    usual_names = {name for name, _ in usual.all}
    if all(name in usual_names and is_plain_lora(parts) for name, parts in modules.items()):
        return None
    text = [layer for prefix, encoder in text_encoder_prefixes(text_encoder) for layer in every_layer(encoder, prefix)]
    in_unet = [] if unet is None else list(every_layer(as_files_name_it(unet), UNET_PREFIX))
    check_names(modules, (name for name, _ in (*text, *in_unet)), str(file))

    def adapters(layers: Sequence[Layer]) -> list[Adapter]:
        found = [(name, layer, modules[name]) for name, layer in layers if name in modules]
        return [_adapter(name, layer, parts, multiplier, file, plain_lora) for name, layer, parts in found]

    network = AnyKindNetwork(adapters(text), adapters(in_unet))
    network.other_names = usual.other_names
    return network, tensors


def _adapter(
    name: str, layer: Any, parts: Parts, multiplier: float, file: Path | str, plain_lora: PlainLora
) -> Adapter:
    check_module(name, parts, layer.weight.shape, file)
    if is_plain_lora(parts):
        rank = len(parts[DOWN])
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        return plain_lora(name, layer, rank=rank, alpha=alpha, multiplier=multiplier)
    if bias_change(parts) is not None and layer.bias is None:
        raise OptionError("", f"{file} does not fit: it changes the bias of {name}, which has none in this model")
    return ChangedLayer(name, layer, parts, multiplier)


# ---------------------------------------------------------------------------------------------- module


class ChangedLayer(Adapter):
    """One layer's change, of any kind. Its parts have the file's names, and don't learn."""

    def __init__(self, name: str, layer: torch.nn.Module, parts: Parts, multiplier: float = 1.0) -> None:
        super().__init__(name, layer, multiplier)
        for key, tensor in parts.items():
            *above, last = key.split(".")
            place: torch.nn.Module = self
            for word in above:
                if word not in place._modules:
                    place.add_module(word, torch.nn.Module())
                place = place._modules[word]  # type: ignore[assignment]
            place.register_buffer(last, tensor.detach())  # no copy: files of differences are as large as models
        self._numbers: dict[str, torch.Tensor] = {}
        self._read_numbers()

    @property
    def parts(self) -> Parts:
        """The parts by their names in files; single numbers are on the CPU, so that nothing waits for the device."""
        return {**dict(self.named_buffers()), **self._numbers}

    def _read_numbers(self) -> None:
        self._numbers = {key: tensor.cpu() for key, tensor in self.named_buffers() if key in NUMBERS}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the change; the base layer's alone while disabled or at multiplier 0.

        To make the changed weight costs less than a second product, where nobody else stands on the layer.
        """
        if not self.enabled or self.multiplier == 0:
            return self._base_forward(x)
        if not self._base_is_plain:
            return self._base_forward(x) + self.change(x)
        change = self.weight_change()
        return self._product(x, change.add_(self.layer.weight.detach().to(change.device)), self._changed_bias())

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's product with the change in place of its weight and bias."""
        return self._product(x, self.weight_change(), self.bias_change())

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = compute_dtype(x)
        bias = None if bias is None else bias.to(x.device, dtype)
        return product(self.layer, x.to(dtype), weight.to(x.device, dtype), bias)

    def _changed_bias(self) -> torch.Tensor | None:
        """The layer's bias with the change, in float32; the layer's own where there is none."""
        bias, change = self.layer.bias, self.bias_change()
        return bias if change is None else change + bias.detach().to(change.device)

    def weight_change(self) -> torch.Tensor:
        parts = self.parts
        device = next(tensor.device for key, tensor in parts.items() if key not in NUMBERS)
        weight = self.weight_below() if depends_on_weight(parts) else self.layer.weight.detach()
        return weight_change(parts, weight.to(device)) * self.multiplier

    def bias_change(self) -> torch.Tensor | None:
        """What the adapter adds to the layer's bias at its multiplier: float32, or None."""
        bias = bias_change(self.parts)
        return None if bias is None else bias * self.multiplier

    # ------------------------------------------------------------------ merging: the bias, too

    def merge(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().merge(dtype, device)
        bias, merged = self.layer.bias, self._changed_bias()
        if merged is not None and merged is not bias:
            bias.data = merged.to(bias.device, bias.dtype if dtype is None else dtype)

    def back_up(self) -> None:
        super().back_up()
        if self.layer.bias is not None and not hasattr(self.layer, "bias_backup"):
            self.layer.bias_backup = self.layer.bias.detach().clone()

    def restore(self) -> None:
        super().restore()
        if hasattr(self.layer, "bias_backup"):
            self.layer.bias.data.copy_(self.layer.bias_backup)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_numbers()


# ---------------------------------------------------------------------------------------------- network


class AnyKindNetwork(Network):
    """The modules of a file, of whatever kinds. It is used and merged, not trained."""

    def load_weights(self, file: Path | str) -> Any:
        """As of any network, with other programs' names understood."""
        names = [adapter.name for adapter in self.adapters]
        return self.load_state_dict(in_our_names(read_network_file(file), names, self.other_names), strict=False)
