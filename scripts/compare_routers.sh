#!/usr/bin/env bash
# The router study: from a parent checkpoint a seed, with the same data order and steps, dense training goes on beside
# all routers, with several seeds; then evaluation and a paired comparison with intervals over questions and seeds.
# A seed is that of the parent's training, of the routers' start, of the data's order and of the competitions.
#   bash scripts/compare_routers.sh                 3 seeds on the demo, under an hour on 2 cores
#   bash scripts/compare_routers.sh --quick         1 seed, few steps, under 10 minutes
#   PARENT='outputs/demo_hard/parent{seed}' bash scripts/compare_routers.sh --seeds 5 --suite demo_hard --out outputs/hard \
#     --config configs/demo_hard/sft.yaml --upcycle configs/demo_hard/upcycle.yaml training.max_steps=4000
#   (harder questions, as one would run it on a GPU; after llava-compete data scenes-hard and, for each seed,
#   scripts/pretrain_align.sh configs/demo_hard/pretrain_align.yaml output_dir=outputs/demo_hard/parent0 seed=0)
#   PARENT=outputs/smollm2_dinov2/pft bash scripts/compare_routers.sh --suite emoji --out outputs/routers_emoji \
#     --config configs/smollm2_dinov2/sft.yaml --upcycle configs/smollm2_dinov2/upcycle.yaml \
#     --eval configs/smollm2_dinov2/eval.yaml
#   (pretrained parts on real pictures, after scripts/realistic.sh)
#   ... --rules                                     instead of all routers: softmax, the published competition, one that
#                                                   only teaches (distil_only), and ones that the loss judges: contested
#                                                   experts are asked (judged), or their running means (judged_means)
# Further KEY=VALUE go to every training run. Runs that are finished are kept: the same command goes on after a stop.
# PARENT: a dense checkpoint to start from (default: one a seed is trained first); {seed} in it stands for the seed, and
# without it the differences hold for this one parent only. JOBS: runs at a time (default: GPUs, else cores).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/study.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/study.sh"

steps=250 seeds=3 limit=null SUITE=demo OUT=outputs/compare_routers CONFIG=configs/demo/sft.yaml
UPCYCLE=configs/demo/upcycle.yaml EVAL=configs/demo/eval.yaml overrides=()
# Experts of each token, one of them shared with the shared_* routers: with 2 their router would get no gradient from the
# task, and with another number than the rest they would have other active sizes.
CHOSEN=3
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) steps=60 seeds=1 limit=200 OUT=outputs/compare_routers_quick ;;
    --rules) METHODS=("${RULES[@]}") CHOSEN=2 ;; # none of them shares an expert
    --seeds) seeds=$2 && shift ;;
    --suite) SUITE=$2 && shift ;;
    --config) CONFIG=$2 && shift ;;
    --upcycle) UPCYCLE=$2 && shift ;;
    --eval) EVAL=$2 && shift ;;
    --out) OUT=$2 && shift ;;
    *=*) overrides+=("$1") ;;
    *) die "scripts/compare_routers.sh: unknown argument '$1' (--quick, --rules, --seeds N, --suite S, --config F, --upcycle F, --eval F, --out D, KEY=VALUE)" ;;
  esac
  shift
done
ensure_venv
export PATH="$VENV/bin:$PATH" TOKENIZERS_PARALLELISM=false

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
JOBS=${JOBS:-$((gpus > 0 ? gpus : $(nproc)))}
if [ "$gpus" -eq 0 ]; then
  # Small runs side by side, one core each, use a CPU better than one run on all cores.
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

study_settings "$OUT" "parent ${PARENT:-one a seed}, $CONFIG, $UPCYCLE, suite $SUITE, $steps steps, $CHOSEN experts a token, limit $limit ${overrides[*]}"
if [ -z "${PARENT:-}" ]; then
  PARENT="$OUT/parent/seed{seed}"
  [ -f playground/data/demo/eval/meta.json ] || llava-compete data demo --out playground/data/demo
  for ((seed = 0; seed < seeds; seed++)); do
    parent=${PARENT//"{seed}"/$seed}
    [ -f "$parent/config.json" ] && continue
    start_group env OMP_NUM_THREADS= bash scripts/pretrain_align.sh output_dir="$parent" seed="$seed"
    # shellcheck disable=SC2154 # common.sh's
    wait_group "$group"
  done
fi

# The parts that have experts.
mapfile -t PARTS < <(grep -oE '^  (vision|projector|language):' "$UPCYCLE" | tr -d ' :')
[ "${#PARTS[@]}" -gt 0 ] || die "$UPCYCLE: found no part with experts (vision, projector or language below moe)"

# One method with one seed: upcycle (unless dense), train in one process, evaluate.
run_one() {
  local method=$1 seed=$2 slot=$3
  local directory=$OUT/$method/seed$seed
  if study_done "$directory"; then return 0; fi
  [ "$gpus" -eq 0 ] || export CUDA_VISIBLE_DEVICES=$((slot % gpus))
  local parent=${PARENT//"{seed}"/$seed} start moe=(moe=false)
  start=$parent
  if [ "$method" != dense ]; then
    start=$directory/upcycle moe=()
    local part settings=()
    for part in "${PARTS[@]}"; do
      mapfile -t -O "${#settings[@]}" settings < <(study_rule "$method" | sed "s/^/moe.$part./")
      settings+=(moe."$part".num_experts_per_tok="$CHOSEN")
    done
    [ -f "$start/config.json" ] || llava-compete upcycle --config "$UPCYCLE" model.checkpoint="$parent" \
      output_dir="$start" "${settings[@]}" seed="$seed" moe.seed="$seed"
  fi
  [ -f "$directory/sft/config.json" ] || llava-compete train "$CONFIG" --stage sft model.checkpoint="$start" \
    output_dir="$directory/sft" seed="$seed" deepspeed=none training.per_device_train_batch_size=16 \
    training.max_steps="$steps" "${moe[@]}" "${overrides[@]}"
  llava-compete eval --config "$EVAL" checkpoint="$directory/sft" output_dir="$directory/eval" \
    suite="$SUITE" limit="$limit" batch_size=100 processes=1
}

study_runs "$OUT" "$seeds" "$JOBS"
say "Comparison (baseline: softmax, the router without competition)"
study_compare "$OUT" "$seeds"
