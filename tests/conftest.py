"""What tests of every kind share: a server that speaks S3, on loopback."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import boto3
import hypothesis
import pytest

from coldsnap.foundation.s3 import Place

hypothesis.settings.register_profile("patient", deadline=None)  # how long an example takes is the machine's business
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of moto's S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_place(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty bucket, with the environment in which boto3 finds it."""
    environ = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    bucket = f"coldsnap-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return Place(bucket, "some/where/")
