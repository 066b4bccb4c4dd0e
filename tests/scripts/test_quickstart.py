"""quickstart.py without installing anything: environment, checks and words; and that all it relies on fits together."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import toml
from PIL import Image, ImageStat

import quickstart
from starter import comparison, loss_curve

ROOT = Path(quickstart.__file__).parent


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A project folder with a blank in its name, for quickstart to act on instead of the real one."""
    root = tmp_path / "my project"
    for name in quickstart.DEVELOPMENT:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    venv = root / ".venv"
    places = {
        "ROOT": root,
        "VENV": venv,
        "PYTHON": venv / quickstart.PYTHON.relative_to(quickstart.VENV),
        "STARTER": root / "starter",
        "OUTPUT": root / "outputs" / "quickstart",
        "LOG": root / "outputs" / "quickstart" / "quickstart.log",
        "INSTALL_LOG": root / "outputs" / "install.log",
    }
    for name, path in places.items():
        monkeypatch.setattr(quickstart, name, path)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def installations(monkeypatch):
    """What pip is asked to install; nothing is."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(quickstart, "pip", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(quickstart, "fitting_build", lambda: None)
    return asked


# ---------------------------------------------------------------------------------------------- environment


def test_uses_the_standard_library_only():
    tree = ast.parse((ROOT / "quickstart.py").read_text(encoding="utf-8"))
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_installs_once_and_again_after_a_change(house, installations):
    quickstart.prepare_environment(quickstart.REQUIREMENTS, None)
    constraint = next(
        line for line in (house / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    assert installations == [(constraint,), ("-r", "requirements.txt", "-c", "constraints.txt")]
    answer = subprocess.run([quickstart.PYTHON, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    assert str(house) in answer.stdout

    quickstart.prepare_environment(quickstart.REQUIREMENTS, None)
    assert len(installations) == 2

    quickstart.prepare_environment(quickstart.DEVELOPMENT, None)
    assert installations[-1] == ("-r", "requirements.txt", "-r", "requirements-dev.txt", "-c", "constraints.txt")
    quickstart.prepare_environment(quickstart.REQUIREMENTS, None)  # the larger set holds the smaller one
    assert len(installations) == 4

    with (house / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    quickstart.prepare_environment(quickstart.REQUIREMENTS, None)
    assert len(installations) == 6


def test_an_interrupted_installation_is_done_again(house, installations, monkeypatch):
    def fail(*arguments: str) -> None:
        raise quickstart.Failure("no network")

    monkeypatch.setattr(quickstart, "pip", fail)
    with pytest.raises(quickstart.Failure):
        quickstart.prepare_environment(quickstart.REQUIREMENTS, None)
    monkeypatch.setattr(quickstart, "pip", lambda *arguments: installations.append(arguments))
    quickstart.prepare_environment(quickstart.REQUIREMENTS, None)
    assert len(installations) == 2


def test_the_given_index_is_used_for_torch(house, installations):
    quickstart.install_torch("https://example.org/whl/xpu")
    assert installations[0][1:] == ("--extra-index-url", "https://example.org/whl/xpu")


@pytest.mark.parametrize(
    ("system", "nvidia", "reachable", "expected"),
    [
        ("linux", False, True, quickstart.CPU_BUILD),
        ("linux", False, False, None),
        ("linux", True, True, None),  # the usual index has CUDA builds for Linux
        ("win32", True, True, quickstart.CUDA_BUILD),
        ("win32", False, True, None),
        ("darwin", False, True, None),
    ],
)
def test_chooses_the_build_of_torch(monkeypatch, capsys, system, nvidia, reachable, expected):
    def answer(url, timeout):
        assert timeout <= 3
        if not reachable:
            raise urllib.error.URLError("no route")
        return open(os.devnull, "rb")

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("shutil.which", lambda name: "nvidia-smi" if nvidia else None)
    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert quickstart.fitting_build() == expected
    assert ("can't be reached" in capsys.readouterr().out) == (not reachable)


# ---------------------------------------------------------------------------------------------- steps


def test_runs_a_step_showing_and_keeping_what_it_says(house, capsys):
    quickstart.OUTPUT.mkdir(parents=True)
    bar = "print('first'); print('10%\\r50%\\r100% \\u2588'); print('last', end='')"
    quickstart.run([sys.executable, "-c", bar], "counting")
    assert "10%\r50%\r100% \u2588" in capsys.readouterr().out
    assert quickstart.LOG.read_text(encoding="utf-8").splitlines()[-3:] == ["first", "100% \u2588", "last"]


def test_a_failed_step_is_one_sentence_with_the_log(house):
    quickstart.OUTPUT.mkdir(parents=True)
    with pytest.raises(quickstart.Failure, match="counting ended with exit code 3.*quickstart.log"):
        quickstart.run([sys.executable, "-c", "raise SystemExit(3)"], "counting")


def test_changed_and_missing_starter_files_are_named(house):
    quickstart.STARTER.mkdir()
    (quickstart.STARTER / "a b.jpg").write_bytes(b"picture")
    sums = quickstart.STARTER / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(b'picture').hexdigest()}  a b.jpg\n")
    quickstart.check_starter()
    (quickstart.STARTER / "a b.jpg").write_bytes(b"other")
    with pytest.raises(quickstart.Failure, match="a b.jpg was changed.*git checkout"):
        quickstart.check_starter()
    (quickstart.STARTER / "a b.jpg").unlink()
    with pytest.raises(quickstart.Failure, match="a b.jpg is missing"):
        quickstart.check_starter()


def test_forgets_its_own_files_only(house):
    quickstart.OUTPUT.mkdir(parents=True)
    mine = [quickstart.OUTPUT / f"{quickstart.NAME}{end}.safetensors" for end in ("", "-step00000060")]
    (quickstart.OUTPUT / "base").mkdir()
    yours = quickstart.OUTPUT / "my_lora.safetensors"
    for path in (*mine, yours):
        path.touch()
    quickstart.forget_last_run()
    assert [path.name for path in quickstart.OUTPUT.iterdir()] == [yours.name]


def test_an_old_python_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert quickstart.main() == 2
    assert (
        capsys.readouterr().out
        == f"quickstart: Python {platform.python_version()} is too old; use Python 3.10 or newer\n"
    )


def test_a_typo_is_refused():
    result = subprocess.run([sys.executable, "quickstart.py", "tset"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "tset" in result.stderr


# ---------------------------------------------------------------------------------------------- the starter


def test_the_starter_is_complete_and_unchanged():
    quickstart.check_starter()
    listed = {line.split(maxsplit=1)[1] for line in (ROOT / "starter" / "SHA256SUMS").read_text().splitlines()}
    pictures = {path.relative_to(ROOT / "starter").as_posix() for path in (ROOT / "starter").rglob("*.jpg")}
    captions = {path.relative_to(ROOT / "starter").as_posix() for path in (ROOT / "starter" / "photos").rglob("*.txt")}
    assert listed == {name for name in pictures if name.startswith("photos/")} | captions | {"model.safetensors"}
    attribution = (ROOT / "starter" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in pictures:
        assert Path(name).stem in attribution
        assert max(Image.open(ROOT / "starter" / name).size) <= 256
        assert (ROOT / "starter" / name).with_suffix(".txt").exists()


def test_quickstart_and_its_toml_agree():
    config = toml.load(ROOT / "starter" / "train.toml")
    flat = {key: value for section in config.values() for key, value in section.items()}
    assert (flat["output_name"], flat["save_every_n_steps"]) == (quickstart.NAME, quickstart.EARLY_STEP)
    assert flat["max_train_steps"] == quickstart.FINAL_STEP
    assert ROOT / flat["output_dir"] == quickstart.OUTPUT
    assert ROOT / flat["logging_dir"] == quickstart.OUTPUT / "logs"
    subset = toml.load(ROOT / "starter" / "dataset.toml")["datasets"][0]["subsets"][0]
    assert len(list((ROOT / subset["image_dir"]).glob("*.jpg"))) == 10


# ---------------------------------------------------------------------------------------------- pictures


def test_comparison_has_a_row_per_prompt_and_a_column_per_folder(tmp_path):
    colors = {"base": ["red", "lime"], "final": ["blue", "yellow"]}
    for folder, names in colors.items():
        (tmp_path / folder).mkdir()
        for number, color in enumerate(names):
            Image.new("RGB", (64, 64), color).save(tmp_path / folder / f"im_{number}.png")
    (tmp_path / "prompts.txt").write_text("# comment\na cat --d 1\n\na dog --d 2\n")
    prompts = comparison.prompts_of(tmp_path / "prompts.txt")
    assert prompts == ["a cat", "a dog"]
    sheet = comparison.comparison(prompts, [(name, comparison.pictures_of(tmp_path / name, 2)) for name in colors])
    for column, name in enumerate(colors):
        for row, color in enumerate(colors[name]):
            x = comparison.GAP + column * (comparison.CELL + comparison.GAP) + comparison.CELL // 2
            y = comparison.HEADER + row * (comparison.CAPTION + comparison.CELL + comparison.GAP) + comparison.CELL // 2
            assert sheet.getpixel((x, y)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
    title = sheet.crop((0, 0, sheet.width, comparison.HEADER)).convert("L")
    assert ImageStat.Stat(title).extrema[0][0] < 100  # there is dark text


def test_comparison_refuses_a_folder_with_other_pictures(tmp_path):
    with pytest.raises(SystemExit, match="holds 0 pictures for 2 prompts"):
        comparison.pictures_of(tmp_path, 2)


def test_loss_curve_reads_the_log_and_draws_a_falling_line(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(1, 101):
            writer.add_scalar(loss_curve.TAG, 1 / step, step)
    points = loss_curve.read_losses(tmp_path)
    assert points[0] == (1, 1.0)
    assert len(points) == 100
    image = loss_curve.loss_curve(points)
    rows = {x: [y for y in range(image.height) if image.getpixel((x, y)) == (26, 102, 204)] for x in (200, 800)}
    assert max(rows[200]) < max(rows[800])


def test_smoothing_is_the_mean_of_the_last_points():
    assert loss_curve.smoothed([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1, 1.0), (2, 2.0), (3, 4.0)]
