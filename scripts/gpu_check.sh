#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 5 minutes on one: correctness, waiting, speed, and the demo's stages.
#   bash scripts/gpu_check.sh [--cpu] [--out FOLDER] [SECTION ...]      default: every section, outputs/gpu_check
#     parity    every router and both steps in float32 and bfloat16 against float64 on the CPU
#     waiting   forward and backward of a training step never wait for the GPU
#     nccl      the stage's process group and its collectives with one rank
#     moe train generate    the three benchmarks
#     routing   the routing study's default preset, as far as a minute takes it
#     demo      the demo's stages in bfloat16 under ZeRO-2 and ZeRO-3, a few steps each
# Writes FOLDER/gpu_check.{json,md,log} anew after each section: what was measured stays if the time runs out.
# --cpu tries the script where there is no GPU, on small sizes. Runs from the source tree with any Python that has
# torch (PYTHON; default: the project's .venv, else python3); what else that needs: scripts/gpu_wheels.sh.
# GPU_CHECK_SECONDS (300; with --cpu 3600) is for all sections together, beside each section's own limit on a GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

SECTIONS=(parity waiting nccl moe train demo generate routing)
declare -A LIMITS=([parity]=60 [waiting]=45 [nccl]=60 [moe]=50 [train]=120 [generate]=120 [demo]=140 [routing]=100)

out=outputs/gpu_check chosen=()
export GPU_CHECK_CPU=no
while [ $# -gt 0 ]; do
  case $1 in
    --cpu) GPU_CHECK_CPU=yes ;;
    --out)
      out=${2:?--out needs a folder}
      shift
      ;;
    *)
      [ -n "${LIMITS[$1]:-}" ] || die "scripts/gpu_check.sh: found '$1', expected --cpu, --out FOLDER or some of: ${SECTIONS[*]}"
      chosen+=("$1")
      ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${SECTIONS[@]}")

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; fi
fi
export PYTHON PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
total=${GPU_CHECK_SECONDS:-300}
if [ "$GPU_CHECK_CPU" = yes ]; then
  export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu GPU_TESTS_ON_CPU=1
  total=${GPU_CHECK_SECONDS:-3600}
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  die "$PYTHON: its torch finds no CUDA device; --cpu tries the script without one"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out" "$scratch/results"
: >"$out/gpu_check.log"

# run_section NAME SECONDS: notes the section's status and seconds, and writes the report of all sections so far.
run_section() {
  local name=$1 seconds=$2 started status=0
  started=$(date +%s.%N)
  timeout --kill-after=5 "$seconds" bash scripts/lib/gpu_section.sh "$name" "$scratch" >"$scratch/$name.log" 2>&1 || status=$?
  { printf '\n=== %s\n' "$name" && cat "$scratch/$name.log"; } >>"$out/gpu_check.log"
  awk -v n="$name" -v s="$status" -v a="$started" -v b="$(date +%s.%N)" \
    'BEGIN {printf "%s\t%d\t%.1f\n", n, s, b - a}' >>"$scratch/results/sections.tsv"
  "$PYTHON" -m llava_compete.report.gpu_check "$scratch/results" "$out"
  [ "$status" -eq 0 ] || { tail -n 15 "$scratch/$name.log" >&2 && failed+=("$name"); }
}

failed=()
for name in "${chosen[@]}"; do
  left=$((total - SECONDS)) limit=${LIMITS[$name]}
  [ "$GPU_CHECK_CPU" = no ] || limit=$left
  if [ "$left" -lt 10 ]; then
    failed+=("$name (no time left)")
    continue
  fi
  say "$name"
  run_section "$name" $((limit < left ? limit : left))
done
cat "$out/gpu_check.md"
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}; see $out/gpu_check.log"
