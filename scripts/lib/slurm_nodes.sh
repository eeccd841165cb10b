# Sourced by two_nodes.sh: Slurm on the two machines of namespaces.sh, and what becomes of a job there.
# shellcheck shell=bash disable=SC2154 # folder, out, words: two_nodes.sh's

has_slurm() { command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; }

# start_slurm: settings, state and logs in $folder; `stop_slurm` ends what is outside the namespaces.
start_slurm() {
  mkdir -m 700 "$folder/munge" "$folder/state"
  head -c 128 /dev/urandom >"$folder/munge/key"
  chmod 600 "$folder/munge/key"
  munged --force --key-file "$folder/munge/key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munge/log" --seed-file "$folder/munge/seed"
  echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf" # not used, but looked for by default
  cat >"$folder/slurm.conf" <<END
ClusterName=two
SlurmctldHost=${NODES[0]}(${ADDRESSES[0]})
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName=${NODES[0]} NodeAddr=${ADDRESSES[0]} CPUs=2
NodeName=${NODES[1]} NodeAddr=${ADDRESSES[1]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
  slurm slurmctld
  (on_node 0 env SLURM_CONF="$folder/slurm.conf" slurmd)
  (on_node 1 env SLURM_CONF="$folder/slurm.conf" slurmd)
  local end=$((SECONDS + 30))
  until [ "$(slurm sinfo -h -p low -t idle -o %D)" = 2 ]; do
    [ "$SECONDS" -lt "$end" ] || die "Slurm does not start: $(tail -n 3 "$folder"/slurm*.log)"
    sleep 0.5
  done
}

stop_slurm() {
  if [ -f "$folder/munged.pid" ]; then kill "$(cat "$folder/munged.pid")" 2>/dev/null || true; fi
}

slurm() { (on_node 0 env SLURM_CONF="$folder/slurm.conf" "$@"); }

# submit RUN: the project's own batch script, on both machines; its number in `job`.
submit() {
  # The header asks for GPUs and 64 cores.
  sed -E '/^#SBATCH --(gpus|cpus)-per/d' scripts/slurm/stage.sbatch >"$folder/stage.sbatch"
  job=$(slurm sbatch --parsable --nodes 2 --partition low --output "$out/run-$1.log" "$folder/stage.sbatch" \
    sft "${words[@]}" output_dir="$out/run-$1")
}

state_of() { slurm squeue -h -j "$1" -o %T 2>/dev/null || true; }
restarts() { slurm scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
# A job that queues itself again starts after a delay of minutes otherwise.
hurry() { slurm scontrol update JobId="$1" StartTime=now 2>/dev/null || true; }

# wait_for_state JOB STATE...: until the job is in one of these states ("" once it has gone).
wait_for_state() {
  local job=$1 state wanted end=$((SECONDS + 240))
  shift
  while [ "$SECONDS" -lt "$end" ]; do
    state=$(state_of "$job")
    for wanted in "$@"; do
      if [ "$state" = "$wanted" ]; then return 0; fi
    done
    sleep 0.5
  done
}

wait_for_job_step() {
  local end=$((SECONDS + 240))
  while [ "$(steps_of "$1")" -lt "$2" ] && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
}

slurm_cases() {
  local urgent
  rm -rf "$out/run-slurm" "$out/run-cancelled"
  straight
  start_slurm
  say "Slurm: the signal before the time limit, then a preemption"
  submit slurm
  wait_for_job_step slurm 3
  slurm scancel --batch --signal=USR1 "$job" # as --signal=B:USR1@300 sends it
  wait_for_state "$job" PENDING ""
  report "USR1 to the batch script: the job, how often it was queued again, a checkpoint is there" "PENDING 1 yes" \
    "$(state_of "$job") $(restarts "$job") $(saved slurm)"
  hurry "$job"
  wait_for_job_step slurm 7
  urgent=$(slurm sbatch --parsable --nodes 2 --partition high --output /dev/null --wrap "sleep 1")
  wait_for_state "$urgent" ""
  report "preempted by an urgent job: the job, how often it was queued again" "PENDING 2" \
    "$(state_of "$job") $(restarts "$job")"
  hurry "$job"
  wait_for_state "$job" RUNNING ""
  wait_for_state "$job" ""
  report "the job ends: finished, the same curve and weights as without a stop" "yes yes" \
    "$(finished slurm) $(equal straight slurm)"

  say "Slurm: scancel"
  submit cancelled
  wait_for_job_step cancelled 3
  slurm scancel "$job"
  wait_for_state "$job" ""
  report "scancel: the job, a checkpoint is there, finished, ranks left" "gone yes no 0" \
    "$(state_of "$job" | grep . || echo gone) $(saved cancelled) $(finished cancelled) $(ranks | wc -l)"
}
