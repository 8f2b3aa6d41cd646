#!/usr/bin/env bash
# Joins a Ray head with its token, in the foreground. Further options go to `ray start`.
#
#   cluster/start-worker.sh HEAD:6379 [--num-gpus=4 ...]
#
# METRICS_PORT (8080) may be set. README.md says more.
set -euo pipefail
# shellcheck source=cluster/auth.sh
. "$(dirname "${BASH_SOURCE[0]}")/auth.sh"

[ $# -ge 1 ] || die "HEAD:PORT must be given. Usage: cluster/start-worker.sh HEAD:6379 [options of \`ray start\`]"
need_token
head="$1"
shift
exec ray start --address="$head" --block --disable-usage-stats --metrics-export-port="${METRICS_PORT:-8080}" "$@"
