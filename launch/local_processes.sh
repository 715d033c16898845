#!/usr/bin/env bash
# N processes of one run on this machine: what several hosts do, without them.
#   bash launch/local_processes.sh N [--devices=D] [--restarts=R] [--dry-run] -- COMMAND [ARGUMENTS ...]
#   bash launch/local_processes.sh 2 --devices=4 -- cai run --config=configs/miniworld.py --workdir=runs/two
# Process I is COMMAND with --coordinator=127.0.0.1:PORT --processes=N --process=I behind it; with --devices it has D simulated
# CPU devices. Process 0 writes to the terminal as it is, the lines of the others begin with their number, "[1] ".
# When one fails the others get SIGTERM and, GRACE seconds later (30 unless it is set), SIGKILL. Then all are started again, at
# most R times (0 unless given), by the rules of launch/restarts.sh. --dry-run shows the commands and starts nothing.
# Ends with 0, with 2 when one of them did, otherwise with the exit code of the first that failed. SIGTERM and SIGINT are passed
# on to all, and it then ends with 143 or 130.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

say() {
  echo "local_processes.sh: $*" >&2
}

die() {
  say "$*; wanted: bash launch/local_processes.sh N [--devices=D] [--restarts=R] [--dry-run] -- COMMAND ..."
  exit 2
}

whole() {  # WHAT VALUE LEAST: VALUE must be a whole number of at least LEAST
  [[ "$2" =~ ^(0|[1-9][0-9]*)$ && "$2" -ge "$3" ]] || die "$1 is '$2', not a whole number of at least $3"
}

processes="${1:-}" devices="" restarts=0 dry="" command=()
whole N "$processes" 1
shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --devices=*) devices="${1#*=}" && whole --devices "$devices" 1 ;;
    --restarts=*) restarts="${1#*=}" && whole --restarts "$restarts" 0 ;;
    --dry-run) dry=yes ;;
    --) shift && command=("$@") && break ;;
    *) die "unknown argument '$1'" ;;
  esac
  shift
done
[[ ${#command[@]} -gt 0 ]] || die "there is no command behind --"

if [[ "$restarts" -gt 0 && -z "$dry" ]]; then
  exec bash "$here/restarts.sh" "$restarts" \
    bash "$here/local_processes.sh" "$processes" ${devices:+"--devices=$devices"} -- "${command[@]}"
fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
grace="${GRACE:-30}"
pids=() writers=() codes=()
first=     # exit code of the first that failed
asked=     # the signal that this script got
deadline=  # when SIGKILL comes
killed=

tell() {  # SIGNAL: to all processes, and to what they started
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -s "$1" -- "-$pid" 2>/dev/null || true
  done
}

end() {  # SIGNAL
  tell "$1"
  deadline="${deadline:-$((SECONDS + grace))}"
}
trap 'asked=TERM; end TERM' TERM
trap 'asked=INT; end INT' INT

start() {  # I
  local copy=("${command[@]}" "--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$1")
  if [[ -n "$devices" ]]; then
    local flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    copy=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "${copy[@]}")
  fi
  if [[ -n "$dry" ]]; then
    printf '%q ' "${copy[@]}" && echo
    return
  fi
  if [[ "$1" == 0 ]]; then
    exec 8>&1 9>&2
  else  # signals are not for the writer: it ends when nothing more can come
    exec 8> >(trap '' TERM INT && exec sed -u "s/^/[$1] /")
    writers+=($!)
    exec 9>&8
  fi
  set -m  # a process group for each, so that none of it is left behind
  "${copy[@]}" </dev/null >&8 2>&9 8>&- 9>&- &
  pids+=($!)
  set +m
  exec 8>&- 9>&-
}

collect() {  # the exit codes of those that ended; succeeds while one is running
  local i code running=""
  for ((i = 0; i < processes; i++)); do
    if [[ -n "${codes[i]:-}" ]]; then
      continue
    elif kill -0 "${pids[i]}" 2>/dev/null; then
      running=yes
      continue
    fi
    code=0
    wait "${pids[i]}" || code=$?
    codes[i]="$code"
    if [[ "$code" != 0 && -z "$first" && -z "$asked" ]]; then
      first="$code"
      say "process $i ended with exit code $code; the others have $grace s to end"
      end TERM
    fi
  done
  [[ -n "$running" ]]
}

left() {  # whether one of them left something running
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    ! kill -0 -- "-$pid" 2>/dev/null || return 0
  done
  return 1
}

late() {
  [[ -n "$deadline" && "$SECONDS" -ge "$deadline" ]]
}

finish() {  # kills what did not end in time
  [[ -n "$killed" ]] || say "after $grace s something is still running, and is killed"
  killed=yes
  tell KILL
}

for ((i = 0; i < processes; i++)); do
  [[ -n "$asked" ]] || start "$i"
done
[[ -z "$dry" ]] || exit 0
processes="${#pids[@]}"
[[ -z "$asked" ]] || end "$asked"  # it came while they were started
while collect; do
  ! late || finish
  sleep 0.1 || true  # a signal may end it early
done
if left; then
  end TERM
  while left && ! late; do
    sleep 0.1 || true
  done
  ! left || finish
fi
for writer in ${writers[@]+"${writers[@]}"}; do
  wait "$writer" || true
done
case "$asked" in
  TERM) exit 143 ;;
  INT) exit 130 ;;
esac
[[ -z "$first" || " ${codes[*]} " != *" 2 "* ]] || exit 2
exit "${first:-0}"
