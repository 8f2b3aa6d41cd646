#!/usr/bin/env bash
# Submits a job with the token and the working directory, once that holds nothing that should stay here.
#
#   RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 cluster/submit.sh python pipelines/distill.py my.yaml output=s3://...
#
# A stopped job gets STOP_WAIT_S (120) seconds to save a checkpoint.
set -euo pipefail
# shellcheck source=cluster/auth.sh
. "$(dirname "${BASH_SOURCE[0]}")/auth.sh"

[ $# -ge 1 ] || die "a command must be given. Usage: cluster/submit.sh python pipelines/distill.py my.yaml"
need_token
python "$(dirname "${BASH_SOURCE[0]}")/check_upload.py" .
exec ray job submit --working-dir . \
  --runtime-env-json "{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"${STOP_WAIT_S:-120}\"}}" \
  -- "$@"
