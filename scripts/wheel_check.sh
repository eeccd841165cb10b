#!/usr/bin/env bash
# Builds the wheel, installs it into an empty folder and uses it outside the checkout: recipes, data, plan, one short
# stage under DeepSpeed, evaluation. The dependencies are those of the project's environment.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_venv
export PATH="$VENV/bin:$PATH" CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$work" # a build leaves its folders beside the sources
say "Building the wheel"
python -m pip wheel -q --no-deps --no-build-isolation -w "$work/dist" "$work"
python -m pip install -q --no-deps --target "$work/site" "$work"/dist/llava_compete-*.whl

mkdir "$work/elsewhere"
cd "$work/elsewhere"
export PYTHONPATH=$work/site # before the checkout that the environment has installed
llava() { python -m llava_compete.cli "$@"; }
[ "$(python -c 'import llava_compete; print(llava_compete.__file__)')" = "$work/site/llava_compete/__init__.py" ]

say "Recipes, data and plan of the installed wheel"
llava recipes | grep -q phi35_siglip
llava recipes demo --out demo >/dev/null
llava data demo >/dev/null
llava data check demo/pretrain_align.yaml >/dev/null
llava plan demo/sft.yaml >/dev/null
say "One short stage under ZeRO-2, and an evaluation"
llava train demo/pretrain_align.yaml --stage pretrain_align output_dir=out deepspeed=zero2 training.max_steps=2
[ -f out/model.safetensors ]
llava eval out --suite demo --limit 4 --out out/eval
[ -f out/eval/summary.json ]
say "The wheel works outside the checkout"
