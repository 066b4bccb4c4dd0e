"""Options of generation: which model, which pictures, how they are computed, where they go."""

from __future__ import annotations

from dataclasses import dataclass, replace

from library.diffusion.samplers import SAMPLERS, check_steps
from library.families.options import ModelOptions
from library.models.options import AttentionOptions
from library.options import opt, require

SIZE_STEP = 8  # pixels of one latent pixel
LEAST_SIZE = 64  # pixels; the U-Net halves its 8 times smaller latents three times
LARGEST_SIZE = 16_384  # pixels: beyond any model, but a slip of the keyboard
LARGEST_FACTOR = 10_000.0  # of scales and multipliers: beyond any use, but within all arithmetic
SEED_RANGE = range(2**64)  # what torch's generators take


@dataclass(frozen=True)
class CheckpointOptions:
    """The model."""

    ckpt: str | None = opt(
        help="model: a .safetensors or .ckpt file, a Diffusers folder, or a hub id (only this uses the network)"
    )
    vae: str | None = opt(help="replace the VAE: a VAE file, a full checkpoint, a Diffusers folder or a hub id")
    v2: bool = opt(False, help="assert that the model is Stable Diffusion 2.x (found from the file in any case)")
    v_parameterization: bool = opt(
        False, help="the model predicts velocity (SD 2.x 768-v); found from the file where it says so"
    )
    tokenizer_cache_dir: str | None = opt(help="no effect: the CLIP vocabulary is part of this project")

    def __post_init__(self) -> None:
        way_out = "name a .safetensors or .ckpt file, a Diffusers folder or a hub id"
        require(bool(self.ckpt), "--ckpt", "no model given", way_out)

    @property
    def model(self) -> ModelOptions:
        """The same in the words of the families."""
        return ModelOptions(
            pretrained_model_name_or_path=self.ckpt,
            v2=self.v2,
            v_parameterization=self.v_parameterization,
            vae=self.vae,
            may_inpaint=True,
        )


@dataclass(frozen=True)
class ComputeOptions:
    """How pictures are computed."""

    fp16: bool = opt(False, help="half precision; float32 without this option")
    bf16: bool = opt(False, help="bfloat16 precision; --fp16 takes precedence")
    xformers: bool = opt(False, help="xformers' memory-efficient attention (package xformers)")
    sdpa: bool = opt(False, help="PyTorch's scaled dot-product attention; the default")
    diffusers_xformers: bool = opt(False, help="the same as --xformers")
    opt_channels_last: bool = opt(False, help="weights and pictures with channels last in memory: often faster")
    no_half_vae: bool = opt(False, help="run the VAE in float32 beside --fp16 or --bf16")
    batch_size: int = opt(1, help="pictures computed at once; a picture does not depend on its batch")

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "--batch_size", f"{self.batch_size} is out of range", "use 1 or more")

    @property
    def attention(self) -> AttentionOptions:
        return AttentionOptions(xformers=self.xformers or self.diffusers_xformers, sdpa=self.sdpa)


@dataclass(frozen=True)
class PromptOptions:
    """What is asked for."""

    prompt: str | None = opt(help="one prompt; its options (--n, --w ...) may follow inside the quotes")
    from_file: str | None = opt(
        help="text file (UTF-8) with one prompt per line, or a picture with its prompt in it, to be made again; takes "
        "precedence over --prompt"
    )
    from_module: str | None = opt(help="Python file whose get_prompter() makes the prompts; before --from_file")
    prompter_module_args: tuple[str, ...] | None = opt(help="arguments that --from_module's file looks at")
    interactive: bool = opt(False, help="ask for prompts, one after the other, behind those given otherwise")
    no_preview: bool = opt(False, help="show no windows with the pictures of --interactive")
    skip_errors: bool = opt(False, help="leave out lines of prompts that are wrong; without it nothing is drawn then")
    images_per_prompt: int = opt(1, help="pictures per prompt")
    n_iter: int = opt(1, help="times the whole list of prompts is repeated")
    shuffle_prompts: bool = opt(False, help="go through the prompts in another order each time")
    seed: int | None = opt(help="all seeds follow from it; one picture of one prompt has it as its own")
    iter_same_seed: bool = opt(False, help="the same seeds for every prompt, new ones for each repetition of the list")

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "n_iter"):
            require(getattr(self, name) >= 1, f"--{name}", f"{getattr(self, name)} is out of range", "use 1 or more")
        check_seed("--seed", self.seed)

    @property
    def is_live(self) -> bool:
        """Whether there are prompts that show only while pictures are drawn."""
        return self.interactive or self.from_module is not None


