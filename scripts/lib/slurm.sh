# Sourced by the batch scripts of scripts/slurm: runs their one step, and queues the job again where it was stopped.
# shellcheck shell=bash

# run_step SRUN_ARGUMENTS...: exits with the step's status.
run_step() {
  local step status
  # Since Slurm 22.05 srun does not take it from the job, and would bind all of a machine's ranks to one core.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  srun --kill-on-bad-exit=1 "$@" &
  step=$!
  # Before the time limit Slurm signals this script alone (--signal=B:USR1): srun passes it on to the stage scripts. At a
  # preemption it signals the step alone, and where the job is cancelled both.
  # shellcheck disable=SC2064 # this step
  trap "kill -USR1 $step 2>/dev/null || true" USR1
  trap : TERM
  status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
  done
  # 143: stopped, and saved. 138: ended by USR1, before there was anything to save. A job that was cancelled (or whose
  # time is over) no longer counts as running, and stays away.
  if [[ $status =~ ^(143|138)$ && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    echo "stopped before its end: the job queues itself again" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
