#!/usr/bin/env bash
# A run on a TPU VM, of one host or many, from this machine and with gcloud.
#   bash launch/tpu_vm.sh create NAME --zone=ZONE --type=v5litepod-256 [--spot] [--queued] [--version=RUNTIME] [-- FLAGS]
#   bash launch/tpu_vm.sh ssh    NAME --zone=ZONE -- COMMAND ...        on all workers, to its end; --worker=I: on one
#   bash launch/tpu_vm.sh run    NAME --zone=ZONE [--restarts=20] -- cai run --config=FILE --workdir=DIR
#   bash launch/tpu_vm.sh logs   NAME --zone=ZONE [--worker=0]          what worker 0 writes; --worker=all: what all write
#   bash launch/tpu_vm.sh stop   NAME --zone=ZONE                       saves; `run` goes on from there
#   bash launch/tpu_vm.sh fetch  NAME --zone=ZONE WORKDIR [INTO]        WORKDIR as the command had it; into runs/
#   bash launch/tpu_vm.sh delete NAME --zone=ZONE [--queued]
# All take --project=PROJECT, and --dry-run (before --), which shows every command of gcloud and runs none. A run on several
# TPUs, which send to each other through the network, wants --slices=N in every command; Google's queue is the only way to them.
# `create` waits until NAME is ready, and uses it if it is there: --spot is cheaper and may be taken away, --queued waits in
# Google's queue, and FLAGS go to gcloud as they are (--network=..., --service-account=..., --reserved). `run` copies the commit
# that is checked out to all workers, installs it there and starts the command on all, under launch/restarts.sh and without this
# machine, which may be switched off. The command runs in the repository.
# Exit codes: 1 something failed, 3 there is no TPU to be had, 4 a run is in progress.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 3>&1  # where commands are shown, also while what they write is read

say() {
  echo "tpu_vm.sh: $*" >&2
}

die() {
  say "$*"
  exit 1
}

action="${1:-}" name="${2:-}"
case "$action" in
  create | ssh | run | logs | stop | fetch | delete) ;;
  *) die "got '$action', wanted create, ssh, run, logs, stop, fetch or delete; see the first lines of launch/tpu_vm.sh" ;;
esac
[[ -n "$name" && "$name" != -* ]] || die "$action wants the name of a TPU VM behind it: bash launch/tpu_vm.sh $action NAME ..."
shift 2

zone="" project="" type="" version="" worker="" restarts=20 slices=1 spot="" queued="" dry="" words=() command=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --worker=*) worker="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --spot) spot=--spot ;;
    --queued) queued=--queued ;;
    --dry-run) dry=yes ;;
    --) shift && command=("$@") && break ;;
    -*) die "unknown option '$1'; see the first lines of launch/tpu_vm.sh" ;;
    *) words+=("$1") ;;
  esac
  shift
