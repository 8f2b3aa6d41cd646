#!/usr/bin/env bash
# Starts a Ray head that takes nobody without the token, in the foreground. Options go to `ray start`.
#
#   cluster/start-head.sh [--num-gpus=4 ...]
#
# PORT (6379), DASHBOARD_PORT (8265, on this machine alone) and METRICS_PORT (8080) may be set. README.md says more.
set -euo pipefail
# shellcheck source=cluster/auth.sh
. "$(dirname "${BASH_SOURCE[0]}")/auth.sh"

make_token
need_token
echo "Token: ${RAY_AUTH_TOKEN_PATH:-in RAY_AUTH_TOKEN}. Workers and clients need it, and RAY_AUTH_MODE=token." >&2
exec ray start --head --block --disable-usage-stats \
  --port="${PORT:-6379}" \
  --dashboard-host=127.0.0.1 --dashboard-port="${DASHBOARD_PORT:-8265}" \
  --metrics-export-port="${METRICS_PORT:-8080}" \
  "$@"
