# Sourced by scripts of several stages, after `OUT` is set: each stage runs once, and again when what it reads has changed.
# shellcheck shell=bash

mkdir -p "$OUT/stages"

# stage NAME FINGERPRINT COMMAND...: runs the command unless this stage finished before with the same fingerprint,
# and records its seconds. A stage that runs makes every later one run: its input is new.
upstream=""
stage() {
  local name=$1 inputs=$2 mark=$OUT/stages/$1 started fingerprint
  shift 2
  fingerprint=$(printf '%s %s' "$upstream" "$inputs" | sha256sum | cut -d' ' -f1)
  upstream=$fingerprint
  if [ -f "$mark" ] && [ "$(cut -d' ' -f1 "$mark")" = "$fingerprint" ]; then
    say "$name: finished before, skipped (--fresh starts over)"
    return
  fi
  if [ -f "$OUT/stages/$name.started" ] && [ "$(cat "$OUT/stages/$name.started")" != "$fingerprint" ]; then
    rm -rf "${OUT:?}/$name" # made from other inputs: not something to go on from
  fi
  rm -f "$mark"
  echo "$fingerprint" >"$OUT/stages/$name.started"
  say "$name"
  started=$(date +%s.%N)
  start_group "$@" # not beside `||`, where a function goes on behind a command that failed
  # shellcheck disable=SC2154 # common.sh's
  wait_group "$group" || die "stage $name failed (above); run the same command again to go on from here"
  echo "$fingerprint $(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN {printf "%.1f", b - a}')" >"$mark"
}
