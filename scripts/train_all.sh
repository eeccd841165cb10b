#!/usr/bin/env bash
# Runs every stage whose YAML is in CONFIG_DIR, in order, skipping finished ones; stops at the first that fails.
#   bash scripts/train_all.sh CONFIG_DIR [KEY=VALUE ...]     for example configs/phi35_siglip
# Overrides go to every training stage. Environment: see scripts/lib/launch.sh
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
if [ $# -lt 1 ] || [ ! -d "$1" ]; then
  echo "error: scripts/train_all.sh: expected a directory with stage YAMLs, found '${1:-nothing}'" >&2
  exit 2
fi
configs=$1
shift
found=no
for stage in pretrain_align pft upcycle sft; do
  config=$configs/$stage.yaml
  if [ ! -f "$config" ]; then continue; fi
  found=yes
  echo "== $stage" >&2
  # A training stage that has finished says so and returns; upcycling is a transform, done when its result is there.
  if [ "$stage" = upcycle ]; then
    output=$(sed -n 's/^output_dir: *//p' "$config")
    if [ -f "$output/config.json" ]; then
      echo "$output: upcycled already" >&2
    else
      bash "$scripts/upcycle.sh" "$config"
    fi
  else
    bash "$scripts/$stage.sh" "$config" "$@"
  fi
done
if [ "$found" = no ]; then
  echo "error: $configs: no pretrain_align.yaml, pft.yaml, upcycle.yaml or sft.yaml" >&2
  exit 2
fi
