"""Options of the tools that fill caches before any training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require


@dataclass(frozen=True)
class CachingOptions:
    """What is done with the cache."""

    sdxl: bool = opt(False, help="assert that the model is SDXL (found from the file in any case)")
    skip_existing: bool = opt(
        False,
        help="also leave cache files of other programs as they are, if they fit: nothing in them says what made them. "
        "Files that prove to be of the same image or caption, model and settings are never made anew",
    )
    verify: bool = opt(
        False,
        help="nothing is encoded: check every cache file of the data set, list those that are not valid, and end with "
        "exit code 1 if there are any",
    )
    gc: bool = opt(
        False,
        help="nothing is encoded: list cache files beside the images that belong to no image, caption or size any more",
    )
    yes: bool = opt(False, help="with --gc: remove the files that it lists")
    text_encoder_batch_size: int | None = opt(
        help="without effect: captions are always encoded 32 at a time, so that a cache does not depend on it"
    )

    def __post_init__(self) -> None:
        require(not self.yes or self.gc, "--yes", "confirms nothing without --gc", "add --gc, or leave it out")
        require(not (self.verify and self.gc), "--verify", "contradicts --gc", "run one after the other")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect."""
        if self.text_encoder_batch_size is None:
            return []
        return ["--text_encoder_batch_size has no effect: captions are encoded 32 at a time, whatever it says"]
