"""Objects in an S3 bucket. The only module that imports boto3.

Credentials, region and endpoint come from where boto3 looks for them: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL` and its configuration files. Making a `Bucket` imports
boto3, which takes a few tenths of a second: do it beside something else. A `Bucket` may be used by many threads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldsnap.errors import S3Error, SettingsError

_READ_BYTES = 256 << 10
_PART_BYTES = 64 << 20
"""Of an upload: a bucket takes 10,000 parts of at least 5 MiB."""
_CONNECTIONS = 32

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
                f"{variable}: expected s3://bucket/prefix, the bucket of 3 to 63 of a-z, 0-9, . and -, "
                f"found {uri!r:.200}"
            )
        prefix = (match["prefix"] or "").strip("/")
        return cls(match["bucket"], f"{prefix}/" if prefix else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


@dataclass(frozen=True)
class Object:
    """An object's name below the place, its size in bytes, and when it was stored (s since 1970, by the server)."""

    name: str
    size: int
    modified: float


class Bucket:
    """The objects under one `Place`. Names are relative to it. Every failure is an `S3Error` that names the object."""

    def __init__(self, place: Place, *, attempts: int = 5, timeout_seconds: float = 30.0) -> None:
        """Connect to `place`; a request is tried up to `attempts` times, with growing pauses."""
        import boto3
        from botocore.config import Config

        self.place = place
        self._attempts = attempts
        self._timeout = timeout_seconds
        config = Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=timeout_seconds,
            read_timeout=timeout_seconds,
            max_pool_connections=_CONNECTIONS,
            response_checksum_validation="when_required",  # who reads a range compares a digest of the whole
        )
        try:
            with _translated(str(place)):
                self.client: Any = boto3.session.Session().client("s3", config=config)
        except ValueError as error:  # boto3's word for an address that is none
            raise S3Error(f"{place}: AWS_ENDPOINT_URL: expected http://… or https://…: {error}") from error

    def put(self, name: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Store `data` as `name`, replacing what is there. It is stored whole or not at all."""
        with self.naming(name):
            self.client.put_object(Bucket=self.place.bucket, Key=self._key(name), Body=data, Metadata=metadata or {})

    def create(self, name: str, data: bytes) -> bool:
        """Store `data` as `name` unless there is such an object already; return whether it was stored."""
        try:
            with self.naming(name):
                self.client.put_object(Bucket=self.place.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
        except S3Error as error:
            code = _code(error.__cause__)
            if code in _THERE_ALREADY:
                return False
            if code not in _NO_CONDITIONS:
                raise
            if self.find(name):
                return False
            self.put(name, data)
        return True

    def upload(
        self,
        name: str,
        path: Path,
        *,
        part_bytes: int = _PART_BYTES,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Store the file as `name`, in parts sent side by side if it is larger than one. Whole or not at all.

        `on_bytes` is called with the number of bytes sent since its last call, from several threads.
        """
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=part_bytes, multipart_chunksize=part_bytes, preferred_transfer_client="classic"
        )
        with self.naming(name), path.open("rb") as file:
            self.client.upload_fileobj(file, self.place.bucket, self._key(name), Config=config, Callback=on_bytes)

    def get(self, name: str) -> bytes:
        """Return the object's bytes."""
        answer = self._open(name)
        try:
            with self.naming(name), closing(answer["Body"]) as body:
                data: bytes = body.read()
        except S3Error:  # cut off: the rest comes in another way
            return bytes(self.read(name, 0, answer["ContentLength"]))
        return data

    def stream(self, name: str) -> tuple[int, Iterator[bytes]]:
        """Return the object's size and its bytes, piece by piece."""
        answer = self._open(name)
        size = answer["ContentLength"]
        return size, self._continued(name, answer, size)

    def _continued(self, name: str, answer: Any, size: int) -> Iterator[bytes]:
        size_read = 0
        try:
            with self.naming(name), closing(answer["Body"]) as body:
                for piece in body.iter_chunks(_READ_BYTES):
                    size_read += len(piece)
                    yield piece
        except S3Error:  # cut off
            yield bytes(self.read(name, size_read, size - size_read))

    def read(self, name: str, start: int, size: int) -> bytearray:
        """Return `size` bytes of the object from `start` on.

        An answer that breaks off, or crawls for longer than the timeout, is continued by a new request from
        where it had come to; only attempts in a row that bring nothing are counted.
        """
        data = bytearray(size)
        view = memoryview(data)
        filled = attempts = 0
        while filled < size:
            before, failure = filled, f"{self.place}{name}: nothing came"
            try:
                for piece in self._pieces(name, start + filled, start + size):
                    view[filled : filled + len(piece)] = piece
                    filled += len(piece)
            except _BrokenOff as error:
                failure = error.message
            attempts = attempts + 1 if filled == before else 0
            if attempts == self._attempts:
                raise S3Error(f"{failure}, {attempts} times in a row")
        return data

    def _pieces(self, name: str, start: int, end: int) -> Iterator[bytes]:
        answer = self._open(name, f"bytes={start}-{end - 1}")
        length = answer.get("ContentRange", "").rpartition("/")[2]
        if not length.isdecimal() or int(length) < end:
            raise S3Error(f"{self.place}{name}: expected at least {end} bytes, found {length or 'no range of bytes'}")
        give_up = time.monotonic() + self._timeout
        try:
            with self.naming(name), closing(answer["Body"]) as body:
                for piece in body.iter_chunks(_READ_BYTES):
                    yield piece
                    if time.monotonic() > give_up:
                        return
        except S3Error as error:
            raise _BrokenOff(error.message) from error

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _open(self, name: str, span: str | None = None) -> Any:
        with self.naming(name):
            return self.client.get_object(
                Bucket=self.place.bucket, Key=self._key(name), **({} if span is None else {"Range": span})
            )

    def find(self, name: str) -> Object | None:
        """Return the object, or None if there is none of that name."""
        try:
            with self.naming(name):
                head = self.client.head_object(Bucket=self.place.bucket, Key=self._key(name))
        except S3Error as error:
            if error.missing:
                return None
            raise
        return Object(name, head["ContentLength"], head["LastModified"].timestamp())

    def objects(self, prefix: str = "") -> Iterator[Object]:
        """Yield every object whose name starts with `prefix`, in the order of names."""
        with self.naming(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"][len(self.place.prefix) :]
                    yield Object(name, item["Size"], item["LastModified"].timestamp())

    def delete(self, name: str) -> None:
        """Delete the object; nothing if there is none of that name."""
        with self.naming(name):
            self.client.delete_object(Bucket=self.place.bucket, Key=self._key(name))

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Translate what boto3 raises inside into an `S3Error` about the object `name`."""
        with _translated(f"{self.place}{name}"):
            yield

    def _key(self, name: str) -> str:
        return f"{self.place.prefix}{name}"


class _BrokenOff(S3Error):
    """An answer ended before its last byte."""


_REMEDIES = {
    "NoSuchBucket": "there is no such bucket: check its name, AWS_REGION and AWS_ENDPOINT_URL",
    "AccessDenied": "access denied: these credentials may not do this here",
    "403": "access denied: these credentials may not do this here",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
    "InvalidRange": "the object is shorter than expected",
}
_MISSING = {"NoSuchKey", "404"}
_THERE_ALREADY = {"PreconditionFailed", "412", "ConditionalRequestConflict"}
_NO_CONDITIONS = {"NotImplemented", "501"}
"""What servers say that cannot store under a condition."""


def _code(error: object) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextmanager
def _translated(what: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        code = _code(error)
        raise S3Error(f"{what}: {_REMEDIES.get(code, error)}", missing=code in _MISSING) from error
    except NoCredentialsError as error:
        raise S3Error(f"{what}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (BotoCoreError, HTTPError, OSError) as error:
        raise S3Error(f"{what}: {error}") from error
