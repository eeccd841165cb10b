#!/usr/bin/env bash
# Does a competition help on real pretrained parts? Softmax, the published competition, one that only teaches, and two
# that the loss judges, on SmolLM2-135M, DINOv2 and emoji; a parent a seed, then the same data, order and steps for all.
#   bash scripts/realistic.sh                    first: it fetches the parts, and shows that the recipe learns
#   bash scripts/compare_rules_emoji.sh          5 seeds, some five hours a seed on 2 cores as busy as those of
#                                                eval/results/realistic, whose pft and five of whose sft it takes
#   SEEDS=3 bash scripts/compare_rules_emoji.sh outputs/rules3 training.max_steps=100
# Further KEY=VALUE go to every training of the rules. What is finished is kept: the same command goes on after a stop.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

RECIPE=configs/smollm2_dinov2 SEEDS=${SEEDS:-5} out=outputs/rules_emoji
case "${1:-}" in
  "" | *=*) ;;
  *) out=$1 && shift ;;
esac
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || die "SEEDS: found '$SEEDS', expected a number of seeds"
for needed in playground/data/emoji/instruct.json playground/data/pretrained/smollm2 playground/data/pretrained/dinov2; do
  [ -e "$needed" ] || die "$needed is missing: run bash scripts/realistic.sh first, which fetches it"
done
ensure_venv
export PATH="$VENV/bin:$PATH" NUM_PROCESSES=${NUM_PROCESSES:-1} # as scripts/realistic.sh trains the parent

say "$SEEDS seeds: some $((5 * SEEDS)) hours on 2 cores, less with fewer training.max_steps"
for ((seed = 0; seed < SEEDS; seed++)); do
  parent=$out/parent/seed$seed
  for stage in pretrain_align pft; do
    [ -f "$parent/$stage/config.json" ] && continue
    from=()
    [ "$stage" = pretrain_align ] || from=(model.checkpoint="$parent/pretrain_align")
    start_group bash "scripts/$stage.sh" "$RECIPE/$stage.yaml" output_dir="$parent/$stage" seed="$seed" "${from[@]}"
    # shellcheck disable=SC2154 # common.sh's
    wait_group "$group"
  done
done
# 8 rows a step, and as many steps as the recipe's one pass over the rows takes.
PARENT="$out/parent/seed{seed}/pft" exec bash scripts/compare_routers.sh --rules --seeds "$SEEDS" --suite emoji \
  --config "$RECIPE/sft.yaml" --upcycle "$RECIPE/upcycle.yaml" --eval "$RECIPE/eval.yaml" --out "$out/rules" \
  training.per_device_train_batch_size=4 training.max_steps=null "$@"
