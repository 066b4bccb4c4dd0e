"""Whether a picture fits into the machine's memory, told before it is drawn.

Where a GPU runs out of memory, torch says so; the memory of the machine itself ends in the system ending the program.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.generate.request import GenerationRequest
from library.options import OptionError

MEMINFO = Path("/proc/meminfo")
TENSORS = 2  # of the decoder's widest layer at the picture's full size that there are at least: what it takes and gives


def check_fits(batch: Sequence[GenerationRequest], vae: Any, at_once: int, free: int | None = None) -> None:
    """Raise OptionError for pictures that `vae` (diffusers' AutoencoderKL, on the CPU) can't decode in `free` bytes.

    What is free is asked of the system where it is not given; nothing is said where it doesn't tell.
    """
    weight = next(vae.parameters())
    free = free_memory() if free is None else free
    if weight.device.type != "cpu" or free is None:
        return
    first, count = batch[0], min(at_once, len(batch))
    needed = count * decoding_bytes(first.width, first.height, vae.config.block_out_channels, weight.element_size())
    if needed <= free:
        return
    pictures = f"{count} pictures of {first.width}x{first.height}" if count > 1 else (
        f"a picture of {first.width}x{first.height}"
    )  # fmt: skip
    problem = f"{pictures} would take at least {_gigabytes(needed)} of memory, and {_gigabytes(free)} are free"
    raise OptionError("", problem, "use --vae_batch_size 1" if count > 1 else "draw a smaller one (--W, --H)")


def decoding_bytes(width: int, height: int, channels: Sequence[int], element_size: int) -> int:
    """What decoding one picture takes at least; `channels` are those of the VAE's levels, the finest one first.

    The last level begins with the channels of the one before, already at the picture's size.
    """
    return TENSORS * max(channels[:2]) * element_size * width * height


def free_memory() -> int | None:
    """Bytes that this machine can still give, or all that it has where it does not tell; None where not even that."""
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
