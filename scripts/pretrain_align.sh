#!/usr/bin/env bash
# Aligns a projector (real recipes) or trains all parts from scratch (the demo) on captions.
#   bash scripts/pretrain_align.sh [CONFIG] [KEY=VALUE ...]     CONFIG: configs/demo/pretrain_align.yaml by default; goes on where it stopped
# NUM_GPUS, NUM_PROCESSES, HOSTFILE, NNODES/NODE_RANK/MASTER_ADDR: see scripts/lib/launch.sh
set -euo pipefail
trap 'exit 143' TERM USR1 INT HUP # until there are ranks, which save first
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
run_stage pretrain_align "$@"
