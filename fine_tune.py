"""Fine-tune a whole Stable Diffusion 1.x or 2.x model on the images of metadata files. See docs/full_training.md."""

from library.cli.legacy import FullLegacyOptions
from library.cli.training import Script, main
from library.targets.full_options import FineTuneOptions
from library.train.output_options import ModelSavingOptions

SCRIPT = Script(
    description=__doc__,
    family="library.families.sd:StableDiffusion",
    target="library.targets.full:FullTarget",
    target_options=FineTuneOptions,
    tracker_name="finetuning",
    other_script="sdxl_train.py",
    datasets="metadata",
    omits=frozenset({"reg_data_dir", "prior_loss_weight", "no_metadata", "fp8_base_unet"}),
    more_groups={"saving": ModelSavingOptions},
    legacy_options=FullLegacyOptions,
)

if __name__ == "__main__":
    main(SCRIPT)
