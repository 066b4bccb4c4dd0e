"""A stored ControlNet, original file or Diffusers file or folder, whose tensors are read when they are written.

As library.checkpoints.stored_model for whole models: no module is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.configs import control_net_config
from library.checkpoints.control_net import LLLITE_PREFIX, STEM, open_control_net, read_control_net
from library.checkpoints.keymaps import CONTROL_PREFIX, control_original_names, control_slots
from library.checkpoints.network_kind import KIND_NAMES, kind_by_width
from library.checkpoints.parameter_names import control_net_names
from library.checkpoints.probe import read_config
from library.checkpoints.safetensors_io import Entry
from library.checkpoints.stored_model import Reading
from library.checkpoints.weights import Weights, open_component
from library.options import OptionError

if TYPE_CHECKING:
    import torch

OWN_KEYS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")


@dataclass(frozen=True)
class StoredControlNet:
    """What is stored, by diffusers' parameter names: valid as long as its files are open."""

    kind: str  # "sd1" | "sd2" | "sdxl"
    state: Mapping[str, torch.Tensor]  # deferred
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    def original_entries(self, dtype: str | None) -> list[Entry]:
        """The tensors under the original names, with prefix; `dtype` as headers name it, None keeps each one's own."""
        import torch

        from library.checkpoints.safetensors_io import DTYPES, header_dtype, rounded

        entries = []
        for name, slot in control_slots(self.state, CONTROL_PREFIX).items():
            tensor = self.state[name]
            as_type = getattr(torch, DTYPES[dtype][1]) if dtype else tensor.dtype
            entries.append(
                Entry(
                    slot.key,
                    header_dtype(as_type),
                    tuple(tensor.shape),
                    lambda tensor=tensor, as_type=as_type, key=slot.key: rounded(tensor.detach(), as_type, key),
                )
            )
        return entries


def is_control_net(path: Path, flag: str) -> bool:
    """Whether a file or folder holds a ControlNet, and no ControlNet-LLLite; headers only."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_config(config, flag).get("_class_name") == "ControlNetModel"
    with open_control_net(path, flag) as weights:
        return has_control_net(weights.shapes)


def has_control_net(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether keys are those of a ControlNet."""
    return any(key.removeprefix(CONTROL_PREFIX) in OWN_KEYS for key in shapes)


def control_net_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "sd1", "sd2" or "sdxl" by the width of the text states; "" for none of theirs."""
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
    return kind_by_width(width)


@contextlib.contextmanager
def stored_control_net(
    path: Path,
    flag: str,
    *,
    kind: str = "",
    variant: str | None = None,
    done: Callable[[int], object] = lambda size: None,
) -> Iterator[StoredControlNet]:
    """A ControlNet; OptionError, naming `flag`, for anything else, for what is missing and for differences to a model.

    `kind` counts where the file does not tell; the rest is as of `stored_model`.
    """
    with contextlib.ExitStack() as stack:
        if variant and not path.is_dir():
            raise OptionError("--variant", f"{path} is a single file", "leave it out, or name a Diffusers folder")
        opened = open_component(path, STEM, flag, variant) if variant else open_control_net(path, flag)
        weights = stack.enter_context(opened)
        found = control_net_kind(weights.shapes)
        if kind and found and kind != found:
            raise OptionError(flag, f"{path} was made for {KIND_NAMES[found]}", "leave out --v1 and --v2")
        found = found or kind or "sd1"
        file = read_control_net(weights, path, found, flag)
        if file.holds_difference:
            problem = f"{path} holds the differences of a ControlNet to a model"
            raise OptionError(flag, problem, "use the ControlNet they were made of")
        names = control_net_names(file.architecture)
        state = _state(names, weights, f"{flag}: {path}", Reading(stack, done))
        config = read_config(path / "config.json", flag) if path.is_dir() else control_net_config(file.architecture)
        yield StoredControlNet(found, state, config, weights.metadata)


def _state(names: set[str], weights: Weights, subject: str, reading: Reading) -> dict[str, torch.Tensor]:
    keys = control_original_names(weights.shapes)
    places = {name: slot.key for name, slot in control_slots(names).items()}
    missing = sorted(set(places.values()) - set(keys))
    if missing:
        problem = f"{subject} lacks {len(missing)} tensors of the ControlNet ({missing[0]} ...)"
        raise OptionError("", problem, "use a complete one")
    return {
        name: reading.deferred(
            tuple(weights.shapes[keys[place]]),
            weights.dtypes[keys[place]],
            lambda key=keys[place]: weights.tensor(key),
        )
        for name, place in sorted(places.items())
    }


def is_lllite(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether keys are those of a ControlNet-LLLite."""
    return any(key.startswith(LLLITE_PREFIX) for key in shapes)
