"""Doubles for tests and benchmarks: the platform's side of the worker protocol, on this machine."""

from coldsnap.testing.control_plane import NO_INPUT, ControlPlane, Violation, Worker, WorkerUnhealthy
from coldsnap.testing.faults import Faults
from coldsnap.testing.faulty_proxy import Exchange, Fault, FaultyProxy
from coldsnap.testing.gateway import Gateway
from coldsnap.testing.job import Job, JobCancelled, JobFailed, JobState, Timestamps

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
