#!/usr/bin/env bash
# ZeRO stage x part x mode x experts x accumulation x checkpointing: every cell on two CPU ranks against one process, and
# the table in eval/results/zero_grid/README.md. Takes hours on 2 cores; goes on where it stopped.
#   bash scripts/zero_grid.sh [--pairwise] [FOLDER]     FOLDER: outputs/zero_grid by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
kind=full
if [ "${1:-}" = --pairwise ]; then
  kind=pairwise
  shift
fi
folder=${1:-outputs/zero_grid}
mkdir -p "$folder" eval/results/zero_grid
"$VENV/bin/python" tests/train/zero_grid.py "$kind" "$folder" eval/results/zero_grid/README.md
