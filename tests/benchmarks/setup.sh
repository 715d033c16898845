#!/usr/bin/env bash
# The peers' environments, apart from ours, for their dependencies are not ours.
#   bash tests/benchmarks/setup.sh [FOLDER]       PYTHON=python3.12 bash tests/benchmarks/setup.sh
# FOLDER is relative to the repository root; default .venv-peers. In it: torch/ and tunix/, virtual environments, and trl-ppo/,
# the last TRL that has a PPO trainer, which torch/ reads for that one benchmark. On Linux PyTorch comes with CUDA, several
# gigabytes that nothing here uses, unless pip is told of its CPU builds:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tests/benchmarks/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder="${1:-.venv-peers}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

environment() {  # NAME PACKAGE...
  "${PYTHON:-python3}" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet "${@:2}"
}

environment torch torch==2.13.0 transformers==5.23.0 trl==1.16.0 safetensors==0.8.0
"$folder/torch/bin/python" -m pip install --quiet --no-deps --upgrade --target "$folder/trl-ppo" trl==1.12.0
# The versions of JAX and Flax that we are measured with, so that both sides have the same compiler.
environment tunix google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 transformers==5.12.1
echo "$folder is ready: python tests/benchmarks/run.py generate$([[ $folder == .venv-peers ]] || echo " --envs=$folder")"
