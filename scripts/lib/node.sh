#!/usr/bin/env bash
# One machine of a HOSTFILE, started by hosts.sh over ssh: reads its environment and its stage from standard input, then
# runs the stage's ranks. The word `stop`, or the end of the input, makes them save and stop.
set -euo pipefail
settings=""
while IFS= read -r line; do
  if [ "$line" = . ]; then break; fi
  settings+=$line$'\n'
done
[ "$line" = . ] || exit 143 # the other end has left
stage=()
eval "$settings"
# Messages go through a process that outlives the connection: a rank must not fail while it saves, because nobody reads.
relay() { (trap '' TERM USR1 INT HUP && exec tee -p /dev/null); }
exec 3<&0 </dev/null > >(relay) 2> >(relay >&2)
{
  read -r _ || true
  kill -TERM $$
  # Only the word: where the connection is lost now, the ranks may still be saving.
  if read -r _; then kill -TERM $$; fi
} <&3 >/dev/null 2>&1 &
# shellcheck disable=SC2064 # this process
trap "kill $! 2>/dev/null || true" EXIT
exec 3<&-
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
run_stage "${stage[@]}"
