#!/usr/bin/env bash
# The main job on the bundled default: demo data, pretrain_align, upcycle, sft, evaluation and a closing report.
#   bash scripts/quickstart.sh            goes on from the last finished stage
#   bash scripts/quickstart.sh --fresh    starts over
#   bash scripts/quickstart.sh --smoke    a few steps of each stage over the same path, then checks what was written
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

fresh=no smoke=no
for argument in "$@"; do
  case "$argument" in
    --fresh) fresh=yes ;;
    --smoke) smoke=yes fresh=yes ;;
    *) die "scripts/quickstart.sh: unknown argument '$argument' (expected --fresh or --smoke)" ;;
  esac
done

OUT=outputs/quickstart train_overrides=() eval_overrides=() report_options=(--rows 100)
if [ "$smoke" = yes ]; then
  OUT=outputs/smoke
  train_overrides=(training.max_steps=4 training.logging_steps=1)
  eval_overrides=(limit=16)
  report_options=(--rows 8 --examples 2)
fi
if [ "$fresh" = yes ]; then rm -rf "$OUT"; fi
# shellcheck source-path=SCRIPTDIR source=lib/stages.sh
source "$ROOT/scripts/lib/stages.sh"

config_sum() { cat "configs/demo/$1.yaml" | sha256sum; }

stage setup "$(cat pyproject.toml constraints.txt | sha256sum)" ensure_venv
ensure_venv # an environment that was removed since then is made again
upstream="" # a newer package does not make the stages run again
export PATH="$VENV/bin:$PATH"
stage data "$(cat llava_compete/demo/*.py | sha256sum)" llava-compete data demo --out playground/data/demo
stage pretrain_align "$(config_sum pretrain_align)" \
  bash scripts/pretrain_align.sh configs/demo/pretrain_align.yaml output_dir="$OUT/pretrain_align" "${train_overrides[@]}"
stage upcycle "$(config_sum upcycle)" \
  bash scripts/upcycle.sh configs/demo/upcycle.yaml model.checkpoint="$OUT/pretrain_align" output_dir="$OUT/upcycle"
stage sft "$(config_sum sft)" \
  bash scripts/sft.sh configs/demo/sft.yaml model.checkpoint="$OUT/upcycle" output_dir="$OUT/sft" "${train_overrides[@]}"
stage eval "$(config_sum eval)" \
  bash scripts/eval.sh configs/demo/eval.yaml checkpoint="$OUT/sft" output_dir="$OUT/eval" "${eval_overrides[@]}"
llava-compete report "$OUT" --data playground/data/demo/eval/*_test.parquet "${report_options[@]}"
