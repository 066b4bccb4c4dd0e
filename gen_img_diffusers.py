"""Generate pictures with Stable Diffusion 1.x and 2.x models, with or without networks such as LoRA."""

from library.cli.generation import Script, main

SCRIPT = Script(
    description=str(__doc__),
    family="library.families.sd:StableDiffusion",
    omits=frozenset({  # what SDXL alone knows
        "original_height", "original_width", "original_height_negative", "original_width_negative",
        "crop_top", "crop_left", "control_net_lllite_models", "clip_vision_strength", "clip_vision_model",
    }),
)  # fmt: skip

if __name__ == "__main__":
    main(SCRIPT)
