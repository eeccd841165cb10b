#!/usr/bin/env bash
# Tests the lower bounds that pyproject.toml declares: every package named there at the lowest version allowed (uv's
# `--resolution lowest-direct`), in an environment of its own, .venv-lowest (about 7 GB and 2 minutes, made once).
#   bash scripts/test_lower_bounds.sh                      the selection below
#   bash scripts/test_lower_bounds.sh tests/moe -k golden  arguments go to pytest
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

# What touches the libraries' interfaces: loading, saving, forward, ZeRO, adapters, readers, a stage in one process.
SELECTION=(tests/moe tests/model tests/vision tests/language tests/plan tests/data tests/train/test_stage_in_process.py)
LOWEST=$ROOT/.venv-lowest

fingerprint=$(sha256sum <pyproject.toml)
if [ "$(cat "$LOWEST/.installed" 2>/dev/null)" != "$fingerprint" ]; then
  say "Installing the lowest versions into $LOWEST"
  "${PYTHON:-python3}" -m venv --clear "$LOWEST"
  "$LOWEST/bin/python" -m pip --disable-pip-version-check install --quiet uv
  "$LOWEST/bin/uv" pip install --python "$LOWEST/bin/python" --no-progress \
    --resolution lowest-direct --editable '.[all]'
  echo "$fingerprint" >"$LOWEST/.installed"
fi
say "Tests with the lowest versions"
export PATH="$LOWEST/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then set -- "${SELECTION[@]}"; fi
# Older libraries warn of what newer ones have mended; only our own use of them is tested here.
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile -W ignore "$@"
