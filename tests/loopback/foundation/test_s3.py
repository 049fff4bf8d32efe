"""Buckets, against a server that speaks S3."""

from __future__ import annotations

import time
from typing import Any

import pytest
from botocore.exceptions import ClientError

from coldsnap.errors import S3Error, SettingsError
from coldsnap.foundation.s3 import Bucket, Object, Place


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://ledgers", Place("ledgers", "")),
        ("s3://ledgers/", Place("ledgers", "")),
        ("s3://my.bucket-1/a/b", Place("my.bucket-1", "a/b/")),
        ("s3://my.bucket-1/a/b/", Place("my.bucket-1", "a/b/")),
    ],
)
def test_a_uri_names_a_bucket_and_a_folder_in_it(uri: str, place: Place) -> None:
    assert Place.parse(uri, "LEDGER_S3_URI") == place
    assert Place.parse(str(place), "LEDGER_S3_URI") == place


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///a", "s3://A/b", "s3://ab", "https://x/y", "/a/b", "s3://a_b/c"])
def test_a_uri_without_a_bucket_is_refused_by_the_name_of_its_setting(uri: str) -> None:
    with pytest.raises(SettingsError, match=r"LEDGER_S3_URI: expected s3://bucket/prefix"):
        Place.parse(uri, "LEDGER_S3_URI")


def test_what_was_put_is_found_listed_and_returned(s3_place: Place) -> None:
    bucket = Bucket(s3_place)
    assert bucket.find("a/1") is None
    for name in ("a/1", "a/2", "b"):
        bucket.put(name, name.encode() * 1000)
    listed = list(bucket.objects("a/"))
    assert [(found.name, found.size) for found in listed] == [("a/1", 3000), ("a/2", 3000)]
    found = bucket.find("a/1")
    assert found == Object("a/1", 3000, found.modified if found else 0.0)
    assert found.modified == pytest.approx(listed[0].modified, abs=1.0)
    assert time.time() - 60 < found.modified < time.time() + 60
    assert [found.name for found in bucket.objects()] == ["a/1", "a/2", "b"]
    assert bucket.get("b") == b"b" * 1000
    assert next(found.name for found in Bucket(Place(s3_place.bucket, "")).objects()) == "some/where/a/1"
    bucket.delete("a/1")
    bucket.delete("a/1")
    assert [found.name for found in bucket.objects()] == ["a/2", "b"]


def test_a_missing_object_is_told_from_a_missing_bucket(s3_place: Place) -> None:
    with pytest.raises(S3Error, match="some/where/a: there is no such object") as missing:
        Bucket(s3_place).get("a")
    assert missing.value.missing
    with pytest.raises(S3Error, match="s3://no-such-bucket/a: there is no such bucket") as wrong:
        Bucket(Place("no-such-bucket", "")).put("a", b"")
    assert not wrong.value.missing


def test_missing_credentials_and_a_wrong_address_are_named(s3_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(S3Error, match=r'/a: Could not connect to the endpoint URL: "http://127.0.0.1:9'):
        Bucket(s3_place, attempts=1).put("a", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(S3Error, match="AWS_ENDPOINT_URL: expected http://… or https://…: Invalid endpoint: nonsense"):
        Bucket(s3_place)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(S3Error, match="no credentials: set AWS_ACCESS_KEY_ID"):
        Bucket(s3_place).put("a", b"")


def test_an_object_is_created_once(s3_place: Place) -> None:
    bucket = Bucket(s3_place)
    assert bucket.create("a", b"first")
    assert not bucket.create("a", b"second")
    assert bucket.get("a") == b"first"
    with pytest.raises(S3Error, match="there is no such bucket"):
        Bucket(Place("no-such-bucket", "")).create("a", b"")


def test_a_server_that_knows_no_conditions_is_asked_whether_there_is_one(
    s3_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(s3_place)
    put = bucket.client.put_object

    def refuse(**given: Any) -> Any:
        if "IfNoneMatch" in given:
            raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
        return put(**given)

    monkeypatch.setattr(bucket.client, "put_object", refuse)
    assert bucket.create("a", b"first")
    assert not bucket.create("a", b"second")
    assert bucket.get("a") == b"first"


def test_an_object_is_streamed_with_its_size(s3_place: Place) -> None:
    bucket = Bucket(s3_place)
    bucket.put("a", b"x" * 1_000_000)
    size, pieces = bucket.stream("a")
    assert size == 1_000_000
    assert b"".join(pieces) == b"x" * size
    with pytest.raises(S3Error) as missing:
        bucket.stream("b")
    assert missing.value.missing
