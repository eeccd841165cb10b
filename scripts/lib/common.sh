# Sourced by the scripts: repository root, messages, and the project's virtual environment.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${VENV:-$ROOT/.venv}
cd "$ROOT" || exit 1

say() { printf '\n== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Makes .venv once, and again when pyproject.toml or constraints.txt have changed.
ensure_venv() {
  bash "$ROOT/scripts/setup.sh"
}
