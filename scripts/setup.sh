#!/usr/bin/env bash
# Makes the environment for `demo`, `test`, `image`, `bake` or `gpu-seam` from the lock files; where that is done, it returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

die() { echo "coldsnap: $*" >&2; exit 1; }

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
    die "needs Linux on x86-64, the platform of vLLM's wheels; this is $(uname -s) on $(uname -m)"

device=cpu
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then device=gpu; fi
case ${1:-demo} in
    demo) env=.venv locks=("requirements/$device.lock" requirements/tools.lock) ;;
    test) env=.venv locks=("requirements/$device.lock" requirements/tools.lock requirements/dev.lock) ;;
    image) env=.venv locks=("requirements/$device.lock") ;; # the worker's alone
    bake) env=.venv-bake locks=(requirements/bake.lock) device=cpu ;; # quantising needs no GPU
    gpu-seam) env=.venv-gpu locks=(requirements/gpu.lock) device=gpu ;; # the CUDA build, on a machine without a GPU
    *) die "usage: scripts/setup.sh demo|test|image|bake|gpu-seam" ;;
esac
torch=requirements/torch-cpu.txt
stamp=$env/.made-from # one hash a file that the environment was made from
if [ $device = cpu ]; then sources=("${locks[@]}" "$torch"); else sources=("${locks[@]}"); fi
wanted=$(sha256sum "${sources[@]}")

# The stamp is written last, so an interrupted run left none; if site-packages are younger, someone changed them.
intact() {
    local packages
    packages=$(echo $env/lib/python3*/site-packages)
    [ -f $stamp ] && [ -x $env/bin/python ] && [ -d "$packages" ] && [ ! "$packages" -nt $stamp ]
}
within() { ! grep -qvxFf <(echo "$2") <<<"$1"; } # is each line of $1 one of $2?
ready() { intact && within "$wanted" "$(cat $stamp)"; }

# The programs of the process image (docs/process-image.md). Without a compiler every boot imports, as it would anyway.
build_image_programs() {
    local programs=build/image sources=src/coldsnap/image
    [ $env = .venv ] && [ $device = cpu ] && [ -d $sources ] || return 0 # an image's build has no sources yet
    if [ -x $programs/restore ] && [ -z "$(find $sources -name '*.[ch]' -newer $programs/snap.so)" ]; then return 0; fi
    mkdir -p $programs
    command -v "${CC:-cc}" >/dev/null || {
        [ -e $programs/none ] || echo "coldsnap: no C compiler (apt install gcc libc6-dev): no process image, each boot imports vLLM" >&2
        touch $programs/none
        return 0
    }
    $sources/build.sh $programs || { rm -f $programs/restore; echo "coldsnap: no process image, each boot imports vLLM" >&2; }
}

if ready; then build_image_programs; exit 0; fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=missing
case $version in
    3.11 | 3.12 | 3.13 | 3.14) ;;
    *) die "needs Python 3.11 to 3.14, and $python is $version: install one and name it (PYTHON=python3.12 make demo)" ;;
esac

if [ $env = .venv ] && [ $device = cpu ]; then # vLLM's CPU build links to it, and a bare Debian has none
    has_numa() { "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }
    if ! has_numa && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "coldsnap: installing libnuma1 with apt-get" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y libnuma1; } >/dev/null || true
    fi
    has_numa || die "needs libnuma.so.1: apt install libnuma1"
fi

mkdir -p .tools
exec 9>.tools/lock # two `make` at once: the second one waits, then finds the work done
flock 9
if ready; then build_image_programs; exit 0; fi
started=$SECONDS

# A demo environment grows into a test one; any other difference means a new one.
if ! intact || ! within "$(cat $stamp)" "$wanted"; then
    echo "coldsnap: making $env ($device, Python $version); the first time fetches 1 GB or more" >&2
    scripts/uv.sh venv --quiet --clear --python "$("$python" -c 'import sys; print(sys.executable)')" $env
fi
rm -f $stamp

# The lock is complete, so nothing is left to resolve (and pip's resolver would refuse: overrides.txt says why).
# Wheels only: no compiler is needed and no setup.py is run. Without bytecode every cold start would compile.
if [ -t 2 ]; then output=(); else output=(--quiet); fi # progress bars are for people
# The seam's tests import a part of theirs, and leave bytecode of that.
if [ $env = .venv-gpu ]; then bytecode=(); else bytecode=(--compile-bytecode); fi
install() { scripts/uv.sh pip install "${output[@]}" --python $env --no-deps --no-build "${bytecode[@]}" "$@"; }

# torch first, as the one that may be nowhere to be found. `--torch-backend` is uv's own knowledge of PyTorch's
# CPU index, but it would look for triton there too: so torch is a step of its own.
if [ $device = cpu ]; then
    pin=$(sed -n 's/^torch==//p' $torch)
    from=(--torch-backend cpu)
    for folder in $(scripts/uv.sh --pip-setting find-links); do
        folder=${folder#file://}
        # A `+` in a file name may be written %2B.
        if compgen -G "$folder/torch-${pin/+/*}-cp${version/./}-*.whl" >/dev/null; then from=(--find-links "$folder"); fi
    done
    install "${from[@]}" -r $torch ||
        die "could not fetch torch $pin for Python $version (uv's message is above): it needs PyTorch's own index, or" \
            "a folder with that wheel named by PIP_FIND_LINKS"
fi
install "${locks[@]/#/--requirements=}" ||
    die "could not install the packages (uv's message is above); run the same command again: what was fetched is kept"

# The `coldsnap` command: this clone itself, nothing is copied. Its build backend, setuptools, is in the lock.
if [ $env = .venv ] && [ "${1:-demo}" != image ]; then
    scripts/uv.sh pip install --quiet --python $env --no-deps --no-build-isolation --editable . ||
        die "could not install the coldsnap command (uv's message is above)"
fi

$env/bin/python -m compileall -q src builder handler.py >/dev/null || true # a syntax error is for the checks to tell
build_image_programs
echo "$wanted" >$stamp
echo "coldsnap: $env is ready ($((SECONDS - started)) s)" >&2
