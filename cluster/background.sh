#!/usr/bin/env bash
# Starts one of the scripts beside it in the background and returns when Ray runs: for launchers, whose commands must end.
# What it started before on this machine ends first, and nothing else does.
#
#   cluster/background.sh start-head.sh [options of that script]
#   cluster/background.sh stop
#
# STATE (~/.ray/ddil-ray/HOST) is the folder of its log and process id.
set -euo pipefail
# shellcheck source=cluster/auth.sh
. "$(dirname "${BASH_SOURCE[0]}")/auth.sh"

[ $# -ge 1 ] || die "a script must be given. Usage: cluster/background.sh start-head.sh [options]"
script="$(dirname "${BASH_SOURCE[0]}")/$1"
[ "$1" = stop ] || [ -x "$script" ] || die "the script must be one of this folder, but $script is none."
state="${STATE:-$HOME/.ray/ddil-ray/$(hostname)}"
mkdir -p "$state"
[ -O "$state" ] || die "STATE must be a folder of your own, but $state is of another user."
chmod 700 "$state"

# Whether the process that was started before still is that process.
runs() {
  [ -s "$state/pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$state/pid")/cmdline" | grep -Eq 'ray start|start-[a-z]+\.sh'
}

if runs; then
  kill "$(cat "$state/pid")"
  for _ in $(seq 60); do runs && sleep 1; done
  runs && die "process $(cat "$state/pid") must end within 60 s, but did not."
fi
[ "$1" != stop ] || exit 0
shift
setsid nohup "$script" "$@" >"$state/log" 2>&1 </dev/null &
echo $! >"$state/pid"
for _ in $(seq 240); do
  grep -q "Ray runtime started" "$state/log" && exit 0
  kill -0 $! 2>/dev/null || break # a process that is becoming another has no command line for a moment
  sleep 0.5
done
tail -n 20 "$state/log" >&2
die "Ray must start within 120 s, but did not: see $state/log."
