"""The environment, read once into one frozen model.

It is handed in by whatever starts a process or is a command: `worker`, `warm`, `desk/serve`, `desk/bench`. Nothing else
touches `os.environ`, but for `cost/step_meter` in a process that vLLM starts.

worker-vllm's names keep working. Variables that are not settings of the worker are handed to
`arguments.parse`, which takes those that are arguments of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from coldsnap.errors import SettingsError
from coldsnap.foundation.s3 import Place

ROOT = Path(__file__).resolve().parents[2]
"""The clone, or the image's /app: the folder that holds handler.py."""

_LOCAL_WORKER = "local"


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _place(value: Any, info: ValidationInfo) -> Any:
    return Place.parse(value, str(info.field_name).upper()) if isinstance(value, str) else value


def _shared(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or value == "off":
        return value
    if value.startswith("s3://"):
        return _place(value, info)
    if not value.startswith("/"):
        raise ValueError("expected s3://bucket/prefix, a folder's absolute path, or off")
    return Path(value)


def _push_url(value: str | None) -> str | None:
    if value is not None and not (urlsplit(value).scheme in {"http", "https"} and urlsplit(value).hostname):
        raise ValueError("expected http://host:port or https://host:port")
    return value


class Settings(BaseModel):
    """What a user can set about the worker itself; the README's table is made from these fields.

    Read with `Settings.read`. A value of the wrong type or out of range raises `SettingsError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    snapshot_dir: Path | None = Field(
        None,
        alias="SNAPSHOT_DIR",
        description="Folder of the baked snapshot. Default: MODEL_NAME if that is a folder, else the demo's.",
    )
    model_name: str | None = Field(
        None,
        alias="MODEL_NAME",
        description="A snapshot folder, or the hub repository that the snapshot must have been baked from.",
    )
    snapshot_s3_uri: Annotated[Place | None, BeforeValidator(_place)] = Field(
        None,
        alias="SNAPSHOT_S3_URI",
        description="`s3://bucket/prefix` that a snapshot was pushed to; fetched unless volume or disk has it.",
    )
    snapshot_volume: Path = Field(
        Path("/runpod-volume"),
        alias="SNAPSHOT_VOLUME",
        description="The network volume: snapshots in its `coldsnap/`, the platform's in `huggingface-cache/`.",
    )
    snapshot_cache: Path = Field(
        ROOT / ".coldsnap" / "snapshots",
        alias="SNAPSHOT_CACHE",
        description="Where fetched snapshots are put if there is no network volume.",
    )
    snapshot_verify: Literal["full", "size"] = Field(
        "full",
        alias="SNAPSHOT_VERIFY",
        description="`full` compares every file's size and BLAKE3 digest with the manifest, `size` the size.",
    )
    cache_uri: Annotated[Place | Path | Literal["off"] | None, BeforeValidator(_shared)] = Field(
        None,
        alias="CACHE_URI",
        description="Folder or `s3://bucket/prefix` of compile caches that workers share; `off`. Default: the volume.",
    )
    process_image: Literal["off", "auto", "require"] = Field(
        "auto",
        alias="PROCESS_IMAGE",
        description="`coldsnap-start` restores the imported process from its image; `require`: or ends. Never on GPUs.",
    )
    allow_hub: bool = Field(
        False,
        alias="ALLOW_HUB",
        description="Let a boot without a snapshot download MODEL_NAME from the hub, unverified and slowly.",
    )
    served_model_name: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        validation_alias=AliasChoices("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "SERVED_MODEL_NAME"),
        description="Names that requests may use, comma-separated. Default: the manifest's.",
    )
    max_concurrency: int = Field(
        128,
        alias="MAX_CONCURRENCY",
        ge=1,
        description="Jobs taken from the platform at once; what the engine cannot run waits in vLLM's queue.",
    )
    max_queue: int | None = Field(
        None,
        alias="MAX_QUEUE",
        ge=1,
        description="Jobs that may wait: for the engine, where a worker takes no more; in `serve`, which answers 429.",
    )
    max_queue_seconds: float | None = Field(
        None,
        alias="MAX_QUEUE_SECONDS",
        gt=0,
        le=86_400,
        description="How long a job may wait, for the engine or in `serve` for a worker, before it ends with a 429.",
    )
    max_n: int = Field(
        32,
        alias="MAX_N",
        ge=1,
        le=16_384,
        description="Completions that a job may ask for: `n`, times its prompts. It counts as so many jobs.",
    )
    grammar_max_bytes: int = Field(
        100_000,
        alias="GRAMMAR_MAX_BYTES",
        ge=100,
        le=10_000_000,
        description="Size of a schema, regular expression or other grammar that an answer must follow.",
    )
    grammar_seconds: float = Field(
        2.0,
        alias="GRAMMAR_SECONDS",
        gt=0,
        le=60,
        description="Processor time for a new grammar: to compile it and to follow it for 512 tokens.",
    )
    chunk_interval_ms: float = Field(
        4.0,
        alias="CHUNK_INTERVAL_MS",
        ge=0,
        le=1000,
        description="Least time between two chunks of a job; the first leaves at once. Widens by 1 a stream, up to 35.",
    )
    drain_seconds: float = Field(
        30.0,
        alias="DRAIN_SECONDS",
        ge=0,
        le=86_400,
        description="How long running jobs may go on after SIGTERM before they end with an error.",
    )
    engine_stall_seconds: float = Field(
        60.0,
        alias="ENGINE_STALL_SECONDS",
        ge=1,
        le=86_400,
        description="How long an engine with requests may make no step before it counts as hung and the worker ends.",
    )
    ledger_dir: Path = Field(
        ROOT / ".coldsnap",
        alias="COLDSNAP_LEDGER_DIR",
        description="Folder of ledger.jsonl, the cold-start and request records.",
    )
    ledger_s3_uri: Annotated[Place | None, BeforeValidator(_place)] = Field(
        None,
        alias="LEDGER_S3_URI",
        description="`s3://bucket/prefix` that workers on the platform send their records to; AWS_* as boto3 has it.",
    )
    ledger_flush_seconds: float = Field(
        60.0,
        alias="LEDGER_FLUSH_SECONDS",
        ge=1,
        le=3600,
        description="Least time between two uploads of a busy worker. One that is idle or ends sends at once.",
    )
    metrics_push_url: Annotated[str | None, AfterValidator(_push_url)] = Field(
        None,
        alias="METRICS_PUSH_URL",
        repr=False,
        description="A Pushgateway that the worker pushes its Prometheus metrics to: `https://[user:password@]host`.",
    )
    metrics_push_seconds: float = Field(
        15.0,
        alias="METRICS_PUSH_SECONDS",
        ge=1,
        le=3600,
        description="Time between two pushes: the interval at which Prometheus scrapes the gateway will do.",
    )
    cost_in_response: bool = Field(
        True,
        alias="COST_IN_RESPONSE",
        description="Put `cost` (GPU-seconds, dollars) into answers, beside `usage`.",
    )
    gpu_price_per_second: float | None = Field(
        None,
        alias="GPU_PRICE_PER_SECOND",
        ge=0,
        allow_inf_nan=False,
        description="US dollars for a second of one GPU. Default: the platform's flex price, where known.",
    )
    hf_token: str | None = Field(
        None, alias="HF_TOKEN", repr=False, description="Hub token; used only with ALLOW_HUB=true."
    )

    worker_id: str = Field(_LOCAL_WORKER, alias="RUNPOD_POD_ID", description="Set by the platform.")
    endpoint_id: str = Field(_LOCAL_WORKER, alias="RUNPOD_ENDPOINT_ID", description="Set by the platform.")
    job_url: str | None = Field(None, alias="RUNPOD_WEBHOOK_GET_JOB", repr=False, description="Set by the platform.")
    image_refused: str | None = Field(None, alias="COLDSNAP_IMAGE_REFUSED", description="Set by `coldsnap-start`.")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from `environ`. An empty value counts as not set."""
        values = {}
        for field in cls.model_fields.values():
            for name in _variables(field):
                if value := environ.get(name, "").strip():
                    values[name] = value
                    break  # of two names for one setting the first wins
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            given_value = first["input"] if isinstance(first["input"], str) else ", ".join(map(str, first["input"]))
            secret = {name for field in cls.model_fields.values() if not field.repr for name in _variables(field)}
            shown = "another value" if first["loc"][0] in secret else f"{given_value!r:.200}"
            wrong = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{first['loc'][0]}: {wrong}, found {shown}") from error

    @classmethod
    def others(cls, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that are no settings of the worker: vLLM's arguments are among them."""
        names = {name for field in cls.model_fields.values() for name in _variables(field)}
        return {name: value for name, value in environ.items() if name not in names}

    @classmethod
    def table(cls) -> str:
        """Return the settings as the Markdown table that the README shows."""
        rows = ["| variable | default | what it does |", "|---|---|---|"]
        for field in cls.model_fields.values():
            if (field.description or "").startswith("Set by "):
                continue
            name, *aliases = reversed(_variables(field))
            also = f" (also `{aliases[0]}`)" if aliases else ""
            default = field.default
            if isinstance(default, Path) and default.is_relative_to(ROOT):
                default = f"`{default.relative_to(ROOT)}/` in the clone"
            elif isinstance(default, bool):
                default = str(default).lower()
            elif default in (None, ()):
                default = ""
            rows.append(f"| `{name}`{also} | {default} | {field.description} |")
        return "\n".join(rows)

    @property
    def on_platform(self) -> bool:
        """Whether jobs come from a Runpod endpoint rather than from the command line."""
        return self.job_url is not None

    def caches(self) -> Path | Place | None:
        """Return where compile caches are shared, None if they are not."""
        if self.cache_uri is None:
            return self.snapshot_volume / "coldsnap" / "caches" if self.snapshot_volume.is_dir() else None
        return None if isinstance(self.cache_uri, str) else self.cache_uri

    def snapshot(self) -> Path | None:
        """Return the folder that the settings name themselves; None if the snapshot has to be looked for."""
        if self.snapshot_dir is not None:
            return self.snapshot_dir.absolute()
        if self.model_name is None:
            return None if self.snapshot_s3_uri else ROOT / "snapshots" / "demo"
        folder = Path(self.model_name)
        return folder.absolute() if folder.is_dir() else None


def _variables(field: Any) -> list[str]:
    if isinstance(field.validation_alias, AliasChoices):
        return [str(choice) for choice in field.validation_alias.choices]
    return [str(field.alias)]
