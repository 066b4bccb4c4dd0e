"""Options of precision and memory, and of how several devices share the work."""

from __future__ import annotations

from dataclasses import dataclass, fields

from library.options import opt, require
from library.train.options import OptimizerOptions, TrainingOptions
from library.train.output_options import SavingOptions

# backends of torch.compile as the trade lists them; which of them are there depends on the installation
DYNAMO_BACKENDS = (
    "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm",
)  # fmt: skip


@dataclass(frozen=True)
class PrecisionOptions:
    """The precision of what is trained and of the frozen model."""

    full_fp16: bool = opt(False, help="what is trained is float16 too; with --mixed_precision fp16")
    full_bf16: bool = opt(
        False, help="what is trained is bfloat16 too, rounded so that small steps add up; with --mixed_precision bf16"
    )
    fp8_base: bool = opt(
        False, help="keep the frozen U-Net and text encoder in 8 bits; with --mixed_precision fp16 or bf16"
    )
    fp8_base_unet: bool = opt(False, help="keep only the frozen U-Net in 8 bits")

    def __post_init__(self) -> None:
        require(not (self.full_fp16 and self.full_bf16), "--full_fp16", "contradicts --full_bf16", "give one of them")

    @property
    def stores_unet_in_8_bits(self) -> bool:
        return self.fp8_base or self.fp8_base_unet

    @property
    def stores_text_in_8_bits(self) -> bool:
        return self.fp8_base and not self.fp8_base_unet

    def check_beside(self, training: TrainingOptions) -> None:
        """Raise OptionError unless --mixed_precision is what these options need."""
        for name, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
            require(
                not getattr(self, name) or training.mixed_precision == needed,
                f"--{name}",
                f"needs --mixed_precision {needed}, not {training.mixed_precision}",
            )
        flag = "--fp8_base" if self.fp8_base else "--fp8_base_unet"
        is_half = training.mixed_precision != "no"
        require(is_half or not self.stores_unet_in_8_bits, flag, "needs --mixed_precision bf16 or fp16", "use bf16")

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        both = self.fp8_base and self.fp8_base_unet
        return ["--fp8_base beside --fp8_base_unet: only the U-Net is kept in 8 bits"] if both else []


