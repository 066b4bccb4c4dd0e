"""Train a LoRA or another network for Stable Diffusion 1.x and 2.x. See docs/train_network.md."""

from library.cli.training import Script, main
from library.targets.options import NetworkOptions

SCRIPT = Script(
    description=__doc__,
    family="library.families.sd:StableDiffusion",
    target="library.targets.network:NetworkTarget",
    target_options=NetworkOptions,
    tracker_name="network_train",
    other_script="sdxl_train_network.py",
)

if __name__ == "__main__":
    main(SCRIPT)
