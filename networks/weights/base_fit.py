"""Whether a base model would use every key of a file: a network, words, a ControlNet, part of a model. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from library.checkpoints.architecture import text_architectures, unet_architecture
from library.checkpoints.control_net import LLLITE_PREFIX
from library.checkpoints.keymaps import (
    UNET_PREFIX,
    VAE_PREFIX,
    UNetLayout,
    control_original_names,
    translate,
    unet_paths,
    unet_slots,
    vae_slots,
)
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.parameter_names import text_names
from library.checkpoints.sd import part_slots
from library.checkpoints.stored_model import model_places, parameter_shape
from library.wording import counted
from networks.key_names import DOWN, MID, UP
from networks.layers import TEXT_PREFIX
from networks.layers import UNET_PREFIX as NAME_PREFIX
from networks.weights.checkpoint_layers import checkpoint_layers
from networks.weights.file_identity import (
    CHECKPOINT,
    CONTROL_NET,
    EMBEDDING,
    HYPERNETWORK,
    LLLITE,
    NETWORK,
    UNET,
    VAE,
    Identity,
    Shapes,
)
from networks.weights.network_file import NetworkFile

OF_TURNS = "oft_unet_"  # names of OFT files begin otherwise


@dataclass
class Fit:
    """What a base model would do with a file."""

    unused: dict[str, str] = field(default_factory=dict)  # key -> why
    missing: list[str] = field(default_factory=list)  # keys that the file would need to have
    notes: list[str] = field(default_factory=list)


def fit(identity: Identity, file: NetworkFile | None, shapes: Shapes, base_kind: str, base: Shapes) -> Fit:
    """How a file with these sizes fits a model of `base_kind` with the sizes `base`, in single-file layout.

    `file`: the same file as a network, where it is one.
    """
    if identity.kind and identity.kind != base_kind:
        made_for = f"made for {KIND_NAMES[identity.kind]}, the base is {KIND_NAMES[base_kind]}"
        return Fit(dict.fromkeys(shapes, made_for))
    if identity.sort == NETWORK and file is not None:
        return _network(file, base_kind, base)
    if identity.sort == LLLITE:
        return _lllite(shapes, base_kind, base)
    if identity.sort == EMBEDDING:
        return _words(shapes, base_kind, base)
    if identity.sort == HYPERNETWORK:
        return _hypernetwork(shapes, base_kind, base)
    if identity.sort == CONTROL_NET:
        return _control_net(shapes, base)
    if identity.sort == CHECKPOINT:
        return _models(shapes, base_kind, base)
    if identity.sort == VAE:
        return _same_keys(_vae_keys(shapes), {key: base[key] for key in base if key.startswith(VAE_PREFIX)})
    if identity.sort == UNET:
        own = {slot.key: shapes[name] for name, slot in unet_slots(shapes).items()}
        return _same_keys(own, {key: base[key] for key in base if key.startswith(UNET_PREFIX)})
    return Fit(notes=[f"a base model says nothing about a {identity.sort or 'file of this kind'}"])


def _models(shapes: Shapes, kind: str, base: Shapes) -> Fit:
    """What both hold beside their models is not compared."""
    own, needed = model_places(shapes, kind), model_places(base, kind)
    found = _same_keys({key: shapes[key] for key in own if key in shapes}, {key: base[key] for key in needed})
    beside = len(shapes.keys() - own)
    if beside:
        found.notes.append(f"{counted(beside, 'key')} beside the model: noise schedule, position numbers and the like")
    return found


def missing_places(shapes: Shapes, kind: str) -> list[str]:
    """The keys that a checkpoint lacks in the parts that it has."""
    return sorted(model_places(shapes, kind) - shapes.keys())


def _same_keys(own: Shapes, base: Shapes) -> Fit:
    unused = {key: "not in the base" for key in own if key not in base}
    unused |= {
        key: f"{[*own[key]]} here, {[*base[key]]} in the base" for key in own if key in base and own[key] != base[key]
    }
    return Fit(unused, [key for key in base if key not in own])


def _vae_keys(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A VAE's sizes by the keys of a checkpoint."""
    if any(".down_blocks." in key for key in shapes):
        slots = vae_slots(shapes)
        return {
            slot.key: (*shapes[name], 1, 1) if ".attn_1." in slot.key and len(shapes[name]) == 2 else shapes[name]
            for name, slot in slots.items()
        }
    return {VAE_PREFIX + key.removeprefix(VAE_PREFIX): shape for key, shape in shapes.items()}


# ------------------------------------------------------------------------------------------- networks


def _network(file: NetworkFile, kind: str, base: Shapes) -> Fit:
    places, targets = module_shapes(base, kind), checkpoint_layers(base, kind)
    found = Fit()
    for key in file.other_keys:
        found.unused[key] = "no part of a module"
    names = set()
    for name, parts in file.modules.items():
        place = name.replace(OF_TURNS, f"{NAME_PREFIX}_", 1) if name.startswith(OF_TURNS) else name
        why = "no such layer in the base" if place not in places else _other_size(file, name, places[place])
        found.unused |= dict.fromkeys(parts.values(), why) if why else {}
        found.missing += [f"{name}.{part}" for part in _lacks(parts)]
        names.add(place)
    for prefix, part in ((TEXT_PREFIX, "text encoders"), (NAME_PREFIX, "U-Net")):
        own = [name for name in targets if name.startswith(prefix)]
        found.notes.append(f"changes {sum(name in names for name in own)} of {len(own)} layers of the {part}")
    further = len(names & places.keys() - targets.keys())
    if further:
        found.notes.append(f"changes {further} further layers, which LoRA does not stand on but LyCORIS may")
    return found


