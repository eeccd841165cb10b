#!/usr/bin/env bash
# What the router studies share: every method with every seed, some at a time, and the comparison of their results.
# The caller defines `run_one METHOD SEED SLOT`, which writes OUT/METHOD/seedSEED/eval and returns at once if it is there.

# The first is the baseline: the router without competition. `coupled` is that router with the coupling loss.
METHODS=(softmax dense sigmoid xmoe perturbed_cosine shared_softmax shared_sigmoid bias_balanced tc_moe moe_plus_plus autonomy coupled competition)

# Competitions of one router, instead of all routers.
# shellcheck disable=SC2034 # for scripts that read this file
RULES=(softmax competition distil_only judged judged_means)

# study_rule METHOD: the keys of a part with experts that make a method, a line each.
study_rule() {
  case "$1" in
    distil_only) printf '%s\n' router=competition competition_output=router ;;
    judged) printf '%s\n' router=competition competition_judge=loss ;;
    judged_means) printf '%s\n' router=competition competition_judge=loss competition_answers=mean ;;
    coupled) printf '%s\n' router=softmax coupling_coef=1 ;;
    *) echo "router=$1" ;;
  esac
}

# study_settings OUT TEXT: finished runs are kept, so a folder must not get runs of other settings.
study_settings() {
  local file=$1/settings
  mkdir -p "$1"
  if [ -f "$file" ] && [ "$(cat "$file")" != "$2" ]; then
    die "$1: holds runs with other settings ($(cat "$file"); now: $2); choose another --out"
  fi
  echo "$2" >"$file"
}

# study_done RUN: its evaluation is there, and no benchmark of it failed, which the same command tries again.
study_done() { [ -f "$1/eval/summary.json" ] && ! grep -q '"failures": {$' "$1/eval/summary.json"; }

# study_runs OUT SEEDS JOBS: in rounds of JOBS; a failure ends the study with the log that says why.
# Logs grow: a run that is finished, and says nothing when it is asked for again, keeps its own. A signal ends the runs too.
study_runs() {
  local out=$1 seeds=$2 jobs=$3 seed method
  local -a pids=() names=()
  mkdir -p "$out/logs"
  trap 'end_groups "${pids[@]}"; exit 143' TERM USR1 INT HUP
  for ((seed = 0; seed < seeds; seed++)); do
    for method in "${METHODS[@]}"; do
      say "$method, seed $seed"
      start_group run_one "$method" "$seed" "${#pids[@]}" >>"$out/logs/$method-$seed.log" 2>&1
      # shellcheck disable=SC2154 # common.sh's
      pids+=("$group") names+=("$method-$seed")
      [ ${#pids[@]} -lt "$jobs" ] || study_wait
    done
  done
  study_wait
  trap - TERM USR1 INT HUP
}

# Waits for the round in `pids` and `names` of study_runs.
study_wait() {
  local index
  local -a failed=()
  for index in "${!pids[@]}"; do wait "${pids[$index]}" || failed+=("${names[$index]}"); done
  pids=() names=()
  [ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]} (see $out/logs/NAME.log); the same command goes on from here"
}

# study_compare OUT SEEDS
study_compare() {
  local out=$1 seeds=$2 method
  local -a runs=()
  for method in "${METHODS[@]}"; do
    runs+=("$method=$(seq -f "$out/$method/seed%g/eval" -s , 0 $((seeds - 1)))")
  done
  llava-compete compare "${runs[@]}" --out "$out/comparison"
}
