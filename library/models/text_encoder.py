"""CLIP's text encoder with module paths that do not depend on the version of transformers.

The names `TextEncoder.text_model.encoder.layers.N.self_attn.k_proj` and so on, and transformers' class names
CLIPAttention and CLIPMLP, are part of file formats: checkpoints and network files are keyed by them.

Shape letters: B samples, N windows of text, T = 77 tokens of a window, D features.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from library.checkpoints.architecture import TextArchitecture
from library.checkpoints.configs import text_config
from library.options import OptionError
from library.text.tokens import END_ID

WINDOW = 75  # content tokens of a window, between its begin and end token


class TextEncoder(torch.nn.Module):
    """A CLIP text encoder that gives the states of any of its layers and computes no layer it need not.

    The layers are transformers' own; only the path to them, the loop over them and gradient checkpointing are here.
    """

    text_model: Any  # embeddings, encoder.layers, final_layer_norm

    def __init__(self, architecture: TextArchitecture) -> None:
        super().__init__()
        self.config = clip_config(architecture)
        model = CLIPTextModel(self.config)
        inner = getattr(model, "text_model", model)  # transformers 5 dropped this level
        self.text_model = torch.nn.Module()
        self.text_model.embeddings = inner.embeddings
        self.text_model.encoder = torch.nn.Module()
        self.text_model.encoder.layers = inner.encoder.layers
        self.text_model.final_layer_norm = inner.final_layer_norm
        self.gradient_checkpointing = False
        layer = inspect.signature(inner.encoder.layers[0].forward).parameters
        self._takes_causal_mask = "causal_attention_mask" in layer  # transformers 4

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.text_model.final_layer_norm.weight.device

    @property
    def num_layers(self) -> int:
        return len(self.text_model.encoder.layers)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.text_model.embeddings.token_embedding

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def forward(self, token_ids_BT: torch.Tensor, *, layer_from_end: int = 1, normalized: bool = True) -> torch.Tensor:
        """(B, T, D) output of the `layer_from_end`-th last layer (1: the last), through the final norm if `normalized`.

        Beyond the first layer come the embeddings: `layer_from_end` may be 1 to the number of layers + 1.
        """
        if not 1 <= layer_from_end <= self.num_layers + 1:
            raise OptionError(
                "--clip_skip", f"{layer_from_end} is deeper than the text encoder's {self.num_layers} layers"
            )
        hidden_BTD = self.text_model.embeddings(input_ids=token_ids_BT)
        hidden_BTD = self._through(hidden_BTD, 0, self.num_layers + 1 - layer_from_end)
        return self.text_model.final_layer_norm(hidden_BTD) if normalized else hidden_BTD

    def _through(self, hidden_BTD: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The output of layers `start` to `end` - 1."""
        for layer in self.text_model.encoder.layers[start:end]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_BTD = checkpoint(self._run, layer, hidden_BTD, use_reentrant=False)
            else:
                hidden_BTD = self._run(layer, hidden_BTD)
        return hidden_BTD

    def _run(self, layer: torch.nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if not self._takes_causal_mask:
            return layer(hidden_BTD, attention_mask=None, is_causal=True)
        length = hidden_BTD.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden_BTD.device).tril()
        return layer(hidden_BTD, None, mask[None, None])[0]


class ProjectedTextEncoder(TextEncoder):
    """A text encoder that also gives the pooled state of a text: SDXL's second one, OpenCLIP bigG."""

    text_projection: torch.nn.Linear  # its name is part of file formats

    def __init__(self, architecture: TextArchitecture) -> None:
        assert architecture.projection is not None
        super().__init__(architecture)
        self.text_projection = torch.nn.Linear(architecture.width, architecture.projection, bias=False)

    def forward(
        self, token_ids_BT: torch.Tensor, *, layer_from_end: int = 1, normalized: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) states of a layer, as of :class:`TextEncoder`, and (B, P) pooled states.

        The pooled state is the last layer's, through the final norm, at the first end token, projected. The first and
        not the one of the highest id, as transformers has it: words added to the vocabulary have higher ones.
        """
        hidden_BTD = super().forward(token_ids_BT, layer_from_end=layer_from_end, normalized=False)
        last_BTD = self._through(hidden_BTD, self.num_layers + 1 - layer_from_end, self.num_layers)
        end_B = (token_ids_BT == END_ID).int().argmax(dim=-1)
        last_BD = last_BTD[torch.arange(len(end_B), device=end_B.device), end_B]
        pooled_BP = self.text_projection(self.text_model.final_layer_norm(last_BD))
        return self.text_model.final_layer_norm(hidden_BTD) if normalized else hidden_BTD, pooled_BP


def clip_config(architecture: TextArchitecture) -> CLIPTextConfig:
    """The configuration other programs read from a Diffusers folder; token ids are the trade's (they are not used)."""
    config = CLIPTextConfig(**text_config(architecture))
    config._attn_implementation = "sdpa"
    return config


def encode_windows(encoder: torch.nn.Module, token_ids_BNT: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
    """(B, 75 N + 2, D) states of (B, N, 77) token ids: each window is encoded alone, then they are joined.

    `clip_skip` = k takes the k-th layer from the end (1, or None, is the last), through the final norm.
    """
    B, N, T = token_ids_BNT.shape
    states = encoder(token_ids_BNT.reshape(B * N, T), layer_from_end=clip_skip or 1)
    return join_windows(states.reshape(B, N, T, -1))


def join_windows(states_BNTD: torch.Tensor) -> torch.Tensor:
    """The states of N windows as one sequence: begin of the first, the 75 inner ones of each, end of the last."""
    if states_BNTD.shape[1] == 1:
        return states_BNTD[:, 0]
    inner = states_BNTD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BNTD[:, 0, :1], inner, states_BNTD[:, -1, -1:]], dim=1)
