"""Equal files among a run's images: whatever their names, and whatever of them an index knows."""

from __future__ import annotations

import os

import pytest

from library.data import index
from library.data.findings import find
from library.data.options import CaptionOptions
from tests.tiny_data import tiny_image
from tests.tiny_runs import build


def equal(*folders, on_bad_image="stop"):
    data = build(*folders, on_bad_image=on_bad_image, caption=CaptionOptions(data_index="on"))
    found = find(data.datasets, data.scan, num_processes=1, token_limit=75, count_tokens=lambda texts: [1] * len(texts))
    return [[os.path.relpath(path, folders[0].parent) for path in group] for group in found.equal]


@pytest.fixture
def root(tmp_path):
    """Two folders; of six images two are one file, and three another one."""
    contents = []
    for seed in range(3):
        tiny_image((64, 64), seed=seed).save(tmp_path / "picture.png")
        contents.append((tmp_path / "picture.png").read_bytes())
    (tmp_path / "picture.png").unlink()
    names = {"1_a/b.png": 0, "1_a/a.png": 1, "1_a/c.png": 2, "1_a-b/z.jpg": 0, "1_a-b/a.png": 1, "1_a-b/b.png": 1}
    for name, number in names.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(contents[number])
    return tmp_path / "data"


GROUPS = [["data/1_a-b/a.png", "data/1_a-b/b.png", "data/1_a/a.png"], ["data/1_a-b/z.jpg", "data/1_a/b.png"]]


def test_whatever_their_names_and_with_an_index(root, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", -(10**10))
    monkeypatch.setattr(index, "ARRANGED_FROM", 0)
    for _ in range(3):
        assert equal(root) == GROUPS
    (root / "1_a" / "b.png").write_bytes((root / "1_a" / "c.png").read_bytes())
    assert equal(root) == [GROUPS[0], ["data/1_a/b.png", "data/1_a/c.png"]]


def test_what_is_left_out_is_in_no_group(root, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", -(10**10))
    monkeypatch.setattr(index, "ARRANGED_FROM", 0)
    broken = root / "1_a" / "a.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    for _ in range(3):
        assert equal(root, on_bad_image="skip") == [["data/1_a-b/a.png", "data/1_a-b/b.png"], GROUPS[1]]


def test_a_file_used_twice_is_no_copy_of_itself(root):
    assert equal(root, root) == GROUPS
