"""The demo's cold start in several checkouts, in turn: what a change to the code costs or gains.

    python bench/before_after.py BEFORE AFTER … [--rounds 5]

Each checkout runs `handler.py --test_input` with this Python and a home folder of its own. One boot each comes first
and is not counted: it fills the caches. Printed are medians over the rounds and of the differences to BEFORE. Where
other things run, `processor` says more: the seconds of user and system time, to the end of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = '{"input": {"messages": [{"role": "user", "content": "What is a cold start?"}]}}'
COLUMNS = ("ready", "processor", "import_vllm", "configure", "engine", "warm_up")


def boot(checkout: Path, home: Path) -> dict[str, float]:
    """Boot once; return the seconds up to ready and of the phases, and all that it took of the processors."""
    with tempfile.TemporaryDirectory(dir=home) as ledger:
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "COLDSNAP_LEDGER_DIR": ledger}
        command = [sys.executable, str(checkout / "handler.py"), "--test_input", JOB]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environ, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = [json.loads(line) for line in Path(ledger, "ledger.jsonl").read_text("utf-8").splitlines()]
    (record,) = [line for line in lines if line["record"] == "cold_start"]
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"ready": record["seconds"], "processor": processor, **record["phases"]}


def main() -> None:
    """Boot all of them in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    checkouts = [path.resolve() for path in arguments.checkouts]
    with tempfile.TemporaryDirectory() as folder:
        homes = [Path(tempfile.mkdtemp(dir=folder)) for _ in checkouts]
        places = list(zip(checkouts, homes, strict=True))
        for checkout, home in places:
            boot(checkout, home)
        rounds: list[list[dict[str, float]]] = []
        for _ in range(arguments.rounds):
            rounds.append([boot(checkout, home) for checkout, home in places])
            print(
                *(f"{each['ready']:.2f} ({each['processor']:.2f})" for each in rounds[-1]), file=sys.stderr, flush=True
            )
    print(f"| seconds, median of {arguments.rounds} | {' | '.join(COLUMNS)} | ready, against the first |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for index, checkout in enumerate(checkouts):
        boots = [each[index] for each in rounds]
        medians = [statistics.median(each.get(column, 0.0) for each in boots) for column in COLUMNS]
        against = statistics.median(each[index]["ready"] - each[0]["ready"] for each in rounds)
        print(f"| {checkout.name} | {' | '.join(f'{each:.2f}' for each in medians)} | {against:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