def _lacks(parts: Mapping[str, str]) -> list[str]:
    """The other half of a pair, where it is not there, or both where there is an alpha alone."""
    if [*parts] == ["alpha"]:
        return [DOWN, UP]
    pairs = ((DOWN, UP), (UP, DOWN), ("hada_w1_a", "hada_w1_b"), ("hada_w1_b", "hada_w1_a"))
    return [other for one, other in pairs if one in parts and other not in parts]


def _other_size(file: NetworkFile, name: str, shape: tuple[int, ...]) -> str:
    """Why a module does not fit a layer with a weight of this shape; empty if it does, or can't be told."""
    sizes = {part: file.shape(name, part) for part in file.modules[name]}
    outputs, inputs = shape[0], math.prod(shape[1:])
    here = outputs, inputs
    if DOWN in sizes and UP in sizes and MID not in sizes:
        here = sizes[UP][0], math.prod(sizes[DOWN][1:])
    elif "hada_w1_a" in sizes and "hada_t1" not in sizes and "hada_w1_b" in sizes:
        here = sizes["hada_w1_a"][0], math.prod(sizes["hada_w1_b"][1:])
    elif "oft_blocks" in sizes and len(sizes["oft_blocks"]) == 3:
        here = math.prod(sizes["oft_blocks"][:2]), inputs
    elif "diff" in sizes:
        here = sizes["diff"][0], math.prod(sizes["diff"][1:])
    if here == (outputs, inputs):
        return ""
    return f"for {here[1]} inputs and {here[0]} outputs, the base's layer has {inputs} and {outputs}"


def module_shapes(base: Shapes, kind: str) -> dict[str, tuple[int, ...]]:
    """The size of the weight of every layer of the text encoders and the U-Net, by names as files of networks have."""
    architecture = unet_architecture(base, kind)
    layout = UNetLayout(tuple(depth > 0 for depth in architecture.transformer_depths), architecture.resnets)
    paths = unet_paths(layout)
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in base.items():
        if key.startswith(UNET_PREFIX) and key.endswith(".weight"):
            original = key.removeprefix(UNET_PREFIX).removesuffix(".weight")
            path = original if kind == "sdxl" else translate(original, paths) or original
            found[f"{NAME_PREFIX}_{path}".replace(".", "_")] = shape
    encoders = text_architectures(base, kind)
    for number, encoder in enumerate(encoders, start=1):
        prefix = TEXT_PREFIX if len(encoders) == 1 else f"{TEXT_PREFIX}{number}"
        part = "text_encoder" if number == 1 else "text_encoder_2"
        names = text_names(encoder.layers, is_projected=bool(encoder.projection))
        for name, slot in part_slots(part, names, kind=kind, file_keys=base).items():
            if name.endswith(".weight"):
                module = f"{prefix}_{name.removesuffix('.weight')}".replace(".", "_")
                found[module] = parameter_shape(slot, base[slot.key])
    return found


def _lllite(shapes: Shapes, kind: str, base: Shapes) -> Fit:
    places = module_shapes(base, kind)
    found = Fit()
    for key, shape in shapes.items():
        name, _, part = key.partition(".")
        place = places.get(name.replace(f"{LLLITE_PREFIX}unet", NAME_PREFIX, 1))
        if place is None:
            found.unused[key] = "no such layer in the base"
        elif part == "down.0.weight" and shape[1] != place[1]:
            found.unused[key] = f"for {shape[1]} inputs, the base's layer has {place[1]}"
    return found


# -------------------------------------------------------------------------------------------- the rest


def _words(shapes: Shapes, kind: str, base: Shapes) -> Fit:
    encoders = text_architectures(base, kind)
    first, last = encoders[0].width, encoders[-1].width
    widths = {"clip_l": first, "clip_g": last} if kind == "sdxl" else {}
    found = Fit()
    for key, shape in shapes.items():
        width = widths.get(key) if widths else first
        if width is None:
            found.unused[key] = "no text encoder of this name in the base"
        elif shape[-1] != width:
            found.unused[key] = f"vectors of {shape[-1]} numbers, the base's words have {width}"
    found.missing = [key for key in widths if key not in shapes]
    return found


def _hypernetwork(shapes: Shapes, kind: str, base: Shapes) -> Fit:
    unet = unet_architecture(base, kind)
    known = {unet.context_width, *unet.channels}
    return Fit({key: "no attention of this width" for key in shapes if int(key.split(".")[0]) not in known})


def _control_net(shapes: Shapes, base: Shapes) -> Fit:
    """The half of the U-Net that a ControlNet is a copy of has to have the base's sizes."""
    found = Fit()
    for name, key in control_original_names(shapes).items():
        own = base.get(UNET_PREFIX + name)
        if own is not None and own != shapes[key]:
            found.unused[key] = f"{[*shapes[key]]} here, {[*own]} in the base"
    return found
