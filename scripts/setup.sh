#!/usr/bin/env bash
# Makes the virtual environment .venv with everything installed, at the versions in constraints.txt.
#   bash scripts/setup.sh                         made once, reused until pyproject.toml or constraints.txt change
#   bash scripts/setup.sh --refresh-constraints   upgrades everything and writes the new versions to constraints.txt
# PYTHON chooses the interpreter (default: the newest of python3.13, 3.12, 3.11 and python3 that is new enough).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

NEEDED_GIB=9
refresh=no
case "${1:-}" in
  "") ;;
  --refresh-constraints) refresh=yes ;;
  *) die "scripts/setup.sh: unknown argument '$1' (expected --refresh-constraints or nothing)" ;;
esac

stamp=$VENV/.installed
fingerprint=$(cat pyproject.toml constraints.txt 2>/dev/null | sha256sum | cut -d' ' -f1)
installed() { [ "$refresh" = no ] && [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; }
if installed; then exit 0; fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  if new_enough "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  found=$("${PYTHON:-python3}" --version 2>&1 || true)
  die "Python 3.11 or newer is needed, found: ${found:-none}. Install one and set PYTHON=/path/to/python3.11"
fi

if [ ! -x "$VENV/bin/python" ]; then
  free_kib=$(df -Pk "$ROOT" | awk 'NR==2 {print $4}')
  if [ "$free_kib" -lt $((NEEDED_GIB * 1024 * 1024)) ]; then
    die "$ROOT has $((free_kib / 1024 / 1024)) GiB free; installing needs about $NEEDED_GIB GiB"
  fi
fi

# The machines of a run start at the same time, and may share this folder: one installs, the others wait for it.
mkdir -p "$VENV"
exec 9>"$VENV/.setup.lock"
flock 9
if installed; then exit 0; fi

say "Installing into $VENV with $("$python" --version) (a few minutes, about 7 GB, once)"
"$python" -m venv "$VENV"
rm -f "$stamp"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
constrain=(-c constraints.txt)
if [ "$refresh" = yes ]; then constrain=(--upgrade); fi
# One line for each package instead of hundreds of lines of "already satisfied" and progress fragments.
if [ -t 2 ]; then quiet=(); else quiet=(--progress-bar off); fi
pip install "${quiet[@]}" "${constrain[@]}" -e '.[all]' |
  grep --line-buffered -E '^(Collecting|  Downloading|Building|Installing|ERROR)' | sed -u 's/ from https\?:.*//; s/^/  /' >&2
"$VENV/bin/python" -c 'import torch, transformers, deepspeed, open_clip, lmms_eval' 2>"$VENV/import.log" >/dev/null ||
  die "the installed packages do not import together: $(tail -n 1 "$VENV/import.log") (see $VENV/import.log)"

if [ "$refresh" = yes ]; then
  {
    echo "# Exact versions that the tests ran on. Refresh: bash scripts/setup.sh --refresh-constraints"
    pip freeze --exclude-editable --exclude llava_compete | grep -E '^[A-Za-z0-9._-]+=='
  } >constraints.txt
  fingerprint=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
fi
echo "$fingerprint" >"$stamp"
say "Installed: $("$VENV/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)')"
