#!/usr/bin/env bash
# The whole method on the embedded world, on this machine: a few minutes on two CPU cores.
#   bash launch/quickstart.sh [WORKDIR] [--config.section.key=value ...]
# WORKDIR is relative to the repository root; default runs/quickstart. The same command resumes a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv
workdir=runs/quickstart
if [[ $# -gt 0 && "$1" != -* ]]; then
  workdir="$1"
  shift
fi
exec cai run --config=configs/miniworld.py --workdir="$workdir" "$@"
