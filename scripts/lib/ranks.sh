# Sourced by launch.sh: runs one launcher with this machine's ranks until the ranks have gone, whatever ends the launcher.
# shellcheck shell=bash

# How long ranks may go on without their launcher, while they save; and those that are left once one of them has gone,
# for which they may wait in vain. A launcher gives them 30 s, too.
ORPHAN_SECONDS=300
LEFT_SECONDS=30

# The process ids of the ranks (and of their loader workers). Found by a mark in their environment: a launcher that was
# killed leads to them no longer, and other runs of this user have other marks.
list_ranks() {
  local marked
  mapfile -t marked < <(grep -lsz "^LLAVA_COMPETE_LAUNCH=$LLAVA_COMPETE_LAUNCH\$" /proc/[0-9]*/environ)
  [ ${#marked[@]} -gt 0 ] || return 0
  mapfile -t marked < <(grep -lsz '^RANK=' "${marked[@]}")
  [ ${#marked[@]} -gt 0 ] || return 0
  # Not what a library started in a rank (its own helpers end with it).
  grep -lszF 'llava_compete.cli' "${marked[@]/%environ/cmdline}" | cut -d/ -f3 || true
}

# How many ranks live, each with or without loader workers, which have their rank's number.
count_ranks() {
  list_ranks | sed 's|.*|/proc/&/environ|' | xargs -r grep -hszE '^RANK=' | tr '\0' '\n' | sort -u | wc -l
}

# stop_ranks LAUNCHER: the ranks alone are told, so that they save first; the launcher sees them leave, and leaves too.
# Asked a second time, or before training has begun, they leave at once.
stop_ranks() {
  local ranks
  ranks=$(list_ranks)
  if [ -n "$ranks" ]; then
    xargs kill -TERM <<<"$ranks" 2>/dev/null || true
  else # the launcher has not started any: nothing to save
    pkill -KILL -s "$1" || true
  fi
}

# run_ranks LAUNCHER...
run_ranks() {
  local pid status=0
  LLAVA_COMPETE_LAUNCH=$(uname -n)-$$-$(date +%s%N)
  export LLAVA_COMPETE_LAUNCH
  # In a session of its own: a signal to the script's process group (Ctrl-C, a closed terminal) would end the launcher,
  # and with it the ranks, before they have saved.
  setsid "$@" &
  pid=$!
  wait_for "$pid" "stop_ranks $pid" || status=$?
  # `deepspeed` says a process that signal N ended as -N, which is 256 - N to a shell.
  if [ "$status" -gt 192 ]; then status=$((384 - status)); fi
  # The launcher does not stay where all processes were told to stop (systemd, scancel), or it was killed.
  # shellcheck disable=SC2154 # `told` is common.sh's
  if [ -n "$(list_ranks)" ]; then
    if [ "$told" = no ]; then stop_ranks "$pid"; fi
    wait_for_orphans "$pid"
    if [ "$status" -eq 0 ]; then status=137; fi # `deepspeed` says 0 when the process that it started was killed
  fi
  trap - TERM USR1 INT HUP
  if [ "$told" = yes ] && [ "$status" -gt 128 ]; then status=143; fi
  return "$status"
}

# wait_for_orphans LAUNCHER
wait_for_orphans() {
  local end=$((SECONDS + ORPHAN_SECONDS)) some_left=no count
  while count=$(count_ranks) && [ "$count" -gt 0 ] && [ "$SECONDS" -lt "$end" ]; do
    # shellcheck disable=SC2154 # `processes` is devices.sh's
    if [ "$some_left" = no ] && [ "$count" -lt "$processes" ]; then some_left=yes end=$((SECONDS + LEFT_SECONDS)); fi
    sleep 0.5
  done
  list_ranks | xargs -r kill -KILL 2>/dev/null || true
  # `deepspeed` has a second launcher, which leaves a second after its ranks; not zombies, which nobody may fetch here.
  end=$((SECONDS + 30))
  while pgrep -s "$1" -r D,R,S,T >/dev/null && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  pkill -KILL -s "$1" || true
}
