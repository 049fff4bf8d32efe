"""What a killed process leaves behind, and how the worker ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path
from uuid import uuid4

import pytest

from coldsnap import processes
from coldsnap.settings import ROOT

CHILD = """
import socket, sys, time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None  # vLLM's is killed with it
memory = shared_memory.SharedMemory(create=True, size=64)
bound = socket.socket(socket.AF_UNIX)
bound.bind(sys.argv[1])
print(memory.name, flush=True)
time.sleep(600)
"""


BOOTING = """
import multiprocessing, os, socket, sys, time
from coldsnap.processes import end_at_signals
end_at_signals()
os.mkfifo(sys.argv[1])
fifo = os.open(sys.argv[1], os.O_RDWR)
bound = socket.socket(socket.AF_UNIX)
bound.bind(sys.argv[2])
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
print("booting", flush=True)
try:
    time.sleep(600)
except BaseException:  # as vLLM does
    time.sleep(600)
"""


COMMAND = """
import signal, sys, tempfile, time, types
from coldsnap import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
def run(options):
    with tempfile.TemporaryDirectory(dir=sys.argv[2]):
        print("at work", flush=True)
        time.sleep(60)
sys.modules["work"] = types.SimpleNamespace(configure=lambda parser: parser.add_argument("folder"), run=run)
cli.COMMANDS = {"work": ("work", "works")}
sys.exit(cli.main())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environ = {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)


def ends(pid: int) -> bool:
    """Wait until a process that was killed has ended: where it gets no processor that takes a while."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    return True


def test_children_that_are_killed_leave_no_files(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    other = tmp_path / "ours"
    with socket.socket(socket.AF_UNIX) as ours, subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:  # fmt: skip
        ours.bind(str(other))
        assert child.stdout is not None
        memory = Path("/dev/shm") / child.stdout.readline().strip()
        assert memory.is_file()
        assert path.is_socket()
        with processes.without_leaks():
            child.kill()
            child.wait()
            assert path.is_socket()
        assert not memory.exists()
        assert not path.exists()
        assert other.is_socket()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_boot_ends_it_at_once_and_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    environ = {"PYTHONPATH": str(ROOT / "src")}
    names = str(tmp_path / "coldsnap-steps"), str(tmp_path / "socket")
    stdin = tmp_path / "theirs"
    os.mkfifo(stdin)
    with stdin.open("r+b", 0) as theirs, subprocess.Popen(
        [sys.executable, "-c", BOOTING, *names], env=environ, stdin=theirs, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as boot:  # fmt: skip
        assert boot.stdout is not None
        assert boot.stdout.readline() == "booting\n"
        (child,) = processes.children(boot.pid)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["coldsnap-steps", "socket", "theirs"]
        boot.send_signal(signum)
        assert boot.communicate() == ("", "")
    assert boot.returncode == 128 + signum
    assert list(tmp_path.iterdir()) == [stdin]
    assert ends(child)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_takes_its_temporary_folder_with_it(tmp_path: Path, signum: signal.Signals) -> None:
    environ = {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "work", str(tmp_path)], env=environ, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout is not None
        assert command.stdout.readline() == "at work\n"
        command.send_signal(signum)
        assert command.communicate() == ("", "")
    assert command.returncode == 128 + signum
    assert list(tmp_path.iterdir()) == []


def test_what_a_child_has_tidied_up_itself_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "socket")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        memory = shared_memory.SharedMemory(child.stdout.readline().strip())
        with processes.without_leaks():
            memory.unlink()
            (tmp_path / "socket").unlink()
            child.kill()
        memory.close()


def test_children_of_children_are_found() -> None:
    code = "import subprocess; subprocess.run(['sh', '-c', 'sleep 60; true'])"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        found: list[int] = []
        while len(found) < 2:
            found = list(processes.children(child.pid))
        parents = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in found]
        for pid in (child.pid, *found):
            os.kill(pid, 9)
    assert parents == [child.pid, found[0]]


def test_a_process_that_leaves_has_written_all_and_gives_its_code() -> None:
    code = (
        "import atexit, sys; from coldsnap.processes import leave;"
        "atexit.register(print, 'torn down'); print('out'); print('err', file=sys.stderr); leave(3)"
    )
    ended = run(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "out\n", "err\n")


def test_a_process_that_leaves_takes_its_own_with_it() -> None:
    code = (
        "import multiprocessing, time; from coldsnap.processes import leave;"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,));"
        "child.start(); print(child.pid); leave(0)"
    )
    assert ends(int(run(code).stdout))


def test_what_a_killed_worker_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    def child(name: str) -> tuple[subprocess.Popen[str], Path, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / name)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, Path("/dev/shm") / process.stdout.readline().strip(), tmp_path / name

    killed, *left = child(str(uuid4()))
    living, *used = child(str(uuid4()))
    pipe, rendezvous, theirs = (tmp_path / name for name in ("coldsnap-1", "vllm_dist_1", "report.txt"))
    os.mkfifo(pipe)
    rendezvous.touch()
    theirs.touch()
    left += [pipe, rendezvous]
    try:
        killed.kill()
        killed.wait()
        assert not {*left, *used} & set(processes.remove_left_behind(tmp_path))  # somebody may be about to use them
        for path in (*left, *used, theirs):
            os.utime(path, (0, 0), follow_symlinks=False)
        assert set(left) <= set(processes.remove_left_behind(tmp_path))
        assert [path.exists() for path in left] == [False] * 4
        assert all(path.exists() for path in (*used, theirs))
    finally:
        for each in (killed, living):
            with each:
                each.kill()
        used[0].unlink()
