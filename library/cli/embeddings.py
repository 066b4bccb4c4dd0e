"""Words of textual inversion for generation: from files on the command line into a loaded model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from library.generate.embedding_options import EmbeddingOptions
from library.wording import counted

if TYPE_CHECKING:
    from library.families.base import ModelBundle
    from library.generate.conditions import PromptEncoder
    from library.models.added_words import Word

logger = logging.getLogger(__name__)

USUAL, LAYERED = "--textual_inversion_embeddings", "--XTI_embeddings"


def read(options: EmbeddingOptions) -> dict[str, list[Word]]:
    """The words of the files by their flag; OptionError for one that holds something else."""
    usual, layered = options.textual_inversion_embeddings or (), options.XTI_embeddings or ()
    if not usual and not layered:
        return {}
    from library.models import added_words

    return {
        USUAL: [added_words.read_word(path, USUAL) for path in usual],
        LAYERED: [added_words.read_layered_word(path, LAYERED) for path in layered],
    }


def teach(words: dict[str, list[Word]], bundle: ModelBundle) -> None:
    """Let the model's text encoders and its tokenizers know the words; OptionError for those of another model."""
    from library.models.added_words import add_words

    for flag, of_flag in words.items():
        if not of_flag:
            continue
        bundle.tokenizers = add_words(bundle.tokenizers, bundle.text_encoders, of_flag, flag)
        for word in of_flag:
            logger.info("%s: %s in prompts stands for %s", word.path, word.name, counted(word.num_vectors, "vector"))


def part_for(words: dict[str, list[Word]], encoder: PromptEncoder) -> tuple:
    """What takes part in drawing where words mean something else to each layer; lets `encoder` make those meanings."""
    from library.generate.layered_words import LayeredContexts
    from library.models.added_words import LayeredWords

    layered = words.get(LAYERED, [])
    if not layered:
        return ()
    tokenizer = encoder.bundle.tokenizers[0]
    spans = tuple((tokenizer.words[word.name.lower()][0], word.num_vectors) for word in layered)
    encoder.layered_words = LayeredWords(spans)
    return (LayeredContexts(),)
