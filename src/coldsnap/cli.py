"""The `coldsnap` command: what is done at a desk, not in a worker.

A command is a module with `configure(parser)`, which adds its arguments, and `run(arguments)`, which returns
the exit code. Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

from coldsnap.errors import ColdsnapError

COMMANDS: Mapping[str, tuple[str, str]] = {
    "bake": ("coldsnap.desk.bake", "Turn a model into a verified, quantised snapshot."),
    "report": ("coldsnap.desk.report.command", "What requests cost, out of ledgers: tables, and a page with plots."),
    "plan": (
        "coldsnap.desk.plan.command",
        "Which workers and timeouts to choose for a trace: cost against time to first token.",
    ),
    "push": ("coldsnap.snapshot.push", "Send a snapshot to a bucket that workers boot from."),
    "pull": ("coldsnap.snapshot.pull", "Fetch a snapshot from a bucket."),
    "warm": ("coldsnap.warm", "Boot the engine once and share what it compiled: a cache bundle for workers like this."),
    "serve": ("coldsnap.desk.serve.command", "Run a Runpod endpoint on this machine."),
    "bench": ("coldsnap.desk.bench.command", "Load an endpoint: latency, throughput, goodput, errors, cost."),
    "compare": ("coldsnap.desk.compare.command", "What differs between two endpoints on your own prompts."),
}
"""Name -> module, and what it does in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 after an error (one line on stderr), 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # the command itself: temporary folders go with it, as they do at Ctrl-C
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = _options(words)
        code = int(options.run(options))
        sys.stdout.flush()
    except ColdsnapError as error:
        print(f"coldsnap: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except ModuleNotFoundError as error:
        if str(error.name).startswith("coldsnap"):
            raise
        what = f"coldsnap {words[0]} needs {error.name}, which is not here"
        print(f"coldsnap: {what}; scripts/setup.sh installs it, an image goes without", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 -- what is left to write must go somewhere
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0
    except OSError as error:  # the disk: full, read-only, no place for temporary files
        print(f"coldsnap: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return code


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="coldsnap", description="Serve an open-weight LLM on Runpod Serverless.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen_parser = parser
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:
            chosen_parser, imported = command, importlib.import_module(module)
            imported.configure(command)
            command.set_defaults(run=imported.run)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen_parser.error(_unknown(unknown[0], chosen_parser.format_help()))
    return options


def _unknown(word: str, help_text: str) -> str:
    option = word.partition("=")[0]
    near = difflib.get_close_matches(option, re.findall(r"--[a-z0-9-]+", help_text), n=1)
    return f"unrecognized argument {option}" + (f"; did you mean {near[0]}?" if near else "")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"coldsnap {version('coldsnap')}")  # noqa: T201
        parser.exit()


if __name__ == "__main__":  # where nothing is installed, as in an image: PYTHONPATH=src python -m coldsnap.cli
    sys.exit(main())
