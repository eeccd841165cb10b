# Sourced by launch.sh: one stage on the machines of a HOSTFILE, over ssh; node.sh is the other end.
# shellcheck shell=bash
#
# ssh's standard input carries the environment and the command, so that no token shows in a list of processes, and
# then the word `stop`. Its end means the same: where the connection is lost, no rank is left behind.

# Variables with these prefixes reach the ranks; devices are each machine's own.
PASSED_ON='^(VENV$|LD_LIBRARY_PATH$|TMPDIR$|OMP_|MKL_|HF_|HUGGINGFACE_|TRANSFORMERS_|WANDB_|MLFLOW_|TENSORBOARD_|TOKENIZERS_|NCCL_|GLOO_|TP_|UCX_|TORCH|PYTHON|DS_|TRITON_|CUDA_LAUNCH|[a-z]+_proxy$|NUM_GPUS$)'
HANG_SECONDS=60

# read_hostfile: sets `hosts` and `slots`.
read_hostfile() {
  local line number=0
  [ -f "$HOSTFILE" ] || die "HOSTFILE=$HOSTFILE: no such file"
  [ -z "${NNODES:-}" ] || die "HOSTFILE and NNODES are both set: set one of them"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    if [[ $line =~ ^[[:space:]]*$ ]]; then continue; fi
    if [[ ! $line =~ ^[[:space:]]*([^[:space:]-][^[:space:]]*)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]]; then
      die "$HOSTFILE, line $number: expected 'HOST slots=N', found '$line'"
    fi
    if [[ " ${hosts[*]} " == *" ${BASH_REMATCH[1]} "* ]]; then die "$HOSTFILE, line $number: ${BASH_REMATCH[1]} stands there twice"; fi
    hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
  done <"$HOSTFILE"
  [ ${#hosts[@]} -gt 0 ] || die "$HOSTFILE: names no host"
}

# run_on_hosts STAGE CONFIG [KEY=VALUE | --option ...]: the status of the machine that was the first to fail, 143 where
# the stage was stopped.
run_on_hosts() {
  local -a hosts=() slots=() inputs=() clients=()
  local index input folder status=0
  command -v ssh >/dev/null || die "HOSTFILE=$HOSTFILE: needs ssh"
  read_hostfile
  check_number MASTER_PORT 1 65535
  check_number NUM_GPUS 0
  # The address by which ssh reaches the first machine; its name in the file may be an alias of ~/.ssh/config.
  MASTER_ADDR=${MASTER_ADDR:-$(ssh -G "${hosts[0]}" | sed -n 's/^hostname //p')}
  folder=$(mktemp -d)
  for index in "${!hosts[@]}"; do
    mkfifo "$folder/$index"
    connect "${hosts[$index]}" <"$folder/$index" &
    clients+=($!)
    exec {input}>"$folder/$index"
    inputs+=("$input")
    # One that has left already says why by itself.
    { settings_of "$index" "$@" >&"$input"; } 2>/dev/null || true
  done
  rm -r "$folder"
  told=no
  trap 'told=yes; tell_hosts' TERM USR1 INT HUP
  wait_for_hosts || status=$?
  trap - TERM USR1 INT HUP
  if [ "$told" = yes ] && [ "$status" -gt 128 ]; then status=143; fi # 255: the connections were ended too
  return "$status"
}

connect() {
  local input
  for input in "${inputs[@]}"; do exec {input}>&-; done # else a client would keep those of other machines open
  # In a session of its own, as the ranks' launchers are: Ctrl-C must not end the connection.
  exec setsid ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 "$1" \
    "exec bash $(printf %q "$ROOT/scripts/lib/node.sh")"
}

# settings_of INDEX STAGE ...: what node.sh evaluates.
settings_of() {
  local index=$1 name
  shift
  for name in $(compgen -e | grep -E "$PASSED_ON"); do printf 'export %s=%q\n' "$name" "${!name}"; done
  printf 'export NNODES=%s NODE_RANK=%s MASTER_ADDR=%q MASTER_PORT=%s\n' \
    "${#hosts[@]}" "$index" "$MASTER_ADDR" "${MASTER_PORT:-29500}"
  if [ "${NUM_GPUS:-}" = 0 ]; then echo "export NUM_PROCESSES=${slots[$index]}"; else echo "export NUM_GPUS=${slots[$index]}"; fi
  printf 'stage=('
  printf '%q ' "$@"
  printf ')\n.\n'
}

tell_hosts() {
  local input
  for input in "${inputs[@]}"; do { echo stop >&"$input"; } 2>/dev/null || true; done
}

wait_for_hosts() {
  local index status first=0 ask=0
  local -a running=("${!clients[@]}") left
  while [ ${#running[@]} -gt 0 ]; do
    left=()
    for index in "${running[@]}"; do
      if kill -0 "${clients[$index]}" 2>/dev/null; then
        left+=("$index")
        continue
      fi
      status=0
      wait "${clients[$index]}" || status=$?
      if [ "$status" -eq 0 ] || [ "$first" -ne 0 ]; then continue; fi
      first=$status
      if [ "$status" -eq 255 ]; then say "${hosts[$index]}: the connection has ended (ssh: 255)"; fi
    done
    running=("${left[@]}")
    # With a machine less the others' ranks wait in vain: they are told to leave, and once more if they hang.
    if [ "$first" -ne 0 ] && [ "$SECONDS" -ge "$ask" ]; then
      tell_hosts
      ask=$((SECONDS + HANG_SECONDS))
    fi
    sleep 0.5
  done
  return "$first"
}
