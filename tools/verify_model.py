"""Say what a file of weights is, what it was trained with, whether it is sound and whether it fits a base model.

Any file of the trade: checkpoints, VAEs, LoRA and its relatives, textual inversion, ControlNets, hypernetworks, and
Diffusers folders. The exit code is 0 for a sound file and 2 for any other. See docs/models_and_loras.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.architecture import ArchitectureError, is_refiner
from library.checkpoints.hashed_file import LEGACY_HASH, MODEL_HASH, SPEC_HASH, sshs_hashes_of_file
from library.checkpoints.network_kind import kind_by_header
from library.checkpoints.own_folders import EXTRAS
from library.checkpoints.probe import resolve_model
from library.checkpoints.scaled import scale_key
from library.checkpoints.stored_model import STEMS, original_shapes
from library.checkpoints.tensor_health import Health
from library.checkpoints.trained_with import trained_with
from library.checkpoints.weights import Weights, is_safetensors, open_component, open_weights, read_config
from library.cli.tools import Tool
from library.options import OptionError, opt, require
from library.progress import progress_bar
from library.wording import aligned, counted
from networks.key_names import DOWN
from networks.weights.base_fit import Fit, fit, missing_places
from networks.weights.block_names import block_name, block_order
from networks.weights.file_identity import CHECKPOINT, NETWORK, Identity, identify, told_elsewhere
from networks.weights.network_file import NetworkFile

MODEL, BASE = "model", "--base"
LISTED = 12  # keys of a list that are shown without --show_all_keys


@dataclass(frozen=True)
class VerifyOptions:
    """What is verified."""

    model: str = opt("", help="file or Diffusers folder to verify")
    base: str | None = opt(help="model (file or Diffusers folder) that has to have a use for every key of the file")
    header_only: bool = opt(False, help="read no weights: no counts of NaN, no norms, no hashes; done at once")
    show_all_keys: bool = opt(False, help=f"list all keys in question, not the first {LISTED}")

    def __post_init__(self) -> None:
        require(bool(self.model), MODEL, "is needed", "name a file or folder")


@dataclass
class Findings:
    """What is wrong, in sentences."""

    problems: list[str] = field(default_factory=list)


def verify(options: VerifyOptions) -> None:
    """Print all that is found; raises OptionError for a file that is not sound."""
    path = resolve_model(options.model, MODEL)
    findings = Findings()
    with contextlib.ExitStack() as stack:
        if path.is_dir() and not (path / "config.json").is_file():
            _verify_folder(path, options, findings)
        else:
            weights = stack.enter_context(_opened(path))
            _verify_file(path, weights, options, findings)
    if findings.problems:
        raise OptionError("", f"{options.model} is not sound: {'; '.join(findings.problems)}")
    print("\nsound")


def _opened(path: Path) -> Weights:
    """A file, or the weights of one part of a Diffusers folder, which has a config.json."""
    if not path.is_dir():
        return open_weights(path, MODEL)
    files = [*path.glob("model.*"), *path.glob("pytorch_model.*"), *path.glob("model-*")]
    return open_component(path, "model" if files else "diffusion_pytorch_model", MODEL)


def _print_table(title: str, rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    if rows:
        print(f"\n{title}")
        print("\n".join(aligned(rows, numbers)))


# ---------------------------------------------------------------------------------------------- one file


def _verify_file(path: Path, weights: Weights, options: VerifyOptions, findings: Findings) -> None:
    identity = told_elsewhere(identify(weights.shapes), kind_by_header(weights.metadata), "its header")
    file = _as_network(path, identity)
    found = None
    if options.base is not None and identity.sort:
        kind, base = original_shapes(options.base, BASE)
        found = fit(identity, file, weights.shapes, kind, base)
        identity = identity if found.unused else told_elsewhere(identity, kind, BASE)
    form = "safetensors" if path.is_dir() or is_safetensors(path) else "PyTorch pickle"
    print(f"{path}: {identity.what}")
    facts = [("form", form), ("tensors", f"{len(weights.shapes):,}"), ("precision", _precisions(weights))]
    if inert := getattr(weights, "inert", ()):  # of a pickle
        facts.append(("not loaded", f"objects of {', '.join(inert)}"))
    _print_table("file", facts)
    _print_table("header", trained_with(weights.metadata))
    if not identity.sort:
        findings.problems.append("it is no file of the trade")
        return
    if found is not None:
        _report_fit(found, options, findings)
    elif file is not None:
        _ = file.pairs  # raises where half of one is missing
    if key := scale_key(weights.shapes):
        findings.problems.append(f"its float8 weights have scales of their own ({key}), which are not read here")
    if identity.sort == CHECKPOINT and not is_refiner(weights.shapes):
        _report_missing(weights, identity, options, findings)
    if options.header_only:
        return
    _report_hashes(path, weights, findings)
    _report_health([("", weights)], file, findings)


def _report_missing(weights: Weights, identity: Identity, options: VerifyOptions, findings: Findings) -> None:
    try:
        missing = missing_places(weights.shapes, identity.kind)
    except ArchitectureError as error:
        findings.problems.append(str(error))
        return
    _print_keys(missing, "missing", options)
    if missing:
        findings.problems.append(f"it lacks {counted(len(missing), 'tensor')} of its own model")


def _as_network(path: Path, identity: Identity) -> NetworkFile | None:
    """The same file with the modules of a network, where it is one."""
    return NetworkFile(path, MODEL) if identity.sort == NETWORK else None


def _precisions(weights: Weights) -> str:
    """ "F16 685, I64 1"."""
    dtypes = sorted(weights.dtypes.values())
    return ", ".join(f"{dtype} {dtypes.count(dtype)}" for dtype in dict.fromkeys(dtypes))


def _report_fit(found: Fit, options: VerifyOptions, findings: Findings) -> None:
    print(f"\nwith the base {options.base}")
    for note in found.notes:
        print(f"  {note}")
    _print_keys([f"{key}: {why}" for key, why in found.unused.items()], "not used", options)
    _print_keys(found.missing, "missing", options)
    if not (found.unused or found.missing):
        print("  every key is used")
    if found.unused:
        findings.problems.append(f"{counted(len(found.unused), 'key')} would not be used by the base")
    if found.missing:
        findings.problems.append(f"{counted(len(found.missing), 'key')} missing for the base")


def _print_keys(keys: Sequence[str], what: str, options: VerifyOptions) -> None:
    if not keys:
        return
    print(f"  {what}: {counted(len(keys), 'key')}")
    shown = keys if options.show_all_keys else keys[:LISTED]
    for key in shown:
        print(f"    {key}")
    if len(shown) < len(keys):
        print(f"    and {len(keys) - len(shown)} more (--show_all_keys lists them)")


# -------------------------------------------------------------------------------------- Diffusers folder


def _verify_folder(path: Path, options: VerifyOptions, findings: Findings) -> None:
    kind, sizes = original_shapes(str(path), MODEL)  # raises for a part that is incomplete
    identity = identify(sizes)
    print(f"{path}: Diffusers folder: {identity.what}")
    index = path / "model_index.json"
    content = read_config(index, MODEL) if index.is_file() else {}
    _print_table("file", [("pipeline", content.get("_class_name", "not said")), ("tensors", f"{len(sizes):,}")])
    if options.base is not None:
        base_kind, base = original_shapes(options.base, BASE)
        _report_fit(fit(identity, None, sizes, base_kind, base), options, findings)
    if options.header_only:
        return
    with contextlib.ExitStack() as stack:
        parts = [
            (part, stack.enter_context(open_component(path / part, stem, MODEL)))
            for part, stem in STEMS.items()
            if (path / part).is_dir()
        ]
        if (path / EXTRAS).is_file():
            parts.append(("beside the model", stack.enter_context(open_weights(path / EXTRAS, MODEL))))
        _report_health(parts, None, findings)


# ------------------------------------------------------------------------------------- hashes and values


def _report_hashes(path: Path, weights: Weights, findings: Findings) -> None:
    """Whether the header's hashes are those of the content."""
    noted = {key: weights.metadata[key] for key in (MODEL_HASH, LEGACY_HASH, SPEC_HASH) if key in weights.metadata}
    if not noted or path.is_dir() or not is_safetensors(path):
        return
    model_hash, legacy_hash = sshs_hashes_of_file(path)
    true = {MODEL_HASH: model_hash, LEGACY_HASH: legacy_hash, SPEC_HASH: model_hash}
    wrong = [key for key, text in noted.items() if text.lower().removeprefix("0x") != true[key]]
    _print_table("hashes", [(key, text, "wrong" if key in wrong else "right") for key, text in noted.items()])
    if wrong:
        findings.problems.append(f"{', '.join(wrong)} of its header is not that of its content")


