"""Training a network (LoRA and its relatives) beside a frozen model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from library.checkpoints.safetensors_io import NonFiniteError, is_finite, read_header, require_disk_space
from library.data.batch import Batch
from library.families.base import Conditioning, ModelBundle, ModelFamily
from library.families.options import TextOptions
from library.options import OptionError
from library.targets.adapter import Adapted, Models, NetworkFactory, blamed_on, read_tensors, skips_parameters
from library.targets.base import ParamGroup, TrainTarget
from library.targets.options import NetworkOptions
from library.targets.reach import reached_by_text
from library.text.network_tag import network_tag

logger = logging.getLogger(__name__)

TEXT, UNET = "text encoder", "unet"
SHORT_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}  # as --save_precision calls them
TEXT_NAME = re.compile(r"(^|[._])te\d?_|text_encoder|text_model")


@dataclass(frozen=True)
class PartSummary:
    """What a network has in one part of the model."""

    name: str
    modules: int
    parameters: int  # that are trained


class NetworkTarget(TrainTarget):
    """A network module, found by name, trained on a frozen model of any family."""

    adapter = "lora"

    def __init__(self, options: NetworkOptions, text: TextOptions | None = None) -> None:
        """A wrong module and wrong arguments are refused here; wrong files by `options.check_before_start`."""
        self.options = options
        self.text = text or TextOptions()
        self.factory = NetworkFactory(str(options.network_module))
        self.factory.require("create_network")
        if options.dim_from_weights or options.base_weights:
            self.factory.require("create_network_from_weights")
        self.factory.check_arguments(options.arguments)
        self.needs_autocast = not self.factory.casts_itself
        self.skips_parameters = self.factory.skips_parameters or skips_parameters(options.arguments)
        self._trains_text = False
        self._strength = 1.0

    @classmethod
    def of(cls, config: Any) -> NetworkTarget:
        return cls(config.target, config.text)

    # ------------------------------------------------------------------ setting up

    def setup(self, family: ModelFamily, bundle: ModelBundle, *, gradient_checkpointing: bool) -> None:
        self.models = Models(bundle.text_encoders, bundle.unet, bundle.vae)
        device = next(bundle.unet.parameters()).device
        self._merge_base_weights(device)
        self.network = self._create()
        self.network.require(*Adapted.REQUIRED)
        self.network.prepare(asdict(self.options))
        options = self.options
        self.network.apply(
            self.models,
            text=not options.network_train_unet_only,
            unet=not options.network_train_text_encoder_only,
        )
        if options.network_weights:
            self._load(options.network_weights)
        module = self.trained_module()
        module.to(device, torch.float32)
        self.network.prepare_gradients(self.models)
        if next(module.parameters(), None) is None:
            raise OptionError("--network_module", f"{self.factory.name} has nothing to train in this model")
        self._freeze_unreached_text(family, bundle)
        if gradient_checkpointing:
            self.network.require("enable_gradient_checkpointing")
            self.network.enable_gradient_checkpointing()
        if options.scale_weight_norms is not None and not self.network.can_limit_norms:
            logger.warning("--scale_weight_norms is off: %s can't limit norms", self.factory.name)

    def _create(self) -> Adapted:
        options, arguments = self.options, self.options.arguments
        if options.dim_from_weights:
            if options.network_dim is not None:
                logger.warning("--network_dim has no effect beside --dim_from_weights")
            file, flag = str(options.network_weights), "--network_weights"
            arguments = {"dropout": options.network_dropout, **arguments}
            tensors = read_tensors(file, flag)
            with blamed_on(flag):
                return self.factory.create_from_weights(1.0, file, self.models, weights_sd=tensors, **arguments)[0]
        dim, alpha = options.network_dim, options.network_alpha
        return self.factory.create(dim, alpha, options.network_dropout, self.models, **arguments)

    def _merge_base_weights(self, device: torch.device) -> None:
        """Merge each --base_weights file, in float32; every weight of the model keeps its dtype and device."""
        multipliers = [*(self.options.base_weights_multiplier or ())]
        for index, file in enumerate(self.options.base_weights or ()):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            tensors = read_tensors(file, "--base_weights")
            with blamed_on("--base_weights"):
                network, tensors = self.factory.create_from_weights(
                    multiplier, file, self.models, weights_sd=tensors, for_inference=True
                )
            network.require("merge_to")
            kept = {
                parameter: (parameter.dtype, parameter.device)
                for part in (self.models.unet, *self.models.text_encoders)
                for parameter in part.parameters()
            }
            network.merge(self.models, tensors, torch.float32, device)
            for parameter, (dtype, place) in kept.items():
                parameter.data = parameter.data.to(place, dtype)
            logger.info("--base_weights: merged %s, multiplier %g", file, multiplier)

    def _load(self, file: str) -> None:
        self.network.require("load_weights")
        tensors = read_tensors(file, "--network_weights")
        with blamed_on("--network_weights"):
            found = self.network.load(file, tensors)
        if not found:
            example = next(iter(tensors), "none")
            problem = f"no tensor of {file} belongs to this network (its first is {example})"
            raise OptionError("--network_weights", problem, "was it made for another model or network module?")
        total = len(self.trained_module().state_dict())
        logger.info("--network_weights: %d of the network's %d tensors loaded, %d of the file's not used",
                    found, total, max(0, len(tensors) - found))  # fmt: skip

    def _freeze_unreached_text(self, family: ModelFamily, bundle: ModelBundle) -> None:
        """Freeze parameters on text encoder layers behind the one that conditions: no gradient ever reaches them."""
        module = self.trained_module()
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad and part_of(n) == TEXT]
        if not named:
            return
        was_training = module.training
        module.eval()  # no dropout: every module takes part
        reached = reached_by_text(family, bundle, self.text, [parameter for _, parameter in named])
        module.train(was_training)
        for (_, parameter), is_reached in zip(named, reached, strict=True):
            parameter.requires_grad_(is_reached)

    # ------------------------------------------------------------------ what is trained

    def trained_module(self) -> torch.nn.Module:
        return self.network.network

    def param_groups(self, default_lr: float) -> list[ParamGroup]:
        """The network's groups without rates of 0; whatever is in no group is frozen, and takes no gradients."""
        options = self.options
        names = {id(parameter): name for name, parameter in self.trained_module().named_parameters()}
        groups = []
        for label, group in self.network.param_groups(options.text_encoder_lr, options.unet_lr, default_lr):
            parameters = tuple(parameter for parameter in group["params"] if parameter.requires_grad)
            lr = group.get("lr")
            if parameters and lr != 0:
                name = _readable(label) or part_of(names.get(id(parameters[0]), "")) or f"group {len(groups) + 1}"
                groups.append(ParamGroup(name, parameters, lr))
        trained = {id(parameter) for group in groups for parameter in group.parameters}
        for parameter in self.trained_module().parameters():
            parameter.requires_grad_(id(parameter) in trained)
        parts = {part_of(name) for identity, name in names.items() if identity in trained}
        self._trains_text = TEXT in parts or (None in parts and not options.network_train_unet_only)
        return groups

    def trains_text(self, step: int) -> bool:
        return self._trains_text

    def parts(self) -> tuple[PartSummary, ...]:
        """Modules and trained parameters of the network in each part of the model."""
        children = [(part_of(name) or "other", child) for name, child in self.trained_module().named_children()]
        return tuple(
            PartSummary(
                part,
                sum(found == part for found, _ in children),
                sum(p.numel() for found, c in children if found == part for p in c.parameters() if p.requires_grad),
            )
            for part in dict.fromkeys(part for part, _ in children)
        )

    def notes(self) -> tuple[str, ...]:
        """What the network says of its training, as a text `about_training`, if it does."""
        about = getattr(self.trained_module(), "about_training", None)
        return (about,) if isinstance(about, str) and about else ()

    # ------------------------------------------------------------------ around a step

    def before_forward(self, batch: Batch) -> None:
        self._set_strength(batch.network_multiplier)

    def predict(
        self,
        family: ModelFamily,
        bundle: ModelBundle,
        noised_BCHW: torch.Tensor,
        conditioning: Conditioning,
        batch: Batch,
    ) -> torch.Tensor:
        """As the family predicts; where no backward pass follows, the network is then at full strength again."""
        prediction = super().predict(family, bundle, noised_BCHW, conditioning, batch)
        if not torch.is_grad_enabled():
            self._set_strength(1.0)
        return prediction

    def _set_strength(self, multiplier: float) -> None:
        """How strong the network is, as a dataset may ask for its batches; it is saved and shown at 1."""
        if multiplier != self._strength:
            self.network.set_multiplier(multiplier)
            self._strength = multiplier

    def on_epoch_start(self, epoch: int) -> None:
        self.network.on_epoch_start(self.models)

    def on_step_start(self, step: int) -> None:
        self.network.on_step_start(self.models)

    def after_optimizer_step(self) -> Mapping[str, float | torch.Tensor]:
        """Limit the norms of the modules' weight changes, where --scale_weight_norms asks for it."""
        self._set_strength(1.0)
        limit = self.options.scale_weight_norms
        if limit is None or not self.network.can_limit_norms:
            return {}
        device = next(self.trained_module().parameters()).device
        scaled, mean, largest = self.network.limit_norms(limit, device)
        return {
            "max_norm/keys_scaled": scaled,
            "max_norm/average_key_norm": mean,
            "max_norm/max_key_norm": largest,
        }

    # ------------------------------------------------------------------ files

    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file under a temporary name, check it, rename it.

        Raises NonFiniteError rather than write NaN, and OptionError where the file can't be written.
        """
        path = Path(path)
        size = self._size_of_finite(path, dtype)
        temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}{path.suffix}")  # the suffix decides the format
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            require_disk_space(path.parent, size)
            temporary.touch()  # shows at once whether the folder takes files
            self.network.save(temporary, dtype, metadata)
            if path.suffix == ".safetensors":
                read_header(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            problem = f"can't write {path} ({getattr(error, 'strerror', None) or error})"
            raise OptionError("", problem, "free some space or choose another folder") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _size_of_finite(self, path: Path, dtype: torch.dtype | None) -> int:
        """Bytes of the network's tensors as `dtype`; NonFiniteError when one is not finite, or not in that dtype."""
        size = 0
        for name, tensor in self.trained_module().state_dict().items():
            saved = tensor if dtype is None else tensor.to(dtype)
            if not is_finite(saved):
                raise _not_finite(name, tensor, saved, path)
            size += saved.numel() * saved.element_size()
        return size

    def prompt_tag(self, name: str) -> str:
        return network_tag(name)

    def describe(self) -> dict[str, Any]:
        """ss_network_*; ss_network_args is JSON and there only if arguments were given."""
        options = self.options
        described = {
            "ss_network_module": options.network_module,
            "ss_network_dim": options.network_dim,
            "ss_network_alpha": options.network_alpha,
            "ss_network_dropout": options.network_dropout,
        }
        if options.network_args:
            arguments = options.arguments
            described["ss_network_args"] = json.dumps(
                {**arguments, "dropout": arguments.get("dropout", options.network_dropout)}
            )
        return described