done
[[ -n "$zone" ]] || die "--zone=ZONE is missing, for example --zone=us-west4-a"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: wanted a whole number above 0"
case "$action" in
  create | ssh | run) ;;
  *) [[ ${#command[@]} == 0 ]] || die "$action takes nothing behind --" ;;
esac
[[ "$action" == fetch || ${#words[@]} == 0 ]] || die "'${words[0]}': $action takes no words but NAME; a command goes behind --"
for word in ${command[@]+"${command[@]}"}; do
  [[ "$word" != --dry-run ]] || die "--dry-run stands behind --, where it is the command's; put it before --"
done
[[ "$worker" =~ ^(all|[0-9]*)$ ]] || die "--worker=$worker: wanted a number from 0, or all"
where=("--zone=$zone" ${project:+"--project=$project"})
again="$name --zone=$zone${project:+ --project=$project}"  # the beginning of the next command
kind=tpu-vm node=("--node-id=$name")
if [[ "$slices" != 1 ]]; then
  again+=" --slices=$slices" kind=queued-resources queued=--queued node=("--node-count=$slices")
fi
said="$(mktemp)"  # what gcloud complained about
trap 'rm -f "$said"; kill $(jobs -p) 2>/dev/null || true' EXIT

call() {  # COMMAND ...: shows it as a shell would take it, and runs it
  { printf '%q ' "$@" && echo; } >&3
  [[ -n "$dry" ]] || "$@"
}

everywhere() {  # WORKER COMMAND ...: a command of gcloud with the flags for a worker, of the first slice, or for all of them
  local i code worst=0 jobs=()
  if [[ "$slices" == 1 ]]; then
    call "${@:2}" "--worker=$1"
  elif [[ "$1" != all ]]; then
    call "${@:2}" "--worker=$1" --node=0
  else  # gcloud would take 64 workers at a time, and go on without a slice that it does not reach
    for ((i = 0; i < slices; i++)); do
      call "${@:2}" --worker=all "--node=$i" &
      jobs+=($!)
    done
    for i in "${jobs[@]}"; do
      code=0
      wait "$i" || code=$?
      ((code <= worst)) || worst=$code
    done
    return "$worst"
  fi
}

on() {  # WORKER COMMAND: a command line for the shell (bash) of a worker, or of all of them
  everywhere "$1" gcloud compute tpus "$kind" ssh "$name" "${where[@]}" "--command=$2"
}

state() {  # KIND FIELD: prints the state of NAME, nothing when there is none
  if ! call gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)" 2>"$said"; then
    grep -qiE 'not.?found' "$said" || { cat "$said" >&2 && exit 1; }
  fi
}

ask() {  # COMMAND ...: one that asks Google for TPUs
  local code=0
  { call "$@" 2>&1 >&3 | tee "$said" >&2; } || code=$?
  if [[ "$code" != 0 ]] && grep -qE 'Quota|RESOURCE_EXHAUSTED|no more capacity|Insufficient.*capacity' "$said"; then
    say "there is no $type for this project in $zone now: try another --zone, --spot (it has a quota of its own), --queued" \
      "(it waits for one), or ask for quota for the TPU API at https://console.cloud.google.com/iam-admin/quotas"
    exit 3
  fi
  return "$code"
}

runtime() {  # what https://cloud.google.com/tpu/docs/runtimes has for JAX
  case "$type" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    v5e-*) die "--type=$type: Google calls it v5litepod-${type#v5e-}" ;;
    *) die "--type=$type: its runtime version is not known here (v4, v5litepod, v5p, v6e are); give --version=RUNTIME" ;;
  esac
}

create() {
  [[ -n "$type" ]] || die "--type=TYPE is missing, for example --type=v5litepod-256"
  [[ -n "$version" ]] || version="$(runtime)"
  local now
  if [[ -n "$queued" ]]; then
    now="$(state queued-resources state.state)"
    [[ -n "$now" ]] || ask gcloud compute tpus queued-resources create "$name" "${node[@]}" "${where[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" $spot ${command[@]+"${command[@]}"}
    while true; do
      now="$(state queued-resources state.state)"
      [[ "$now" != ACTIVE && -z "$dry" ]] || break
      case "$now" in
        "" | FAILED | SUSPEND*)
          die "the request $name is '$now' and gets no TPU: bash launch/tpu_vm.sh delete $again --queued, then create it again"
          ;;
      esac
      say "the request $name is $now; asking again in ${POLL:-60} s (interrupted, the same command goes on waiting)"
      sleep "${POLL:-60}"
    done
  else
    now="$(state tpu-vm state)"
    case "$now" in
      "")
        ask gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" $spot \
          ${command[@]+"${command[@]}"}
        ;;
      READY) say "$name is there already and is used as it is" ;;
      CREATING | STARTING | RESTARTING | REPAIRING) die "$name is $now; try again in a few minutes" ;;
      *) die "$name is $now, wanted READY: bash launch/tpu_vm.sh delete $again, then create it" ;;
    esac
  fi
  [[ -n "$dry" ]] || say "$name is ready: bash launch/tpu_vm.sh run $again -- cai run --config=FILE --workdir=DIR"
}

