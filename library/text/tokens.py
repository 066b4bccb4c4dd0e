"""CLIP's tokenizer and the layout of token windows, from the vocabulary that is part of this project.

Shape letters: B captions, N windows of 75 content tokens, T = 77 tokens of a window with its begin and end.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

VOCABULARY = Path(__file__).resolve().parent / "clip_vocab"
BEGIN_ID = 49406
END_ID = 49407
WINDOW = 75  # content tokens of a window
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # how CLIP cuts a text before merging bytes


class Tokens(NamedTuple):
    """Captions as the text encoders take them: one tensor per tokenizer."""

    ids: tuple[torch.Tensor, ...]  # (B, N, 77) int64
    weights: tuple[torch.Tensor, ...] | None = None  # (B, N, 77) float32: emphasis of each token; None: all are 1


class ClipTokenizer:
    """Captions to token ids. `pad_token`: "eos" (SD 1.x, SDXL's first) or "zero" (SD 2.x, SDXL's second).

    Cheap to pickle: a process that receives one reads the vocabulary itself, once.
    """

    def __init__(self, pad_token: str = "eos") -> None:
        self.pad_id = {"eos": END_ID, "zero": 0}[pad_token]
        self.pad_token = pad_token
        self.bos_id, self.eos_id = BEGIN_ID, END_ID

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return ClipTokenizer, (self.pad_token,)

    def for_transformers(self) -> Any:
        """transformers' tokenizer of the same vocabulary and padding, for code that expects one."""
        from transformers import CLIPTokenizer

        vocabulary = json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
        lines = (VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        merges: Any = [tuple(line.split()) for line in lines if line]
        pad_token = {"eos": "<|endoftext|>", "zero": "!"}[self.pad_token]
        return CLIPTokenizer(vocabulary, merges, pad_token=pad_token, model_max_length=WINDOW + 2)

    def encode(self, text: str) -> list[int]:
        """Content ids of `text`, without begin and end, of any length."""
        return _bpe().encode(text, add_special_tokens=False).ids

    def groups(self, text: str) -> Sequence[Sequence[int]]:
        """Content ids of `text` in pieces that stay in one window: each alone but for words of several vectors."""
        return [(token,) for token in self.encode(text)]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many content ids each caption has."""
        return [len(encoding.ids) for encoding in _bpe().encode_batch(list(captions), add_special_tokens=False)]

    def windows(self, captions: Sequence[str], num_windows: int) -> torch.Tensor:
        """(B, N, 77) int64 ids of captions; tokens beyond 75 N are cut off (see count_cut_off)."""
        encodings = _bpe().encode_batch(list(captions), add_special_tokens=False)
        return torch.tensor([self.layout(encoding.ids, num_windows) for encoding in encodings], dtype=torch.int64)

    def count_cut_off(self, caption: str, num_windows: int) -> int:
        """How many tokens of `caption` do not fit into `num_windows` windows."""
        return max(0, len(self.encode(caption)) - WINDOW * num_windows)

    def layout(self, content: Sequence[int], num_windows: int) -> list[list[int]]:
        """Content ids as N windows of 77: each has its begin and 75 ids of the padded sequence.

        The sequence is begin, content, end, padding, in 75 N + 2 places. Each window ends with the sequence's last id.
        Where padding is not the end token (SD 2.x) and N > 1, a window that is full ends with an end token, and a
        window without content starts with one.
        """
        length = WINDOW * num_windows + 2
        sequence = [BEGIN_ID, *content[: length - 2], END_ID]
        sequence += [self.pad_id] * (length - len(sequence))
        if num_windows == 1:
            return [sequence]
        starts = range(1, length - 1, WINDOW)
        return [self._closed([BEGIN_ID, *sequence[i : i + WINDOW], sequence[-1]]) for i in starts]

    def _closed(self, window: list[int]) -> list[int]:
        if self.pad_id != END_ID:
            if window[-2] not in (END_ID, self.pad_id):
                window[-1] = END_ID
            if window[1] == self.pad_id:
                window[1] = END_ID
        return window


def without_padding(tokens: Tokens) -> Tokens:
    """Captions of one window each, filled up only to the longest of them: (B, 1, L) with L up to 77."""
    longest = max(int((ids_BNT == END_ID).int().argmax(dim=-1).max()) for ids_BNT in tokens.ids) + 1
    weights = None if tokens.weights is None else tuple(part[..., :longest] for part in tokens.weights)
    return Tokens(tuple(ids_BNT[..., :longest] for ids_BNT in tokens.ids), weights)


@functools.cache
def _bpe() -> Tokenizer:
    """CLIP's byte-pair encoding (Radford et al. 2021): lower case, words, bytes, merges."""
    model = models.BPE.from_file(
        str(VOCABULARY / "vocab.json"),
        str(VOCABULARY / "merges.txt"),
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([AddedToken("<|startoftext|>"), AddedToken("<|endoftext|>")])
    return tokenizer
