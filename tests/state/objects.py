"""An S3-compatible store for tests, over real HTTP: moto's server.

The server answers one request at a time, so that conditional writes are atomic, as they are on the real S3.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock, Thread
from typing import Any

from tests.servers import free_ports

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Objects:
    """A store, and the requests that it received."""

    def __init__(self, host: str) -> None:
        self.host, self.port = host, free_ports(1)[0]
        self.url = f"http://{host}:{self.port}"
        self.key, self.secret = f"AK{secrets.token_hex(8)}", f"sk-{secrets.token_hex(16)}"
        self.lock = Lock()
        self.refuse: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda _: None
        """Returns the error to answer with (a status line and S3's error code), or None to let the request through."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request, oldest first."""

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables with which clients find the store and log in."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys in a bucket that begin with `prefix`."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def around(self, application: Application) -> Application:
        def one_at_a_time(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            # Read the body first: a client that is cut off while it sends must not keep the others waiting.
            if length := int(environ.get("CONTENT_LENGTH") or 0):
                environ["wsgi.input"] = BytesIO(environ["wsgi.input"].read(length))
            with self.lock:
                self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
                if (refused := self.refuse(environ)) is None:
                    return list(application(environ, start))
                body = (
                    f"<?xml version='1.0'?><Error><Code>{refused[1]}</Code><Message>refused</Message></Error>".encode()
                )
                start(refused[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return [body]

        return one_at_a_time


@contextmanager
def running(host: str = "127.0.0.1") -> Iterator[Objects]:
    """Run a store that listens on `host`, in a thread of this process."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Objects(host)
    application = store.around(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, store.port, application, threaded=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
