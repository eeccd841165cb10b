#!/usr/bin/env bash
# The router study on text: a dense baseline with the same active parameters and all routers, several seeds, from
# scratch on the standard library's documentation; then a paired comparison over held-out rows and seeds.
#   bash scripts/compare_routers_lm.sh            3 seeds
#   bash scripts/compare_routers_lm.sh --quick    1 seed, few steps
#   bash scripts/compare_routers_lm.sh --seeds 5 --out outputs/lm_routers5 training.max_steps=2000
# Further KEY=VALUE go to every training run. Runs that are finished are kept: the same command goes on after a stop.
# JOBS: runs at a time (default: cores).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/study.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/study.sh"

seeds=3 out=outputs/lm_routers overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) seeds=1 out=outputs/lm_routers_quick overrides+=(training.max_steps=60 data.max_validation_rows=64) ;;
    --seeds) seeds=$2 && shift ;;
    --out) out=$2 && shift ;;
    *=*) overrides+=("$1") ;;
    *) die "scripts/compare_routers_lm.sh: unknown argument '$1' (--quick, --seeds N, --out DIR, KEY=VALUE)" ;;
  esac
  shift
done
ensure_venv
export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
JOBS=${JOBS:-$(nproc)}
study_settings "$out" "overrides: ${overrides[*]:-none}"
[ -f playground/data/stdlib_text/meta.json ] || llava-compete data stdlib-text

# One method with one seed: train in one process, then held-out bits per byte by row.
run_one() {
  local method=$1 seed=$2 config=configs/lm/tiny.yaml moe=("moe.seed=$2")
  local directory=$out/$method/seed$seed
  if study_done "$directory"; then return 0; fi
  case "$method" in
    dense) config=configs/lm/tiny_dense.yaml moe=() ;;
    competition) ;;
    *)
      mapfile -t -O "${#moe[@]}" moe < <(study_rule "$method" | sed "s/^/moe.language./")
      for term in distillation winner_distillation diversity; do moe+=("moe.language.${term}_coef=null"); done
      ;;
  esac
  llava-compete train "$config" --stage pretrain_lm output_dir="$directory/model" seed="$seed" deepspeed=none \
    "${moe[@]}" "${overrides[@]}"
  llava-compete perplexity "$directory/model" --out "$directory/eval"
}

study_runs "$out" "$seeds" "$JOBS"
say "Comparison (baseline: softmax); text_compression: share of the text's bits saved, 1 percent = 0.08 bits per byte"
study_compare "$out" "$seeds"
