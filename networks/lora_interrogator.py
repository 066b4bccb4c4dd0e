"""Which words a LoRA changes most: every token is encoded with it and without it. See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.probe import probe_any
from library.cli.tools import Tool
from library.options import OptionError, opt, require
from library.progress import progress_bar
from networks.key_names import file_key
from networks.layers import TEXT_PREFIX
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SHOWN = 100  # words of the list
BASE = "--sd_model"


@dataclass(frozen=True)
class InterrogateOptions:
    """What is asked."""

    v2: bool = opt(False, help="the model is SD 2.x: stop if it is not (the kind is found from the file itself)")
    sd_model: str = opt("", help="model that the LoRA was made for: file, Diffusers folder or hub id; SDXL too")
    model: str = opt("", help="LoRA file, with a text encoder's part")
    batch_size: int = opt(16, help="words that are encoded at a time")
    clip_skip: int | None = opt(help="layer of the text encoder that is compared, counted from the last (1)")

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "--batch_size", f"{self.batch_size} is too small", "use 1 or more")
        skip = self.clip_skip
        require(skip is None or skip > 0, "--clip_skip", f"{skip} is no layer", "use 1 or more")


def interrogate(options: InterrogateOptions) -> None:
    """Print the list; raises OptionError for a LoRA that leaves text encoders alone, or is for another model."""
    source = probe_any(options.sd_model, flag=BASE, v2=options.v2)
    with NetworkFile(Path(options.model).expanduser(), "--model") as file:
        if not any(name.startswith(TEXT_PREFIX) for name in file.modules):
            raise OptionError("--model", f"{options.model} changes no text encoder", "use one that was trained with it")
        _ = file.pairs
    encoders, vocabulary = _text_encoders(options, source.kind)
    network = _network(options.model, encoders)
    for place, (score, token) in enumerate(_scores(encoders, network, vocabulary.size, options)[:SHOWN], start=1):
        print(f"[{place}]: {token} {vocabulary.text(token)}: {score:.5f}")


@dataclass(frozen=True)
class Vocabulary:
    """The words of CLIP: ids from 0 to the end token's."""

    texts: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.texts)

    def text(self, token: int) -> str:
        return self.texts[token].replace("</w>", "")


def _text_encoders(options: InterrogateOptions, kind: str) -> tuple[list[Any], Vocabulary]:
    import torch

    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions
    from library.text.tokens import ClipTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # CPUs are slow with half precision
    plan = LoadPlan(dtype, dtype, dtype, device, frozenset({"text_encoders"}))
    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    bundle = family.load(ModelOptions(pretrained_model_name_or_path=options.sd_model), AttentionOptions(), plan)
    ids = ClipTokenizer().for_transformers().get_vocab()
    return list(bundle.text_encoders), Vocabulary(sorted(ids, key=lambda text: ids[text]))


def _network(file: str, encoders: list[Any]) -> Any:
    """The LoRA of the text encoders, hooked to them."""
    from library.checkpoints.weights import load_tensors
    from networks.lora import create_network_from_weights

    has_two = len(encoders) > 1
    tensors = {
        key: tensor
        for key, tensor in load_tensors(file, "--model").items()
        if file_key(key, has_two=has_two).startswith(TEXT_PREFIX)
    }
    network, found = create_network_from_weights(
        1.0, file, None, encoders if has_two else encoders[0], None, weights_sd=tensors, for_inference=True
    )
    network.apply_to(encoders, None, True, False)
    network.load_state_dict(found, strict=False)
    return network.to(encoders[0].device, encoders[0].dtype).eval()


def _scores(encoders: list[Any], network: Any, count: int, options: InterrogateOptions) -> list[tuple[float, int]]:
    """(mean absolute difference of a token's states, token), the largest first."""
    import torch

    from library.text.tokens import BEGIN_ID, END_ID

    device = encoders[0].device
    scores: list[tuple[float, int]] = []
    with torch.no_grad(), progress_bar(desc="words", total=count) as bar:
        for start in range(0, count, options.batch_size):
            tokens = torch.arange(start, min(start + options.batch_size, count), device=device)
            ids = torch.stack([tokens.new_full(tokens.shape, BEGIN_ID), tokens, tokens.new_full(tokens.shape, END_ID)])
            states = []
            for is_enabled in (False, True):
                network.set_enabled(is_enabled)
                states.append(_states(encoders, ids.T, options.clip_skip or 1))
            difference_B = (states[1] - states[0]).abs().mean(dim=(1, 2))
            scores += zip(difference_B.tolist(), tokens.tolist(), strict=True)
            bar.update(len(tokens))
    return sorted(scores, key=lambda item: -item[0])


def _states(encoders: list[Any], ids_B3: torch.Tensor, layer: int) -> torch.Tensor:
    """(B, 3, D) states of all text encoders side by side, through their final norms, in float32."""
    import torch

    found = [encoder(ids_B3, layer_from_end=layer) for encoder in encoders]
    return torch.cat([states[0] if isinstance(states, tuple) else states for states in found], dim=-1).float()


TOOL = Tool(__doc__, InterrogateOptions, interrogate, required=("sd_model", "model"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
