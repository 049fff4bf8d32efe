"""Why the engine's processes did not start, carried to the one that has forked them."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing

from coldsnap.vllm.cause import FirstCause

CORE, WORKER = "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"
SET_UP = {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"level": "ERROR", "propagate": False}}}
"""As vLLM does it, in its processes too: a handler of a logger below would be lost."""


def fail(logger: str, *reasons: str) -> None:
    logging.config.dictConfig(SET_UP)
    for reason in reasons:
        error = ValueError(reason)
        logging.getLogger(logger).error("it failed to start", exc_info=error)


def forked(*failures: tuple[str, ...]) -> str | None:
    cause = FirstCause([CORE, WORKER])
    for failure in failures:
        process = multiprocessing.get_context("fork").Process(target=fail, args=failure)
        process.start()
        process.join()
    return cause.end()


def test_the_first_cause_counts_on_one_line() -> None:
    assert forked((WORKER, "no memory\nfor the cache"), (CORE, "a worker failed")) == "no memory for the cache"


def test_a_long_one_is_cut_and_does_not_block() -> None:
    cause = forked((CORE, "é" * 5000), (CORE, "x" * 100_000))
    assert cause is not None
    assert 2000 < len(cause) < 2100


def test_what_this_process_logs_is_no_cause_and_neither_is_silence() -> None:
    cause = FirstCause([CORE, WORKER])
    fail(CORE, "not a child's")
    assert cause.end() is None
    assert forked((CORE,)) is None
