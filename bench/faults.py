"""The faults that coldsnap is tested under, as a table: what is broken, what is promised, and the test that breaks it.

    python bench/faults.py                # all rows; writes docs/reliability.md
    python bench/faults.py --rows engine  # those whose test has this in its name
    python bench/faults.py --new          # those that have never been run

Where a fault lasts minutes the row runs it whole; in `make test` the same test takes seconds (FAULTS=1 tells them).

A row is a test of `make test`: the table says what each means to a user, the run what became of it.
A row that has never been run is not written; what earlier runs found is kept in bench/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "faults.json"
SOAKS = ("chaos", "chaos-mended")
"""Runs of bench/chaos.py, in bench/results: the first, and one after what it found was mended."""
PAGE = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True, slots=True)
class Row:
    """A fault and the promise about it; `test` is the pytest node, of which every case must pass."""

    fault: str
    promise: str
    test: str


_BOMBS = "tests/engine/test_bombs.py::test_"
_BAD = "tests/engine/test_bad_input.py::test_"
_HOSTILE = "tests/engine/test_hostile.py::test_"
_LIFE = "tests/engine/test_lifecycle.py::test_"
_SLOW = "tests/engine/test_slow_platform.py::test_"
_FAULTS = "tests/engine/test_faults.py::test_"
_CANCEL = "tests/engine/test_cancel.py::test_"
_DISPATCH = "tests/unit/jobs/test_dispatch.py::test_"
_ACCOUNTS = "tests/unit/cost/test_accounts.py::test_"
_EGRESS = "tests/loopback/jobs/test_egress.py::test_"
_PLANE = "tests/loopback/desk/test_control_plane.py::test_"
_SERVE = "tests/loopback/desk/test_serve.py::test_"
_UPLOAD = "tests/loopback/records/test_upload.py::test_"
_PULL = "tests/loopback/snapshot/test_transfer.py::Test"
_CACHES = "tests/loopback/caches/test_caches.py::"

PARTS: dict[str, tuple[Row, ...]] = {
    "The engine": (
        Row(
            "engine core killed, streams running, a prompt under way",
            "what was read fails with EngineDeadError, the rest is left to another worker; exit code 1; no [DONE]",
            _LIFE + "a_killed_engine_fails_the_jobs_that_were_read_leaves_the_others_and_ends_the_worker_with_1",
        ),
        Row(
            "engine worker killed, idle",
            "the worker ends with 1 and takes no more jobs",
            _LIFE + "a_worker_whose_engine_dies_while_idle_takes_no_more_jobs_and_ends_with_1",
        ),
        Row(
            "engine core stopped, streams running, a prompt under way",
            "503 after ENGINE_STALL_SECONDS, exit code 1; the prompt is left to another worker; idle before: nothing",
            _LIFE + "a_stopped_engine_fails_its_jobs_as_stalled_and_ends_the_worker_with_1",
        ),
        Row(
            "engine stopped, then SIGTERM",
            "jobs end with the drain, the worker too, no process is left",
            _LIFE + "sigterm_ends_a_worker_whose_engine_is_stopped",
        ),
        Row(
            "a worker frozen for an hour, a busy engine",
            "frozen time is no stall",
            "tests/unit/vllm/test_stall.py::test_time_in_which_the_worker_itself_stood_still_does_not_count",
        ),
        Row(
            "engine dead, in serve",
            "a job that nobody has read runs again elsewhere, one that was read fails",
            _PLANE + "a_job_whose_engine_died_waits_again_unless_a_client_has_some_of_it",
        ),
        Row(
            "engine dead before or in a terminal's job",
            "exit code 1, with the reason",
            _LIFE + "an_engine_that_dies_before_or_during_the_job_of_a_terminal_ends_it_with_1",
        ),
    ),
    "The worker": (
        Row(
            "SIGTERM, streams running and a job still to come",
            "all end whole, exit code 0",
            _LIFE + "sigterm_lets_running_and_late_jobs_end_and_exits_0_without_ever_asking_the_network",
        ),
        Row(
            "SIGTERM, jobs longer than the drain; ledger cannot be written",
            "503 that names DRAIN_SECONDS, exit code 0",
            _LIFE + "a_job_that_outlasts_drain_seconds_ends_with_an_error_that_names_it_and_exit_code_0",
        ),
        Row(
            "SIGTERM, SIGINT or SIGKILL during the boot",
            "it ends at once and leaves nothing; after SIGKILL no process",
            _LIFE + "a_signal_while_the_engine_starts_ends_the_boot_at_once_without_a_word",
        ),
        Row(
            "memory used up as the engine starts",
            "the boot ends with one line that says so",
            _FAULTS + "a_boot_that_runs_out_of_memory_says_so",
        ),
        Row(
            "memory used up under load",
            "as a dead engine: exit code 1, unread jobs are left to another worker",
            _FAULTS + "an_engine_that_runs_out_of_memory_is_a_dead_one",
        ),
        Row(
            "no temporary folder can be written",
            "the boot ends with one line that says so",
            _FAULTS + "a_boot_that_can_write_no_temporary_file_says_so",
        ),
        Row(
            "more jobs than the engine runs",
            "the worker takes MAX_QUEUE more; 429 after MAX_QUEUE_SECONDS",
            "tests/engine/test_overload.py::"
            "test_a_worker_takes_max_queue_jobs_beyond_the_engine_s_and_none_waits_past_max_queue_seconds",
        ),
        Row(
            "a worker killed under a thousand jobs",
            "each ends once",
            "tests/engine/test_serve.py::test_of_a_thousand_jobs_none_is_lost_or_ends_twice_when_a_worker_is_killed",
        ),
        Row(
            "two workers killed under one job",
            "tried twice, then it fails and says so",
            _SERVE + "a_job_whose_workers_die_is_tried_twice_then_fails_and_can_be_retried",
        ),
        Row(
            "what killed workers left: shared memory, sockets, pipes",
            "the next boot removes it, and nothing in use",
            "tests/loopback/test_processes.py::test_what_a_killed_worker_left_is_removed_and_what_a_living_one_uses_is_not",
        ),
        Row(
            "the worker's own process killed, its engine stopped",
            "the engine ends with it: the GPU is free",
            _LIFE + "a_worker_that_is_killed_takes_its_engine_with_it",
        ),
        Row(
            "children killed at the end",
            "no shared memory and no socket is left",
            "tests/loopback/test_processes.py::test_children_that_are_killed_leave_no_files",
        ),
        Row(
            "a process suspended, frozen or restored",
            "its clocks tell, the books close without it",
            "tests/unit/cost/test_revival.py::test_the_books_close_without_the_time_away",
        ),
    ),
    "The control plane": (
        Row(
            "gone for 2 minutes, streams running",
            "every stream equals the engine's text, once; jobs are taken again",
            _FAULTS + "a_platform_that_is_gone_for_a_while_loses_and_doubles_nothing",
        ),
        Row(
            "30 s for every POST",
            "the same",
            _FAULTS + "a_platform_that_answers_slowly_gets_all_of_every_stream_once",
        ),
        Row(
            "one 403, 404, 408, 429, 500, 503 or hang-up on a chunk",
            "offered again before the next",
            _EGRESS + "a_chunk_that_is_not_taken_is_offered_again_before_the_next",
        ),
        Row(
            "5xx and 429 on a fifth of all POSTs, and slow ones",
            "streams equal the engine's text, in order",
            _SLOW + "streams_are_complete_and_in_order_whatever_their_posts_meet",
        ),
        Row(
            "a POST hangs",
            "neither the engine nor other jobs wait",
            _CANCEL + "a_hanging_post_holds_up_neither_the_engine_nor_other_jobs",
        ),
        Row(
            "a POST hangs, and its job is cancelled",
            "the job leaves the engine",
            _CANCEL + "a_cancel_reaches_a_job_whose_post_hangs",
        ),
        Row(
            "POSTs refused, lost and late: 2,000 chunks of 100 streams",
            "in serve 0 lost, 0 doubled, 0 out of order",
            "tests/loopback/jobs/test_delivery.py::"
            "test_streams_are_delivered_once_where_posts_are_refused_lost_and_late",
        ),
        Row(
            "a POST taken, its answer lost",
            "numbered, and marked as a repeat where there is a place for it",
            _EGRESS + "every_post_has_its_chunks_number_and_a_repeat_says_so_where_there_is_a_place_for_it",
        ),
        Row(
            "the same, in serve; or late",
            "the chunk counts once",
            _PLANE + "what_is_posted_again_because_its_answer_was_lost_counts_once",
        ),
        Row(
            "a chunk refused for good (413)",
            "the job fails at once and says why",
            _EGRESS + "a_chunk_that_will_never_be_taken_fails_the_job_at_once",
        ),
        Row(
            "a result refused (403, 404, 413)",
            "a short failure ends the job",
            _EGRESS + "a_result_that_is_refused_is_answered_with_a_short_failure",
        ),
        Row(
            "a result taken, its answer lost, the repeat refused",
            "it does not become a failure",
            _EGRESS + "a_result_that_may_have_been_taken_never_becomes_a_failure",
        ),
        Row(
            "5xx without end",
            "the job fails after the time for delivery",
            _EGRESS + "a_platform_that_fails_for_long_fails_the_job",
        ),
        Row(
            "answers that are no HTTP, or none",
            "an error, and a new connection",
            "tests/loopback/jobs/test_post.py::test_no_answer_is_an_error_and_the_next_post_has_a_new_connection",
        ),
        Row("silence", "a timeout", "tests/loopback/jobs/test_post.py::test_silence_is_a_timeout"),
        Row(
            "nobody there",
            "an error that says the POST was not sent",
            "tests/loopback/jobs/test_post.py::test_nobody_there_is_an_error",
        ),
        Row(
            "a job delivered twice",
            "it runs once",
            _DISPATCH + "a_job_that_is_delivered_again_while_it_runs_runs_once_and_again_after_its_end",
        ),
        Row(
            "a cancel that overtakes its job",
            "the job does not run",
            _DISPATCH + "a_cancel_that_overtakes_its_job_stops_it_and_an_old_one_does_not",
        ),
    ),
    "serve": (
        Row(
            "serve killed",
            "no job is lost, no worker left",
            _SERVE + "a_restart_after_sigkill_loses_no_job_and_leaves_no_worker",
        ),
        Row(
            "serve restarted, streams half read",
            "the read ones fail, the others run again",
            _SERVE + "after_a_restart_what_ran_waits_again_unless_a_client_has_a_part_of_it",
        ),
        Row(
            "workers that do not boot",
            "who waits is told; what waits runs once they do",
            _SERVE + "while_no_worker_boots_who_waits_is_told_why_and_what_is_queued_runs_when_it_is_mended",
        ),
        Row(
            "the disk of the logs full",
            "the worker's end is explained",
            _SERVE + "a_worker_that_ends_on_a_full_disk_and_can_say_nothing_is_explained",
        ),
        Row(
            "the state file is none",
            "said, and left as it is",
            _SERVE + "a_state_file_that_is_none_is_said_and_left_as_it_is",
        ),
        Row(
            "idle and half-sent connections to the API",
            "cut off",
            _SERVE + "a_client_that_sends_nothing_or_half_a_request_is_cut_off",
        ),
        Row(
            "idle and half-sent connections of workers",
            "cut off",
            _PLANE + "a_client_that_sends_nothing_or_half_a_request_is_cut_off",
        ),
        Row("a stranger asks for jobs", "401", _PLANE + "a_worker_that_has_not_its_own_key_gets_and_gives_nothing"),
        Row("a foreign Host header", "421", _PLANE + "a_request_under_another_name_is_refused"),
        Row("a queue that is full", "429", _SERVE + "a_full_queue_takes_no_more"),
        Row(
            "MAX_QUEUE and MAX_QUEUE_SECONDS",
            "429 at once, or after the wait",
            _SERVE + "who_waits_too_long_or_is_one_too_many_gets_429_from_serve",
        ),
        Row(
            "the disk of the state full",
            "jobs are refused with an error, and taken once there is room; none is lost",
            _FAULTS + "a_full_disk_of_the_state_refuses_jobs_and_takes_them_again",
        ),
    ),
    "Ledger and metrics": (
        Row(
            "a ledger that cannot be written",
            "records on stdout, said once, the worker serves on",
            "tests/unit/records/test_records.py::TestUnwritable::test_it_is_said_once_and_counted_and_the_worker_serves_on",
        ),
        Row(
            "the disk of the ledger and of temporary files full",
            "records on stdout, said once, answers as ever, grammars too, written again once there is room",
            _FAULTS + "a_full_disk_of_the_ledger_costs_records_there_and_nothing_else",
        ),
        Row(
            "a disk that took half of a line",
            "no other worker's line is spoilt",
            "tests/unit/records/test_records.py::TestUnwritable::"
            "test_what_a_disk_took_of_a_line_spoils_no_other_workers",
        ),
        Row(
            "a ledger moved away",
            "begun again",
            "tests/unit/records/test_records.py::test_a_ledger_that_is_moved_away_is_begun_again",
        ),
        Row(
            "a bucket that fails",
            "records are kept, counted, sent later",
            _UPLOAD + "what_a_fault_stops_is_kept_counted_and_sent_later",
        ),
        Row(
            "a bucket that is not there",
            "said once, the lines stay",
            _UPLOAD + "a_bucket_that_is_not_there_is_said_once_and_its_lines_stay",
        ),
        Row(
            "a worker killed before it sent",
            "its next life sends",
            _UPLOAD + "a_worker_that_was_killed_is_read_out_by_its_next_life",
        ),
        Row("a line torn by a kill", "left out and said", _UPLOAD + "a_torn_line_is_left_out_and_said"),
        Row(
            "two workers on one folder",
            "nothing lost, nothing twice",
            _UPLOAD + "two_workers_in_one_folder_lose_and_double_nothing",
        ),
        Row("no bucket at the end", "the end is bounded", _UPLOAD + "an_end_without_a_bucket_is_bounded"),
        Row(
            "a Pushgateway that fails",
            "said once",
            "tests/loopback/records/test_metrics.py::test_a_gateway_that_fails_is_said_once",
        ),
    ),
    "Snapshot and caches": (
        Row(
            "a byte of the weights flipped",
            "the boot ends; nothing is served",
            _LIFE + "one_flipped_byte_of_the_weights_ends_the_boot_and_nothing_is_served",
        ),
        Row(
            "a file missing, cut, grown, added, linked",
            "one line names it",
            _LIFE + "a_damaged_snapshot_ends_the_boot_with_one_line_that_names_the_file",
        ),
        Row(
            "every third answer of the bucket fails",
            "the snapshot arrives whole",
            _PULL + "Pull::test_with_every_third_answer_failing_everything_arrives_and_nothing_else",
        ),
        Row(
            "a download killed", "it goes on where it was", _PULL + "Pull::test_a_killed_download_goes_on_where_it_was"
        ),
        Row(
            "an answer that crawls",
            "given up and continued",
            _PULL + "Pull::test_an_answer_that_crawls_is_given_up_and_continued",
        ),
        Row(
            "a corrupt object",
            "named; nothing appears",
            _PULL + "Refusals::test_a_corrupt_object_is_named_and_nothing_appears",
        ),
        Row(
            "who fetches for all stops",
            "one of those who wait goes on",
            _PULL + "Lock::test_who_stops_beating_loses_it_to_one_of_the_waiters_and_knows",
        ),
        Row(
            "a bundle damaged",
            "refused and made anew",
            _CACHES + "TestStore::test_a_damaged_bundle_is_refused_and_made_anew",
        ),
        Row(
            "disk full while a bundle is unpacked",
            "nothing is left behind",
            _CACHES + "test_a_disk_that_fills_up_while_a_bundle_is_unpacked_fails_the_fetch_and_leaves_nothing_behind",
        ),
        Row(
            "a clock that is wrong",
            "deletes nobody's bundle",
            _CACHES + "TestPruning::test_a_worker_whose_clock_is_wrong_deletes_nothing",
        ),
        Row("a volume that hangs", "the boot goes on without", _CACHES + "test_a_volume_that_hangs_is_late"),
    ),
}

DEFECTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a grammar outlived its job and slowed every later one",
        (_BOMBS + "a_grammar_that_costs_too_much_is_refused_and_burns_nothing",),
    ),
    (
        "a hung engine was never noticed, and kept SIGTERM from ending the worker",
        (
            _LIFE + "a_stopped_engine_fails_its_jobs_as_stalled_and_ends_the_worker_with_1",
            _LIFE + "sigterm_ends_a_worker_whose_engine_is_stopped",
        ),
    ),
    (
        "text was doubled where the answer to a POST was lost or late",
        (
            "tests/loopback/jobs/test_delivery.py::test_streams_are_delivered_once_where_posts_are_refused_lost_and_late",
            _EGRESS + "every_post_has_its_chunks_number_and_a_repeat_says_so_where_there_is_a_place_for_it",
        ),
    ),
    (
        "a refused result was never posted again; one 403 failed a job; a platform gone for 75 s lost jobs",
        (
            _EGRESS + "a_result_that_is_refused_is_answered_with_a_short_failure",
            _EGRESS + "a_chunk_that_is_not_taken_is_offered_again_before_the_next",
            _FAULTS + "a_platform_that_is_gone_for_a_while_loses_and_doubles_nothing",
        ),
    ),
    (
        "a dead engine failed unread jobs too, and an error followed `[DONE]`",
        (
            _LIFE + "a_killed_engine_fails_the_jobs_that_were_read_leaves_the_others_and_ends_the_worker_with_1",
            _PLANE + "a_job_whose_engine_died_waits_again_unless_a_client_has_some_of_it",
        ),
    ),
    (
        "/tokenize and /detokenize had no limit; 9.6 MB took 1.5 GB",
        (
            _BAD + "an_openai_job_ends_with_an_openai_error",
            _HOSTILE + "the_largest_jobs_take_no_more_memory_than_is_stated",
        ),
    ),
    (
        "one job of 500 completions took every slot; a runsync job whose client had left could not be found",
        (
            _BAD + "a_native_job_ends_with_one_json_string_that_names_the_field",
            "tests/unit/jobs/test_request.py::test_a_job_asks_for_n_completions_of_each_prompt",
            _SERVE + "a_job_that_its_client_has_left_is_found_and_cancelled",
        ),
    ),
    (
        "the workers' port of `serve` gave jobs to whoever asked",
        (
            _PLANE + "a_worker_that_has_not_its_own_key_gets_and_gives_nothing",
            _PLANE + "a_request_under_another_name_is_refused",
        ),
    ),
    (
        "a job that was delivered twice ran twice",
        (_DISPATCH + "a_job_that_is_delivered_again_while_it_runs_runs_once_and_again_after_its_end",),
    ),
    (
        "errors of the wrong class, or about the wrong field; webhooks to private addresses",
        (
            _BAD + "a_native_job_ends_with_one_json_string_that_names_the_field",
            _BAD + "an_openai_job_ends_with_an_openai_error",
            _SERVE + "what_is_wrong_is_refused_with_its_status_and_why",
            _SERVE + "a_webhook_leads_to_no_private_address_and_follows_no_redirect",
        ),
    ),
    (
        "Anthropic's errors became 500; an empty POST was no JSON; 405, `x-api-key` and clipped answers",
        (
            "tests/engine/test_openai.py::test_errors_in_anthropics_shape_keep_their_status_through_the_gateway",
            "tests/unit/jobs/test_job.py::TestGoodInput::test_a_response_is_cancelled_by_a_post_without_a_body",
            _SERVE + "without_the_key_there_is_nothing",
            "tests/engine/test_answers.py::test_max_tokens_beyond_the_context_is_bounded_by_what_the_prompt_leaves",
        ),
    ),
    (
        "a cancelled request had 0 tokens beside its GPU-seconds",
        (_ACCOUNTS + "a_call_that_is_cut_before_an_output_came_counts_the_tokens_of_its_steps",),
    ),
    (
        "idle and half-sent connections stayed open without end",
        (
            _SERVE + "a_client_that_sends_nothing_or_half_a_request_is_cut_off",
            _PLANE + "a_client_that_sends_nothing_or_half_a_request_is_cut_off",
        ),
    ),
    (
        "killed workers left shared memory and sockets behind",
        (
            "tests/loopback/test_processes.py::test_what_a_killed_worker_left_is_removed_and_what_a_living_one_uses_is_not",
        ),
    ),
    (
        "tests hung on the machine's speed",
        (
            "tests/engine/test_answers.py::test_the_first_token_leaves_at_once_and_the_rest_at_most_every_4_ms",
            _LIFE + "sigterm_lets_running_and_late_jobs_end_and_exits_0_without_ever_asking_the_network",
            "tests/engine/test_sinks.py::test_a_workers_records_and_metrics_leave_it_before_it_ends",
            _LIFE + "a_job_that_outlasts_drain_seconds_ends_with_an_error_that_names_it_and_exit_code_0",
        ),
    ),
    (
        "VLLM::Worker grew over 3,000 requests: torch's freed tensors in malloc's heap, up to a plateau",
        ("tests/loopback/desk/test_timed_engine.py::test_two_thousand_requests_leave_nothing_in_the_worker",),
    ),
)
"""What was found before there was this table, in that order, and the tests that failed before it was mended."""


def main() -> int:
    """Run the rows, keep what became of them, write the page; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="PART", help="only rows with this in their test's name")
    parser.add_argument("--new", action="store_true", help="only rows that have never been run")
    given = parser.parse_args()
    before = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    every = [row for rows in PARTS.values() for row in rows if given.rows in row.test]
    wanted = [row for row in every if not (given.new and row.test in before)]
    ran = _run(wanted) if wanted else {}
    known = before | ran
    kept = {row.test: known[row.test] for rows in PARTS.values() for row in rows if row.test in known}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(kept), "utf-8")
    failed = [row.test for row in wanted if not kept.get(row.test, {}).get("passed")]
    print(f"{len(wanted) - len(failed)} of {len(wanted)} rows hold", *failed, sep="\n  ")
    return 1 if failed else 0