def part_of(name: str) -> str | None:
    """Which part of the model a parameter or module of a network belongs to, by its name; None if that doesn't say."""
    if "unet" in name:
        return UNET
    return TEXT if TEXT_NAME.search(name) else None


def _not_finite(name: str, tensor: torch.Tensor, saved: torch.Tensor, path: Path) -> NonFiniteError:
    """Why `tensor` can't be saved: it is not finite, or not any more as `saved`."""
    if not is_finite(tensor):
        return NonFiniteError(f"{name} holds NaN or infinity; {path} was not written")
    precision = SHORT_NAMES.get(saved.dtype, str(saved.dtype))
    largest, limit = tensor.abs().max(), torch.finfo(saved.dtype).max
    problem = f"{precision} can't hold the weights: {name} goes up to {largest:.3g}, {precision} to {limit:g}"
    return NonFiniteError(problem, "use --save_precision bf16 or float")


def _readable(label: str | None) -> str | None:
    """ "unet_block7 plus" -> "unet block 7 plus", "textencoder2" -> "text encoder 2"."""
    if label is None:
        return None
    label = re.sub(r"textencoder(\d)", rf"{TEXT} \1", label).replace("textencoder", TEXT)
    return re.sub(r"unet_block(\d+)", r"unet block \1", label)
