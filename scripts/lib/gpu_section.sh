#!/usr/bin/env bash
# One section of scripts/gpu_check.sh, which sets the environment: gpu_section.sh NAME SCRATCH_FOLDER
# Results go to SCRATCH_FOLDER/results, where llava_compete.report.gpu_check reads them.
set -euo pipefail
name=$1 scratch=$2 results=$2/results

if [ "$GPU_CHECK_CPU" = yes ]; then
  moe=(--tokens 128 --rounds 1 --shape 64 128 4 2) train=(--repeats 1)
  generate=(--batch-size 1 --new-tokens 2 --rounds 1) routing=(--quick)
else
  moe=(--tokens 8192 --rounds 3) train=(--repeats 3)
  generate=(--device cuda --dtype bfloat16 --batch-size 32 --new-tokens 48 --rounds 3 --static-cache)
  routing=(--device cuda --minutes 1)
fi

llava() { "$PYTHON" -m llava_compete.cli "$@"; }

gpu_tests() {
  "$PYTHON" -m pytest -m gpu -p no:cacheprovider -o junit_family=xunit1 "tests/gpu/test_$1.py" --junitxml "$results/$1.xml"
}

# demo_stage NAME STAGE ZERO SOURCE [KEY=VALUE ...]: a few steps of a stage of the demo, under a launcher, with one rank.
demo_stage() {
  local run=$1 stage=$2 zero=$3 source=$4
  shift 4
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 1 --module llava_compete.cli train \
    "configs/demo/$stage.yaml" --stage "$stage" output_dir="$scratch/$run" deepspeed="$zero" training.bf16=true \
    training.max_steps=3 training.logging_steps=1 training.save_strategy=no training.report_to=none \
    data.cache_dir="$scratch/cache-$run" "data.sources=[{name: demo, path: $scratch/data/$source, image_folder: $scratch/data/images}]" "$@"
  mkdir -p "$results/demo"
  cp "$scratch/$run/run/metrics.jsonl" "$results/demo/$run.jsonl"
}

case $name in
  parity | waiting) gpu_tests "$name" ;;
  nccl) gpu_tests collectives ;;
  moe) llava bench moe "${moe[@]}" --figure "$scratch/moe.png" --json "$results/moe.json" ;;
  train) llava bench train "${train[@]}" --json "$results/train.json" ;;
  generate) llava bench generate "${generate[@]}" --json "$results/generate.json" ;;
  routing)
    llava study routing "${routing[@]}" --out "$scratch/routing"
    cp "$scratch/routing/routing.json" "$results/routing.json"
    ;;
  demo)
    "$PYTHON" scripts/lib/few_scenes.py "$scratch/data"
    demo_stage pretrain_align-zero2 pretrain_align zero2 pretrain.json
    # Competitions from the first step, so that three steps have some.
    llava upcycle --config configs/demo/upcycle.yaml model.checkpoint="$scratch/pretrain_align-zero2" \
      output_dir="$scratch/upcycle" moe.competition_warmup_ratio=0 moe.competition_rate=0.5
    pids=()
    for zero in zero2 zero3; do # side by side: most of their time is start-up
      demo_stage "sft-$zero" sft "$zero" instruct.json model.checkpoint="$scratch/upcycle" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
    ;;
  *)
    echo "error: no section '$name'" >&2
    exit 2
    ;;
esac
