"""One command from a fresh clone to a picture of what a LoRA learned; another one to run every test.

    python quickstart.py          makes .venv, installs the tested packages, trains a LoRA on ten pictures, compares
    python quickstart.py test     the same environment, then all tests (further words go to pytest)

Needs nothing but Python 3.10 or newer. A second run installs nothing. Everything it makes lies in .venv and
outputs/quickstart; delete them to start over.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STARTER = ROOT / "starter"
OUTPUT = ROOT / "outputs" / "quickstart"
LOG = OUTPUT / "quickstart.log"
INSTALL_LOG = ROOT / "outputs" / "install.log"

REQUIREMENTS = ("requirements.txt", "constraints.txt")
DEVELOPMENT = (*REQUIREMENTS, "requirements-dev.txt")
TORCH_BUILDS = "https://download.pytorch.org/whl/"  # besides the package index: builds for one kind of device
CPU_BUILD, CUDA_BUILD = TORCH_BUILDS + "cpu", TORCH_BUILDS + "cu130"
PROBE_SECONDS = 3

NAME = "sks_cat"  # output_name in starter/train.toml
EARLY_STEP, FINAL_STEP = 100, 300  # save_every_n_steps and max_train_steps in starter/train.toml
SIZE, SAMPLING_STEPS, GUIDANCE = 128, 30, 4


class Failure(Exception):
    """A step that did not work: one sentence for the screen."""


# ---------------------------------------------------------------------------------------------- the two commands


def main() -> int:
    options, further = parse()
    if sys.version_info < (3, 10):  # noqa: UP036 (a sentence is kinder than a syntax error)
        print(f"quickstart: Python {platform.python_version()} is too old; use Python 3.10 or newer")
        return 2
    os.chdir(ROOT)
    try:
        if options.command == "test":
            prepare_environment(DEVELOPMENT, options.torch_index_url)
            return run_tests(further)
        prepare_environment(REQUIREMENTS, options.torch_index_url)
        quickstart()
    except Failure as failure:
        say(f"Stopped: {failure}")
        return 1
    except KeyboardInterrupt:
        say("Stopped by you.")
        return 130
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["test"], help="test: run all tests instead")
    parser.add_argument("--torch-index-url", metavar="URL", help="further index with torch's build for your device")
    options, further = parser.parse_known_args()
    if further and options.command != "test":
        parser.error(f"{further[0]}: unknown option")
    return options, further


def quickstart() -> None:
    started = time.monotonic()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    check_starter()
    forget_last_run()
    say("Training a LoRA on ten views of a cat that the starter model has never seen: train_network.py")
    config = ["--config_file", "starter/train.toml", "--dataset_config", "starter/dataset.toml"]
    run([PYTHON, "train_network.py", *config], "training")
    early, final = OUTPUT / f"{NAME}-step{EARLY_STEP:08d}.safetensors", OUTPUT / f"{NAME}.safetensors"
    draw("with the base model alone", "base")
    draw(f"with the LoRA after {EARLY_STEP} steps", "early", early)
    draw(f"with the LoRA after {FINAL_STEP} steps", "final", final)
    say("Putting the pictures side by side, and drawing the loss curve")
    titles = {"base": "base model", "early": f"LoRA, {EARLY_STEP} steps", "final": f"LoRA, {FINAL_STEP} steps"}
    columns = [word for folder, title in titles.items() for word in ("--column", title, OUTPUT / folder)]
    picture, curve = OUTPUT / "comparison.png", OUTPUT / "loss_curve.png"
    run([PYTHON, "starter/comparison.py", "--prompts", "starter/prompts.txt", *columns, "--output", picture], "drawing")
    run([PYTHON, "starter/loss_curve.py", "--logs", OUTPUT / "logs", "--output", curve], "drawing")
    say_what_next(picture, curve, final, time.monotonic() - started)


def run_tests(further: Sequence[str]) -> int:
    """All tests, two at a time, one thread each; returns pytest's exit code."""
    say("Running the tests")
    command = [str(PYTHON), "-m", "pytest", "-n", "2", *further]
    return subprocess.run(command, env=child_environment() | {"OMP_NUM_THREADS": "1"}, check=False).returncode


