#!/usr/bin/env bash
# Shows how a stage on two machines starts, stops, goes on, refuses and is evaluated: two network namespaces of this machine, with ssh.
#   bash scripts/two_nodes.sh [OUT [PART ...]]     as root, on CPU, about 10 minutes; the table goes to OUT/README.md
# OUT: outputs/two_nodes. PART: hostfile, nnodes, experts, different, mistakes, slurm (default: all); the table keeps the other parts' rows.
# Needs Debian's iproute2, openssh-server and openssh-client; for the part about Slurm slurmctld, slurmd, slurm-client and
# munge. All traffic stays between the two namespaces; nothing is left behind.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/namespaces.sh
source "$ROOT/scripts/lib/namespaces.sh"
# shellcheck source-path=SCRIPTDIR source=lib/slurm_nodes.sh
source "$ROOT/scripts/lib/slurm_nodes.sh"
# shellcheck source-path=SCRIPTDIR source=lib/tiny_stage.sh
source "$ROOT/scripts/lib/tiny_stage.sh"
need_namespaces
ensure_venv
export PATH="$VENV/bin:$PATH" VENV NUM_GPUS=0 NUM_PROCESSES=1 OMP_NUM_THREADS=1 WANDB_NAME="a 'name'" HF_HUB_OFFLINE=1
unset HOSTFILE NNODES NODE_RANK MASTER_ADDR MASTER_PORT
out=$(realpath -m "${1:-outputs/two_nodes}")
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(hostfile nnodes experts different mistakes slurm)
folder=$(mktemp -d)
trap 'remove_nodes; stop_slurm; rm -rf "$folder"' EXIT
trap 'exit 143' TERM INT HUP
mkdir -p "$out/rows"
say "Preparing the data and the model"
prepare_tiny_stage "$out"
tiny_stage "$out"
words+=(training.max_steps=80 training.save_steps=20) # long enough to be met in the middle
mkdir -p "$out/tasks"
cp eval/tasks/_demo_template_yaml eval/tasks/utils.py "$out/tasks"
sed "s#test: .*#test: $out/data/eval/digits_test.parquet#" eval/tasks/demo_digits.yaml >"$out/tasks/demo_digits.yaml"
make_nodes "$folder"
hosts=$out/hosts
printf '%s slots=1\n' "${ADDRESSES[@]}" >"$hosts"

# ---- what is looked at ----

