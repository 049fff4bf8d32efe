#!/usr/bin/env bash
# Puts an image's snapshot under its name in snapshots/: the one in /given, or one baked from MODEL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "coldsnap: $*" >&2; exit 1; }

[ $# = 4 ] || die "expected NAME MODEL REVISION SCHEME, found $# arguments; MODEL may be empty"
name=$1 model=$2 revision=$3 scheme=$4

[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "SNAPSHOT: expected a folder's name, without slashes; found '$name'"
if [ -n "$model" ]; then
    [ "$name" != demo ] || die "SNAPSHOT: expected a name for what is baked from $model, found none, or the demo's"
    roots=/etc/ssl/certs/ca-certificates.crt # the hub's client brings its own, which a proxy's signature does not pass
    if [ -f $roots ]; then export SSL_CERT_FILE=$roots REQUESTS_CA_BUNDLE=$roots; fi
    if [ -n "$HF_TOKEN" ]; then export HF_TOKEN; else unset HF_TOKEN; fi
    .venv-bake/bin/python builder/bake.py "$model" --revision "$revision" --scheme "$scheme" --out "snapshots/$name"
else
    [ -f "/given/$name/coldsnap.json" ] ||
        die "SNAPSHOT: expected a baked snapshot in snapshots/$name, found no coldsnap.json there; bake it first, or" \
            "name the MODEL to bake it from"
    mkdir -p snapshots && cp -R "/given/$name" snapshots/
fi
read_digest='import sys; from pathlib import Path; from coldsnap.snapshot.manifest import load_manifest
print(load_manifest(Path(sys.argv[1])).digest)'
PYTHONPATH=src .venv/bin/python -c "$read_digest" "snapshots/$name" >"snapshots/$name.digest"
