"""Prompt lines, prompt files, requests, seeds and batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.generate.network_options import NetworkOptions
from library.generate.options import OutputOptions, PictureOptions, PromptOptions
from library.generate.prompt_line import LINE_OPTIONS, PromptLine, parse_prompt_line, read_raw_lines
from library.generate.request import GenerationRequest, batches, make_requests
from library.options import OptionError


def request(**values: object) -> GenerationRequest:
    defaults = {
        "prompt": "a", "negative_prompt": "", "width": 64, "height": 64, "steps": 2, "scale": 7.5, "seed": 1,
    }  # fmt: skip
    return GenerationRequest(**(defaults | values))


def test_options_leave_the_prompt() -> None:
    line = parse_prompt_line("  a cat, on a mat --n blurry, dark --W 640 --h 448 --s 30 --l 5.5 --d 1,2 , 3 ")
    assert line == PromptLine("a cat, on a mat", "blurry, dark", 640, 448, 30, 5.5, (1, 2, 3))


def test_a_plain_prompt_has_no_options() -> None:
    assert parse_prompt_line("a-b --- c") == PromptLine("a-b")  # " --" splits, whatever follows
    assert parse_prompt_line("a (b:1.2) BREAK [c]") == PromptLine("a (b:1.2) BREAK [c]")


def test_a_repeated_option_counts_once_more() -> None:
    assert parse_prompt_line("a --w 64 --w 128").width == 128


@pytest.mark.parametrize("line", [" --n only", "--n only", "  --n only  "])
def test_a_line_may_have_no_prompt(line: str) -> None:
    assert parse_prompt_line(line) == PromptLine("", "only")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w wide", "prompts.txt, line 3: --w 'wide' is not a whole number"),
        ("a --l nan", "--l 'nan' is not a number"),
        ("a --d 1,x", "--d '1,x' is not a seed or several joined by commas"),
        ("a --s", "--s '' is not a whole number"),
    ],
)
def test_broken_values_name_the_place(line: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_prompt_line(line, "prompts.txt, line 3")


def test_unknown_options_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        line = parse_prompt_line("a --foo 3 --bar --w 64", "prompts.txt, line 7")
    assert line.prompt == "a"
    assert line.width == 64
    known = ", ".join(f"--{name}" for name in LINE_OPTIONS)
    assert [record.message for record in caplog.records] == [
        f"prompts.txt, line 7: no effect: --foo 3, --bar; prompt lines know {known}"
    ]


def test_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# comment\r\n\r\nein Kätzchen --n häßlich\r\n  a dog  \r\n".encode())
    first, second = (parse_prompt_line(line.text, line.where) for line in read_raw_lines(path))
    assert (first.prompt, first.negative_prompt, second.prompt) == ("ein Kätzchen", "häßlich", "a dog")
    assert first.where == f"{path}, line 3"


def test_prompt_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(OptionError, match="--from_file: can't read .*No such file"):
        read_raw_lines(path)
    path.write_bytes(b"fine\n\xff\xfe broken\n")
    with pytest.raises(OptionError, match=r"line 2: is not UTF-8 text"):
        [parse_prompt_line(line.text, line.where) for line in read_raw_lines(path)]
    path.write_text("\n# nothing\n")
    with pytest.raises(OptionError, match="holds no prompt"):
        read_raw_lines(path)


def test_requests_take_the_line_before_the_command_line() -> None:
    lines = [parse_prompt_line("a --w 128 --s 3 --l 1 --n bad"), parse_prompt_line("b")]
    first, second = make_requests(lines, PromptOptions(prompt="x", seed=1), PictureOptions(W=64, H=64, steps=9))
    assert (first.width, first.height, first.steps, first.scale, first.negative_prompt) == (128, 64, 3, 1.0, "bad")
    assert (second.width, second.steps, second.scale, second.negative_prompt) == (64, 9, 7.5, "")
    assert not first.is_guided
    assert second.is_guided


def test_default_size_is_512() -> None:
    (only,) = make_requests([PromptLine("a")], PromptOptions(prompt="a"), PictureOptions())
    assert (only.width, only.height, only.steps, only.sampler) == (512, 512, 50, "ddim")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w 100", "--w: 100 is not a multiple of 8; use 96 or 104"),
        ("a --h 0", "--h: 0 is too small; use at least 64"),
        ("a --w -8", "--w: -8 is too small; use at least 64"),
        ("a --w 51200", "--w: 51200 is too large; the largest is 16384"),
        ("a --d 99999999999999999999", "--d: 99999999999999999999 is out of range"),
        ("a --d 1,-5", "--d: -5 is out of range; use 0 to 2"),
        ("(" * 2000 + "a", "--prompt: its brackets make an emphasis of 4.2e.06; 1e.06 is the limit"),
        ("a --n " + "(" * 9000 + "b", "--prompt: its brackets make an emphasis of 4.2e.06"),
    ],
)
def test_lines_out_of_range(line: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_requests([parse_prompt_line(line)], PromptOptions(prompt="a"), PictureOptions())


@pytest.mark.parametrize(
    ("line", "sampler", "steps"),
    [
        ("a --s 0", "ddim", 1),
        ("a --s -4", "euler", 1),
        ("a --s 99999", "euler", 1000),
        ("a --s 99999", "ddim", 999),
        ("a --s 2", "pndm", 4),
    ],
)
def test_steps_of_a_line_are_clamped_and_it_is_said_once(
    line: str, sampler: str, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = PromptOptions(prompt="a", images_per_prompt=3)
    made = make_requests([parse_prompt_line(line)], prompts, PictureOptions(sampler=sampler))
    assert [request.steps for request in made] == [steps] * 3
    given = line.rpartition(" ")[2]
    said = f"--prompt: --s {given} is taken as {steps}, the nearest that {sampler} can"
    assert [record.message for record in caplog.records] == [said]


def test_steps_in_range_stay(caplog: pytest.LogCaptureFixture) -> None:
    (only,) = make_requests([parse_prompt_line("a --s 30")], PromptOptions(prompt="a"), PictureOptions())
    assert only.steps == 30
    assert not caplog.records


def test_strong_emphasis_is_allowed() -> None:
    lines = [parse_prompt_line("((((a:5)))) BREAK [[[b]]] (c:0) (d:-3)")]
    assert len(make_requests(lines, PromptOptions(prompt="a"), PictureOptions())) == 1


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (PromptOptions, {"prompt": "a", "seed": -1}, "--seed: -1 is out of range; use 0 to 2.64 - 1, or leave it out"),
        (PictureOptions, {"W": 0}, "--W: 0 is too small; use at least 64"),
        (PictureOptions, {"H": -8}, "--H: -8 is too small"),
        (OutputOptions, {"outdir": ""}, "--outdir: no folder named"),
        (NetworkOptions, {"network_module": ("networks.lora",), "network_weights": ("a",),
                          "network_args": ("a=1;a=2",)}, "--network_args: a is given twice"),
    ],
)  # fmt: skip
def test_options_out_of_range(group: type, values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        group(**values)


def seeds_of(lines: list[PromptLine], **options: int | bool) -> list[int]:
    return [item.seed for item in make_requests(lines, PromptOptions(prompt="x", **options), PictureOptions())]


def test_one_picture_has_the_seed_itself() -> None:
    assert seeds_of([PromptLine("a")], seed=42) == [42]


def test_many_pictures_draw_their_seeds_from_it() -> None:
    source = random.Random(42)
    expected = [source.randint(0, 2**32 - 1) for _ in range(8)]
    assert seeds_of([PromptLine("a"), PromptLine("b")], seed=42, images_per_prompt=2, n_iter=2) == expected


def test_lines_with_seeds_take_none_away() -> None:
    source = random.Random(42)
    drawn = [source.randint(0, 2**32 - 1) for _ in range(3)]
    lines = [PromptLine("a", seeds=(7, 8)), PromptLine("b")]
    assert seeds_of(lines, seed=42, images_per_prompt=3) == [7, 8, 8, *drawn]


def test_seeds_without_a_seed_differ_and_leave_the_global_generator_alone() -> None:
    state = random.getstate()
    drawn = seeds_of([PromptLine("a")], images_per_prompt=4) + seeds_of([PromptLine("a")], images_per_prompt=4)
    assert len(set(drawn)) == 8
    assert random.getstate() == state


def test_batches_hold_what_fits_together() -> None:
    requests = [request(seed=seed) for seed in range(5)]
    requests += [request(width=128), request(steps=3), request(scale=2.0), request(prompt="long"), request(prompt="b")]
    made = list(batches(requests, 3, lambda item: 2 if item.prompt == "long" else 1))
    assert [len(batch) for batch in made] == [3, 2, 1, 1, 1, 1, 1]
    assert [item for batch in made for item in batch] == requests


def test_seeds_of_an_iteration_are_those_of_every_prompt_in_it() -> None:
    lines = [PromptLine("a"), PromptLine("b", seeds=(5,)), PromptLine("c")]
    drawn = seeds_of(lines, seed=1, images_per_prompt=2, n_iter=2, iter_same_seed=True)
    assert drawn[0:2] == drawn[4:6] and drawn[6:8] == drawn[10:12] and drawn[2:4] == drawn[8:10] == [5, 5]
    assert len(set(drawn)) == 5
    assert seeds_of(lines, seed=42, iter_same_seed=True) == [42, 5, 42]


def test_the_order_of_prompts_follows_from_the_seed() -> None:
    lines = [PromptLine(letter) for letter in "abcdefgh"]

    def order(seed: int | None) -> str:
        options = PromptOptions(prompt="x", seed=seed, n_iter=2, shuffle_prompts=True)
        return "".join(item.prompt for item in make_requests(lines, options, PictureOptions()))

    assert order(1) == order(1) != order(2)
    assert order(1)[:8] != order(1)[8:]
    assert all("".join(sorted(half)) == "abcdefgh" for half in (order(None)[:8], order(1)[8:]))


def test_a_line_may_have_its_turn() -> None:
    numbers: list[int] = []

    def complete(made: GenerationRequest, _line: PromptLine, number: int) -> GenerationRequest:
        numbers.append(number)
        return made

    lines = [PromptLine("a"), PromptLine("b", turn=7)]
    make_requests(lines, PromptOptions(prompt="x", images_per_prompt=2, n_iter=2), PictureOptions(), complete)
    assert numbers == [0, 1, 7, 7] * 2


def test_batches_come_as_soon_as_they_are_full() -> None:
    def source() -> Iterator[GenerationRequest]:
        yield request(seed=1)
        yield request(seed=2)
        raise AssertionError("asked for too early")

    assert [item.seed for item in next(batches(source(), 2, lambda _: 1))] == [1, 2]
