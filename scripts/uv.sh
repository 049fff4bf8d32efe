#!/usr/bin/env bash
# Runs uv, with this machine's settings: `scripts/uv.sh pip list`. A fresh machine has only Python and make,
# so where PATH has no recent uv, the one pinned in requirements/installer.lock goes into .tools/uv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
tools=$root/.tools/uv

# What is installed is the locks' to say. An image's base may say where packages come from and how they are fetched, no
# more: vLLM's sets UV_OVERRIDE to a file without hashes, and nothing could be installed by a lock.
for setting in "${!UV_@}" "${!PIP_@}"; do
    case ${setting#*_} in
        *INDEX* | FIND_LINKS | CERT | *_CERTS | *TLS | *PROXY | *HOST | KEYRING_PROVIDER | CONFIG_FILE) ;; # where from
        CACHE_DIR | LINK_MODE | OFFLINE | *TIMEOUT | *RETRIES | CONCURRENT_* | CUSTOM_COMPILE_COMMAND) ;;  # and how
        *) unset "$setting" ;;
    esac
done

die() { echo "coldsnap: $*" >&2; exit 1; }

# 0.8 is the oldest one that our options were tried with.
recent() { local have; have=$("$1" --version 2>/dev/null) && printf 'uv 0.8.0\n%s\n' "${have%% (*}" | sort -VC; }

install_uv() {
    echo "coldsnap: no recent uv on PATH: putting one into .tools/uv with pip" >&2
    local lock=(--quiet --disable-pip-version-check --only-binary :all: --require-hashes -r "$root/requirements/installer.lock")
    rm -rf "$tools"
    # Debian splits venv and pip off Python: either will do.
    if "$python" -m venv "$tools" >/dev/null 2>&1; then
        "$tools/bin/python" -m pip install "${lock[@]}"
    elif rm -rf "$tools" && "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --target "$tools" "${lock[@]}"
    else
        die "$python has neither venv nor pip, and one of them is needed to get uv: apt install python3-venv"
    fi || die "pip could not install uv (its message is above): install uv by hand, or run this again"
}

# uv reads none of pip's settings. Where pip is pointed at a mirror, uv must ask there too.
pip_setting() {
    local variable=PIP_${1^^} interpreter value
    variable=${variable//-/_}
    if [ -n "${!variable:-}" ]; then echo "${!variable}"; return; fi
    for interpreter in "$python" "$tools/bin/python"; do
        # `pip config get` reads one of pip's files only; `list` shows what they come to together.
        value=$("$interpreter" -m pip config list 2>/dev/null | sed -n "s/^global\.$1='\(.*\)'\$/\1/p") || continue
        if [ -n "$value" ]; then echo "$value"; return; fi
    done
}

# Behind a proxy that re-signs TLS only the system's roots are right; uv and pip bring their own.
roots=/etc/ssl/certs/ca-certificates.crt
if [ -f $roots ] && [ -z "${SSL_CERT_FILE:-}${UV_SYSTEM_CERTS:-}${UV_NATIVE_TLS:-}" ]; then
    export SSL_CERT_FILE=$roots REQUESTS_CA_BUNDLE=${REQUESTS_CA_BUNDLE:-$roots}
fi
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120} UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-4}
export UV_PYTHON_DOWNLOADS=never # the machine's Python or a sentence, never a silent 30 MB interpreter

uv=$(command -v uv || true)
if [ -z "$uv" ] || ! recent "$uv"; then
    uv=$tools/bin/uv
    recent "$uv" || install_uv
fi
if [ "${1:-}" = --pip-setting ]; then pip_setting "$2"; exit; fi
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    mirror=$(pip_setting index-url)
    if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX=$mirror; fi
fi
exec "$uv" "$@"
