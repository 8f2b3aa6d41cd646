#!/usr/bin/env bash
# Submits a job with the token and the working directory, once that holds nothing that should stay here, and follows its log.
#
#   cluster/submit.sh python pipelines/distill.py my.yaml output=s3://...
#
# The dashboard is that of RAY_API_SERVER_ADDRESS, else of RAY_ADDRESS, else at DASHBOARD_PORT (8265) of this machine. With
# WITH_CODE=1 the job runs the ddil_ray of this clone in place of that which its nodes have. A stopped job gets STOP_WAIT_S
# (120) seconds to save a checkpoint.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=cluster/auth.sh
. "$here/auth.sh"

[ $# -ge 1 ] || die "a command must be given. Usage: cluster/submit.sh python pipelines/distill.py my.yaml"
need_token
if [ -z "${RAY_API_SERVER_ADDRESS:-}${RAY_ADDRESS:-}" ]; then
  export RAY_API_SERVER_ADDRESS="http://127.0.0.1:${DASHBOARD_PORT:-8265}"
fi
packed="$(mktemp -d)"
trap 'rm -rf "$packed"' EXIT
python "$here/check_upload.py" . --pack "$packed/job.zip" ${WITH_CODE:+--module "$(dirname "$here")/ddil_ray"}
ray job submit --working-dir "$packed/job.zip" \
  --runtime-env-json "{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"${STOP_WAIT_S:-120}\"}}" \
  -- "$@"
