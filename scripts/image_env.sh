#!/usr/bin/env bash
# Makes .venv in an image. On a plain base it is made whole, from cpu.lock; on a base that brings vLLM it is laid over
# the base's packages and adds only what they lack.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "coldsnap: $*" >&2; exit 1; }

brought=$(python3 -c 'import importlib.metadata as m; print(m.version("vllm"))' 2>/dev/null) || exec scripts/setup.sh image

pinned=$(sed -n 's/^vllm==//p' requirements/gpu.in)
[ "${brought%%+*}" = "$pinned" ] ||
    die "the base image brings vLLM $brought and the locks are for $pinned: take vllm/vllm-openai:v$pinned as" \
        "BASE_IMAGE, or follow docs/runbooks/new-vllm.md"

scripts/uv.sh venv --quiet --clear --system-site-packages --python "$(command -v python3)" .venv
.venv/bin/python scripts/missing.py requirements/base.lock >.venv/added.txt
scripts/uv.sh pip install --quiet --python .venv --no-deps --no-build --compile-bytecode --require-hashes -r .venv/added.txt
