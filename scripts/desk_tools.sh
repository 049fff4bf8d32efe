#!/usr/bin/env bash
# The programs that the tests in tests/programs need beside .venv: Debian packages, installed where they are missing.
set -euo pipefail
# command -> package
declare -A package=([chromium]=chromium [prometheus]=prometheus [prometheus-pushgateway]=prometheus-pushgateway)

missing=()
for command in "${!package[@]}"; do
    command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "coldsnap: needs ${missing[*]}: apt install ${missing[*]}" >&2
    exit 1
fi
echo "coldsnap: installing ${missing[*]} with apt-get" >&2
{
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
} >/dev/null