def _run(rows: list[Row]) -> dict[str, dict[str, object]]:
    """Return what became of each row's cases: how many, whether all passed, how long they took."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.name}", *(row.test for row in rows)]
        subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"FAULTS": "1"})
        cases = defaultdict(list)
        for case in ET.parse(report.name).iter("testcase"):
            name = f"{case.get('classname', '')}.{case.get('name', '').partition('[')[0]}"
            cases[name].append((float(case.get("time", 0)), all(child.tag == "system-out" for child in case)))
    day = time.strftime("%Y-%m-%d", time.gmtime())
    found = {}
    for row in rows:
        file, _, rest = row.test.partition("::")
        if ran := cases.get(".".join([file.removesuffix(".py").replace("/", "."), *rest.split("::")])):
            seconds, passed = sum(took for took, _ in ran), all(good for _, good in ran)
            found[row.test] = {"cases": len(ran), "passed": passed, "seconds": round(seconds, 1), "day": day}
    return found


def page(results: dict[str, dict[str, object]]) -> str:
    """Return docs/reliability.md: the rows that have been run."""
    lines = [
        "# Reliability",
        "",
        "What is broken, and what is promised about it. `make faults` runs the rows and writes this page; each is",
        "a test of `make test` too. A row's command is `.venv/bin/python -m pytest` and its test. Those in",
        "`tests/engine` run the real engine under the real SDK, those in `tests/loopback` real processes or real",
        "HTTP, those in `tests/unit` one part on a clock of its own. Seconds are of the run.",
        "",
        f"{len(results)} of {sum(map(len, PARTS.values()))} rows have been run; one that has not been run is not here.",
        "",
        f"Failed: {sum(not each['passed'] for each in results.values())}.",
    ]
    for part, rows in PARTS.items():
        ran = [row for row in rows if row.test in results]
        if not ran:
            continue
        lines += ["", f"## {part}", "", "| fault | what is promised | cases | result | seconds | run | test |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in ran:
            result = results[row.test]
            held = "holds" if result["passed"] else "**fails**"
            measured = f"{result['cases']} | {held} | {result['seconds']} | {result['day']}"
            lines.append(f"| {row.fault} | {row.promise} | {measured} | `{row.test}` |")
    return "\n".join([*lines, *_soaks(), *_defects()]) + "\n"


def _soaks() -> list[str]:
    """Return what runs of bench/chaos.py counted."""
    runs = {
        name: json.loads(path.read_text("utf-8"))
        for name in SOAKS
        if (path := RESULTS.with_name(f"{name}.json")).exists()
    }
    counts = [name for name, value in next(iter(runs.values())).items() if isinstance(value, int)]
    return [
        "",
        "## Everything at once",
        "",
        "`python bench/chaos.py`: two workers on the real engine, requests streamed and plain, native and over",
        "OpenAI's API, a twentieth of all POSTs refused or their answers lost; and every 200 requests a worker is",
        "killed, frozen or told to end, an engine killed or stopped, the ledger's disk full or frozen, or no POST",
        "answered for 3 s. Every answer is compared with the engine's, character by character. A client whose job",
        "failed with an error that says to send it again does. What the first run had wrong was an error after",
        "`[DONE]`, where a worker ended between its last chunk and its result.",
        "",
        f"| | {' | '.join(f'[{name}](../bench/results/{name}.md)' for name in runs)} |",
        f"|---|{'---|' * len(runs)}",
        *(f"| {count} | {' | '.join(f'{run[count]:,}' for run in runs.values())} |" for count in counts),
    ]


def _defects() -> list[str]:
    """Return the defects, each with its tests."""
    lines = ["", "## Defects, and the tests that hold them mended", "", "| defect | tests |", "|---|---|"]
    lines += [f"| {what} | {'<br>'.join(f'`{test}`' for test in tests)} |" for what, tests in DEFECTS]
    figures = "What processes hold after 20,000 requests: [bench/results/soak.md](../bench/results/soak.md)."
    return [*lines, "", figures]


if __name__ == "__main__":
    sys.exit(main())
