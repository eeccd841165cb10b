#!/usr/bin/env bash
# Language-model pre-training, without a tower, MoE from scratch; then its perplexity on the held-out text.
#   bash scripts/pretrain_lm.sh [CONFIG] [KEY=VALUE ...]     CONFIG: configs/lm/tiny.yaml by default; goes on where it stopped
# NUM_GPUS, NUM_PROCESSES, HOSTFILE, NNODES/NODE_RANK/MASTER_ADDR: see scripts/lib/launch.sh
set -euo pipefail
trap 'exit 143' TERM USR1 INT HUP # until there are ranks, which save first
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
if [ $# -eq 0 ] || [[ $1 == *=* || $1 == -* ]]; then set -- configs/lm/tiny.yaml "$@"; fi
config=$(from_caller "$1")
[ -f "$config" ] || die "$config: no such config file"
output=$("$VENV/bin/python" "$ROOT/scripts/lib/output_dir.py" "$config" "${@:2}")
if grep -q playground/data/stdlib_text "$config" && [ ! -f playground/data/stdlib_text/meta.json ]; then
  llava-compete data stdlib-text
fi
run_stage pretrain_lm "$@"
# Held-out perplexity and bits per byte, beside bigram models of the same split.
if [ "${NODE_RANK:-0}" -eq 0 ] && [ -f "$output/config.json" ]; then llava-compete perplexity "$output"; fi
