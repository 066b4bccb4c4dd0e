"""Files of weights, read lazily: names and shapes at once, each tensor when it is asked for.

Tensors are memory-mapped views of the file: whoever keeps one copies it, once, to where it shall live.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.checkpoints.adapter_metadata import adapter_alphas
from library.checkpoints.safetensors_header import DTYPES, GET_IT_AGAIN, Header, TensorInfo
from library.checkpoints.safetensors_io import header_dtype, read_header
from library.options import OptionError

if TYPE_CHECKING:
    import torch

WEIGHTS_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")  # of files to write; all but the first: PyTorch's own form
# what torch.load raises on files that are damaged or something else
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError,
    ValueError, KeyError, AttributeError, TypeError, IndexError,
)  # fmt: skip


class Weights(Protocol):
    """Named tensors of one or several files; a context manager that closes them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """As a safetensors header names them: "F16", "F32", ..."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """A CPU tensor that may share memory with the file."""
        ...

    def __enter__(self) -> Weights: ...

    def __exit__(self, *error: object) -> None: ...


def open_weights(path: Path | str, where: str = "") -> Weights:
    """Open a .safetensors file or a pickle by content, not by name; raises OptionError for anything else."""
    path = Path(path)
    if is_safetensors(path):
        return SafetensorsWeights(path, where)
    return PickledWeights(path, where)


def load_tensors(path: Path | str, where: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file, or of a pickle (.pt, .ckpt, .bin) through torch's weights-only reader.

    The alphas that diffusers and PEFT note in a header are among them, as `<path>.alpha`.
    """
    import torch

    with open_weights(path, where) as weights:
        tensors = {name: weights.tensor(name).clone() for name in weights.shapes}
        noted = adapter_alphas(weights.shapes, weights.metadata, path)
    return {f"{module}.alpha": torch.tensor(alpha) for module, alpha in noted.items()} | tensors


def is_safetensors(path: Path) -> bool:
    """By the extension, as the trade decides, or else by the first bytes."""
    if path.suffix.lower() == ".safetensors" or not path.is_file():
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith(b"PK")


class SafetensorsWeights:
    """A .safetensors file, memory-mapped. Only the header is read until a tensor is asked for.

    The pages of a tensor are handed back to the system when the next one is asked for, so that copying a whole model
    out of its file takes no more memory than the copy. Its view stays valid as long as it is referred to.
    """

    def __init__(self, path: Path, where: str = "") -> None:
        self.path = path
        self.header: Header = read_header(path, where)
        self.shapes = {name: info.shape for name, info in self.header.tensors.items()}
        self.dtypes = {name: info.dtype for name, info in self.header.tensors.items()}
        self.metadata = self.header.metadata
        self._map: mmap.mmap | None = None
        self._touched: TensorInfo | None = None

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        info = self.header.tensors[name]
        width, torch_name = DTYPES[info.dtype]
        dtype: torch.dtype = getattr(torch, torch_name)
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._release()
        self._touched = info
        size = info.end - info.start
        if info.start % width:  # old writers did not align
            data = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=info.start).clone().view(dtype)
        else:
            data = torch.frombuffer(self._map, dtype=dtype, count=size // width, offset=info.start)
        return data.reshape(info.shape)

    def _release(self) -> None:
        if self._map is None or self._touched is None or not hasattr(self._map, "madvise"):
            return
        start = self._touched.start - self._touched.start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, self._touched.end - start)

    def __enter__(self) -> SafetensorsWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._map = self._touched = None


class PickledWeights:
    """A .ckpt, .pt or .bin file: a dictionary of tensors, or one under "state_dict" or, in files of textual inversion,
    "string_to_param". A hypernetwork's two networks of each width become "768.0.linear1.weight" and so on.

    torch's weights-only reader runs no code of the file. Training programs leave foreign objects in such files (their
    callbacks, numbers of numpy); these become inert placeholders, and `inert` has the names of their classes. A file
    whose loading would run commands is refused.
    """

    def __init__(self, path: Path, where: str = "") -> None:
        self.path = path
        subject = f"{where}: {path}" if where else f"{path}"
        content, self.inert = _unpickle(path, subject)
        state = _state(content, subject)
        self.extra = {key: content[key] for key in ("epoch", "global_step") if state is not content and key in content}
        named = _flattened(state, subject).items()
        self._tensors = {name: _plain(name, value, subject) for name, value in named if _is_tensor(value)}
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.dtypes = {name: header_dtype(value.dtype) for name, value in self._tensors.items()}
        self.metadata: dict[str, str] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __enter__(self) -> PickledWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors = {}


def _state(content: Mapping[Any, Any], subject: str) -> Mapping[Any, Any]:
    for key in ("state_dict", "string_to_param"):
        if key in content:
            if not isinstance(content[key], Mapping):
                raise OptionError("", f"{subject} is no model file: its {key} is no dictionary of tensors")
            return content[key]
    return content