part="" failures=0
# report WHAT EXPECTED FOUND: a row of the part's table.
report() {
  local mark=yes
  [ "$2" = "$3" ] || { mark="**no**: $3" failures=$((failures + 1)); }
  echo "| $1 | $2 | $mark |" >>"$out/rows/$part"
  printf '%s: expected %s, found %s\n' "$1" "$2" "$3" >&2
}
# finish PID: its status, in `status`.
finish() {
  status=0
  wait "$1" || status=$?
}
steps_of() { cat "$out/run-$1/run/metrics.jsonl" 2>/dev/null | grep -c '"loss"' || true; }
# wait_for_step RUN STEP PID
wait_for_step() {
  while [ "$(steps_of "$1")" -lt "$2" ] && kill -0 "$3" 2>/dev/null; do sleep 0.1; done
}
# The processes of ranks in the namespaces; of the second machine's rank.
ranks() { ranks_in "${NODES[@]}"; }
rank_of_second() { ranks_in "${NODES[1]}"; }
ranks_in() {
  local node pid
  for node in "$@"; do
    for pid in $(ip netns pids "$node"); do
      if grep -qsz '^RANK=' "/proc/$pid/environ"; then echo "$pid"; fi
    done
  done
}
checkpoints() { find "$out/run-$1" -maxdepth 2 -name complete.json | wc -l; }
saved() { if [ "$(checkpoints "$1")" -gt 0 ]; then echo yes; else echo no; fi; }
finished() { if [ -f "$out/run-$1/run/finished.json" ]; then echo yes; else echo no; fi; }
# equal RUN OTHER: by loss, gradient norm and rows of each step, and by the bytes of the final weights.
equal() {
  python - "$out/run-$1" "$out/run-$2" <<'END'
import hashlib, json, pathlib, sys
def seen(folder):
    lines = (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    curve = [[r[k] for k in ("step", "loss", "grad_norm", "sample_checksum")] for r in map(json.loads, lines) if "loss" in r]
    return curve, hashlib.sha256((pathlib.Path(folder) / "model.safetensors").read_bytes()).hexdigest()
print("yes" if seen(sys.argv[1]) == seen(sys.argv[2]) else "no")
END
}
# near RUN OTHER: yes if the losses of the first 20 steps are alike to a thousandth; products are summed in another order,
# and the steps of Adam make more of that.
near() {
  python - "$out/run-$1" "$out/run-$2" <<'END'
import json, math, pathlib, sys
def losses(folder):
    lines = (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r and r["step"] <= 20}
one, other = losses(sys.argv[1]), losses(sys.argv[2])
print("yes" if len(one) == 20 and all(math.isclose(one[k], other[k], rel_tol=1e-3) for k in one) else f"no: {one} {other}")
END
}
# evaluate RUN NODE: what the model answers in 40 questions of the demo's test, by the evaluation's own script.
evaluate() {
  if [ ! -f "$out/eval-$1/summary.json" ]; then
    (on_node "$2" bash scripts/eval.sh configs/demo/eval.yaml checkpoint="$out/run-$1" output_dir="$out/eval-$1" suite=null \
      'tasks=[demo_digits]' include_path="$out/tasks" limit=40 'routing_data=[]') >"$out/eval-$1.log" 2>&1 || true
  fi
  cat "$out/eval-$1/samples/demo_digits.jsonl" 2>/dev/null || echo "no answers of $1"
}
# answers RUN NODE: yes if all 40 are there, and those of the run that was never stopped.
answers() {
  local found
  found=$(evaluate "$1" "$2")
  if [ "$(wc -l <<<"$found")" -eq 40 ] && [ "$found" = "$(evaluate straight 0)" ]; then echo yes; else echo no; fi
}
# start RUN [KEY=VALUE ...]: over HOSTFILE, from the first node; its process id in `job`.
start() {
  local run=$1
  shift
  (on_node 0 env HOSTFILE="$hosts" bash scripts/sft.sh "${words[@]}" output_dir="$out/run-$run" "$@") 2>"$out/run-$run.log" &
  job=$!
}

# The run that others are compared with.
straight() {
  if [ "$(finished straight)" = yes ]; then return; fi
  say "A run from start to end"
  start straight
  finish "$job"
}

hostfile_cases() {
  rm -rf "$out"/run-* "$out"/eval-*
  straight
  report "two machines over HOSTFILE, start to end: finished" yes "$(finished straight)"
  (on_node 0 env -u GLOO_SOCKET_IFNAME NUM_PROCESSES=2 bash scripts/sft.sh "${words[@]}" output_dir="$out/run-local") \
    2>"$out/run-local.log" || true
  report "the same curve and weights as two ranks on one machine" yes "$(equal straight local)"

  say "TERM to the script, beside another DeepSpeed job"
  bash -c 'exec -a "python -u -m deepspeed.launcher.launch" sleep 600' &
  bystander=$!
  start told
  wait_for_step told 6 "$job"
  second=$(rank_of_second | head -n 1)
  for variable in OMP_NUM_THREADS=1 "WANDB_NAME=a 'name'" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false; do
    report "$variable reaches the second machine's rank" 1 "$(grep -czxF "$variable" "/proc/$second/environ" || true)"
  done
  kill -TERM "$job"
  finish "$job"
  report "TERM in the middle: status" 143 "$status"
  report "TERM: ranks left" 0 "$(ranks | wc -l)"
  report "TERM: a checkpoint is there" yes "$(saved told)"
  report "TERM: finished" no "$(finished told)"
  report "TERM: the other job lives" yes "$(kill -0 "$bystander" 2>/dev/null && echo yes || echo no)"
  kill "$bystander"
  start told
  finish "$job"
  report "the same command again: status" 0 "$status"
  report "the same curve and weights as without a stop" yes "$(equal straight told)"
  report "evaluated on the second machine: 40 answers, those of the run without a stop on the first" yes "$(answers told 1)"

  say "Connections lost"
  start lost
  wait_for_step lost 6 "$job"
  pgrep -f "ssh -F $folder" | xargs kill -KILL
  finish "$job"
  report "ssh killed: status" 137 "$status"
  while [ "$(ranks | wc -l)" -gt 0 ] && [ "$SECONDS" -lt 1200 ]; do sleep 0.5; done
  report "ssh killed: ranks left after they have saved" 0 "$(ranks | wc -l)"
  report "ssh killed: a checkpoint is there" yes "$(saved lost)"

  say "One machine alone is told to stop"
  start one
  wait_for_step one 6 "$job"
  rank_of_second | xargs kill -TERM
  finish "$job"
  report "the second machine's rank told to stop: status" 143 "$status"
  report "the second machine's rank told to stop: a checkpoint is there" yes "$(saved one)"

  say "A rank of one machine is killed"
  start killed
  wait_for_step killed 6 "$job"
  rank_of_second | xargs kill -KILL
  finish "$job"
  report "a rank killed: ranks left, not finished" "0 no" "$(ranks | wc -l) $(finished killed)"
  start killed
  finish "$job"
  report "a rank killed, the same command again: status, same curve and weights" "0 yes" "$status $(equal straight killed)"
}

nnodes_cases() {
  rm -rf "$out/run-launched" "$out/eval-launched"
  straight
  say "The same command on each machine (NNODES), told to stop, again, and evaluated"
  # node INDEX: its process id in `job`.
  node() {
    (on_node "$1" env NNODES=2 NODE_RANK="$1" MASTER_ADDR="${ADDRESSES[0]}" bash scripts/sft.sh "${words[@]}" \
      output_dir="$out/run-launched") 2>>"$out/run-launched$1.log" &
    job=$!
  }
  both() {
    node 0
    first=$job
    node 1
  }
  both
  wait_for_step launched 6 "$job"
  kill -TERM "$first"
  finish "$job"
  second=$status
  finish "$first"
  report "TERM to the first machine's script: statuses" "143 143" "$status $second"
  report "TERM: ranks left, a checkpoint is there, finished" "0 yes no" \
    "$(ranks | wc -l) $(saved launched) $(finished launched)"
  both
  finish "$job"
  second=$status
  finish "$first"
  report "the same commands again: statuses" "0 0" "$status $second"
  report "the same curve and weights as over HOSTFILE without a stop" yes "$(equal straight launched)"
  report "evaluated on the second machine: 40 answers, those of that run on the first" yes "$(answers launched 1)"
}

experts_cases() {
  rm -rf "$out/run-spread" "$out/eval-spread"
  straight
  say "Experts spread over both machines, told to stop, again on one machine"
  start spread moe.expert_parallel=2
  wait_for_step spread 6 "$job"
  kill -TERM "$job"
  finish "$job"
  report "moe.expert_parallel=2, TERM in the middle: status, a checkpoint is there, ranks left" "143 yes 0" \
    "$status $(saved spread) $(ranks | wc -l)"
  start spread moe.expert_parallel=2
  wait_for_step spread 30 "$job"
  kill -TERM "$job"
  finish "$job"
  report "the same command again, TERM once more: status" 143 "$status"
  (on_node 0 env -u GLOO_SOCKET_IFNAME NUM_PROCESSES=2 bash scripts/sft.sh "${words[@]}" output_dir="$out/run-spread") \
    2>"$out/run-spread-whole.log" && status=0 || status=$?
  report "on with whole experts on one machine: status, finished" "0 yes" "$status $(finished spread)"
  report "losses of 20 steps as with whole experts, to a thousandth" yes "$(near straight spread)"
}

different_cases() {
  rm -rf "$out"/run-different*
  say "Machines that were started with different commands"
  # node INDEX [KEY=VALUE ...]
  node() {
    local index=$1
    shift
    (on_node "$index" env NNODES=2 NODE_RANK="$index" MASTER_ADDR="${ADDRESSES[0]}" NUM_PROCESSES=1 \
      bash scripts/sft.sh "${words[@]}" output_dir="$out/run-different" "$@") 2>"$out/run-different$index.log" &
  }
  python - "$out/data" <<'END'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
rows = json.loads((folder / "instruct.json").read_text())
(folder / "other.json").write_text(json.dumps(rows[1:] + rows[:1]))
END
  for change in seed=1 training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2 \
    training.learning_rate=1e-5 data.max_length=255 training.save_steps=5 \
    "data.sources=[{name: instructions, path: $out/data/other.json, image_folder: $out/data/images}]"; do
    key=${change%%=*}
    if [ "$key" = data.sources ]; then key="data (digest)"; fi
    node 0
    first=$!
    node 1 "$change"
    finish $!
    second=$status
    finish "$first"
    said=$(grep -h '^error:' "$out"/run-different[01].log | grep -cF "error: rank 1 on ${NODES[1]} was started with $key=" || true)
    report "other $key on the second: statuses, lines that name it" "2 2 1" "$status $second $said"
  done
}

mistakes_cases() {
  say "Mistakes in HOSTFILE"
  missing=$(HOSTFILE=/no/hosts bash scripts/sft.sh "${words[@]}" output_dir="$out/run-none" 2>&1) && status=0 || status=$?
  report "no such HOSTFILE: status, message" "2 error: HOSTFILE=/no/hosts: no such file" "$status $missing"
  printf '%s slots=1\n' "${ADDRESSES[0]}" 10.213.77.3 >"$hosts"
  start unreachable
  finish "$job"
  report "a host that is not there: status, lines that name it, ranks left" "255 1 0" \
    "$status $(grep -c '10.213.77.3: the connection has ended' "$out/run-unreachable.log" || true) $(ranks | wc -l)"
}

for part in "${parts[@]}"; do
  rm -f "$out/rows/$part"
  if [ "$part" = slurm ] && ! has_slurm; then
    say "No Slurm here (slurmctld, slurmd, munged): its part is left out"
  else
    "${part}_cases"
  fi
done

{
  echo "# Two machines"
  echo
  echo "\`bash scripts/two_nodes.sh\`: two network namespaces with ssh, one rank each on CPU (gloo), a demo stage of 80 steps"
  echo "(ZeRO-2, competition), checkpoints every 20. $(date -u +%F), $(python -c 'import torch; print("torch", torch.__version__)'), $(ssh -V 2>&1 | cut -d, -f1)$(if has_slurm; then slurmctld -V | sed "s/^slurm-wlm/, Slurm/"; fi)."
  for file in "$out/rows"/*; do
    printf '\n## %s\n\n| what | expected | as expected |\n| --- | --- | --- |\n' "$(basename "$file")"
    cat "$file"
  done
} >"$out/README.md"
say "$failures not as expected: $out/README.md"
[ "$failures" -eq 0 ]
