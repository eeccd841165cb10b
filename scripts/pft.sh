#!/usr/bin/env bash
# Dense pre-finetuning of all parts on captions, between pretrain_align and upcycle; optional.
#   bash scripts/pft.sh [CONFIG] [KEY=VALUE ...]     CONFIG: configs/demo/pft.yaml by default; goes on where it stopped
# NUM_GPUS, NUM_PROCESSES, HOSTFILE, NNODES/NODE_RANK/MASTER_ADDR: see scripts/lib/launch.sh
set -euo pipefail
trap 'exit 143' TERM USR1 INT HUP # until there are ranks, which save first
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
run_stage pft "$@"
