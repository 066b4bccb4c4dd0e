#!/bin/sh
# Train a LoRA with the settings of lora.toml and the pictures of dataset.toml, which stand beside this file.
# What is given here goes before lora.toml: sh train_lora.sh --max_train_steps 3000
cd "$(dirname "$0")" || exit 1

../../.venv/bin/python ../../train_network.py \
  --config_file lora.toml \
  --dataset_config dataset.toml \
  --output_name mydog \
  --metadata_trigger_phrase "mydog dog" \
  "$@"
