"""What web user interfaces call the weights that drew a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.safetensors_io import file_sha256, network_hash

SHORT = 10  # digits of a hash, as they are written
SHORT_OF_NETWORKS = 12

TagsAt = Callable[[tuple[float, ...] | None], str]
Hashes = tuple[tuple[str, str], ...]  # (name of a file without its ending, hash)


@dataclass(frozen=True)
class ModelNames:
    """Names and hashes; "" for what is not known."""

    model: str
    model_hash: str = ""  # the first digits of the file's SHA-256
    networks: str = ""  # tags such as "<lora:name:1>", as prompts ask for networks there
    network_hashes: Hashes = ()
    embedding_hashes: Hashes = ()
    vae: str = ""  # name of a file that replaces the model's own
    vae_hash: str = ""
    networks_at: TagsAt | None = None  # `networks` with the multipliers of a request
    looks: tuple[tuple[str, Any], ...] = ()  # networks that look at pictures: options of a run by their names

    def tags(self, multipliers: tuple[float, ...] | None) -> str:
        """The networks as prompts ask for them, with the multipliers of a request."""
        return self.networks if self.networks_at is None else self.networks_at(multipliers)

    @classmethod
    def of(
        cls,
        model: Path,
        networks: str = "",
        network_files: Sequence[Path] = (),
        embedding_files: Sequence[Path] = (),
        vae: str | None = None,
        networks_at: TagsAt | None = None,
        looks: Sequence[tuple[str, Any]] = (),
    ) -> ModelNames:
        """Of a model's file or folder; files are read as a whole for their hashes, once."""
        vae_path = Path(vae or "")
        return cls(
            model.stem,
            _file_hash(model),
            networks,
            tuple((path.stem, network_hash(path)[:SHORT_OF_NETWORKS]) for path in _files(network_files)),
            tuple((path.stem, _file_hash(path)) for path in _files(embedding_files)),
            vae_path.name,
            _file_hash(vae_path),
            networks_at,
            tuple(looks),
        )


def _files(paths: Iterable[Path]) -> list[Path]:
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _file_hash(path: Path) -> str:
    return file_sha256(path)[:SHORT] if path.is_file() else ""
