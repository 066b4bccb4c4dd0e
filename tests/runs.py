"""Running the real scripts in tests: inside this process where that is enough, as a subprocess where it is not."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def flags(**options) -> list[str]:
    """Command line words: True is a switch, None leaves the option out, a list gives several values."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return words


def train_network(**options) -> int:
    """train_network.py in this process; returns the exit code."""
    import train_network as entry

    return run_script(entry, options)


def sdxl_train_network(**options) -> int:
    """sdxl_train_network.py in this process; returns the exit code."""
    import sdxl_train_network as entry

    return run_script(entry, options)


def caching_tool(name: str, **options) -> int:
    """tools/<name>.py in this process; returns the exit code."""
    from library.cli.caching import run

    entry = importlib.import_module(f"tools.{name}")
    return alone(lambda: run(entry.TOOL, flags(**options)))


def run_script(entry: ModuleType, options: Mapping[str, Any]) -> int:
    """A training script in this process; returns the exit code."""
    from library.cli.training import run

    return alone(lambda: run(entry.SCRIPT, flags(**options)))


def alone(action: Callable[[], int]) -> int:
    """As if in a process of its own: what `action` returns, or the exit code that a parser ends it with."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return action()
    except SystemExit as end:  # as the parser ends a program
        return int(end.code or 0)
    finally:
        torch.set_num_threads(threads)


def script(name: str, *words: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """A script as users start it."""
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, **{"cwd": ROOT, "env": ENVIRONMENT, **kwargs}
    )


def in_two_processes(name: str, *words: object, **options) -> None:
    """A script as accelerate starts it on two processes of the CPU."""
    command = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", ROOT / name, *words, *flags(**options),
    ]  # fmt: skip
    done = _launched(command, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr


def with_deepspeed(name: str, num_processes: int = 2, **options) -> subprocess.CompletedProcess[str]:
    """A script with --deepspeed on processes of the CPU, as torchrun starts it."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", num_processes, ROOT / name]
    return _launched([*command, *flags(**options, deepspeed=True)])


def with_fsdp(name: str, settings: Mapping[str, object], folder: Path, **options) -> None:
    """A script as accelerate starts it with an FSDP configuration, whose file is put into `folder`, on the CPU."""
    file = folder / "accelerate.yaml"
    lines = [f"  fsdp_{key}: {value}" for key, value in settings.items()]
    head = ["distributed_type: FSDP", "num_machines: 1", "num_processes: 2", "mixed_precision: 'no'", "fsdp_config:"]
    file.write_text("\n".join([*head, *lines]), encoding="utf-8")
    command = ["accelerate.commands.launch", "--config_file", file, "--dynamo_backend", "no", ROOT / name]
    done = _launched([*command, *flags(**options)], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr


def _launched(command: Sequence[Any], **variables: str) -> subprocess.CompletedProcess[str]:
    """What starts several processes and waits for them."""
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, timeout=600)


def equal_files(first: Path, second: Path) -> bool:
    """Whether two network files hold the same tensors, bit for bit."""
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def logged(folder: Path, tag: str) -> list[float]:
    """The values of one TensorBoard tag in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = [path for path in folder.rglob("events.out.tfevents.*") if path.stat().st_size > 0]
    accumulator = EventAccumulator(str(events.parent), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars(tag)]