def _flattened(state: Mapping[Any, Any], subject: str) -> dict[str, Any]:
    """A dictionary by texts; lists of dictionaries under numbers, as hypernetworks have them, by paths."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(name, str):
            flat[name] = value
        elif _is_tensor(value):
            raise OptionError("", f"{subject} is no model file: its tensor {name!r} has no text as its name")
        elif isinstance(name, int) and isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                if isinstance(inner, Mapping):
                    flat |= {f"{name}.{number}.{key}": item for key, item in inner.items()}
    return flat


def _plain(name: str, tensor: torch.Tensor, subject: str) -> torch.Tensor:
    """The tensor without a gradient; OptionError for what is no ordinary array of numbers that a file can hold."""
    import torch

    problem = ""
    if tensor.is_meta:
        problem = "has no content"
    elif tensor.layout is not torch.strided:
        problem = "is sparse"
    elif tensor.is_quantized:
        problem = "is quantised"
    elif str(tensor.dtype).removeprefix("torch.") not in TORCH_NAMES:
        problem = f"is of the data type {str(tensor.dtype).removeprefix('torch.')}, which is not known here"
    if problem:
        raise OptionError("", f"{subject}: {name} {problem}", "save it as an ordinary tensor by the program it is of")
    return tensor.detach()


class Inert:
    """Stands for an object of a class that is not loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class ParameterTable(dict):
    """Stands for torch.nn.ParameterDict: its parameters by name."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update(state["_parameters"])


KNOWN_CLASSES = {"torch.nn.modules.container.ParameterDict": ParameterTable}
TORCH_NAMES = {name for _, name in DTYPES.values()}
# whoever names something of these in a model file wants commands to run when it is loaded
CODE_MODULES = {
    "builtins", "__builtin__", "code", "commands", "ctypes", "importlib", "nt", "os", "pickle", "posix", "pty",
    "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser",
}  # fmt: skip
PLAIN_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "tuple", "type",
    "getattr",  # by which newer versions of Python store members of enumerations
}  # fmt: skip


def runs_code(name: str) -> bool:
    """Whether a function or class that a pickle names, such as "posix.system", is there to run commands."""
    module, _, rest = name.partition(".")
    return module in CODE_MODULES and not (module in ("builtins", "__builtin__") and rest in PLAIN_BUILTINS)


def _unpickle(path: Path, subject: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a pickle holds, and the names of the classes whose objects became inert."""
    import torch

    is_zip = zipfile.is_zipfile(path)
    foreign: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            if is_zip:
                foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
                code = [name for name in foreign if runs_code(name)]
                if code:
                    raise _holds_code(subject, code)
                stack.enter_context(
                    torch.serialization.safe_globals([(KNOWN_CLASSES.get(name, Inert), name) for name in foreign])
                )
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OptionError:
        raise
    except DAMAGE as error:
        said = str(error)
        named = re.findall(r"GLOBAL ([\w.]+)", said)  # without its module: of builtins
        code = [name for name in named if runs_code(name if "." in name else f"builtins.{name}")]
        if code or "is blocked" in said:  # PyTorch's word for modules that run programs, such as os
            raise _holds_code(subject, code) from None
        if "Unsupported global" in said:  # foreign objects in the form of before PyTorch 1.6, which has no list of them
            problem = f"{subject} holds more than tensors, in an old form that can't be read safely"
            raise OptionError("", problem, "convert it to .safetensors") from None
        with path.open("rb") as file:
            looks_torch = file.read(2) in (b"PK", b"\x80\x02")
        problem = "is damaged or truncated" if looks_torch else "is no model file"
        raise OptionError("", f"{subject} {problem}", "copy or download it again" if looks_torch else "") from None
    if not isinstance(content, dict):
        raise OptionError("", f"{subject} is no model file: it holds no dictionary of tensors")
    return content, tuple(name for name in foreign if name not in KNOWN_CLASSES)


def _holds_code(subject: str, names: list[str]) -> OptionError:
    listed = f" ({', '.join(names)})" if names else ""
    problem = f"{subject} holds code that would run when it is loaded{listed}, and is not opened"
    return OptionError("", problem, "don't use it; get the model elsewhere, as .safetensors")


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


class MergedWeights:
    """Several files as one: the shards of a large Diffusers component."""

    def __init__(self, parts: list[Weights]) -> None:
        self.parts = parts
        self._home = {name: part for part in parts for name in part.shapes}
        self.shapes = {name: part.shapes[name] for name, part in self._home.items()}
        self.dtypes = {name: part.dtypes[name] for name, part in self._home.items()}
        self.metadata: dict[str, str] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return self._home[name].tensor(name)

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.__exit__(*error)


def read_config(path: Path, where: str = "") -> dict[str, Any]:
    """A JSON file of a Diffusers folder: a component's configuration, or an index."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(where, f"{path} is missing", "check that the Diffusers folder is complete") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(where, f"{path} is no valid JSON ({error})", GET_IT_AGAIN) from None
    if not isinstance(content, dict):
        raise OptionError(where, f"{path} holds no JSON object", GET_IT_AGAIN)
    return content


def open_component(folder: Path, stem: str, where: str = "", variant: str | None = None) -> Weights:
    """The weights of one component of a Diffusers folder: `stem`.safetensors, a sharded one, an fp16 variant, or .bin.

    With a `variant`, such as "fp16" or "non_ema", its files alone. `stem` is "diffusion_pytorch_model" or "model"; the
    .bin of text encoders is called "pytorch_model".
    """
    old_stem = "pytorch_model" if stem == "model" else stem
    infixes = (f".{variant}",) if variant else ("", ".fp16")
    names = [f"{stem}{infix}.safetensors" for infix in infixes]
    names += [f"{old_stem}{infix}.bin" for infix in infixes]
    for name in names:
        if (folder / name).is_file():
            return open_weights(folder / name, where)
        index = folder / f"{name}.index.json"
        if not index.is_file() and variant:  # diffusers puts the variant last but one in the names of indices
            index = folder / f"{name.replace(f'.{variant}', '')}.index.{variant}.json"
        if index.is_file():
            places = read_config(index, where).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
                problem = f"{index} has no weight_map, which says what file a tensor is in"
                raise OptionError(where, problem, GET_IT_AGAIN)
            shards = sorted(set(places.values()))
            return MergedWeights([open_weights(folder / shard, where) for shard in shards])
    subject = f"{where}: {folder}" if where else f"{folder}"
    raise OptionError("", f"{subject} holds no {names[0]}", "check that the download is complete")