@dataclass(frozen=True)
class MemoryOptions:
    """Memory against time."""

    cpu_offload_checkpointing: bool = opt(
        False, help="with --gradient_checkpointing: keep what the backward pass needs in the CPU's memory"
    )
    fused_backward_pass: bool = opt(
        False, help="update each parameter as soon as its gradient is there, so that gradients take no memory"
    )
    lowram: bool = opt(False, help="without effect: weights always go straight to their device")
    highvram: bool = opt(False, help="leave every model on the GPU, also while it is not needed")
    torch_compile: bool = opt(False, help="compile the U-Net (torch.compile): slow first steps, faster ones later")
    dynamo_backend: str = opt("inductor", choices=DYNAMO_BACKENDS, help="what compiles for --torch_compile")

    @property
    def fused_flag(self) -> str:
        """The flag that has parameters updated inside the backward pass; empty where none does."""
        return "--fused_backward_pass" if self.fused_backward_pass else ""

    @property
    def num_fused_groups(self) -> int | None:
        """In how many groups they are then updated; None for each parameter alone."""
        return None

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect."""
        why = "weights are always read straight to their device, one copy at a time"
        return [f"--lowram has no effect: {why}"] if self.lowram else []

    def check_beside(self, training: TrainingOptions, optimizer: OptimizerOptions) -> list[str]:
        """Raise OptionError for what contradicts the steps and the optimizer; returns notes."""
        notes = []
        if self.cpu_offload_checkpointing and not training.gradient_checkpointing:
            notes.append("--cpu_offload_checkpointing has no effect without --gradient_checkpointing")
        if self.dynamo_backend != "inductor" and not self.torch_compile:
            notes.append("--dynamo_backend has no effect without --torch_compile")
        flag, batches = self.fused_flag, training.gradient_accumulation_steps
        if not flag:
            return notes
        require(
            batches == 1,
            flag,
            f"applies a gradient when it is made, so --gradient_accumulation_steps {batches} can't add some up",
            "use 1",
        )
        require(
            training.mixed_precision != "fp16",
            flag,
            "does not go with the scaled gradients of --mixed_precision fp16",
            "use bf16",
        )
        require(
            not (optimizer.adapts_rate or optimizer.is_schedule_free),
            flag,
            f"{optimizer.optimizer_type} looks at all gradients together",
            "use AdaFactor, AdamW, Lion or SGDNesterov",
        )
        if optimizer.max_grad_norm:
            notes.append(
                f"--max_grad_norm {optimizer.max_grad_norm:g}: with {flag} each "
                f"{'gradient' if self.num_fused_groups is None else 'group of gradients'} is clipped by "
                "its own norm, not by that of all; 0 switches clipping off"
            )
        return notes


@dataclass(frozen=True)
class SdxlFullMemoryOptions(MemoryOptions):
    """Memory against time."""

    fused_optimizer_groups: int | None = opt(
        help="update parameters inside the backward pass in this many groups (4 to 10 is usual): more memory and less "
        "time than --fused_backward_pass, which does it one by one"
    )

    def __post_init__(self) -> None:
        flag, count = "--fused_optimizer_groups", self.fused_optimizer_groups
        require(count is None or count >= 1, flag, f"{count} is no number of groups", "use 4 to 10")
        is_one = not (self.fused_backward_pass and count)
        require(is_one, flag, "contradicts --fused_backward_pass, which updates parameters one by one", "give one")

    @property
    def fused_flag(self) -> str:
        return "--fused_optimizer_groups" if self.fused_optimizer_groups else super().fused_flag

    @property
    def num_fused_groups(self) -> int | None:
        return self.fused_optimizer_groups


@dataclass(frozen=True)
class DistributedOptions:
    """Several devices: data parallelism, DeepSpeed."""

    ddp_timeout: int | None = opt(help="minutes that processes wait for each other; accelerate's default without it")
    ddp_gradient_as_bucket_view: bool = opt(
        False, help="gradients live in the buffers they are exchanged in: less memory"
    )
    ddp_static_graph: bool = opt(False, help="the graph is the same in every step: a little faster")
    deepspeed: bool = opt(False, help="train with DeepSpeed (package deepspeed)")
    zero_stage: int = opt(
        2, choices=[0, 1, 2, 3], help="DeepSpeed: what is split over devices: 1 optimizer, 2 gradients, 3 weights too"
    )
    offload_optimizer_device: str | None = opt(
        choices=[None, "cpu", "nvme"], help="DeepSpeed: where the optimizer's state is kept (zero_stage 2 and 3)"
    )
    offload_optimizer_nvme_path: str | None = opt(help="DeepSpeed: folder for --offload_optimizer_device nvme")
    offload_param_device: str | None = opt(
        choices=[None, "cpu", "nvme"], help="DeepSpeed: where weights are kept (zero_stage 3)"
    )
    offload_param_nvme_path: str | None = opt(help="DeepSpeed: folder for --offload_param_device nvme")
    zero3_init_flag: bool = opt(False, help="DeepSpeed: split weights while models are made (zero_stage 3)")
    zero3_save_16bit_model: bool = opt(False, help="DeepSpeed: gather 16-bit weights for saving (zero_stage 3)")
    fp16_master_weights_and_gradients: bool = opt(
        False, help="DeepSpeed: master weights in float16 too (zero_stage 2, optimizer offload to the CPU, fp16)"
    )

    def __post_init__(self) -> None:
        timeout = self.ddp_timeout
        require(timeout is None or timeout >= 1, "--ddp_timeout", f"{timeout} is out of range", "use 1 or more minutes")
        if not self.deepspeed:
            return
        for part, device, stages in (
            ("optimizer", self.offload_optimizer_device, (2, 3)),
            ("param", self.offload_param_device, (3,)),
        ):
            flag = f"--offload_{part}_device"
            needed = " or ".join(map(str, stages))
            require(device is None or self.zero_stage in stages, flag, f"needs --zero_stage {needed}")
            require(
                device != "nvme" or bool(getattr(self, f"offload_{part}_nvme_path")),
                flag,
                f"nvme needs --offload_{part}_nvme_path",
            )
        require(
            not self.fp16_master_weights_and_gradients
            or (self.zero_stage == 2 and self.offload_optimizer_device == "cpu"),
            "--fp16_master_weights_and_gradients",
            "needs --zero_stage 2 and --offload_optimizer_device cpu",
        )

    def check_beside(
        self, training: TrainingOptions, saving: SavingOptions, memory: MemoryOptions, precision: PrecisionOptions
    ) -> None:
        """Raise OptionError for what DeepSpeed does not do."""
        if not self.deepspeed:
            return
        contradictions = {
            memory.fused_flag.removeprefix("--"): (bool(memory.fused_flag), "which updates by itself"),
            "fp8_base": (precision.fp8_base, "which keeps weights in 16 bits"),
            "fp8_base_unet": (precision.fp8_base_unet, "which keeps weights in 16 bits"),
        }
        for name, (is_given, why) in contradictions.items():
            require(not is_given, f"--{name}", f"contradicts --deepspeed, {why}", "leave one of them out")
        require(
            not self.fp16_master_weights_and_gradients or training.mixed_precision == "fp16",
            "--fp16_master_weights_and_gradients",
            f"needs --mixed_precision fp16, not {training.mixed_precision}",
        )
        on_disk = self.offload_optimizer_device == "nvme"
        for name in ("save_state", "save_state_on_train_end", "resume"):
            problem = "has no state of a run with --offload_optimizer_device nvme"
            require(not (on_disk and getattr(saving, name)), f"--{name}", problem, "use cpu")

    def check_engine(self, optimizer: OptimizerOptions, *, has_previews: bool, has_average: bool) -> list[str]:
        """Raise OptionError for what goes wrong where DeepSpeed splits optimizer or weights; returns notes."""
        if not self.deepspeed:
            return []
        name = optimizer.optimizer_type
        for is_so, why in (
            (optimizer.adapts_rate, "looks at all gradients together, and each process has a part of them"),
            (optimizer.is_schedule_free, "gives out an average of the weights, which DeepSpeed does not ask for"),
        ):
            require(not is_so, "--optimizer_type", f"{name} {why}", "use AdamW, or leave --deepspeed out")
        if self.zero_stage == 3:
            way_out = "use --zero_stage 2"
            problem = "are drawn by one process each, and with --zero_stage 3 none has the weights"
            require(
                not has_previews, "--sample_every_n_steps, --sample_every_n_epochs, --sample_at_first", problem, way_out
            )
            problem = "averages weights that --zero_stage 3 has split"
            require(not has_average, "--ema_decay", problem, way_out)
        if name.lower() == "adafactor" and self.zero_stage:
            return ["--optimizer_type AdaFactor: DeepSpeed gives it weights as flat pieces, which it can't factor"]
        return []

    @property
    def given_for_several_processes(self) -> list[str]:
        """What was given and has no effect where there is one process."""
        names = ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph")
        return [name for name in names if getattr(self, name)]

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        if not self.deepspeed:
            idle = [field.name for field in fields(self) if not field.name.startswith(("ddp_", "deepspeed"))]
            return [
                f"--{name} has no effect without --deepspeed"
                for name in idle
                if getattr(self, name) != type(self).__dataclass_fields__[name].default
            ]
        idle = [name for name in self.given_for_several_processes if name != "ddp_timeout"]
        notes = [f"--{name} has no effect beside --deepspeed" for name in idle]
        for part in ("optimizer", "param"):
            if getattr(self, f"offload_{part}_nvme_path") and getattr(self, f"offload_{part}_device") != "nvme":
                notes.append(f"--offload_{part}_nvme_path has no effect without --offload_{part}_device nvme")
        if self.zero3_init_flag:
            notes.append("--zero3_init_flag has no effect: weights are read straight to their device")
        if self.zero3_save_16bit_model:
            notes.append("--zero3_save_16bit_model has no effect: files are always whole")
        return notes
