#!/usr/bin/env bash
# A Ray of three nodes on this machine, to try jobs on: a head without work and a node of each pool, with one GPU each in name.
#
#   cluster/local.sh start
#   cluster/local.sh stop      # ends these three, and no other Ray
#
# PORT (6379) and DASHBOARD_PORT (8265) may be set. STATE (~/.ray/ddil-ray/local) has their logs and process ids.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=cluster/auth.sh
. "$here/auth.sh"

[ "$*" = start ] || [ "$*" = stop ] || die "start or stop must be given. Usage: cluster/local.sh start"
state="${STATE:-$HOME/.ray/ddil-ray/local}"
# They share one address and one memory: no port but the head's two has a number, and the object stores are small. Workers
# have folders of their own, for a node that sets up a job replaces what it finds of the job's files in its folder.
shared=(--dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 --object-store-memory=200000000)

# What background.sh does, for the node of that name. Where all go there is nobody to drain a node for, which takes 30 s.
node() {
  STATE="$state/$1" METRICS_PORT=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 "$here/background.sh" "${@:2}"
}

if [ "$1" = stop ]; then
  for name in rollout trainer head; do node "$name" stop; done
  exit 0
fi
node head start-head.sh "${shared[@]}" --num-cpus=0 --num-gpus=0
for pool in trainer rollout; do
  node "$pool" start-worker.sh "127.0.0.1:${PORT:-6379}" "${shared[@]}" --num-cpus=8 --num-gpus=1 --labels="pool=$pool" \
    --temp-dir="${RAY_TMPDIR:-/tmp}/ray-$pool"
done
echo "Three nodes run. Their dashboard: http://127.0.0.1:${DASHBOARD_PORT:-8265}"
