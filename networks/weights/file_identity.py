"""What a file of weights is, by its keys and sizes alone. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from library.checkpoints.architecture import is_refiner, model_kind
from library.checkpoints.keymaps import UNET_PREFIX, count_items
from library.checkpoints.network_kind import KIND_NAMES, kind_by_width, network_kind
from library.checkpoints.probe import EDM_KEYS
from library.checkpoints.stored_control_net import control_net_kind, has_control_net, is_lllite
from library.wording import counted
from networks.key_names import file_key, has_two_encoders

UNKNOWN = "an unknown kind of model"
Shapes = Mapping[str, tuple[int, ...]]

CHECKPOINT, UNET, TEXT, VAE = "checkpoint", "U-Net", "text encoder", "VAE"
NETWORK, CONTROL_NET, LLLITE = "network", "ControlNet", "ControlNet-LLLite"
EMBEDDING, HYPERNETWORK, UPSCALER = "textual inversion", "hypernetwork", "latent upscaler"
OF_MODELS = (CHECKPOINT, UNET, TEXT, VAE)
NETWORK_KEY = re.compile(
    r"^(lora|oft|boft|lycoris|lokr|loha|ia3)_|^(unet|text_encoder|text_encoder_2)\..*lora|\.lora_(down|up|A|B)"
)
# what the parts of a module say of its algorithm, the telling ones first
ALGORITHMS = (
    ("dora_scale", "DoRA"),
    ("hada_w1_a", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_blocks", "OFT"),
    ("oft_diag", "Diag-OFT"),
    ("on_input", "IA3"),
    ("a1.", "GLoRA"),
    ("b1.", "GLoRA"),
    ("lora_mid.", "LoCon with a core"),
    ("lora_down.", "LoRA"),
    ("lora_up.", "LoRA"),
    ("w_norm", "norms"),
    ("b_norm", "norms"),
    ("diff", "full difference"),
    ("weight", "full weights"),
)
WORD_KEYS = ("emb_params", "clip_l", "clip_g", "*", "t5xxl")
HYPER_KEY = re.compile(r"(\d+)\.[01]\.linear")


@dataclass(frozen=True)
class Identity:
    """What a file is."""

    sort: str  # one of the words above; "" for what is nothing of the trade
    what: str  # in words, with the kind of model
    kind: str  # "sd1" | "sd2" | "sdxl"; "" where nothing tells


def identify(shapes: Shapes) -> Identity:
    """The identity of a file with these keys and sizes."""
    if any(NETWORK_KEY.search(key) for key in shapes):
        kind = network_kind(shapes)
        return Identity(NETWORK, f"{algorithms(shapes)} for {_name(kind)}", kind)
    if is_lllite(shapes):
        return Identity(LLLITE, "ControlNet-LLLite for SDXL", "sdxl")
    if has_control_net(shapes):
        kind = control_net_kind(shapes)
        return Identity(CONTROL_NET, f"ControlNet for {_name(kind)}", kind)
    if kind := model_kind(shapes):
        return Identity(CHECKPOINT, _checkpoint(shapes, kind), kind)
    return _part(shapes)


def _name(kind: str) -> str:
    return KIND_NAMES.get(kind, UNKNOWN)


def told_elsewhere(identity: Identity, kind: str, where: str) -> Identity:
    """The identity with the kind of model that something else tells, such as "its header", if the file does not."""
    if identity.kind or not kind:
        return identity
    return replace(identity, what=identity.what.replace(UNKNOWN, f"{KIND_NAMES[kind]} (by {where})"))


def _checkpoint(shapes: Shapes, kind: str) -> str:
    """ "SDXL checkpoint (U-Net, text encoders, VAE)", with what is special about it."""
    if is_refiner(shapes):
        return "SDXL refiner checkpoint"
    stem = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", (0, 4))
    special = {9: " inpainting", 8: " instruction (pix2pix)"}.get(stem[1], "")
    special += " EDM" if any(key in shapes for key in EDM_KEYS) else ""
    prefixes = {
        "U-Net": UNET_PREFIX,
        "text encoder": ("cond_stage_model.", "conditioner."),
        "VAE": "first_stage_model.",
    }
    parts = [part for part, prefix in prefixes.items() if any(key.startswith(prefix) for key in shapes)]
    extras = ", EMA copy" if any(key.startswith("model_ema.") for key in shapes) else ""
    return f"{KIND_NAMES[kind]}{special} checkpoint ({', '.join(parts)}{extras})"


def _part(shapes: Shapes) -> Identity:
    """Part of a model, or words."""
    if any(key.endswith("encoder.conv_in.weight") for key in shapes):
        layout = "Diffusers'" if any(".down_blocks." in key for key in shapes) else "original"
        return Identity(VAE, f"VAE, {layout} layout", "")
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        kind = control_net_kind(shapes)  # both tell by the width of the text states
        return Identity(UNET, f"U-Net of {_name(kind)}, Diffusers' layout", kind)
    if any(key.endswith("token_embedding.weight") for key in shapes):
        layers = count_items(shapes, r".*(?:layers|resblocks)\.(\d+)\.")
        layout = "OpenCLIP" if any(".resblocks." in key for key in shapes) else "CLIP"
        return Identity(TEXT, f"{layout} text encoder of {counted(layers, 'layer')}", "")
    if "resblock1.conv1.weight" in shapes and "conv_final.weight" in shapes:
        return Identity(UPSCALER, "latent upscaler", "")
    if shapes and all(HYPER_KEY.match(key) for key in shapes):
        return Identity(HYPERNETWORK, f"hypernetwork of the widths {', '.join(_widths(shapes))}", "")
    if _is_words(shapes):
        return _words(shapes)
    return Identity("", f"nothing known (it has {next(iter(shapes), 'no tensor')})", "")


def _widths(shapes: Iterable[str]) -> list[str]:
    found = {int(match[1]) for match in map(HYPER_KEY.match, shapes) if match}
    return [str(width) for width in sorted(found)]


def _is_words(shapes: Shapes) -> bool:
    """Vectors of words: by name, or one vector or a few under a name that is no path, as diffusers writes it."""
    if not shapes or any(len(shape) not in (1, 2) for shape in shapes.values()):
        return False
    return all(key in WORD_KEYS for key in shapes) or (len(shapes) == 1 and "." not in next(iter(shapes)))


def _words(shapes: Shapes) -> Identity:
    widths = {shape[-1] for shape in shapes.values()}
    kind = "sdxl" if {"clip_l", "clip_g"} & set(shapes) else kind_by_width(widths.pop()) if len(widths) == 1 else ""
    shape = next(iter(shapes.values()))
    return Identity(EMBEDDING, f"textual inversion of {counted(_rows(shape), 'vector')} for {_name(kind)}", kind)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def algorithms(shapes: Shapes) -> str:
    """ "LoRA with 192 modules" or "LoRA (264), norms (30)"."""
    modules: dict[str, set[str]] = {}
    has_two = has_two_encoders(shapes)
    for key in shapes:
        name, _, part = file_key(key, has_two=has_two).partition(".")
        modules.setdefault(name, set()).add(part)
    counts = Counter(_algorithm(parts) for parts in modules.values())
    if len(counts) == 1:
        ((word, number),) = counts.items()
        return f"{word} with {counted(number, 'module')}"
    return ", ".join(f"{word} ({number})" for word, number in counts.most_common())


def _algorithm(parts: Iterable[str]) -> str:
    parts = sorted(parts)
    return next((word for start, word in ALGORITHMS if any(part.startswith(start) for part in parts)), "unknown")
