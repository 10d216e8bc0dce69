"""Puts this folder on the import path, for the helpers that several test folders share.

One thread, here and in the processes that tests start: several add up in another order, which on some
processors shows in the fifth digit, and what a killed or divided run computes is compared exactly.
"""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, by this process and its children
gc.disable()  # nothing that is imported for the tests goes away again, and looking for it takes a tenth of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of a real server that speaks S3, as a file system; the environment names the server."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": host,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir("web-data")
        yield files
        files.rm("web-data", recursive=True)  # all servers of a process have the same buckets
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
