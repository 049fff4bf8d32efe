"""Objects in an S3 bucket. The only module that imports boto3.

Credentials, region and endpoint come from where boto3 looks for them: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL` and its configuration files. Making a `Bucket` imports
boto3, which takes a few tenths of a second: do it beside something else. A `Bucket` may be used by many threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from coldsnap.errors import S3Error, SettingsError

_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")


@dataclass(frozen=True)
class Place:
    """A folder in a bucket: `s3://bucket/prefix`. `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str, variable: str) -> Place:
        """Read an `s3://` URI. `SettingsError` names `variable`, the setting or option that it came from."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise SettingsError(
                f"{variable}: expected s3://bucket/prefix with a valid bucket's name, found {uri!r:.200}"
            )
        prefix = (match["prefix"] or "").strip("/")
        return cls(match["bucket"], f"{prefix}/" if prefix else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


@dataclass(frozen=True)
class Object:
    """An object's name below the place, and its size in bytes."""

    name: str
    size: int


class Bucket:
    """The objects under one `Place`. Names are relative to it. Every failure is an `S3Error` that names the object."""

    def __init__(self, place: Place, *, attempts: int = 5, timeout_seconds: float = 30.0) -> None:
        """Connect to `place`; a request is tried up to `attempts` times, with growing pauses."""
        import boto3
        from botocore.config import Config

        self.place = place
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=timeout_seconds,
            read_timeout=timeout_seconds,
            max_pool_connections=32,
        )
        with _translated(str(place)):
            self.client: Any = boto3.session.Session().client("s3", config=config)

    def put(self, name: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Store `data` as `name`, replacing what is there. It is stored whole or not at all."""
        with self.naming(name):
            self.client.put_object(Bucket=self.place.bucket, Key=self._key(name), Body=data, Metadata=metadata or {})

    def get(self, name: str) -> bytes:
        """Return the object's bytes."""
        with self.naming(name):
            answer = self.client.get_object(Bucket=self.place.bucket, Key=self._key(name))
            data: bytes = answer["Body"].read()
        return data

    def find(self, name: str) -> Object | None:
        """Return the object, or None if there is none of that name."""
        try:
            with self.naming(name):
                size = self.client.head_object(Bucket=self.place.bucket, Key=self._key(name))["ContentLength"]
        except S3Error as error:
            if error.missing:
                return None
            raise
        return Object(name, size)

    def objects(self, prefix: str = "") -> Iterator[Object]:
        """Yield every object whose name starts with `prefix`, in the order of names."""
        with self.naming(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Object(item["Key"][len(self.place.prefix) :], item["Size"])

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Translate what boto3 raises inside into an `S3Error` about the object `name`."""
        with _translated(f"{self.place}{name}"):
            yield

    def _key(self, name: str) -> str:
        return f"{self.place.prefix}{name}"


_REMEDIES = {
    "NoSuchBucket": "there is no such bucket: check its name, AWS_REGION and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied: these credentials may not do this here",
    "403": "access denied: these credentials may not do this here",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
}
_MISSING = {"NoSuchKey", "404"}


@contextmanager
def _translated(what: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise S3Error(f"{what}: {_REMEDIES.get(code, error)}", missing=code in _MISSING) from error
    except NoCredentialsError as error:
        raise S3Error(f"{what}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (BotoCoreError, HTTPError, OSError) as error:
        raise S3Error(f"{what}: {error}") from error
