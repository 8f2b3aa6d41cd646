#!/usr/bin/env bash
# Makes the token if there is none, and prints the file that holds it.
set -euo pipefail
# shellcheck source=cluster/auth.sh
. "$(dirname "${BASH_SOURCE[0]}")/auth.sh"

make_token
need_token
[ -z "${RAY_AUTH_TOKEN:-}" ] || die "RAY_AUTH_TOKEN must be unset, but holds the token, which so is in no file."
echo "$RAY_AUTH_TOKEN_PATH"
