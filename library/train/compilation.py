"""Compiling the U-Net with torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch

from library.options import OptionError

FLAG = "--dynamo_backend"


def compile_unet(unet: torch.nn.Module, backend: str, device: torch.device) -> None:
    """Let `unet` be compiled on its first call, for shapes of any size; raises OptionError where that can't be.

    The module stays the one it is, with its parameters' names: only its calls are compiled.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        usual = [name for name in ("inductor", "eager", "aot_eager", "cudagraphs") if name in known]
        raise OptionError(FLAG, f"{backend} is not part of this PyTorch", f"use one of {', '.join(usual)}")
    if backend == "inductor":
        _check_compiler(device)
    module: Any = unet
    module.compile(backend=backend)


def _check_compiler(device: torch.device) -> None:
    """inductor writes Triton code for a GPU and C++ for the CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        package = "triton-windows" if os.name == "nt" else "triton"
        raise OptionError("--torch_compile", "inductor needs the package triton", f"pip install {package}")
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise OptionError(
            "--torch_compile", "inductor needs a C++ compiler", "install g++ or use --dynamo_backend eager"
        )
