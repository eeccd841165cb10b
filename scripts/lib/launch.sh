# Sourced by the stage scripts: starts `llava-compete train` on all ranks through the right launcher.
# shellcheck shell=bash
#
#   NUM_GPUS        GPUs of this machine to use (default: all that CUDA_VISIBLE_DEVICES names, or all; 0 = CPU)
#   NUM_PROCESSES   ranks on CPU (default 2)
#   HOSTFILE        DeepSpeed hostfile: several machines over ssh, started from one
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines over torchrun, started on each
# Threads, ports and devices are decided here, everything about training in the YAML.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_venv
export PATH="$VENV/bin:$PATH"

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Tells the ranks alone to stop, so that they save first: the launcher sees them leave and leaves too. Asked a second
# time, or before training has begun, they leave at once.
stop_ranks() {
  local launcher=$1 name=$2 child
  stopped=yes
  if ! kill -0 "$launcher" 2>/dev/null; then
    pkill -TERM -s "$launcher" || true
    return
  fi
  if [ "$name" = torchrun ]; then
    pkill -TERM -P "$launcher" || true
    return
  fi
  for child in $(pgrep -P "$launcher"); do
    if [ "$(ps -o comm= -p "$child")" = pdsh ]; then
      kill -TERM "$launcher" # it alone reaches the other machines' ranks
    else # `deepspeed` starts one process, which starts the ranks
      pkill -TERM -P "$child" || true
    fi
  done
}

# run_stage STAGE [CONFIG] [KEY=VALUE | --option ...]
run_stage() {
  local stage=$1 config=configs/demo/$1.yaml gpus processes devices launcher status=0
  shift
  if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]]; then
    config=$1
    shift
  fi
  gpus=${NUM_GPUS:-$(count_gpus)}
  processes=$gpus
  if [ "$gpus" -eq 0 ]; then
    processes=${NUM_PROCESSES:-2}
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    local cores
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
  fi
  devices=(--num_gpus "$processes")
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # `deepspeed --num_gpus` would take others
    devices=(--include "localhost:$(cut -d, -f "1-$gpus" <<<"$CUDA_VISIBLE_DEVICES")")
  fi
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

  if [ -n "${NNODES:-}" ]; then
    launcher=(torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:?NODE_RANK is needed with NNODES}"
      --nproc_per_node "$processes" --master_addr "${MASTER_ADDR:?MASTER_ADDR is needed with NNODES}"
      --master_port "${MASTER_PORT:-29500}" --module)
  elif [ -n "${HOSTFILE:-}" ]; then
    launcher=(deepspeed --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" --no_local_rank --log_level critical --module)
  else
    launcher=(deepspeed "${devices[@]}" --master_addr 127.0.0.1 --master_port "${MASTER_PORT:-$(free_port)}"
      --no_local_rank --log_level critical --module)
  fi
  stopped=no
  # In a session of its own: a signal to the script's process group (Ctrl-C, a closed terminal) would end the launcher,
  # and with it the ranks, before they have saved.
  setsid "${launcher[@]}" llava_compete.cli train "$config" --stage "$stage" "$@" &
  local pid=$!
  wait_for "$pid" "stop_ranks $pid ${launcher[0]}" || status=$?
  # Where all processes were told to stop (systemd, scancel) the launcher does not stay until the ranks have saved.
  while [ "$stopped" = yes ] && pgrep -s "$pid" >/dev/null; do sleep 0.2; done
  if [ "$stopped" = yes ] && [ "$status" -eq 0 ]; then return 143; fi
  return "$status"
}
