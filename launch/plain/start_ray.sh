#!/usr/bin/env bash
# A Ray cluster by hand, a machine at a time, protected by a token. Ray's own options may follow.
#   launch/plain/start_ray.sh head                        on the first machine
#   launch/plain/start_ray.sh worker HEAD:6379            on every other one, with the head's ~/.ray/auth_token
# Then, where the token is and the head's dashboard is within reach: grpo-ray submit RECIPE --address http://127.0.0.1:8265
# It is served on the head alone: ssh -L 8265:127.0.0.1:8265 HEAD, or DASHBOARD_HOST=0.0.0.0 in a network that you trust.
# All machines see the folder GRPO_RAY_HOME (default: the home): runs are written there.
set -euo pipefail
stop() { echo "start_ray: $*" >&2; exit 1; }
usage="usage: start_ray.sh head | worker HEAD:6379 [options of ray start]"

root=$(cd "$(dirname "$0")/../.." && pwd)
[ ! -d "$root/.venv/bin" ] || export PATH=$root/.venv/bin:$PATH
command -v ray >/dev/null || stop "ray was not found; set the project up first (make help), or activate its environment"
export RAY_AUTH_MODE=token
# Of this user alone: in Ray's own folder every user of the machine could change the code that runs here.
RAY_TMPDIR=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python -P -m actors.private) || stop "no private folder for temporary files"
export RAY_TMPDIR TMPDIR=$RAY_TMPDIR
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

case "${1:-}" in
head)
    shift
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token" ]; then
        (umask 077 && mkdir -p "$(dirname "$token")" && rm -f "$token" && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
    fi
    [ ! -f "$token" ] || chmod 600 "$token"
    exec ray start --head --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --temp-dir="$RAY_TMPDIR/ray" --disable-usage-stats "$@"
    ;;
worker)
    address=${2:-}
    [[ $address == *:* ]] || stop "$usage"
    shift 2
    [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$token" ] || stop "the token is missing: copy it from the head to $token, mode 0600"
    exec ray start --address="$address" --temp-dir="$RAY_TMPDIR/ray" --disable-usage-stats "$@"
    ;;
*) stop "$usage" ;;
esac
