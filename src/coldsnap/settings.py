"""The environment, read once into one frozen model. Nothing else in the package reads `os.environ`.

worker-vllm's names keep working. Variables that are not settings of the worker are handed to
`arguments.parse`, which takes those that are arguments of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from coldsnap.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
"""The clone, or the image's /app: the folder that holds handler.py."""

_LOCAL_WORKER = "local"


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


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
    snapshot_verify: Literal["full", "size"] = Field(
        "full",
        alias="SNAPSHOT_VERIFY",
        description="`full` compares every file's size and BLAKE3 digest with the manifest, `size` the size.",
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
    chunk_interval_ms: float = Field(
        20.0,
        alias="CHUNK_INTERVAL_MS",
        ge=0,
        le=1000,
        description="Least time between two chunks of a job; the first leaves at once. Load widens it, up to 35.",
    )
    drain_seconds: float = Field(
        30.0,
        alias="DRAIN_SECONDS",
        ge=0,
        le=86_400,
        description="How long running jobs may go on after SIGTERM before they end with an error.",
    )
    ledger_dir: Path = Field(
        ROOT / ".coldsnap",
        alias="COLDSNAP_LEDGER_DIR",
        description="Folder of ledger.jsonl, the cold-start and request records.",
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

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from `environ`. An empty value counts as not set."""
        given = {}
        for field in cls.model_fields.values():
            for name in _variables(field):
                if value := environ.get(name, "").strip():
                    given[name] = value
                    break  # of two names for one setting the first wins
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            found = first["input"] if isinstance(first["input"], str) else ", ".join(map(str, first["input"]))
            raise SettingsError(f"{first['loc'][0]}: {first['msg']}, found {found!r:.200}") from error

    @classmethod
    def others(cls, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that are no settings of the worker: vLLM's arguments are among them."""
        known = {name for field in cls.model_fields.values() for name in _variables(field)}
        return {name: value for name, value in environ.items() if name not in known}

    @classmethod
    def table(cls) -> str:
        """Return the settings as the Markdown table that the README shows."""
        rows = ["| variable | default | what it does |", "|---|---|---|"]
        for field in cls.model_fields.values():
            if field.description == "Set by the platform.":
                continue
            name, *aliases = reversed(_variables(field))
            also = f" (also `{aliases[0]}`)" if aliases else ""
            default = field.default
            if isinstance(default, Path):
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

    def snapshot(self) -> Path | None:
        """Return the folder to boot from; None means the hub, which only ALLOW_HUB=true permits."""
        if self.snapshot_dir is not None:
            return self.snapshot_dir.absolute()
        if self.model_name is None:
            return ROOT / "snapshots" / "demo"
        folder = Path(self.model_name)
        if folder.is_dir():
            return folder.absolute()
        if not self.allow_hub:
            raise SettingsError(
                f"MODEL_NAME: {self.model_name!r} is not a folder here; set it to a baked snapshot's folder, "
                f"or set ALLOW_HUB=true to download the model at boot"
            )
        return None


def _variables(field: Any) -> list[str]:
    if isinstance(field.validation_alias, AliasChoices):
        return [str(choice) for choice in field.validation_alias.choices]
    return [str(field.alias)]
