#!/usr/bin/env bash
# Wheels for a GPU machine that has torch and the usual scientific packages, but no network: what this package needs
# besides, at the versions of constraints.txt, in a folder to carry there (about 18 MB).
#   bash scripts/gpu_wheels.sh [FOLDER]      default .whl; PYTHON_VERSION (3.12) is the GPU machine's
# There, beside a checkout:
#   python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl
#   PYTHONPATH=/tmp/site bash scripts/gpu_check.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

folder=${1:-.whl} python_version=${PYTHON_VERSION:-3.12}
packages=(transformers accelerate peft open_clip_torch ftfy wcwidth hjson msgpack py-cpuinfo
  pydantic pydantic_core annotated-types typing_extensions typing-inspection ruamel.yaml
  datasets dill multiprocess pytest-timeout)

pinned() {
  grep -iE "^$1==" constraints.txt || die "constraints.txt: no version of $1"
}
requirements=()
for package in "${packages[@]}"; do requirements+=("$(pinned "$package")"); done

platforms=()
for libc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${libc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package would stop the installation
python -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$python_version" \
  "${platforms[@]}" -d "$folder" "${requirements[@]}"
# DeepSpeed comes as source only; without its kernels it is plain Python.
DS_BUILD_OPS=0 CUDA_HOME="" python -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)"
for wheel in "$folder"/deepspeed-*.whl; do
  [[ $wheel == *-py3-none-any.whl ]] || die "$wheel: built for one interpreter, expected a pure Python wheel"
done
say "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder"
