# Sourced by the scripts: repository root, messages, and the project's virtual environment.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${VENV:-$ROOT/.venv}
CALLER=$PWD
cd "$ROOT" || exit 1

say() { printf '\n== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# from_caller PATH: a file or folder that the user named from where the user is; else as it is, relative to the repository.
from_caller() {
  if [[ $1 != /* && -e $CALLER/$1 ]]; then printf '%s\n' "$CALLER/$1"; else printf '%s\n' "$1"; fi
}

# Makes .venv once, and again when pyproject.toml or constraints.txt have changed.
ensure_venv() {
  bash "$ROOT/scripts/setup.sh"
}

# start_group COMMAND...: a command or function in the background, in a process group of its own, whose id is in `group`.
# shellcheck disable=SC2034 # the callers read it
start_group() {
  set -m
  "$@" &
  group=$!
  set +m
}

# wait_group GROUP: its status. A signal to this script ends it: stages save first.
wait_group() {
  local status=0
  wait_for "$1" "end_groups $1" || status=$?
  trap - TERM USR1 INT HUP
  [ "$told" = no ] || exit 143
  return "$status"
}

# end_groups GROUP...: tells all of them, and returns when no process is left: a function's own shell leaves before what
# it had started. Zombies do not count, which nobody may fetch here.
end_groups() {
  local one
  for one in "$@"; do kill -TERM -- "-$one" 2>/dev/null || true; done
  for one in "$@"; do
    while pgrep -g "$one" -r D,R,S,T >/dev/null; do sleep 0.2; done
  done
}

# wait_for PID COMMAND: the status of a background process. A signal to this script runs COMMAND meanwhile and sets
# `told=yes`.
# shellcheck disable=SC2034 # the callers read it
told=no
wait_for() {
  local pid=$1 status=0
  # shellcheck disable=SC2064 # this process's command
  trap "told=yes; $2" TERM USR1 INT HUP
  wait "$pid" || status=$?
  # `wait` returns early when a trap ran: wait again until the process is really gone.
  while kill -0 "$pid" 2>/dev/null; do
    status=0
    wait "$pid" || status=$?
  done
  return "$status"
}
