"""An object store for tests: moto's S3, a server of this process that needs no network."""

import logging
import os
from collections.abc import Iterator

import pytest


def s3() -> Iterator:
    """As a fixture: a function name -> the path of a new bucket. The environment names the server.

    Of one worker there is one server: clients that are kept know its address.
    """
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= dict(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="somebody",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    client = boto3.client("s3")

    def bucket(name: str) -> str:
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    yield bucket
    server.stop()


def contents(folder: str) -> dict[str, bytes]:
    """Every object of a folder with its bytes, by its name in it."""
    import boto3

    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    objects = boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=prefix and f"{prefix}/")
    start = len(prefix) + 1 if prefix else 0
    return {found.key[start:]: found.get()["Body"].read() for found in objects}
