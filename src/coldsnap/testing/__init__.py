"""Doubles for tests and benchmarks, and what they drive of `coldsnap.desk.serve`."""

from coldsnap.desk.serve.board import NO_INPUT, Worker
from coldsnap.desk.serve.control_plane import ControlPlane, Violation, WorkerUnhealthy
from coldsnap.desk.serve.job import Job, JobCancelled, JobFailed, JobState, Timestamps
from coldsnap.testing.faults import Faults
from coldsnap.testing.faulty_proxy import Exchange, Fault, FaultyProxy
from coldsnap.testing.gateway import Gateway

__all__ = [
    "NO_INPUT",
    "ControlPlane",
    "Exchange",
    "Fault",
    "Faults",
    "FaultyProxy",
    "Gateway",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobState",
    "Timestamps",
    "Violation",
    "Worker",
    "WorkerUnhealthy",
]
