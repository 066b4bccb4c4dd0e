"""Folders that this program writes and replaces: what they hold, so that nothing of anybody else's is deleted.

A folder is replaced or removed only if everything in it is what a save of ours leaves there. Nothing here imports
torch, so that a run can be refused before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

logger = logging.getLogger(__name__)

EXTRAS = "single_file_extras.safetensors"  # of a Diffusers folder: what a single file held beside the model
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json",
    "added_tokens.json",
)  # fmt: skip
UNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TEXT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class FolderForm:
    """What one kind of folder holds."""

    what: str
    marker: str  # the file without which it is none
    files: Collection[str]
    folders: Mapping[str, Collection[str]]  # name -> patterns of the files in it

    def foreign_in(self, folder: Path) -> str | None:
        """What lies in `folder` that no save writes, relative to it, or the folder's own fault; None if it is ours.

        An empty folder has nothing to lose and counts as ours. Raises OSError for one that can't be read.
        """
        if not folder.is_dir():
            return "it is a file"
        found = sorted(folder.iterdir())
        for path in found:
            if path.name in self.folders and path.is_dir():
                patterns = self.folders[path.name]
                for inner in sorted(path.iterdir()):
                    if inner.is_dir() or not any(fnmatchcase(inner.name, pattern) for pattern in patterns):
                        return f"it holds {path.name}/{inner.name}"
            elif path.name not in self.files or path.is_dir():
                return f"it holds {path.name}"
        if found and not (folder / self.marker).is_file():
            return f"it holds no {self.marker}"
        return None

    def is_free(self, folder: Path) -> bool:
        """Whether a folder of this form may be put there: nothing of anybody else's is lost."""
        try:
            return not folder.exists() or self.foreign_in(folder) is None
        except OSError:
            return False

    def free_place(self, folder: Path) -> Path:
        """`folder`, or, where something foreign has come there, the first of folder-2, folder-3 ... that is not there.

        The number stands before "-state", by which the folders of states are known.
        """
        if self.is_free(folder):
            return folder
        ending = "-state" if folder.name.endswith("-state") else ""
        stem = folder.name.removesuffix(ending)
        places = (folder.with_name(f"{stem}-{number}{ending}") for number in count(2))
        place = next(place for place in places if not place.exists())
        logger.warning("%s holds what no save of ours writes and stays as it is; saving %s", folder, place)
        return place


MODEL_FOLDER = FolderForm(
    "a Diffusers model",
    "model_index.json",
    ("model_index.json", EXTRAS),
    {
        "unet": UNET_FILES,
        "vae": UNET_FILES,
        "text_encoder": TEXT_FILES,
        "text_encoder_2": TEXT_FILES,
        "scheduler": ("scheduler_config.json",),
        "tokenizer": TOKENIZER_FILES,
        "tokenizer_2": TOKENIZER_FILES,
    },
)
CONTROL_NET_FOLDER = FolderForm("a ControlNet", "config.json", UNET_FILES, {})
STATE_FOLDER = FolderForm(
    "a state",
    "train_state.json",
    ("train_state.json", "trained.safetensors", "optimizer.pt"),
    {"shares": ("process-*.pt",)},
)