def _report_health(parts: Sequence[tuple[str, Weights]], file: NetworkFile | None, findings: Findings) -> None:
    blocks: dict[str, Health] = {}
    broken: list[str] = []
    total = sum(len(weights.shapes) for _, weights in parts)
    with progress_bar(desc="reading", total=total) as bar:
        for part, weights in parts:
            for key in weights.shapes:
                block = f"{part} {block_name(key)}".strip()
                counts = blocks.setdefault(block, Health()).add(
                    weights.tensor(key), weights.dtypes[key], is_weight=not key.endswith("alpha")
                )
                if any(counts):
                    broken.append(f"{key}: {counts[0]} NaN, {counts[1]} infinite")
                bar.update()
    try:
        changes = _changes(file) if file is not None else {}
    except OptionError as error:  # an alpha that is no number, in a tensor or in the header
        changes = {}
        findings.problems.append(str(error))
    head = ["block", "tensors", "numbers", "norm", "largest", "NaN", "Inf", *(["change"] if changes else []), "kept as"]
    rows = [head]
    for block, health in sorted(blocks.items(), key=lambda item: block_order(item[0])):
        change = [f"{changes[block] ** 0.5:.4g}" if block in changes else ""] if changes else []
        rows.append(
            [
                block, str(health.tensors), f"{health.numbers:,}", f"{health.norm:.4g}", f"{health.largest:.4g}",
                str(health.nans), str(health.infinities), *change, " ".join(sorted(health.dtypes)),
            ]
        )  # fmt: skip
    _print_table("weights (norm: Frobenius" + (", change: that of up @ down x alpha / rank)" if changes else ")"), rows,
                 range(1, len(head) - 1))  # fmt: skip
    if broken:
        _print_table("broken tensors", [[line] for line in broken[:LISTED]])
        nans, infinities = (sum(getattr(health, name) for health in blocks.values()) for name in ("nans", "infinities"))
        findings.problems.append(
            f"{nans:,} NaN and {infinities:,} infinite numbers in {counted(len(broken), 'tensor')}"
        )


def _changes(file: NetworkFile) -> Mapping[str, float]:
    """Block -> square of the norm of what the plain pairs in it add to weights."""
    from networks.low_rank import frobenius_norms

    found: dict[str, float] = {}
    for name in file.pairs:
        down, up = file.pair(name)
        block = block_name(file.modules[name][DOWN])
        norm = float(frobenius_norms([down], [up.flatten(1)])[0]) * file.scale(name)
        found[block] = found.get(block, 0.0) + norm**2
    return found


TOOL = Tool(__doc__, VerifyOptions, verify, positionals=(MODEL,))

if __name__ == "__main__":
    sys.exit(TOOL.run())
