#!/usr/bin/env bash
# Runs every stage whose YAML is in CONFIG_DIR, in order, skipping finished ones; stops at the first that fails.
#   bash scripts/train_all.sh CONFIG_DIR [KEY=VALUE ...]     for example configs/phi35_siglip
# Overrides go to every training stage. Environment: see scripts/lib/launch.sh; several machines with HOSTFILE only,
# since upcycling runs on one.
set -euo pipefail
trap 'exit 143' TERM USR1 INT HUP # until there are ranks, which save first
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
configs=$(from_caller "${1:-}")
if [ $# -lt 1 ] || [ ! -d "$configs" ]; then die "scripts/train_all.sh: expected a directory with stage YAMLs, found '${1:-nothing}'"; fi
if [ "${NNODES:-1}" -gt 1 ]; then
  die "scripts/train_all.sh: NNODES=$NNODES: run the stage scripts one by one on each machine, upcycle.sh on one; or set HOSTFILE"
fi
shift

# Runs a stage so that a signal to this script reaches it: it saves, and no further stage starts.
run() {
  local status=0
  [ "$told" = no ] || exit 143 # between two stages
  bash "$@" &
  wait_for $! "kill -TERM $! 2>/dev/null || true" || status=$?
  if [ "$told" = yes ] && [ "$status" -eq 0 ]; then status=143; fi # it had just finished
  return "$status"
}

found=no
for stage in pretrain_align pft upcycle sft; do
  config=$configs/$stage.yaml
  if [ ! -f "$config" ]; then continue; fi
  found=yes
  echo "== $stage" >&2
  # A stage that has finished with these settings says so and returns.
  if [ "$stage" = upcycle ]; then
    run "$ROOT/scripts/upcycle.sh" "$config" --keep
  else
    run "$ROOT/scripts/$stage.sh" "$config" "$@"
  fi
done
if [ "$found" = no ]; then die "scripts/train_all.sh: $configs: no pretrain_align.yaml, pft.yaml, upcycle.yaml or sft.yaml"; fi
