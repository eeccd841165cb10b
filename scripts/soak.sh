#!/usr/bin/env bash
# Kills a small stage at random moments, lets the same command go on, and compares the result with a run that was left
# alone: curve and weights must be equal to the last bit.
#   bash scripts/soak.sh [N] [OUT]     N kills (default 30), about a minute each on 2 cores; the table goes to
#                                      OUT/README.md (outputs/soak). SOAK_SEED chooses others. The same command goes
#                                      on where it was stopped.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/tiny_stage.sh
source "$ROOT/scripts/lib/tiny_stage.sh"
kills=${1:-30}
[[ $kills =~ ^[1-9][0-9]*$ ]] || die "scripts/soak.sh: expected a number of kills, found '$kills'"
ensure_venv
export PATH="$VENV/bin:$PATH" VENV NUM_GPUS=0 NUM_PROCESSES=2 OMP_NUM_THREADS=1
unset HOSTFILE NNODES NODE_RANK MASTER_ADDR MASTER_PORT
out=$(realpath -m "${2:-outputs/soak}")
mkdir -p "$out"
say "Preparing the data and the model"
prepare_tiny_stage "$out"
tiny_stage "$out"
exec python "$ROOT/scripts/lib/soak.py" "$out" "$kills" "${SOAK_SEED:-0}" "${words[@]}"
