"""Which samples form which batch: regularisation balance, rotation, shares of processes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.epoch_plan import EpochPlan, Pool, registered_repeats, rotation_quotas


def pool(name="p", always=0, rotating=0, quota=0, cut=2, first=0):
    ids = np.arange(first, first + always + rotating)
    return Pool(name, ids[:always], ids[always:], quota, cut)


def plan(pools, *, epoch=1, num_processes=1, seed=0):
    return EpochPlan(pools, seed=seed, epoch=epoch, num_processes=num_processes)


@pytest.mark.parametrize(
    ("num_train", "repeats", "registered"),
    [
        (20, [1] * 6, [4, 4, 3, 3, 3, 3]),
        (3, [2] * 5, [2, 2, 0, 0, 0]),
        (10, [4, 4], [5, 5]),
        (0, [1, 1], [0, 0]),
        (5, [], []),
        (4, [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_registered_repeats(num_train, repeats, registered):
    assert registered_repeats(repeats, num_train) == registered


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 100))
def test_regularisation_is_as_many_as_training(repeats, num_train):
    total = sum(registered_repeats(repeats, num_train))
    assert num_train <= total < num_train + max(repeats) or total == sum(repeats) >= num_train


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_quotas_add_up_and_no_pool_is_forgotten(sizes, data):
    count = data.draw(st.integers(1, sum(sizes)))
    quotas = rotation_quotas(sizes, count)
    if count < len(sizes):
        assert quotas is None
    else:
        assert sum(quotas) == count
        assert all(1 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))


@given(st.integers(1, 50), st.data())
@settings(deadline=None)
def test_rotation_shows_everything_in_turn(total, data):
    quota = data.draw(st.integers(1, total))
    rotating = pool(rotating=total, quota=quota)
    rounds = -(-total // quota)
    for turn in range(2):
        shown = [rotating.samples(7, epoch).tolist() for epoch in range(turn * rounds + 1, (turn + 1) * rounds + 1)]
        assert all(len(set(ids)) == quota for ids in shown)
        assert {number for ids in shown for number in ids} == set(range(total))


def test_an_epoch_shows_every_sample_once_in_batches_of_one_pool():
    pools = [pool("a", always=7), pool("b", always=4, cut=3, first=7)]
    batches = [batch.tolist() for batch in plan(pools).batches]
    assert sorted(sum(batches, [])) == list(range(11))
    assert Counter(map(len, batches)) == {2: 3, 1: 2, 3: 1}
    assert all(max(batch) < 7 or min(batch) >= 7 for batch in batches)


def test_epochs_and_seeds_differ_and_repeat():
    pools = [pool(always=20)]
    first, again, later, other = (
        [batch.tolist() for batch in plan(pools, epoch=epoch, seed=seed).batches]
        for epoch, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again and first != later and first != other
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in later}


def test_pools_of_equal_size_are_shuffled_apart():
    orders = [pool(name, always=20).samples(0, 1).tolist() for name in ("0/64x64", "1/64x64")]
    assert orders[0] != orders[1]


def test_the_number_of_batches_never_changes():
    pools = [pool("a", always=5, rotating=9, quota=4, cut=3), pool("b", rotating=3, quota=2, cut=None, first=14)]
    for num_processes in (1, 2, 3):
        expected = sum(one.num_batches(num_processes) for one in pools)
        assert {len(plan(pools, epoch=epoch, num_processes=num_processes).batches) for epoch in range(1, 9)} == {
            expected
        }


def test_samples_that_make_batches_of_their_own():
    batches = plan([pool(rotating=5, quota=3, cut=None)], num_processes=2).batches
    assert [len(batch) for batch in batches] == [1, 1, 1]


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_processes_share_each_batch_evenly_and_in_order(num_samples, cut, num_processes):
    epoch = plan([pool(always=num_samples, cut=cut)], num_processes=num_processes)
    for index, batch in enumerate(epoch.batches):
        shares = [epoch.share(index, process) for process in range(num_processes)]
        assert len({len(share.samples) for share in shares}) == 1 and len(shares[0].samples) <= cut
        assert [number for share in shares for number in share.samples[: share.num_real]] == batch.tolist()
        assert sum(1 / share.denominator for share in shares for _ in range(share.num_real)) == pytest.approx(
            num_processes
        )


def test_more_processes_or_larger_batches_are_the_same():
    two = plan([pool(always=11, cut=2)], num_processes=2)
    one = plan([pool(always=11, cut=4)], num_processes=1)
    assert [batch.tolist() for batch in two.batches] == [batch.tolist() for batch in one.batches]
