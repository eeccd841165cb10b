#!/usr/bin/env bash
# Evaluates a checkpoint with lmms-eval: one process on a CPU, one for each GPU where there are some.
#   bash scripts/eval.sh [config] [overrides...]
#   bash scripts/eval.sh configs/demo/eval.yaml checkpoint=outputs/mine/sft limit=50
# Without a config file: llava-compete eval CKPT --suite NAME (see llava-compete eval --help).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
config=configs/demo/eval.yaml
case "${1:-}" in
  "" | *=*) ;;
  *)
    config=$(from_caller "$1")
    shift
    ;;
esac
exec "$VENV/bin/llava-compete" eval --config "$config" "$@"
