"""Network modules, importable by name: `--network_module networks.lora`."""
