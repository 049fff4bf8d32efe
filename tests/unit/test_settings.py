"""The worker's settings: names, defaults, precedence, and what a wrong value says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from coldsnap.errors import SettingsError
from coldsnap.foundation.s3 import Place
from coldsnap.settings import ROOT, Settings

NAMES = {
    "SNAPSHOT_DIR": "/s",
    "MODEL_NAME": "org/model",
    "SNAPSHOT_S3_URI": "s3://bucket/prefix",
    "SNAPSHOT_VOLUME": "/volume",
    "SNAPSHOT_CACHE": "/cache",
    "SNAPSHOT_VERIFY": "size",
    "CACHE_URI": "s3://bucket/caches",
    "PROCESS_IMAGE": "require",
    "ALLOW_HUB": "true",
    "SERVED_MODEL_NAME": "a, b",
    "MAX_CONCURRENCY": "7",
    "MAX_QUEUE": "9",
    "MAX_QUEUE_SECONDS": "1.5",
    "MAX_N": "5",
    "GRAMMAR_MAX_BYTES": "5000",
    "GRAMMAR_SECONDS": "0.5",
    "CHUNK_INTERVAL_MS": "2.5",
    "DRAIN_SECONDS": "3",
    "ENGINE_STALL_SECONDS": "20",
    "COLDSNAP_LEDGER_DIR": "/ledger",
    "LEDGER_S3_URI": "s3://bucket/ledgers",
    "LEDGER_FLUSH_SECONDS": "5",
    "METRICS_PUSH_URL": "https://user:word@push.example:9091/",
    "METRICS_PUSH_SECONDS": "2",
    "COST_IN_RESPONSE": "false",
    "GPU_PRICE_PER_SECOND": "0.0011",
    "HF_TOKEN": "hf_secret",
    "RUNPOD_POD_ID": "pod",
    "RUNPOD_ENDPOINT_ID": "endpoint",
    "RUNPOD_WEBHOOK_GET_JOB": "https://api.example/key",
    "COLDSNAP_IMAGE_REFUSED": "there is none",
}


def test_every_variable_is_read() -> None:
    assert Settings.read(NAMES).model_dump() == {
        "process_image": "require",
        "image_refused": "there is none",
        "snapshot_dir": Path("/s"),
        "model_name": "org/model",
        "snapshot_s3_uri": {"bucket": "bucket", "prefix": "prefix/"},
        "snapshot_volume": Path("/volume"),
        "snapshot_cache": Path("/cache"),
        "snapshot_verify": "size",
        "cache_uri": {"bucket": "bucket", "prefix": "caches/"},
        "allow_hub": True,
        "served_model_name": ("a", "b"),
        "max_concurrency": 7,
        "max_queue": 9,
        "max_queue_seconds": 1.5,
        "max_n": 5,
        "grammar_max_bytes": 5000,
        "grammar_seconds": 0.5,
        "chunk_interval_ms": 2.5,
        "drain_seconds": 3.0,
        "engine_stall_seconds": 20.0,
        "ledger_dir": Path("/ledger"),
        "ledger_s3_uri": {"bucket": "bucket", "prefix": "ledgers/"},
        "ledger_flush_seconds": 5.0,
        "metrics_push_url": "https://user:word@push.example:9091/",
        "metrics_push_seconds": 2.0,
        "cost_in_response": False,
        "gpu_price_per_second": 0.0011,
        "hf_token": "hf_secret",
        "worker_id": "pod",
        "endpoint_id": "endpoint",
        "job_url": "https://api.example/key",
    }


def test_this_test_knows_every_setting() -> None:
    assert len(NAMES) == len(Settings.model_fields)


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = Settings.read({})
    assert settings.snapshot() == ROOT / "snapshots" / "demo"
    assert settings.snapshot_verify == "full"
    assert not settings.allow_hub
    assert settings.max_concurrency == 128
    assert settings.chunk_interval_ms == 4
    assert settings.ledger_dir == ROOT / ".coldsnap"
    assert not settings.on_platform


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_value_counts_as_not_set(empty: str) -> None:
    assert Settings.read(dict.fromkeys(NAMES, empty)) == Settings.read({})


@pytest.mark.parametrize("name", NAMES)
def test_white_space_around_a_value_does_not_matter(name: str) -> None:
    assert Settings.read({name: f" {NAMES[name]}\n"}) == Settings.read({name: NAMES[name]})


def test_other_variables_are_ignored() -> None:
    assert Settings.read({"MAX_MODEL_LEN": "1", "snapshot_dir": "/s", "PATH": ""}) == Settings.read({})


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("SNAPSHOT_VERIFY", "none", "'full' or 'size'"),
        ("SNAPSHOT_VERIFY", "FULL", "'full' or 'size'"),
        ("CACHE_URI", "caches", "expected s3://bucket/prefix, a folder's absolute path, or off"),
        ("CACHE_URI", "s3://B", "expected s3://bucket/prefix"),
        ("ALLOW_HUB", "maybe", "valid boolean"),
        ("MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("MAX_CONCURRENCY", "1.5", "valid integer"),
        ("MAX_QUEUE", "0", "greater than or equal to 1"),
        ("MAX_QUEUE_SECONDS", "0", "greater than 0"),
        ("MAX_N", "0", "greater than or equal to 1"),
        ("GRAMMAR_MAX_BYTES", "1", "greater than or equal to 100"),
        ("GRAMMAR_SECONDS", "0", "greater than 0"),
        ("MAX_CONCURRENCY", "many", "valid integer"),
        ("CHUNK_INTERVAL_MS", "-1", "greater than or equal to 0"),
        ("CHUNK_INTERVAL_MS", "1001", "less than or equal to 1000"),
        ("CHUNK_INTERVAL_MS", "nan", "than or equal to"),
        ("CHUNK_INTERVAL_MS", "20ms", "valid number"),
        ("LEDGER_S3_URI", "ledgers", "expected s3://bucket/prefix"),
        ("LEDGER_FLUSH_SECONDS", "0", "greater than or equal to 1"),
        ("METRICS_PUSH_SECONDS", "0.5", "greater than or equal to 1"),
        ("DRAIN_SECONDS", "-0.1", "greater than or equal to 0"),
        ("DRAIN_SECONDS", "inf", "less than or equal to 86400"),
        ("DRAIN_SECONDS", "nan", "than or equal to"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(name: str, value: str, right: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.read({name: value})
    assert raised.value.message.startswith(f"{name}: ")
    assert right in raised.value.message
    assert "Value error" not in raised.value.message
    assert raised.value.message.endswith(f"found {value!r}")


@pytest.mark.parametrize("value", ["push:9091", "http://", "ftp://me:secret@push"])
def test_a_wrong_address_with_a_password_is_named_but_not_shown(value: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.read({"METRICS_PUSH_URL": value})
    assert raised.value.message.startswith("METRICS_PUSH_URL: ")
    assert raised.value.message.endswith("expected http://host:port or https://host:port, found another value")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_not_utf8_are_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: ") as raised:
        Settings.read({name: os.fsdecode(b"\xff\xfe")})
    assert raised.value.message.isprintable()


def test_an_endless_value_makes_a_short_message() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.read({"MAX_CONCURRENCY": "9" * 100_000})
    assert len(raised.value.message) < 500


def test_settings_cannot_be_changed() -> None:
    settings = Settings.read({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.max_concurrency = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"SERVED_MODEL_NAME": "one"}, ("one",)),
        ({"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "other"}, ("other",)),
        ({"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "other", "SERVED_MODEL_NAME": "one"}, ("other",)),
        ({"SERVED_MODEL_NAME": "one", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": " "}, ("one",)),
        ({"SERVED_MODEL_NAME": "a,b , c,"}, ("a", "b", "c")),
        ({"SERVED_MODEL_NAME": " , "}, ()),
    ],
)
def test_served_names_have_two_variables_of_which_the_override_wins(
    environ: dict[str, str], names: tuple[str, ...]
) -> None:
    assert Settings.read(environ).served_model_name == names


def test_secrets_are_not_in_the_representation() -> None:
    text = repr(Settings.read(NAMES))
    assert "hf_secret" not in text
    assert "api.example" not in text


def test_others_are_the_variables_that_no_setting_takes() -> None:
    others = {"MAX_MODEL_LEN": "1", "PATH": "/bin", "max_concurrency": "2"}
    environ = NAMES | {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "x"} | others
    assert Settings.others(environ) == others


def test_jobs_come_from_the_platform_if_it_says_where() -> None:
    assert Settings.read({"RUNPOD_WEBHOOK_GET_JOB": "https://x"}).on_platform


class TestSnapshot:
    def test_a_folder_in_snapshot_dir_is_taken_as_it_is(self, tmp_path: Path) -> None:
        missing = tmp_path / "not-there"
        assert Settings.read({"SNAPSHOT_DIR": str(missing)}).snapshot() == missing

    def test_a_relative_folder_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model").mkdir()
        monkeypatch.chdir(tmp_path)
        assert Settings.read({"SNAPSHOT_DIR": "model"}).snapshot() == tmp_path / "model"
        assert Settings.read({"MODEL_NAME": "model"}).snapshot() == tmp_path / "model"

    def test_snapshot_dir_comes_before_model_name(self, tmp_path: Path) -> None:
        settings = Settings.read({"SNAPSHOT_DIR": "/s", "MODEL_NAME": str(tmp_path)})
        assert settings.snapshot() == Path("/s")

    @pytest.mark.parametrize("other", [{}, {"ALLOW_HUB": "true"}])
    def test_a_hub_name_has_to_be_looked_for(self, other: dict[str, str]) -> None:
        assert Settings.read({"MODEL_NAME": "org/model", **other}).snapshot() is None

    def test_a_bucket_takes_the_place_of_the_demo(self) -> None:
        settings = Settings.read({"SNAPSHOT_S3_URI": "s3://bucket/prefix"})
        assert settings.snapshot() is None
        assert str(settings.snapshot_s3_uri) == "s3://bucket/prefix/"

    def test_permission_alone_still_boots_the_demo(self) -> None:
        assert Settings.read({"ALLOW_HUB": "true"}).snapshot() == ROOT / "snapshots" / "demo"


def test_caches_are_shared_where_it_is_said_by_default_on_the_volume_if_there_is_one(tmp_path: Path) -> None:
    def caches(**environ: str) -> Path | Place | None:
        return Settings.read({"SNAPSHOT_VOLUME": str(tmp_path)} | environ).caches()

    assert caches() == tmp_path / "coldsnap" / "caches"
    assert caches(SNAPSHOT_VOLUME=str(tmp_path / "none")) is None
    assert caches(CACHE_URI="off") is None
    assert caches(CACHE_URI="/elsewhere") == Path("/elsewhere")
    assert caches(CACHE_URI="s3://bucket/a") == Place("bucket", "a/")


def test_the_table_has_a_row_for_every_setting_of_the_user() -> None:
    rows = Settings.table().splitlines()
    assert rows[:2] == ["| variable | default | what it does |", "|---|---|---|"]
    users = [name for name in NAMES if not name.startswith(("RUNPOD_", "COLDSNAP_IMAGE_"))]
    assert [row.split("`")[1] for row in rows[2:]] == users
    assert "(also `OPENAI_SERVED_MODEL_NAME_OVERRIDE`)" in rows[2 + users.index("SERVED_MODEL_NAME")]
    assert all(row.count("|") == 4 for row in rows)
    assert str(ROOT) not in Settings.table()
