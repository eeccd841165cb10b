#!/usr/bin/env bash
# Square against tiles on pages of small print: the same parts, rows, steps and seeds, with a page as one square and in up
# to 4 and 12 tiles beside it; then evaluation and a paired comparison. The parts are real ones out of packages, see
# configs/documents/pretrain_align.yaml; a GPU's work.
#   bash scripts/compare_documents.sh [--seeds N] [--out DIR] [KEY=VALUE ...]     KEY=VALUE go to both stages of each run
# Runs that are finished are kept: the same command goes on after a stop.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/study.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/study.sh"

seeds=1 OUT=outputs/compare_documents RECIPE=configs/documents overrides=()
METHODS=(square tiles_4 tiles_12)
while [ $# -gt 0 ]; do
  case "$1" in
    --seeds) seeds=$2 && shift ;;
    --out) OUT=$2 && shift ;;
    *=*) overrides+=("$1") ;;
    *) die "scripts/compare_documents.sh: unknown argument '$1' (--seeds N, --out D, KEY=VALUE)" ;;
  esac
  shift
done
ensure_venv
export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false

# One way to show a page, with one seed: both stages in one process, then evaluation.
run_one() {
  local method=$1 seed=$2
  local directory=$OUT/$method/seed$seed tiles=null
  [ -f "$directory/eval/summary.json" ] && return 0
  [ "$method" = square ] || tiles="{max: ${method#tiles_}}"
  [ -f "$directory/pretrain_align/config.json" ] || llava-compete train "$RECIPE/pretrain_align.yaml" \
    --stage pretrain_align output_dir="$directory/pretrain_align" seed="$seed" model.vision_tower.tiles="$tiles" \
    "${overrides[@]}"
  [ -f "$directory/sft/config.json" ] || llava-compete train "$RECIPE/sft.yaml" --stage sft \
    model.checkpoint="$directory/pretrain_align" output_dir="$directory/sft" seed="$seed" "${overrides[@]}"
  llava-compete eval --config "$RECIPE/eval.yaml" checkpoint="$directory/sft" output_dir="$directory/eval" processes=1
}

study_settings "$OUT" "$RECIPE ${overrides[*]}"
[ -f playground/data/documents/eval/meta.json ] || llava-compete data documents
study_runs "$OUT" "$seeds" 1
say "Comparison (baseline: square, a page as one picture)"
study_compare "$OUT" "$seeds"