# ---------------------------------------------------------------------------------------------- environment


def prepare_environment(files: Sequence[str], torch_index_url: str | None) -> None:
    """A .venv with the tested packages; nothing is installed when it already holds what `files` ask for.

    A stamp file is written when an installation is complete: it says what .venv then held.
    """
    make_venv()
    stamp = VENV / "quickstart.txt"
    held = stamp.read_text(encoding="utf-8") if stamp.exists() else ""
    if held in (fingerprint(files), fingerprint(DEVELOPMENT)):
        say("The environment in .venv is up to date")
        return
    stamp.unlink(missing_ok=True)
    install_torch(torch_index_url)
    listed = [name for name in files if name.startswith("requirements")]
    say(f"Installing the packages of {' and '.join(listed)} in their tested versions")
    pip(*[word for name in listed for word in ("-r", name)], "-c", "constraints.txt")
    stamp.write_text(fingerprint(files), encoding="utf-8")


def make_venv() -> None:
    """Create .venv unless one is there whose Python runs and is this Python's version."""
    version = platform.python_version()
    if PYTHON.exists():
        ask = [str(PYTHON), "-c", "import platform; print(platform.python_version())"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return
        say(f"Replacing .venv: it does not hold Python {version}")
    else:
        say(f"Making an environment for this project in .venv (Python {version})")
    make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(make, capture_output=True, text=True, check=False)
    if made.returncode:
        reason = (made.stdout + made.stderr).strip().splitlines()[:1]
        hint = "; on Debian and Ubuntu install the package python3-venv first" if sys.platform == "linux" else ""
        raise Failure(f"Python could not make an environment in {VENV} ({' '.join(reason)}){hint}")


def fingerprint(files: Sequence[str]) -> str:
    """Changes when Python or one of `files` changes."""
    content = b"".join((ROOT / name).read_bytes().replace(b"\r\n", b"\n") for name in files)
    return hashlib.sha256(platform.python_version().encode() + content).hexdigest()


def install_torch(index_url: str | None) -> None:
    """torch first and alone, in its tested version, from the build that fits this machine."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    index_url = index_url or fitting_build()
    say(f"Installing {torch}{f' from {index_url}' if index_url else ''}: the largest package, this takes a while")
    pip(torch, *(["--extra-index-url", index_url] if index_url else []))


def fitting_build() -> str | None:
    """The index with torch's build for this machine; None where the usual index has it or nothing else is reachable.

    The usual index has CUDA builds for Linux (several GB), and plain ones for Windows and macOS.
    """
    has_nvidia = shutil.which("nvidia-smi") is not None
    url = {("linux", False): CPU_BUILD, ("win32", True): CUDA_BUILD}.get((sys.platform, has_nvidia))
    if url is None:
        return None
    try:
        with urllib.request.urlopen(url + "/torch/", timeout=PROBE_SECONDS):
            return url
    except urllib.error.HTTPError:
        say(f"{url} has no torch; the usual package index decides which build is installed")
    except OSError:
        say(f"{url} can't be reached; the usual package index decides which build is installed")
    return None


def pip(*arguments: str) -> None:
    INSTALL_LOG.parent.mkdir(exist_ok=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # its progress bars need a terminal
    options = ["--disable-pip-version-check", "--no-input", *quiet, "--log", str(INSTALL_LOG)]
    command = [str(PYTHON), "-m", "pip", "install", *options, *arguments]
    if subprocess.run(command, env=child_environment(), check=False).returncode:
        raise Failure(f"pip could not install {arguments[0]}; what it tried is in {relative(INSTALL_LOG)}")


# ---------------------------------------------------------------------------------------------- steps


def check_starter() -> None:
    """The starter model and pictures are as they were committed."""
    say("Checking the starter model and pictures")
    for line in (STARTER / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, name = line.split(maxsplit=1)
        path = STARTER / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            state = "is missing" if not path.is_file() else "was changed"
            raise Failure(f"{relative(path)} {state}; get it back with: git checkout starter")


def forget_last_run() -> None:
    """Delete what an earlier quickstart made, and nothing else, so that what is there is from this run."""
    for path in OUTPUT.glob(f"{NAME}*.safetensors"):
        path.unlink()
    for name in ("base", "early", "final", "logs"):
        shutil.rmtree(OUTPUT / name, ignore_errors=True)


def draw(how: str, folder: str, weights: Path | None = None) -> None:
    """The prompts of starter/prompts.txt, same seeds every time, into a folder of OUTPUT."""
    say(f"Drawing the prompts {how}: gen_img_diffusers.py")
    size = ["--W", str(SIZE), "--H", str(SIZE), "--steps", str(SAMPLING_STEPS), "--scale", str(GUIDANCE)]
    source = ["--ckpt", "starter/model.safetensors", "--from_file", "starter/prompts.txt"]
    network = [] if weights is None else ["--network_module", "networks.lora", "--network_weights", weights]
    output = ["--outdir", OUTPUT / folder, "--sequential_file_name", "--sampler", "euler_a", "--batch_size", "4"]
    run([PYTHON, "gen_img_diffusers.py", *source, *network, *size, *output], "drawing")


def run(command: Sequence[str | Path], step: str) -> None:
    """Run a step, showing what it says and keeping it in the log (progress bars only in their last state)."""
    words = [relative(word) if isinstance(word, Path) and word != PYTHON else str(word) for word in command]
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(words)}\n")
        # The starter's tensors are so small that further threads would mostly wait for each other.
        environment = child_environment() | {"OMP_NUM_THREADS": "1"}
        if sys.stdout.isatty():
            environment["PROGRESS_BARS"] = "1"  # they are passed on as they come
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert process.stdout is not None
        decoder, line = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        try:
            while chunk := process.stdout.read1(4096):  # type: ignore[attr-defined]
                text = decoder.decode(chunk)
                sys.stdout.write(text)
                sys.stdout.flush()
                *done, line = (line + text).split("\n")
                log.writelines(finished.rstrip("\r").rpartition("\r")[2] + "\n" for finished in done)
            code = process.wait()
        except KeyboardInterrupt:
            process.stdout.read()  # the interrupt went to it as well: it saves and ends by itself
            raise
        log.write(line.rpartition("\r")[2])
    if code:
        raise Failure(f"{step} ended with exit code {code}; all it said is in {relative(LOG)}")


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


# ---------------------------------------------------------------------------------------------- words


def say(sentence: str) -> None:
    print(f"[quickstart] {sentence}", flush=True)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say_what_next(picture: Path, curve: Path, lora: Path, seconds: float) -> None:
    python = shlex.quote(relative(PYTHON)) if os.name != "nt" else relative(PYTHON)
    train = (
        "--pretrained_model_name_or_path MODEL.safetensors --train_data_dir PICTURES --resolution 512",
        "--max_train_steps 1500 --learning_rate 1e-4",
        "--network_module networks.lora --network_dim 16 --network_alpha 16",
        "--cache_latents --gradient_checkpointing --mixed_precision bf16 --output_dir outputs/mine --output_name mine",
    )
    generate = f'{python} gen_img_diffusers.py --ckpt MODEL.safetensors --prompt "YOUR PROMPT --d 1" --outdir'
    network = "--network_module networks.lora --network_weights outputs/mine/mine.safetensors"
    print(f"""
Done in {seconds:.0f} seconds. Look at {relative(picture)}
  the LoRA    {relative(lora)}
  the loss    {relative(curve)}
  the log     {relative(LOG)}

The same with your own model and pictures (each may have a .txt file with its caption beside it):
  {python} train_network.py {" ".join(train)}
  {generate} outputs/mine/without
  {generate} outputs/mine/with {network}
""")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