@dataclass(frozen=True)
class PictureOptions:
    """How a picture is made where its prompt line does not say otherwise."""

    W: int | None = opt(help="width in pixels, a multiple of 8; without this option 512, and 1024 for SDXL")
    H: int | None = opt(help="height in pixels, a multiple of 8; without this option 512, and 1024 for SDXL")
    steps: int = opt(50, help="denoising steps")
    scale: float = opt(7.5, help="classifier-free guidance; 1 or less switches it off")
    sampler: str = opt("ddim", choices=list(SAMPLERS), help="sampling method")
    clip_skip: int | None = opt(help="take the text encoder's n-th layer from the end (1 = the last)")
    max_embeddings_multiples: int | None = opt(help="longest prompt in windows of 75 tokens; 1 without this option")

    def __post_init__(self) -> None:
        check_size("--W", self.width)
        check_size("--H", self.height)
        check_factor("--scale", self.scale, "7.5")
        check_steps("--steps", self.sampler, self.steps)
        check_clip_skip("--clip_skip", self.clip_skip)
        check_windows("--max_embeddings_multiples", self.windows)

    @property
    def width(self) -> int:
        return 512 if self.W is None else self.W

    @property
    def height(self) -> int:
        return 512 if self.H is None else self.H

    def sized(self, native: int) -> PictureOptions:
        """The same with `native` pixels where no size is given."""
        return replace(self, W=native if self.W is None else self.W, H=native if self.H is None else self.H)

    @property
    def windows(self) -> int:
        """Most windows of 75 content tokens per prompt."""
        return 1 if self.max_embeddings_multiples is None else self.max_embeddings_multiples


@dataclass(frozen=True)
class OutputOptions:
    """Where pictures go."""

    outdir: str = opt("outputs", help="folder for the pictures; made where it is missing")
    sequential_file_name: bool = opt(False, help="name files im_000001.png and on, instead of by time and seed")
    sidecar: bool = opt(False, help="write what made each picture beside it, too, as NAME.png.json")
    use_original_file_name: bool = opt(False, help="name a picture like the one of --image_path that it is made from")

    def __post_init__(self) -> None:
        require(bool(self.outdir.strip()), "--outdir", "no folder named", 'name one, "." for the folder you are in')


def check_factor(where: str, value: float | None, usual: str, largest: float = LARGEST_FACTOR) -> None:
    """Raise OptionError unless pictures can be computed with a scale or multiplier of this size, above or below 0."""
    is_well = value is None or abs(value) <= largest  # not so what is no number
    require(is_well, where, f"{value} is out of range", f"use {usual} or so, {largest:g} at most")


def check_size(where: str, pixels: int) -> None:
    """Raise OptionError unless a picture can be this wide or high."""
    require(pixels >= LEAST_SIZE, where, f"{pixels} is too small", f"use at least {LEAST_SIZE}")
    require(pixels <= LARGEST_SIZE, where, f"{pixels} is too large", f"the largest is {LARGEST_SIZE}")
    below = pixels // SIZE_STEP * SIZE_STEP
    require(pixels == below, where, f"{pixels} is not a multiple of {SIZE_STEP}", f"use {below} or {below + SIZE_STEP}")


def check_clip_skip(where: str, skip: int | None) -> None:
    require(skip is None or 1 <= skip <= 12, where, f"{skip} is out of range", "use 1 to 12")


def check_windows(where: str, windows: int | None) -> None:
    require(windows is None or windows >= 1, where, f"{windows} is out of range", "use 1 or more")


def check_seed(where: str, seed: int | None) -> None:
    way_out = "use 0 to 2^64 - 1, or leave it out for a random seed"
    require(seed is None or seed in SEED_RANGE, where, f"{seed} is out of range", way_out)
