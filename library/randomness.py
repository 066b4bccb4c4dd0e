"""Stateless randomness: every draw is a function of (seed, purpose, indices).

No generator lives longer than one draw, and nothing is counted, so a draw does not depend on what was drawn before,
on the number of workers or processes, nor on where a run was interrupted. Called from data, noise and model
initialisation only.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_for(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed for one draw: BLAKE2b over the run's seed, the purpose's name and its indices.

    `indices` are usually (epoch, sample id) or (global step,). Equal arguments give equal seeds on every machine.
    """
    text = "\x1f".join((str(seed), purpose, *map(str, indices)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """A CPU generator for tensors of one draw."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *indices))


def python_random(seed: int, purpose: str, *indices: int | str) -> random.Random:
    """A generator for choices and shuffles of one draw."""
    return random.Random(seed_for(seed, purpose, *indices))


def seed_global_generators(seed: int, purpose: str, *indices: int | str) -> None:
    """Seed the global generators, which dropout layers and other people's networks draw from, for one step.

    Torch's; and Python's and NumPy's, from which for example DyLoRA draws the rank of a step.
    """
    value = seed_for(seed, purpose, *indices)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
