"""Which samples form which batch of an epoch: a pure function of (seed, epoch).

A sample is one showing of one image; its number, the sample id, is the same in every epoch. Samples that may share a
batch form a pool (one bucket of one dataset). Every epoch has the same number of batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from library.randomness import python_random, torch_generator


@dataclass(frozen=True)
class Pool:
    """Samples that may share a batch.

    `always` are shown in every epoch. Of `rotating`, every epoch shows `quota`, others each time until all were shown.
    `cut` is the batch size of one process; None makes every sample a batch of its own.
    """

    name: str  # names the random draws of this pool; unique
    always: np.ndarray  # int64 sample ids
    rotating: np.ndarray
    quota: int
    cut: int | None

    @property
    def size(self) -> int:
        """Samples per epoch."""
        return len(self.always) + self.quota

    def num_batches(self, num_processes: int) -> int:
        return self.size if self.cut is None else -(-self.size // (self.cut * num_processes))

    def samples(self, seed: int, epoch: int) -> np.ndarray:
        """The sample ids of one epoch (from 1), shuffled."""
        ids = np.concatenate([self.always, self._rotated(seed, epoch)])
        return ids[_permutation(len(ids), seed, "sample order", epoch, self.name)]

    def _rotated(self, seed: int, epoch: int) -> np.ndarray:
        if not self.quota:
            return self.rotating[:0]
        total = len(self.rotating)
        rounds = -(-total // self.quota)  # epochs until each was shown
        turn, part = divmod(epoch - 1, rounds)
        order = self.rotating[_permutation(total, seed, "rotation", turn, self.name)]
        return order[np.arange(part * self.quota, (part + 1) * self.quota) % total]


class Share(NamedTuple):
    """One process's samples of one batch."""

    samples: list[int]  # sample ids; all processes have equally many
    num_real: int  # samples from here on are fillers
    denominator: float  # real samples of the whole batch per process


class EpochPlan:
    """The batches of one epoch over all processes."""

    def __init__(self, pools: Sequence[Pool], *, seed: int, epoch: int, num_processes: int) -> None:
        self.num_processes = num_processes
        self._samples = [pool.samples(seed, epoch) for pool in pools]  # in the order of their batches
        self._sizes = [1 if pool.cut is None else pool.cut * num_processes for pool in pools]
        self._first = list(accumulate((pool.num_batches(num_processes) for pool in pools), initial=0))  # batch of each
        order = list(range(self._first[-1]))
        python_random(seed, "batch order", epoch).shuffle(order)
        self._order = np.array(order, np.int32)

    @property
    def batches(self) -> list[np.ndarray]:
        """The sample ids of each batch of the epoch."""
        return [self._batch(index) for index in range(len(self._order))]

    def _batch(self, index: int) -> np.ndarray:
        number = int(self._order[index])
        pool = bisect_right(self._first, number) - 1
        start = (number - self._first[pool]) * self._sizes[pool]
        return self._samples[pool][start : start + self._sizes[pool]]

    def share(self, batch_index: int, process_index: int) -> Share:
        """The contiguous slice of a batch that belongs to a process, filled up to the size of all others."""
        batch = self._batch(batch_index).tolist()
        size = -(-len(batch) // self.num_processes)
        own = batch[process_index * size : (process_index + 1) * size]
        return Share(own + batch[-1:] * (size - len(own)), len(own), len(batch) / self.num_processes)


def _permutation(count: int, seed: int, purpose: str, epoch: int, name: str) -> np.ndarray:
    return torch.randperm(count, generator=torch_generator(seed, purpose, epoch, name)).numpy()


# ---------------------------------------------------------------------------------------------- regularisation


def registered_repeats(repeats: Sequence[int], num_train: int) -> list[int]:
    """How often each regularisation image is shown per epoch, to balance `num_train` training samples.

    `repeats` are the images' own repeats, in order. One pass takes images with their repeats until there are enough;
    where all together are too few, further passes add one showing per image until there are enough.
    """
    registered = [0] * len(repeats)
    count = 0
    for index, own in enumerate(repeats):
        if count >= num_train:
            return registered
        registered[index] = own
        count += own
    while registered and count < num_train:
        for index in range(min(len(repeats), num_train - count)):
            registered[index] += 1
            count += 1
    return registered


def rotation_quotas(pool_sizes: Sequence[int], count: int) -> list[int] | None:
    """How many of `count` samples per epoch come from each pool: by size, but at least one from each.

    Every pool gives at most all it has (`count` is at most the sum of sizes). None where there are more pools than
    samples per epoch.
    """
    if len(pool_sizes) > count:
        return None
    total = sum(pool_sizes)
    exact = [size * count / total for size in pool_sizes]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(quotas)), key=lambda index: quotas[index] - exact[index])
    for index in by_remainder[: max(0, count - sum(quotas))]:
        quotas[index] += 1
    while sum(quotas) > count:  # the minimum of one was paid by nobody yet
        largest = max(range(len(quotas)), key=lambda index: quotas[index])
        quotas[largest] -= 1
    return quotas
