"""A small process written into an image and restored, and each guard broken on purpose."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from coldsnap.settings import ROOT

SOURCES = ROOT / "src" / "coldsnap" / "image"
SUBJECT = Path(__file__).parent / "subject.py"
PLAIN = "import os; print('plain:', os.environ['COLDSNAP_IMAGE_REFUSED'])"
UID_AT, PROCESSOR_AT, RIP_AT, SYMBOLS_AT = 104, 112, 208, 88
"""Offsets in the header; see format.h."""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@dataclass(frozen=True)
class Image:
    """An image of `subject.py`, and the programs around it."""

    programs: Path
    file: Path
    environ: dict[str, str]

    def restore(self, *action: str, mode: str = "auto", **options: Any) -> subprocess.CompletedProcess[str]:
        """Restore it with `action`; where it is refused, a line that begins with `plain:` says why."""
        command = [self.programs / "restore", mode, self.file, sys.executable, "-c", PLAIN, *action]
        options.setdefault("env", self.environ)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)

    def ask(self, action: str, **options: Any) -> Any:
        """Restore it and return what it says."""
        done = self.restore(action, **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return json.loads(done.stdout)

    def refusal(self, **options: Any) -> str:
        """Restore it, which must lead to the plain command; return why."""
        done = self.restore("facts", **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("plain: "), done.stdout
        reason = done.stdout.removeprefix("plain: ").strip()
        assert done.stderr == f"coldsnap: process image: {reason}; booting plainly\n"
        return reason

    def altered(self, folder: Path, alter: Callable[[bytearray], object], *, sign: bool = True) -> Image:
        """Return a copy with other bytes, signed again: what a broken writer would have written."""
        content = bytearray(self.file.read_bytes())
        alter(content)
        if sign:
            at, size = struct.unpack_from("<QQ", content, 48)
            content[8:40] = blake3(content[40:4096] + content[at : at + size]).digest()
        file = folder / "altered.image"
        file.write_bytes(content)
        file.chmod(0o600)
        return Image(self.programs, file, self.environ)


def write(programs: Path, file: Path, *depends: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {"NAMED_FIRST": "1", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    own |= environ
    return subprocess.run(
        [sys.executable, SUBJECT, file, *depends], env=own | {"LD_PRELOAD": str(programs / "snap.so")},
        stdin=subprocess.PIPE, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run([SOURCES / "build.sh", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def image(programs: Path) -> Image:
    file, depends = programs / "subject.image", programs / "depends"
    depends.write_text("library")
    done = write(programs, file, depends, COPIED_AND_NOT_READ="1")
    assert done.returncode == 0, done.stdout + done.stderr
    own = {"NAMED_FIRST": "1", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return Image(programs, file, own)


def test_a_restored_process_is_started_like_any_other(image: Image, tmp_path: Path) -> None:
    facts = image.ask("facts", env=image.environ | {"NEW": "1"}, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert facts["argv"] == ["-c", PLAIN, "facts"]
    assert facts["environ"] == image.environ | {
        "NEW": "1",
        "LC_CTYPE": "C.UTF-8",
    }  # the last as Python sets it, PEP 538
    assert facts["cwd"] == str(tmp_path)
    assert facts["stdin"]
    assert facts["files"] == [0, 1, 2]
    assert [*facts["shown"][:1], *facts["shown"][-2:]] == [sys.executable, "facts", ""]


def test_a_closed_stdin_stays_closed_and_files_that_are_open_stay_open(image: Image) -> None:
    command = 'exec 0<&-; for n in 3 4 5 6 7 8 9; do eval "exec $n</dev/null"; done; exec "$@"'
    restore = [image.programs / "restore", "auto", image.file, sys.executable, "-c", PLAIN, "facts"]
    done = subprocess.run(
        ["bash", "-c", command, "sh", *restore], env=image.environ, capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert not facts["stdin"]
    assert facts["files"] == [1, 2, *range(3, 10)]


def test_signals_that_were_ignored_stay_ignored(image: Image) -> None:
    def ignored(*numbers: signal.Signals) -> list[str]:
        """Return what a process ignores that is restored while `numbers` are, as under nohup(1)."""

        def set_up() -> None:  # whoever runs the tests may be under nohup too
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN if number in numbers else signal.SIG_DFL)

        return list(image.ask("facts", preexec_fn=set_up)["ignored"])

    assert ignored() == ["SIGPIPE", "SIGXFSZ"]
    assert ignored(signal.SIGHUP) == ["SIGHUP", "SIGPIPE", "SIGXFSZ"]


def test_two_processes_of_one_image_have_no_secret_in_common(image: Image) -> None:
    one, other = image.ask("unique"), image.ask("unique")
    assert len(one) == 8
    assert [name for name in one if one[name] == other[name]] == []


def test_a_restored_process_can_do_what_a_process_does(image: Image) -> None:
    did = image.ask("works")
    assert did.pop("fork") == [1, 2]
    assert did.pop("program") == "hi\n"
    assert did.pop("asyncio") == 0
    assert did.pop("stack") == 10_000
    assert did.pop("library") == "libutil.so.1"
    assert did == dict.fromkeys(("thread", "thread_id", "exception", "alarm", "clocks", "ballast", "freed"), True)


def test_an_environment_that_the_import_read_must_be_the_same(image: Image) -> None:
    assert image.ask("env") == {"restored": True, "changed": "yes"}
    done = image.restore("env", env=image.environ | {"READ_BY_IMPORT": "other"})
    assert done.stdout == "plain: READ_BY_IMPORT is 'other', the image was made with not set\n"
    done = image.restore("env", env=image.environ | {"NAMED_FIRST": "2"})  # read of a list of all names
    assert "NAMED_FIRST" in done.stdout
    done = image.restore("env", env=image.environ | {"LD_BIND_NOW": "1"})  # which no program asks `getenv` for
    assert "LD_BIND_NOW" in done.stdout
    assert image.ask("env", env=image.environ | {"READ_BY_NOBODY": "1", "TMPDIR": "/var/tmp"})["restored"]


def test_any_byte_that_changes_is_noticed(image: Image, tmp_path: Path) -> None:
    rng = random.Random(18)
    size = image.file.stat().st_size
    places = [rng.randrange(size) for _ in range(20)] + [rng.randrange(4096) for _ in range(15)] + [size - 1]
    for place in places:

        def flip(content: bytearray, place: int = place) -> None:
            content[place] ^= 1 << rng.randrange(8)

        assert image.altered(tmp_path, flip, sign=False).refusal()


def test_an_image_cut_short_is_refused(image: Image, tmp_path: Path) -> None:
    for kept in (0, 100, 4096, 1_000_000, image.file.stat().st_size - 1):

        def cut(content: bytearray, kept: int = kept) -> None:
            del content[kept:]

        assert image.altered(tmp_path, cut, sign=False).refusal().endswith(("cut short", "longer than it was"))


def test_a_file_that_changed_or_went_makes_the_image_useless(programs: Path, tmp_path: Path) -> None:
    depends = tmp_path / "module.py"
    depends.write_text("x = 1")
    image = Image(programs, tmp_path / "image", {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"})
    assert write(programs, image.file, depends).returncode == 0
    assert image.ask("facts")
    depends.write_text("x = 10")
    assert image.refusal() == f"{depends}: it has changed since the image was made"
    depends.write_text("x = 2")
    os.utime(depends, (1, 1))
    assert image.refusal() == f"{depends}: it has changed since the image was made"
    depends.unlink()
    assert image.refusal() == f"{depends}: it is gone since the image was made"


def test_a_processor_with_less_is_refused(image: Image, tmp_path: Path) -> None:
    def with_all(content: bytearray) -> None:
        content[PROCESSOR_AT : PROCESSOR_AT + 4] = b"\xff" * 4

    assert image.altered(tmp_path, with_all).refusal() == (
        "this processor lacks a feature of the one that it was made on"
    )


def test_a_kernel_without_a_function_of_the_vdso_is_refused(image: Image, tmp_path: Path) -> None:
    def rename(content: bytearray) -> None:
        at = content.rindex(b"__vdso_gettimeofday")
        content[at : at + 6] = b"__gone"

    assert image.altered(tmp_path, rename).refusal() == "__gone_gettimeofday: this kernel's vdso lacks it"


def test_another_users_image_is_refused(image: Image, tmp_path: Path) -> None:
    def anothers(content: bytearray) -> None:
        content[UID_AT : UID_AT + 4] = struct.pack("<I", os.geteuid() + 1)

    assert image.altered(tmp_path, anothers).refusal().endswith("it is another user's process")
    writable = image.altered(tmp_path, lambda _: None)
    writable.file.chmod(0o622)
    assert writable.refusal() == f"{writable.file}: it is not a file that this user alone may write"


def test_a_process_that_dies_before_python_runs_is_started_plainly(image: Image, tmp_path: Path) -> None:
    def jump_to_nowhere(content: bytearray) -> None:
        content[RIP_AT : RIP_AT + 8] = struct.pack("<Q", 0x1000)

    assert image.altered(tmp_path, jump_to_nowhere).refusal() == "signal 11 before it ran Python"


def test_too_little_memory_leads_to_the_plain_command(image: Image) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (100 << 20, 100 << 20))

    assert "error 12" in image.refusal(preexec_fn=limit)  # ENOMEM


def test_without_an_image_nothing_is_said_unless_it_is_required(image: Image, tmp_path: Path) -> None:
    none = Image(image.programs, tmp_path / "none", image.environ)
    done = none.restore("facts")
    assert (done.stdout, done.stderr) == ("plain: there is none\n", "")
    done = none.restore("facts", mode="require")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "coldsnap: process image: there is none\n"


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [("SECOND_THREAD", "the process has 2 threads, not 1"), ("OPEN_FILE", "the process has 1 open files beside")],
)
def test_a_process_that_cannot_be_kept_is_not_written(
    programs: Path, tmp_path: Path, variable: str, complaint: str
) -> None:
    done = write(programs, tmp_path / "image", **{variable: "1"})
    assert done.returncode == 1
    assert done.stdout.startswith(complaint)
    assert list(tmp_path.iterdir()) == []


def test_no_header_or_table_leads_the_restorer_astray(image: Image, tmp_path: Path) -> None:
    fuzz = tmp_path / "fuzz"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        ["cc", *flags, "-fsanitize=address,undefined", f"-I{SOURCES}", "-o", fuzz, SUBJECT.with_name("fuzz_check.c")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if "cannot find" in built.stderr:
        pytest.skip("there are no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [fuzz, image.file, "1500"], env={}, check=False, capture_output=True, text=True, timeout=120
    )  # an LD_PRELOAD would come before the sanitizers
    assert done.returncode == 0, done.stderr
    passed = int(done.stdout.split()[0])
    assert 0 < passed < 1500  # some alterations do no harm, most are found
