"""Train a LoRA or another network for Stable Diffusion XL. See docs/sdxl_train_network.md."""

from library.cli.legacy import SdxlLegacyOptions
from library.cli.training import Script, main
from library.data.text_cache_options import TextCacheOptions
from library.targets.options import SdxlNetworkOptions

SCRIPT = Script(
    description=__doc__,
    family="library.families.sdxl:StableDiffusionXL",
    models="sdxl",
    target="library.targets.network:NetworkTarget",
    target_options=SdxlNetworkOptions,
    tracker_name="network_train",
    other_script="train_network.py",
    more_groups={"text_cache": TextCacheOptions},
    legacy_options=SdxlLegacyOptions,
)

if __name__ == "__main__":
    main(SCRIPT)
