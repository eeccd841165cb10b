#!/usr/bin/env bash
# ZeRO stage x part x mode x experts x accumulation x checkpointing: every cell on two CPU ranks against one process, and
# the table in eval/results/zero_grid. Takes an hour or two on 2 cores; Ctrl-C leaves the table of what has run, and the
# same command goes on from there: remove eval/results/zero_grid/cells.jsonl to run all again.
#   bash scripts/zero_grid.sh [FOLDER]     FOLDER: outputs/zero_grid by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
folder=${1:-outputs/zero_grid}
mkdir -p "$folder" eval/results/zero_grid
exec "$VENV/bin/python" tests/train/zero_grid.py "$folder" eval/results/zero_grid
