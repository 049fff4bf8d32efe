"""Every error of coldsnap's own, in one tree.

A `BootError` ends the process before anything is served: one line on stderr, exit code 1.
A `JobError` ends one job; the worker serves the next one. `status` is the HTTP status that an
OpenAI client gets, `type` the OpenAI error type.
`EngineDead` ends the job and the worker: the platform starts another.
A `BakeError` ends a command at a desk like a `BootError` ends a worker.

Not in the tree: what the other side of a wire says went wrong there, which is a result here (`bench`'s `Failed`, the
control plane's `JobFailed` and `WorkerUnhealthy`), `jobs.post.Unsent`, an OSError that says that a POST had no effect,
and exceptions that never leave their module.
"""

from __future__ import annotations

from typing import ClassVar


class ColdsnapError(Exception):
    """Base of the tree; `message` is one sentence that names the field or file and what would be right."""

    status: int = 500
    type: str = "internal_server_error"
    survives: ClassVar[bool] = True
    """Whether the worker goes on serving afterwards."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, object]:
        """Return the error as the body that OpenAI clients parse."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return {"error": error}


class BootError(ColdsnapError):
    """The worker cannot start."""

    survives = False


class Unfit(BootError):
    """The machine cannot run the engine; `check` names what is missing, as the platform is told."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class SettingsError(BootError):
    """An environment variable has a wrong value; the message names it."""


class SnapshotError(BootError):
    """The snapshot is not what its manifest says; the message names the file."""


class SourceError(BootError):
    """A snapshot cannot be had from where it is; the message names the setting or option and the place."""


class EngineBootError(BootError):
    """vLLM refused the model or its arguments."""


class ImageError(BootError):
    """A process image was not made, or was refused where it is required; the message says why. A boot goes without."""


class S3Error(ColdsnapError):
    """A bucket could not be read or written; the message names the object. `missing` if there is no such object."""

    def __init__(self, message: str, *, param: str | None = None, missing: bool = False) -> None:
        super().__init__(message, param=param)
        self.missing = missing


class CacheError(ColdsnapError):
    """A cache bundle was not used or not stored; the message says why. The engine computes what it would have held."""


class CommandError(ColdsnapError):
    """A command at a desk cannot do what it was asked to; the message names the option, the file or its key."""


class BakeError(CommandError):
    """A snapshot cannot be made; the message names the model, file or option. Nothing is visible under its name."""


class ReportError(CommandError):
    """A report cannot be made."""


class TraceError(CommandError):
    """A trace of requests cannot be read; the message names the file, the line and the field."""


class BenchError(CommandError):
    """`coldsnap bench` cannot load an endpoint; the message names the option."""


class PlanError(CommandError):
    """A plan cannot be made; the message names the option, or what the ledger lacks and how to get it."""


class ServeError(CommandError):
    """`coldsnap serve` cannot start; the message names the option."""


class JobError(ColdsnapError):
    """One job failed; nothing else did."""


class InvalidInput(JobError):
    """The job's input is wrong; `param` names the field."""

    status = 400
    type = "BadRequestError"


class NotFound(InvalidInput):
    """The job names a model that this worker does not serve, or a route that vLLM does not have for its model."""

    status = 404
    type = "NotFoundError"


class RouteRefused(InvalidInput):
    """The job names a route that is not on the allow-list."""

    status = 403
    type = "PermissionDeniedError"


class MethodNotAllowed(InvalidInput):
    """The route exists, but not for this HTTP method."""

    status = 405
    type = "MethodNotAllowedError"


class Unprocessable(InvalidInput):
    """The engine understands the request and cannot follow it."""

    status = 422
    type = "UnprocessableEntityError"


class Conflict(JobError):
    """The request does not go with what the engine does already."""

    status = 409
    type = "Conflict"


class Unavailable(JobError):
    """The engine cannot take the request now, or has given it up."""

    status = 503
    type = "ServiceUnavailableError"


class Overloaded(JobError):
    """More was asked for than can be run: the job has waited too long, or would be one too many."""

    status = 429
    type = "TooManyRequestsError"


class Draining(Unavailable):
    """The job reached a worker that is shutting down and could not be finished in time."""


class Refused(JobError):
    """`coldsnap serve` does not take a client's request; `status` says why, `retry_after` (s) when to ask again."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.type = {429: Overloaded.type, 500: JobError.type, 503: Unavailable.type}.get(
            status, "invalid_request_error"
        )
        self.retry_after = retry_after


class EngineDead(ColdsnapError):
    """The engine process is gone. Its jobs fail; the worker exits so that another is started."""

    status = 500
    type = "EngineDeadError"
    survives = False


class EngineStalled(EngineDead):
    """The engine process is there and does nothing, which ends the worker like a dead one."""

    status = 503
    type = "EngineStalledError"
