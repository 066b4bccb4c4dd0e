@echo off
rem Train a LoRA with the settings of lora.toml and the pictures of dataset.toml, which stand beside this file.
rem What is given here goes before lora.toml: train_lora.bat --max_train_steps 3000
cd /d "%~dp0"

..\..\.venv\Scripts\python ..\..\train_network.py ^
  --config_file lora.toml ^
  --dataset_config dataset.toml ^
  --output_name mydog ^
  --metadata_trigger_phrase "mydog dog" ^
  %*

if errorlevel 1 pause
