#!/usr/bin/env bash
# Runs COMMAND, and again when it crashed or was stopped from outside, at most N times more.
#   bash launch/restarts.sh N COMMAND [ARGUMENTS ...]
#   bash launch/restarts.sh 20 cai run --config=configs/miniworld.py --workdir=runs/a
# COMMAND keeps to the exit codes of `cai`: 0 is done, and 2 is bad input, which the next start would find again; after these it
# is not started again. Anything else is a crash, a lost host or (143) a stop that was saved, and the same command goes on.
# SIGTERM and SIGINT to this script are passed on to COMMAND, which is then not started again. Ends with COMMAND's exit code.
# Between two starts it waits for a few seconds, or for PAUSE.
set -euo pipefail

say() {
  echo "restarts.sh $(date -u +%Y-%m-%dT%H:%M:%SZ): $*" >&2
}

if [[ $# -lt 2 || ! "$1" =~ ^[0-9]+$ ]]; then
  say "got '$*', wanted a number of restarts and a command: bash launch/restarts.sh 20 cai run --config=FILE --workdir=DIR"
  exit 2
fi
if ! command -v "$2" >/dev/null; then
  say "$2: no such command here; is the virtual environment active that it is installed in?"
  exit 2
fi
restarts="$1"
shift

child=
asked=  # the signal that this script got

pass_on() {  # SIGNAL
  asked="$1"
  [[ -z "$child" ]] || kill -s "$1" -- "-$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

run() {  # COMMAND ...: runs it to its end in a process group of its own, so that a signal reaches all of it, and once
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z "$asked" ]] || pass_on "$asked"  # it came before there was a child to tell
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true  # comes back early when a signal arrives
  done
  code=0
  wait "$child" || code=$?
  kill -s KILL -- "-$child" 2>/dev/null || true  # what COMMAND left behind would hold the devices
  child=
}

for ((n = 1; ; n++)); do
  run "$@"
  if [[ "$code" == 0 ]]; then
    exit 0
  elif [[ -n "$asked" ]]; then
    say "stopped by SIG$asked: exit code $code; not started again"
    exit "$code"
  elif [[ "$code" == 2 ]]; then
    say "exit code 2, bad input or hosts that disagree: not started again; what was wrong stands above"
    exit 2
  elif ((n > restarts)); then
    say "exit code $code, and all $restarts restarts are used up"
    exit "$code"
  fi
  # Every host has its own loop. Short, so that all of them are waiting for each other at the same time.
  pause=$((n < 3 ? 5 * n : 15))
  say "exit code $code; restart $n of $restarts in ${PAUSE:-$pause} s"
  run sleep "${PAUSE:-$pause}"
  if [[ -n "$asked" ]]; then
    say "stopped by SIG$asked: not started again"
    [[ "$asked" == TERM ]] && exit 143 || exit 130
  fi
done
