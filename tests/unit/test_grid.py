"""Contact sheets: what is compared, where each picture stands, and that all of it is on the sheet and on the page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.generate.grid import Axes, Block, Row, Variant, blocks
from library.generate.grid_options import GridOptions, in_training_order
from library.generate.grid_page import grid_page
from library.generate.grid_sheet import MOST_PIXELS, grid_sheet
from library.generate.request import GenerationRequest
from library.options import OptionError
from library.targets.detaching import networks_taken_off


def request(prompt: str, seed: int, negative: str = "") -> GenerationRequest:
    return GenerationRequest(prompt, negative, 64, 64, 3, 7.5, seed)


# ---------------------------------------------------------------------------------------------- what is compared


def test_epochs_come_in_the_order_of_training() -> None:
    names = ["mine", "mine-000010", "mine-000002", "mine-step00000500", "other2", "other10", "Mine-000001"]
    paths = [Path(f"{name}.safetensors") for name in names]
    assert [path.stem for path in in_training_order(paths)] == [
        "Mine-000001", "mine-000002", "mine-000010", "mine-step00000500", "mine", "other2", "other10",
    ]  # fmt: skip


def test_a_folder_stands_for_its_networks(tmp_path: Path) -> None:
    for name in ("a-2.safetensors", "a-1.pt", "notes.txt", "a.safetensors"):
        (tmp_path / name).touch()
    given = GridOptions(grid_networks=(str(tmp_path / "a-2.safetensors"), str(tmp_path)))
    assert [Path(file).name for file in given.network_files()] == ["a-2.safetensors", "a-1.pt", "a.safetensors"]


def test_mistakes_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--grid_networks: .* holds no network file; name another folder"):
        GridOptions(grid_networks=(str(tmp_path),)).network_files()
    with pytest.raises(OptionError, match="--grid_networks: .*nowhere does not exist"):
        GridOptions(grid_networks=(str(tmp_path / "nowhere"),)).network_files()
    with pytest.raises(OptionError, match="--grid_multipliers: there is no network; name files or a folder"):
        GridOptions(grid_multipliers=(1.0,))
    with pytest.raises(OptionError, match="--grid_multipliers: nan is out of range"):
        GridOptions(grid_networks=("a",), grid_multipliers=(float("nan"),))


def test_without_network_is_drawn_once() -> None:
    axes = Axes(("m",), ("a", "b"), (0.0, 0.5))
    assert axes.variants("m") == [Variant("m"), Variant("m", "a", 0.5), Variant("m", "b", 0.5)]
    shown = blocks(axes, [request("p", 1)], {Variant("m"): [Path("none.png")], Variant("m", "a", 0.5): [Path("a.png")]})
    assert shown[0].rows == (
        Row("multiplier 0", (Path("none.png"), Path("none.png"))),
        Row("multiplier 0.5", (Path("a.png"), None)),
    )
    assert shown[0].columns == ("a", "b")


def test_rows_and_columns_of_every_comparison() -> None:
    requests = [request("p", 1), request("p", 2), request("q", 1, "bad")]
    drawn = {
        Variant(ckpt, network): [Path(f"{ckpt}{network}{index}") for index in range(3)]
        for ckpt in "mn"
        for network in ("", "a")
    }
    alone = blocks(Axes(("m",), (), (1.0,)), requests, drawn)
    assert [block.columns for block in alone] == [("seed 1", "seed 2"), ("seed 1",)]
    assert alone[0].rows == (Row("", (Path("m0"), Path("m1"))),)
    models = blocks(Axes(("m", "n"), (), (1.0,)), requests, drawn)
    assert models[0].columns == ("m", "n")
    assert models[0].rows == (Row("seed 1", (Path("m0"), Path("n0"))), Row("seed 2", (Path("m1"), Path("n1"))))
    assert models[1].rows == (Row("", (Path("m2"), Path("n2"))),)
    assert models[1].subtitle == "negative: bad, 64x64, 3 steps of ddim, scale 7.5, seed 1"
    both = blocks(Axes(("m", "n"), ("a",), (1.0,)), requests[:1], drawn)
    assert both[0].rows == (Row("m", (Path("ma0"),)), Row("n", (Path("na0"),)))


# ---------------------------------------------------------------------------------------------- sheet and page


def saved(path: Path, colour: str, size_wh: tuple[int, int] = (64, 96)) -> Path:
    Image.new("RGB", size_wh, colour).save(path)
    return path


def test_pictures_stand_in_their_cells(tmp_path: Path) -> None:
    red, blue = saved(tmp_path / "r.png", "red"), saved(tmp_path / "b.png", "blue")
    rows = (Row("multiplier 0.5", (red, None)), Row("multiplier 1\nseed 3", (None, blue)))
    pixels = np.asarray(grid_sheet([Block("a cat", "ddim", ("one", "two"), rows)]))

    def box(colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
        y, x = np.nonzero((pixels == colour).all(2))
        return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1

    first, second = box((255, 0, 0)), box((0, 0, 255))
    assert (first[2] - first[0], first[3] - first[1]) == (64, 96)
    assert second[0] > first[2] and second[1] > first[3]


def test_many_pictures_become_smaller(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.png", "red", (256, 256))
    many = [Block("p", "s", ("n",) * 60, (Row("multiplier 1", (path,) * 60),) * 40)]
    sheet = grid_sheet(many)
    assert sheet.width * sheet.height <= MOST_PIXELS


def test_the_page_needs_nothing_but_the_pictures(tmp_path: Path) -> None:
    path = saved(tmp_path / "a #1.png", "red")
    page = grid_page([Block("<b>&", "s", ("n",), (Row("multiplier 1\nseed 2", (path,)), Row("x", (None,))))], tmp_path)
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page
    assert re.findall(r'href="([^"]*)"', page) == ["a%20%231.png"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "1 picture<" in page and "width=device-width" in page


# ---------------------------------------------------------------------------------------------- taking networks off


def test_forwards_and_hooks_are_undone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    kept: list[int] = []
    model[1].register_forward_hook(lambda *_: kept.append(1))
    before, first = model(x), model[0]
    plain = first.forward
    with networks_taken_off([model]):
        first.forward = lambda input: plain(input) * 2
        model[1].register_forward_hook(lambda *_: torch.zeros(1, 2))
        model[1].register_forward_pre_hook(lambda *_: None)
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)
    assert "forward" not in vars(first) and not model[1]._forward_pre_hooks
    assert len(kept) == 3, "hooks that were there before stay"
