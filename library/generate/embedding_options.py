"""Options of textual inversion: words that files teach the text encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import opt, require
from library.text.word_names import check_name


@dataclass(frozen=True)
class EmbeddingOptions:
    """Words of textual inversion: a file's name without its ending is the word."""

    textual_inversion_embeddings: tuple[str, ...] | None = opt(
        help="files of textual inversion (.safetensors, .pt, .bin); each one's name is its word in prompts"
    )
    XTI_embeddings: tuple[str, ...] | None = opt(
        help="files of extended textual inversion, which tell each cross-attention layer its own meaning of the word "
        "(SD 1.x and 2.x)"
    )

    def check(self) -> None:
        """Raise OptionError for files that are not there, and for names that can't be words. Loads no torch."""
        words: dict[str, str] = {}
        for name in ("textual_inversion_embeddings", "XTI_embeddings"):
            for path in getattr(self, name) or ():
                flag, word = f"--{name}", Path(path).stem
                require(Path(path).is_file(), flag, f"{path} does not exist", "check the path")
                check_name(flag, word, path)
                other = words.get(word.lower())
                problem = (
                    f"{path} is named twice" if other == path else f"{path} and {other} are the same word {word!r}"
                )
                require(other is None, flag, problem, "leave one out" if other == path else "rename one of them")
                words[word.lower()] = path

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [Path(path) for path in (*(self.textual_inversion_embeddings or ()), *(self.XTI_embeddings or ()))]
