# Sourced by .ci/run: runs parts one after another and says at the end, whatever ended it, what each took and what it
# left out.
# shellcheck shell=bash

set -o pipefail
lines=()

# part NAME COMMAND...: the command's status is the part's. Tests that it skipped (pytest's -rs says why) are one line
# for each reason, and one in all where none of its tests could run.
part() {
  local name=$1 started=$SECONDS log reason reasons status=0
  shift
  log=$(mktemp)
  printf '\n=== %s\n' "$name"
  "$@" 2>&1 | tee "$log" || status=$? # the command's, by pipefail
  lines+=("$(printf '%7d s  %s%s' "$((SECONDS - started))" "$name" "$([ "$status" -eq 0 ] || echo ": FAILED ($status)")")")
  mapfile -t reasons < <(sed -nE 's/^SKIPPED \[[0-9]+\] [^ ]+: //p' "$log" | sort -u)
  if [ ${#reasons[@]} -gt 1 ] && ! grep -qE '[0-9]+ passed' "$log"; then
    reasons=("${reasons[0]} (and $((${#reasons[@]} - 1)) more reasons)")
  fi
  for reason in "${reasons[@]}"; do lines+=("SKIPPED    $name: ${reason:0:200}"); done
  rm "$log"
  return "$status"
}

summary() {
  printf '\n=== seconds by part\n'
  printf '%s\n' "${lines[@]}"
}
trap summary EXIT
