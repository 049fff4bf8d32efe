"""Doubles for tests and benchmarks, and what they drive of `coldsnap.platform`."""

from coldsnap.platform.board import NO_INPUT, Worker
from coldsnap.platform.control_plane import ControlPlane, Violation, WorkerUnhealthy
from coldsnap.platform.job import Job, JobCancelled, JobFailed, JobState, Timestamps
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
