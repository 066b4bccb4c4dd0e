"""Where prompts come from: files, lines that are typed, Python files, pictures; their seeds, order and files' names."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from library.generate.output import encode
from library.generate.picture_texts import picture_texts

SMALL = ["--W", "64", "--H", "64", "--steps", "1", "--sampler", "euler_a"]


class Bench:
    """Runs the generator on a tiny model; each run has a folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.out = model, folder, folder
        self.runs = 0

    def run(self, *arguments: object, script: generation.Script = gen_img_diffusers.SCRIPT) -> int:
        self.runs += 1
        self.out = self.folder / f"run{self.runs}"
        words = ["--ckpt", self.model, "--outdir", self.out, *SMALL, *arguments]
        return generation.run(script, [str(word) for word in words])

    @property
    def texts(self) -> list[dict[str, str]]:
        """What the last run's pictures say, in the order of their numbers (--sequential_file_name)."""
        return [picture_texts(path, "") for path in sorted(self.out.glob("*.png"))]

    @property
    def prompts(self) -> list[str]:
        return [texts["prompt"] for texts in self.texts]

    @property
    def seeds(self) -> list[int]:
        return [int(texts["seed"]) for texts in self.texts]

    def file(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        return path


@pytest.fixture
def bench(tiny_sd1_path: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_sd1_path, tmp_path)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


# ---------------------------------------------------------------------------------------------- typed prompts


def test_typed_prompts_are_drawn_one_by_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    typed(monkeypatch, "", "  ", "--n nothing before it", "a cat --d 5", "a {E$$dog|bird} --w wide", "a dog --w 72")
    assert bench.run("--interactive", "--sequential_file_name", "--seed", 1, "--n_iter", 2) == 0
    said = capsys.readouterr()
    assert bench.prompts == ["a cat", "a dog"]
    assert bench.seeds[0] == 5
    assert said.out.count("Type prompt:") == 7
    assert "typed prompt 2: --w 'wide' is not a whole number" in said.err
    assert said.err.count("no windows with pictures") == 1
    assert "--n_iter has no effect beside --interactive" in said.err


def test_typing_goes_on_after_a_list(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "third")
    prompts = bench.file("prompts.txt", "first\nsecond\n")
    arguments = ["--from_file", prompts, "--interactive", "--no_preview", "--sequential_file_name", "--seed", 1]
    assert bench.run(*arguments, "--images_per_prompt", 2, "--batch_size", 2) == 0
    assert bench.prompts == ["first", "first", "second", "second", "third", "third"]
    assert len(set(bench.seeds)) == 6


def test_a_prompt_that_cannot_be_drawn_does_not_end_the_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from library.generate.images import Engine

    draw = Engine.pictures

    def full(engine: Engine, batch: list, **settings: object) -> list:
        if batch[0].width > 64:
            raise torch.OutOfMemoryError
        return draw(engine, batch, **settings)

    monkeypatch.setattr(Engine, "pictures", full)
    typed(monkeypatch, "large --w 512", "small")
    assert bench.run("--interactive", "--no_preview") == 0
    assert "--batch_size: 1 does not fit into the GPU's memory" in capsys.readouterr().err
    assert bench.prompts == ["small"]
    assert bench.run("--prompt", "large --w 512") == 2, "nobody is there to ask for something else"


def test_interruption_keeps_what_is_finished(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from library.generate.images import Engine

    draw = Engine.pictures

    def interrupted(engine: Engine, batch: list, **settings: object) -> list:
        pictures = draw(engine, batch, **settings)
        if batch[0].prompt == "second":
            raise KeyboardInterrupt
        return pictures

    monkeypatch.setattr(Engine, "pictures", interrupted)
    typed(monkeypatch, "first", "second", "third")
    assert bench.run("--interactive", "--no_preview") == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert bench.prompts == ["first"]
    assert [path.suffix for path in bench.out.iterdir()] == [".png"], "nothing half-written"


def test_windows_show_each_picture_until_a_key_is_pressed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[str, np.ndarray]] = []
    keys = iter([-1, -1, 32, -1, 32])
    screen = types.SimpleNamespace(
        error=RuntimeError,
        WND_PROP_VISIBLE=4,
        imshow=lambda title, pixels: shown.append((title, pixels)),
        waitKey=lambda _milliseconds: next(keys),
        getWindowProperty=lambda _title, _property: 1.0,
        destroyAllWindows=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "cv2", screen)  # windows need a screen, which tests have not
    monkeypatch.setenv("DISPLAY", ":0")
    typed(monkeypatch, "a cat " + "x" * 200)
    assert bench.run("--interactive", "--images_per_prompt", 2, "--sequential_file_name") == 0
    assert [title for title, _ in shown] == ["a cat " + "x" * 122] * 2
    saved = [np.asarray(Image.open(path)) for path in sorted(bench.out.glob("*.png"))]
    assert all((pixels[:, :, ::-1] == picture).all() for (_, pixels), picture in zip(shown, saved, strict=True))
    assert "no windows" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- Python files

PROMPTER = """
def get_prompter(args, pipe, networks):
    return Prompter()


class Prompter:
    words = ["cat", "dog", "bird"]

    def __call__(self, args, pipe, seed_random, iter_seed, prompt_index, global_step):
        if prompt_index >= len(self.words):
            return None
        facts = f"{args.steps} {args.prompter_module_args} {type(pipe.unet).__name__} {iter_seed} {global_step}"
        return f"{self.words[prompt_index]} {seed_random.randint(0, 9)} --n {facts}"

    def shuffle(self):
        self.words.reverse()
"""


def test_prompts_of_a_python_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.file("prompter.py", PROMPTER)
    arguments = ["--from_module", path, "--n_iter", 2, "--seed", 3, "--sequential_file_name", "--from_file", "no.txt"]
    assert bench.run(*arguments, "--prompter_module_args", "x", "y", "--shuffle_prompts", "--iter_same_seed") == 0
    texts, seeds = bench.texts, bench.seeds
    assert [prompt.split()[0] for prompt in bench.prompts] == ["bird", "dog", "cat", "cat", "dog", "bird"]
    expected = [f"1 ('x', 'y') UNet2DConditionModel {seed} {step}" for step, seed in enumerate(seeds)]
    assert [text["negative-prompt"] for text in texts] == expected
    assert seeds == [seeds[0]] * 3 + [seeds[3]] * 3
    assert seeds[0] != seeds[3]
    assert "--from_file has no effect beside --from_module" in capsys.readouterr().err
    first = bench.prompts
    assert bench.run(*arguments) == 0
    assert sorted(prompt.split()[1] for prompt in bench.prompts) == sorted(prompt.split()[1] for prompt in first)


def test_wrong_lines_of_a_python_file_are_said_and_left_out(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a", "b --w 65", "c"]
    path = bench.file("lines.py", f"""
lines = iter({lines})
def get_prompter(args, pipe, networks):
    return lambda *_: next(lines, None)
""")  # fmt: skip
    assert bench.run("--from_module", path, "--sequential_file_name") == 2
    assert bench.prompts == ["a", "c"]
    said = capsys.readouterr().err
    assert "lines.py, prompt 2: --w: 65 is not a multiple of 8" in said
    assert "1 prompt could not be drawn" in said


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        ("", 2, "p.py has no function get_prompter(); name a Python file"),
        ("def get_prompter(*_): return 3", 2, "returned 3; it returns a function that makes prompts"),
        ("def get_prompter(*_): return lambda *_: 3", 2, "p.py made 3; prompts are texts"),
        ("def get_prompter(*_): return lambda *_: 'a --w x'", 2, "100 prompts in a row can't be drawn"),
        ("def get_prompter(*_): raise KeyError('x')", 2, "p.py, line 1: KeyError: 'x'; correct it"),
        ("def get_prompter(*_):\n  return lambda *_: 1 / 0", 2, "p.py, line 2: ZeroDivisionError: division by zero"),
        ("import no_such_package", 2, "p.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_python_files_that_are_no_prompters(
    bench: Bench, capsys: pytest.CaptureFixture[str], content: str, code: int, sentence: str
) -> None:
    assert bench.run("--from_module", bench.file("p.py", content)) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said and "--from_module: " in said


# ---------------------------------------------------------------------------------------------- broken lines


def test_a_broken_line_stops_the_run_before_it_starts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.file("prompts.txt", "good\nbad --w wide\n# fine\n{a|b} --h 65\nlast\n")
    assert bench.run("--from_file", path) == 2
    assert capsys.readouterr().err.strip().endswith(f"{path}, line 2: --w 'wide' is not a whole number")
    assert not bench.out.exists()


def test_the_other_lines_are_drawn_with_skip_errors(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.folder / "prompts.txt"
    path.write_bytes(b"good\nbad --w wide\n# fine\n{a|b} --h 65\n\xff\xfe\n((" + b"(" * 4000 + b"x\nlast --f last\n")
    assert bench.run("--from_file", path, "--skip_errors", "--n_iter", 2) == 2
    assert sorted(bench.prompts) == ["good", "good", "last", "last"]
    assert {path.name for path in bench.out.iterdir()} >= {"last.png", "last_2.png"}
    said = capsys.readouterr().err
    for number, problem in ((2, "--w 'wide' is not"), (4, "--h: 65 is"), (5, "is not UTF-8"), (6, "its brackets")):
        assert said.count(f"{path}, line {number}: {problem}") == 1, "once, not once for each repetition"
    assert said.strip().endswith("4 prompts could not be drawn")


def test_nothing_is_left(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("--from_file", bench.file("prompts.txt", "a --w x\n"), "--skip_errors") == 2
    assert "--skip_errors: no prompt is left; correct the lines named above" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["own.png", "own.webp", "own.jpg"])
def test_a_picture_is_made_again_from_what_it_tells(bench: Bench, name: str) -> None:
    line = f"a (cat:1.3), [dog] --n blurry, (bad) --w 72 --h 64 --s 3 --l 4.5 --d 77 --f {name}"
    assert bench.run("--prompt", line, "--clip_skip", 2) == 0
    first = bench.out / name
    assert bench.run("--from_file", first, "--sampler", "ddim", "--steps", 9, "--prompt", "no", "--seed", 5) == 0
    (again,) = bench.out.glob("*.png")
    with Image.open(again) as image:
        alike = encode(image, picture_texts(again, ""), first.suffix)
    pixels, original = (np.asarray(Image.open(file)) for file in (io.BytesIO(alike), first))
    assert original.shape == (64, 72, 3)
    assert (pixels == original).all()
    texts = picture_texts(again, "")
    assert texts["parameters"] == picture_texts(first, "")["parameters"]
    saved = bench.file("infotext.txt", texts["parameters"])
    assert bench.run("--from_file", saved) == 0
    assert bench.texts[0]["parameters"] == texts["parameters"]


def test_pictures_that_tell_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(bench.folder / "plain.png")
    bench.file("broken.png", "no picture")
    for name, sentence in (
        ("plain.png", "plain.png does not tell how it was made; name one that this program"),
        ("broken.png", "broken.png can't be read as a picture"),
        ("missing.png", "missing.png does not exist"),
    ):
        assert bench.run("--from_file", bench.folder / name) == 2
        assert f"--from_file: {bench.folder / sentence}" in capsys.readouterr().err


def test_pictures_to_start_from_lend_their_prompts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    sources = bench.folder / "sources"
    sources.mkdir()
    for index, name in enumerate(["a", "b", "c"]):
        info = PngInfo()
        if name != "b":
            info.add_text("prompt", f"{name} --w 8 {{x|y}}")
            info.add_text("negative-prompt", f"not {name}")
        Image.new("RGB", (64 + 32 * index, 64), (80 * index, 0, 0)).save(sources / f"{name}.png", pnginfo=info)
    assert generation.run(gen_img_diffusers.SCRIPT, [
        "--ckpt", str(bench.model), "--outdir", str(bench.out), "--image_path", str(sources), "--steps", "2",
        "--images_per_prompt", "2", "--use_original_file_name", "--sequential_file_name",
    ]) == 0  # fmt: skip
    assert f"--image_path: {sources / 'b.png'} has no prompt in it and is left out" in capsys.readouterr().err
    assert sorted(path.name for path in bench.out.glob("*.png")) == ["a.png", "a_2.png", "c.png", "c_2.png"]
    for path in bench.out.glob("*.png"):
        texts = picture_texts(path, "")
        assert (texts["prompt"], texts["negative-prompt"]) == (f"{path.name[0]} --w 8 {{x|y}}", f"not {path.name[0]}")
        assert Image.open(path).size == ((64 if path.name[0] == "a" else 128), 64), "each its own source"
    assert bench.run("--image_path", sources, "--prompt", "all", "--use_original_file_name", "--steps", 2) == 0
    assert [path.name for path in bench.out.glob("*.png")] == ["a.png"]
    assert bench.run("--image_path", sources / "b.png") == 2
    assert "--image_path: no prompt given, and none in 1 picture; add --prompt" in capsys.readouterr().err


def test_both_stages_of_a_named_picture(bench: Bench) -> None:
    arguments = ["--prompt", "a --f own --w 128 --h 128", "--highres_fix_scale", 0.5, "--highres_fix_steps", 1]
    assert bench.run(*arguments, "--highres_fix_save_1st", "--steps", 2) == 0
    sizes = {path.name: Image.open(path).size for path in bench.out.glob("*.png")}
    assert sizes == {"own.png": (128, 128), "own_1st.png": (64, 64)}


def test_names_of_sources_need_sources(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("--prompt", "a", "--use_original_file_name") == 0
    assert "--use_original_file_name has no effect without --image_path" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- seeds, order, names


def test_every_prompt_of_an_iteration_has_the_same_seeds(bench: Bench) -> None:
    path = bench.file("prompts.txt", "a\nb\nc --d 9\n")
    arguments = ["--from_file", path, "--sequential_file_name", "--iter_same_seed"]
    assert bench.run(*arguments, "--n_iter", 2, "--images_per_prompt", 2) == 0
    seeds = bench.seeds
    assert seeds[0:2] == seeds[2:4] and seeds[6:8] == seeds[8:10] and seeds[4:6] == seeds[10:12] == [9, 9]
    assert len(set(seeds)) == 5
    assert bench.run(*arguments, "--seed", 7) == 0
    assert bench.seeds == [7, 7, 9]


def test_prompts_are_shuffled_as_the_seed_says(bench: Bench, tiny_sdxl_path: Path) -> None:
    bench.model = tiny_sdxl_path
    path = bench.file("prompts.txt", "a\nb\nc\nd\n")
    arguments = ["--from_file", path, "--sequential_file_name", "--batch_size", 8, "--n_iter", 2, "--shuffle_prompts"]
    orders = []
    for _ in range(2):
        assert bench.run(*arguments, "--seed", 1, "--iter_same_seed", script=sdxl_gen_img.SCRIPT) == 0
        orders.append(bench.prompts)
    assert orders[0] == orders[1] != list("abcdabcd")
    assert sorted(orders[0][:4]) == sorted(orders[0][4:]) == list("abcd")
    assert len(set(bench.seeds[:4])) == len(set(bench.seeds[4:])) == 1


def test_options_of_a_line_end_with_it(bench: Bench) -> None:
    path = bench.file("prompts.txt", "a --w 72 --s 2 --l 3 --n x --d 5 --f own\nb\n")
    assert bench.run("--from_file", path, "--n_iter", 2, "--seed", 4) == 0
    texts = [text for text in bench.texts if text["prompt"] == "b"]
    assert [(text["steps"], text["scale"], text["negative-prompt"]) for text in texts] == [("1", "7.5", "")] * 2
    assert len({text["seed"] for text in texts}) == 2
    sizes = {path.name: Image.open(path).size for path in bench.out.glob("*.png")}
    assert sizes.pop("own.png") == sizes.pop("own_2.png") == (72, 64)
    assert set(sizes.values()) == {(64, 64)}


def test_names_that_lines_ask_for(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.file("prompts.txt", "a --f cat\nb --f cat.png\nc --f v1.5 dog.WEBP\nd --f {x|x}.jpg\n")
    assert bench.run("--from_file", path, "--sequential_file_name") == 0
    assert sorted(item.name for item in bench.out.iterdir()) == ["cat.png", "cat_2.png", "v1.5 dog.WEBP", "x.jpg"]
    assert Image.open(bench.out / "v1.5 dog.WEBP").format == "WEBP"
    for name in ("../up", "a/b", "..", "a:b", "", "x" * 300, "C:\\x"):
        assert bench.run("--prompt", f"a --f {name}") == 2
        assert "without a folder, which is --outdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], '--prompt: no prompt given; give --prompt "a photo of a cat", or a file of prompts'),
        (["--from_module", "missing.py"], "--from_module: missing.py does not exist; name a Python file"),
        (["--prompt", "{E$$a|b}" * 20], "--prompt: its braces enumerate 1048576 combinations; 10000 is the limit"),
        (["--prompt", "a --d x"], "--prompt: --d 'x' is not a seed"),
    ],
)
def test_mistakes_are_told_before_torch_is_loaded(bench: Bench, arguments: list[str], sentence: str) -> None:
    program = (
        "import sys, atexit, runpy; sys.argv = sys.argv[1:];"
        "atexit.register(lambda: print('HEAVY', [n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules]));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = ["gen_img_diffusers.py", "--ckpt", str(bench.model), "--outdir", str(bench.folder), *arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=Path(gen_img_diffusers.__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "HEAVY []" in done.stdout
