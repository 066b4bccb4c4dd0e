"""Train a whole Stable Diffusion XL model. See docs/full_training.md."""

from library.cli.legacy import SdxlFullLegacyOptions
from library.cli.training import Script, main
from library.data.text_cache_options import TextCacheOptions
from library.targets.full_options import SdxlFullOptions
from library.train.memory_options import SdxlFullMemoryOptions
from library.train.output_options import ModelSavingOptions

SCRIPT = Script(
    description=__doc__,
    family="library.families.sdxl:StableDiffusionXL",
    models="sdxl",
    target="library.targets.full:FullTarget",
    target_options=SdxlFullOptions,
    tracker_name="finetuning",
    other_script="fine_tune.py or train_db.py",
    omits=frozenset({"no_metadata", "fp8_base_unet"}),
    more_groups={
        "text_cache": TextCacheOptions,
        "saving": ModelSavingOptions,
        "memory": SdxlFullMemoryOptions,
    },  # fmt: skip
    legacy_options=SdxlFullLegacyOptions,
)

if __name__ == "__main__":
    main(SCRIPT)
