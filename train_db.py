"""Train a whole Stable Diffusion 1.x or 2.x model on folders of images (DreamBooth). See docs/full_training.md."""

from library.cli.training import Script, main
from library.families.options import DreamBoothTextOptions
from library.targets.full_options import DreamBoothOptions
from library.train.output_options import ModelSavingOptions

SCRIPT = Script(
    description=__doc__,
    family="library.families.sd:StableDiffusion",
    target="library.targets.full:FullTarget",
    target_options=DreamBoothOptions,
    tracker_name="dreambooth",
    other_script="sdxl_train.py",
    datasets="folders",
    omits=frozenset({"in_json", "dataset_repeats", "no_metadata", "fp8_base_unet"}),
    more_groups={"saving": ModelSavingOptions, "text": DreamBoothTextOptions},
)

if __name__ == "__main__":
    main(SCRIPT)
