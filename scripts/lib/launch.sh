# Sourced by the stage scripts: starts `llava-compete train` on all ranks through the right launcher.
# shellcheck shell=bash
#
#   NUM_GPUS        GPUs of this machine to use (default: all that CUDA_VISIBLE_DEVICES names, or all; 0 = CPU)
#   NUM_PROCESSES   ranks on CPU (default 2)
#   HOSTFILE        lines `host slots=N`, as DeepSpeed's: several machines over ssh, started from one
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines over torchrun, started on each
# Threads, ports and devices are decided here, everything about training in the YAML.
#
# TERM, USR1, INT or HUP to a stage script: its ranks save and stop, and the script exits with 143 once they have.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=devices.sh
source "$ROOT/scripts/lib/devices.sh"
# shellcheck source-path=SCRIPTDIR source=ranks.sh
source "$ROOT/scripts/lib/ranks.sh"
# shellcheck source-path=SCRIPTDIR source=hosts.sh
source "$ROOT/scripts/lib/hosts.sh"
ensure_venv
export PATH="$VENV/bin:$PATH"

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# run_stage STAGE [CONFIG] [KEY=VALUE | --option ...]
run_stage() {
  local stage=$1 config=configs/demo/$1.yaml
  shift
  if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]]; then
    config=$(from_caller "$1")
    shift
  fi
  # A reader of our messages that is gone (`| tee` after Ctrl-C) is no reason to leave before the ranks have saved.
  trap '' PIPE
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  if [ -n "${HOSTFILE:-}" ]; then
    run_on_hosts "$stage" "$config" "$@"
    return
  fi
  choose_devices
  choose_launcher
  run_ranks "${launcher[@]}" --module llava_compete.cli train "$config" --stage "$stage" "$@"
}

# Sets `launcher`: torchrun where DeepSpeed's launcher cannot do it, which takes devices by number alone.
choose_launcher() {
  check_number MASTER_PORT 1 65535
  check_number NNODES 1
  local nodes=${NNODES:-1} node=0 address=127.0.0.1 port=${MASTER_PORT:-}
  if [ -n "${NNODES:-}" ]; then
    check_number NODE_RANK 0 $((NNODES - 1))
    node=${NODE_RANK:-} address=${MASTER_ADDR:-} port=${port:-29500}
    if [ -z "$node" ] || [ -z "$address" ]; then die "NNODES=$NNODES: needs NODE_RANK and MASTER_ADDR too"; fi
  fi
  if [ -n "${NNODES:-}" ] || [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    launcher=(python "$ROOT/scripts/lib/torchrun.py" --nnodes "$nodes" --node_rank "$node" --nproc_per_node "$processes"
      --master_addr "$address" --master_port "${port:-$(free_port)}")
  else
    launcher=(deepspeed --num_gpus "$processes" --master_addr "$address" --master_port "${port:-$(free_port)}"
      --no_local_rank --log_level critical)
  fi
}
