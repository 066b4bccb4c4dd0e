"""Words of textual inversion: their files, and text encoders that know them.

Shape letters: n vectors of a word, D features, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.network_kind import KIND_NAMES, KINDS
from library.checkpoints.safetensors_io import is_finite
from library.checkpoints.weights import load_tensors
from library.options import OptionError, require
from library.text.added_words import LAYERS, NUM_LAYERS, WordTokenizer
from library.text.tokens import WINDOW, ClipTokenizer
from library.text.word_names import check_name
from library.wording import counted

SDXL_KEYS = ("clip_l", "clip_g")  # what files for SDXL call the vectors of its two text encoders


@dataclass(frozen=True)
class Word:
    """A word and what it means to each text encoder."""

    name: str  # the file's name without its ending
    path: str
    vectors: tuple[torch.Tensor, ...]  # (n, D) for each text encoder; (16 n, D) of a layered word
    is_layered: bool = False  # whether it has n vectors for each of the LAYERS

    @property
    def num_vectors(self) -> int:
        """That stand for the word in a prompt."""
        return len(self.vectors[0]) // (NUM_LAYERS if self.is_layered else 1)


@dataclass(frozen=True)
class LayeredWords:
    """Ids of words that mean something else to each cross-attention layer: the first layer's are those of prompts."""

    spans: tuple[tuple[int, int], ...]  # (first id, n vectors); the ids of all layers follow each other

    def variants(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The ids for each of the LAYERS; one variant alone where no such word is among them."""
        offsets = torch.zeros_like(ids)
        for first, count in self.spans:
            offsets[(ids >= first) & (ids < first + count)] = count
        return [ids + offsets * layer for layer in range(NUM_LAYERS)] if offsets.any() else [ids]


def read_word(path: str, flag: str) -> Word:
    """Of a .safetensors, .pt or .bin file: one tensor (n, D), or clip_l and clip_g for SDXL.

    Raises OptionError, which names `flag`, for a file that holds something else.
    """
    tensors = _read(path, flag)
    if set(SDXL_KEYS) <= set(tensors):
        return _checked(Word(Path(path).stem, path, tuple(_as_rows(tensors[key]) for key in SDXL_KEYS)), flag)
    if set(LAYERS) <= set(tensors):
        problem = f"{path} tells each layer its own meaning of the word"
        raise OptionError(flag, problem, f"name it with --XTI_embeddings {path}")
    return _checked(Word(Path(path).stem, path, (_as_rows(next(iter(tensors.values()))),)), flag)


def read_layered_word(path: str, flag: str) -> Word:
    """Of a file of extended textual inversion: a tensor (n, D) or (D,) for each of the LAYERS."""
    tensors = _read(path, flag)
    missing = [key for key in LAYERS if key not in tensors]
    way_out = "name a usual one with --textual_inversion_embeddings" if len(missing) == NUM_LAYERS else ""
    require(not missing, flag, f"{path} is no file of extended textual inversion: it lacks {missing[:1]}", way_out)
    rows = [_as_rows(tensors[key]) for key in LAYERS]
    require(len({each.shape for each in rows}) == 1, flag, f"{path} has layers of different sizes")
    return _checked(Word(Path(path).stem, path, (torch.cat(rows),), is_layered=True), flag)


def _read(path: str, flag: str) -> dict[str, torch.Tensor]:
    tensors = load_tensors(path, flag)
    require(bool(tensors), flag, f"{path} holds no vectors", "name a file of textual inversion")
    for key, tensor in tensors.items():
        require(is_finite(tensor), flag, f"{path} holds NaN or infinity ({key})", "take an earlier save of it")
    return tensors


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.detach().reshape(1, 1)


def _checked(word: Word, flag: str) -> Word:
    lengths = {len(vectors) for vectors in word.vectors}
    require(len(lengths) == 1, flag, f"{word.path} has another number of vectors for each text encoder")
    problem = f"{word.path} has {counted(word.num_vectors, 'vector')}, and a prompt's window holds {WINDOW}"
    require(word.num_vectors <= WINDOW, flag, problem, "use a word with fewer")
    return word


def add_words(
    tokenizers: Sequence[ClipTokenizer], text_encoders: Sequence[Any], words: Sequence[Word], flag: str
) -> tuple[WordTokenizer, ...]:
    """Teach the text encoders the words; returns tokenizers that know them, and leaves the given ones as they are.

    A word of n vectors is all of them; its single ones are words, too: name, name1, name2 ... for the second one on.
    Raises OptionError for vectors of another model's width, and for names that are words already.
    """
    ids: list[dict[str, tuple[int, ...]]] = [dict(getattr(tokenizer, "words", {})) for tokenizer in tokenizers]
    for word in words:
        _check_widths(word, text_encoders, flag)
        for known, encoder, vectors in zip(ids, text_encoders, word.vectors, strict=True):
            first = add_vectors(encoder, vectors)
            of_word = tuple(range(first, first + word.num_vectors))
            for index, token in list(enumerate(of_word))[1:]:
                check_name(flag, f"{word.name}{index}", word.path)
                known.setdefault(f"{word.name}{index}".lower(), (token,))
            known[word.name.lower()] = of_word
    return tuple(WordTokenizer(tokenizer.pad_token, known) for tokenizer, known in zip(tokenizers, ids, strict=True))


def add_vectors(encoder: Any, vectors_nD: torch.Tensor) -> int:
    """Put vectors behind the encoder's vocabulary, in its precision and on its device; returns the first one's id."""
    embeddings = encoder.get_input_embeddings()
    old_VD = embeddings.weight
    embeddings.weight = torch.nn.Parameter(
        torch.cat([old_VD.detach(), vectors_nD.to(old_VD)]), requires_grad=old_VD.requires_grad
    )
    embeddings.num_embeddings = len(embeddings.weight)
    return len(old_VD)


def _check_widths(word: Word, text_encoders: Sequence[Any], flag: str) -> None:
    """Raise OptionError, which says for what the word was made, unless its vectors fit the text encoders."""
    widths = tuple(vectors.shape[1] for vectors in word.vectors)
    expected = tuple(encoder.get_input_embeddings().weight.shape[1] for encoder in text_encoders)
    if widths == expected:
        return
    problem = f"{word.path} was made for {_model_of(widths)}, and the model is {_model_of(expected)}"
    raise OptionError(flag, problem, "use a word that was made for this kind of model")


def _model_of(widths: Sequence[int]) -> str:
    if len(widths) > 1:
        return f"SDXL (vectors of {' and '.join(map(str, widths))})"
    kind = KINDS.get(widths[0], "")
    name = KIND_NAMES[kind] if kind in ("sd1", "sd2") else "a model with one text encoder"
    return f"{name} (vectors of {widths[0]})"
