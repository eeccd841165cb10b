#!/usr/bin/env bash
# Language-model pre-training, without a tower, MoE from scratch.
#   bash scripts/pretrain_lm.sh [CONFIG] [KEY=VALUE ...]     CONFIG: configs/lm/tiny.yaml by default; goes on where it stopped
# NUM_GPUS, NUM_PROCESSES, HOSTFILE, NNODES/NODE_RANK/MASTER_ADDR: see scripts/lib/launch.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
if [ $# -eq 0 ] || [[ $1 == *=* || $1 == -* ]]; then set -- configs/lm/tiny.yaml "$@"; fi
run_stage pretrain_lm "$@"