ssh() {
  [[ ${#command[@]} -gt 0 ]] || die "ssh wants a command behind --"
  on "${worker:-all}" "$(printf '%q ' "${command[@]}")"
}

# What the workers run; files are in the home folder. The lock is held by whatever a run has started, and by nothing else: it
# is free again when all of that has ended, however it ended.
FREE='mkdir -p cai_jax && cd cai_jax && { flock -n run.lock true || { echo "$HOSTNAME: a run is in progress" >&2; exit 4; }; }'
FREE+=' && rm -f ../cai_jax.tar.gz'  # a worker that is not reached later has nothing to install
# What the archive holds replaces what an earlier one did; .venv, runs and the log stay. TPU VMs may come with an older Python
# than the package needs, so it gets one of its own.
INSTALL='set -e; cd cai_jax; tar -tzf ../cai_jax.tar.gz | cut -d/ -f1 | sort -u | xargs rm -rf; tar -xzf ../cai_jax.tar.gz; '
INSTALL+='if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then '
INSTALL+='rm -rf .venv; PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; '
INSTALL+='python3 -m uv venv --quiet --seed --python=3.12 .venv; fi; '
INSTALL+='. .venv/bin/activate; . launch/venv.sh; use_venv tpu,gcs'
START='cd cai_jax && exec 9>run.lock && { flock -n 9 || { echo "$HOSTNAME: a run is in progress" >&2; exit 4; }; } && '
START+='. .venv/bin/activate && { PYTHONUNBUFFERED=1 setsid bash launch/restarts.sh '  # and here how often, and the command
STARTED='</dev/null >>run.log 2>&1 & echo $! >run.pid; }'
STOP='cd cai_jax && { ! flock -n run.lock true || { echo "$HOSTNAME: no run is in progress"; exit 0; }; } && '
STOP+='kill -TERM "$(cat run.pid)" && { flock -w 600 run.lock true || { echo "$HOSTNAME: still saving" >&2; exit 1; }; }'

run() {
  [[ ${#command[@]} -gt 0 ]] || die "run wants a command behind --, for example: cai run --config=FILE --workdir=DIR"
  [[ "$restarts" =~ ^[0-9]+$ ]] || die "--restarts=$restarts: wanted a whole number"
  local commit archive code=0
  commit="$(git rev-parse --short HEAD)" || die "$PWD is no git checkout, and what is copied to the workers is a commit"
  if [[ -n "$(git status --porcelain)" ]]; then
    say "warning: there are changes that are not committed, and they stay here; commit $commit is what runs"
  fi
  on all "$FREE" || code=$?
  [[ "$code" != 4 ]] || { say "a run is in progress on $name: bash launch/tpu_vm.sh logs $again, or stop $again" && exit 4; }
  [[ "$code" == 0 ]] || exit "$code"
  archive="$(git rev-parse --git-path cai_jax.tar.gz)"
  call git archive --format=tar.gz "--output=$archive" HEAD
  everywhere all gcloud compute tpus "$kind" scp "$archive" "$name:cai_jax.tar.gz" "${where[@]}"
  on all "$INSTALL"
  on all "$START$(printf '%q ' "$restarts" "${command[@]}")$STARTED"
  [[ -n "$dry" ]] || say "commit $commit runs on all workers of $name: bash launch/tpu_vm.sh logs $again"
}

logs() {
  local each=""
  [[ "$worker" != all ]] || each=' | sed -u "s/^/[$HOSTNAME] /"'
  on "${worker:-0}" "tail -n 100 -F cai_jax/run.log$each"
}

stop() {
  on all "$STOP"
}

fetch() {
  local from="${words[0]:-}" into="${words[1]:-runs}"
  [[ -n "$from" ]] || die "fetch wants the workdir of the run behind the name"
  case "$from" in
    gs://*)
      into="$into/$(basename "$from")"
      call mkdir -p "$into"
      call gcloud storage rsync --recursive "$from" "$into" ${project:+"--project=$project"}
      ;;
    *)
      [[ "$from" == /* ]] || from="cai_jax/$from"  # relative to where the command ran
      call mkdir -p "$into"
      everywhere 0 gcloud compute tpus "$kind" scp --recurse "$name:$from" "$into" "${where[@]}"
      ;;
  esac
}

delete() {
  if [[ -n "$queued" ]]; then
    call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force  # the TPU VM that came of it too
  else
    call gcloud compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

"$action"
