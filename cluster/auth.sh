# Sourced by the scripts beside it: token authentication for whatever Ray they start, and a token that only you can read.
# shellcheck shell=bash
umask 077
export RAY_AUTH_MODE=token

die() {
  echo "Error: $*" >&2
  exit 2
}

command -v ray >/dev/null || die "\`ray\` must be on PATH, but is not. Activate the environment that ddil-ray is installed in."

# The token: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.
token_file() {
  echo "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
}

# Makes the file's token if there is none; never replaces one.
make_token() {
  local file new
  file="$(token_file)"
  [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$file" ] && return
  mkdir -p "$(dirname "$file")"
  new="$(mktemp "$file.XXXXXX")"
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$new"
  [ "$(wc -c <"$new")" -eq 64 ] || die "/dev/urandom must give 32 bytes, but did not."
  ln "$new" "$file" 2>/dev/null || true # whoever was first
  rm -f "$new"
}

# Sees that there is a token and that nobody else can read it.
need_token() {
  local file
  [ -n "${RAY_AUTH_TOKEN:-}" ] && return
  file="$(token_file)"
  [ -s "$file" ] || die "the token must be in RAY_AUTH_TOKEN or in $file, but there is none. Copy the head's file there."
  [ -O "$file" ] || die "$file must be yours, but belongs to another user. Remove it, or set RAY_AUTH_TOKEN_PATH."
  chmod 600 "$file"
  export RAY_AUTH_TOKEN_PATH="$file"
}
