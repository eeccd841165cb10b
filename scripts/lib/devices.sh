# Sourced by launch.sh: which devices a machine's ranks use. Sets `processes`, and NUM_GPUS, by which each rank knows
# what it must find.
# shellcheck shell=bash

# check_number NAME LOWEST [HIGHEST]: the variable is not set, or a whole number in that range.
check_number() {
  local value=${!1:-} range="$2 or more"
  [ -n "$value" ] || return 0
  if [ $# -gt 2 ]; then range="$2 to $3"; fi
  if [[ ! $value =~ ^[0-9]{1,9}$ ]] || [ "$((10#$value))" -lt "$2" ] || [ "$((10#$value))" -gt "${3:-999999999}" ]; then
    die "$1=$value: expected a whole number, $range"
  fi
}

# The devices that CUDA_VISIBLE_DEVICES names, one a line; as for CUDA, the list ends at the first that is none.
named_gpus() {
  local entry entries
  IFS=$', \t' read -ra entries <<<"$CUDA_VISIBLE_DEVICES"
  for entry in "${entries[@]}"; do
    case $entry in
      GPU-* | MIG-*) ;;
      -1 | NoDevFiles | none | void) return ;;
      *[!0-9]*) die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: expected numbers or UUIDs (GPU-..., MIG-...), found '$entry'" ;;
    esac
    echo "$entry"
  done
}

choose_devices() {
  check_number NUM_GPUS 0
  check_number NUM_PROCESSES 1
  local found=0 cores named=""
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    named=$(named_gpus) || exit 2
    found=$(grep -c . <<<"$named" || true)
  elif command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  fi
  export NUM_GPUS=${NUM_GPUS:-$found}
  processes=$NUM_GPUS
  if [ "$NUM_GPUS" -eq 0 ]; then
    processes=${NUM_PROCESSES:-2} cores=$(nproc)
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    if [ "$NUM_GPUS" -gt "$found" ]; then
      die "NUM_GPUS=$NUM_GPUS: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names $found"
    fi
    named=$(head -n "$NUM_GPUS" <<<"$named")
    if [[ $named == MIG-*$'\n'* ]]; then
      die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: CUDA gives a process one MIG device, and ranks cannot share a GPU; name one"
    fi
    CUDA_VISIBLE_DEVICES=$(paste -sd, <<<"$named")
    export CUDA_VISIBLE_DEVICES
  fi
}
