#!/usr/bin/env bash
# Turns the dense MLPs of a checkpoint into mixtures of experts; no training.
#   bash scripts/upcycle.sh [CONFIG] [KEY=VALUE ...]     CONFIG: configs/demo/upcycle.yaml by default
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
config=configs/demo/upcycle.yaml
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]]; then
  config=$(from_caller "$1")
  shift
fi
exec "$VENV/bin/llava-compete" upcycle --config "$config" "$@"
