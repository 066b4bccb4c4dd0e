"""Generate pictures with Stable Diffusion XL models, with or without networks such as LoRA."""

from library.cli.generation import Script, main

SCRIPT = Script(
    description=str(__doc__),
    family="library.families.sdxl:StableDiffusionXL",
    models="sdxl",
    native_size=1024,
    omits=frozenset({"v2", "XTI_embeddings"}),
    lllite_module="networks.control_net_lllite",
)

if __name__ == "__main__":
    main(SCRIPT)
