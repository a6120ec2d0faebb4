#!/bin/sh
# A worker for Singletrack: claims runs of workflows with the executor `pull`, one at a time, and runs a command for each.
#
#     SINGLETRACK_URL=http://127.0.0.1:7410 WORKFLOWS="deploy test@nightly" worker.sh COMMAND [ARGUMENT]...
#
# COMMAND gets a run's input as JSON on standard input. What it prints is the run's log, a JSON object on its last line the
# output; exit code 0 succeeds. Without WORKFLOWS it takes runs of all. TERM stops the command, gives the run back and ends
# the worker. Needs Linux, curl (7.82), jq and setsid. worker.py does the same, and sends the log as it comes.
set -u
[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARGUMENT]..." >&2; exit 64; }
api=${SINGLETRACK_URL:-http://127.0.0.1:7410}/api/v1
block=16384 # bytes of log in a request
newline='
'
files=$(mktemp -d) || exit 1
stopping='' work=''
trap 'rm -rf "$files"' EXIT
trap 'stopping=1; stop_work' TERM INT

# post PATH [SECONDS]: posts standard input and prints the answer. 1: it was refused; 2: there was no answer.
post() {
  answer=$(curl --silent --show-error --max-time "${2:-30}" --json @- --write-out '\n%{http_code}' "$api/$1") || return 2
  case ${answer##*"$newline"} in
    2??) printf '%s\n' "${answer%"$newline"*}" ;;
    4??) printf '%s\n' "$answer" >&2; return 1 ;;
    *) return 2 ;;
  esac
}

# The same until there is an answer. Every request of a worker may be repeated as it is: it takes effect once.
insist() {
  body=$(cat)
  while :; do
    printf '%s' "$body" | post "$1" && return
    [ $? = 2 ] && kill -0 $$ || return 1 # refused, or the worker itself is gone
    sleep 1
  done
}

# leases [MEMBERS]: a body that says this of the lease, in jq's words.
leases() {
  jq -cn --arg token "$token" "{leases: [{token: \$token${1:+, $1}}]}"
}

now() {
  cut -d. -f1 /proc/uptime # goes on while the machine is suspended, as the lease does
}

# Sends a heartbeat; $result is what it says: ok, busy, lost, or why to stop.
beat() {
  sent=$(now)
  result=$(leases | post leases/heartbeat "$((timeout / 12 + 1))" | jq -r '.leases[0] | .reason // .result')
  case $result in ok | requested | timeout) good=$sent ;; esac
  # The work must be over when the timeout is: somebody else may begin then.
  [ $(($(now) - good)) -le $((timeout * 2 / 3)) ] || result=lost
}

# Keeps the lease until it gets TERM; stops the work when that is asked for, or when the worker itself is gone.
keep() {
  trap : TERM
  while sleep "$interval" & wait $! || ! kill $!; do
    kill -0 $$ && beat || result=lost
    case $result in requested | timeout | lost) echo "$result" >"$files/why"; stop_work ;; esac
    [ "$result" != lost ] || exit
    ship "$block" post
  done
}

# ship LEAST POST: sends the blocks of the log that have at least this many bytes. A block always has the same number.
ship() {
  for stream in stdout stderr; do
    seq=$(cat "$files/$stream.seq")
    while [ "$(wc -c <"$files/$stream")" -ge $(((seq - 1) * block + $1)) ]; do
      dd if="$files/$stream" bs=$block skip=$((seq - 1)) count=1 2>/dev/null | tr '\000' ' ' |
        jq -Rsc --arg token "$token" --arg stream $stream --argjson seq "$seq" '{$token, $stream, $seq, text: .}' |
        "$2" leases/logs >/dev/null || return
      seq=$((seq + 1))
      echo $seq >"$files/$stream.seq"
    done
  done
}

# TERM to the command and what it has started, and KILL to what is left of them.
stop_work() {
  [ -n "$work" ] || return 0
  kill -s TERM -- "-$work" 2>/dev/null || kill -s TERM "$work" 2>/dev/null
  for _ in 1 2 3 4 5 6; do
    ! kill -s 0 -- "-$work" 2>/dev/null || sleep 0.5
  done
  kill -s KILL -- "-$work" 2>/dev/null
}

# field FILTER: of the run.
field() {
  jq -r "$1" "$files/run"
}

attempt() {
  token=$(field .lease.token) timeout=$(field .lease.heartbeat_timeout_seconds)
  interval=$(field .lease.heartbeat_interval_seconds) good=$(now) result=''
  rm -f "$files/why"
  for stream in stdout stderr; do echo 1 >"$files/$stream.seq"; : >"$files/$stream"; done
  # The first heartbeat confirms the lease, before any work.
  while beat; [ "$result" = '' ] || [ "$result" = busy ]; do sleep 1; done
  if [ "$result" != ok ] || [ -n "$stopping" ]; then
    leases | insist leases/release >/dev/null
    return
  fi
  jq -c .input "$files/run" >"$files/input"
  SINGLETRACK_RUN_ID=$(field .id) SINGLETRACK_WORKFLOW_ID=$(field .workflow_id) \
    SINGLETRACK_ATTEMPT=$(field .attempt) SINGLETRACK_FENCE=$(field .fence) \
    setsid "$@" <"$files/input" >"$files/stdout" 2>"$files/stderr" &
  work=$!
  keep &
  keeper=$!
  wait "$work"
  code=$?
  [ -z "$stopping" ] || [ $code -le 128 ] || { wait "$work"; code=$?; } # a signal ended the first wait
  kill -s KILL -- "-$work" 2>/dev/null
  work=''
  settle "$(cat "$files/why" 2>/dev/null)"
  kill -s TERM "$keeper" 2>/dev/null
  wait "$keeper"
}

# settle WHY: says how the work ended, or gives it back. Heartbeats go on all the while.
settle() {
  [ "$1" != lost ] || return 0
  if [ "$code" != 0 ] && [ -z "$1" ] && [ -n "$stopping" ]; then
    leases | insist leases/release >/dev/null
    return
  fi
  ship 1 insist
  output=$(tail -n 1 "$files/stdout" | jq -c 'objects' 2>/dev/null)
  case $code/$1 in
    0/*) end="outcome: \"succeeded\", output: ${output:-null}" ;;
    */) end="outcome: \"failed\", error: \"exit code $code\"" ;;
    *) end="outcome: \"cancelled\", error: \"exit code $code\"" ;;
  esac
  # Better a failure than a run that goes stale, where the output is refused.
  leases "$end" | insist leases/finish >/dev/null ||
    leases 'outcome: "failed", error: "its end was refused"' | insist leases/finish >/dev/null
}

while [ -z "$stopping" ]; do
  # A fresh id for each claim: when its answer is lost, the repetition gets what the first one took.
  jq -cn --arg worker "$(uname -n):$$" --arg claim_id "$(cat /proc/sys/kernel/random/uuid)" --arg only "${WORKFLOWS:-}" \
    '{$worker, $claim_id, wait_seconds: 10} + if $only == "" then {} else {workflows: ($only | split(" "))} end' |
    insist claims >"$files/claims" || exit 1
  jq -c '.runs[0] // empty' "$files/claims" >"$files/run"
  if [ -s "$files/run" ]; then attempt "$@"; else sleep 0.5; fi
done
exit 0 # however the last attempt ended
