"""An S3-compatible store for tests, over real HTTP: moto's server.

It answers one request at a time, so that conditional writes are atomic there as they are on the real one.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock, Thread
from typing import Any

from tests.flows.servers import free_ports

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Objects:
    """A store, and the requests that it got."""

    def __init__(self, host: str) -> None:
        self.host, self.port = host, free_ports(1)[0]
        self.url = f"http://{host}:{self.port}"
        self.key, self.secret = f"AK{secrets.token_hex(8)}", f"sk-{secrets.token_hex(16)}"
        self.lock = Lock()
        self.refuse: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda _: None
        """What is answered instead: a status line, and S3's code of the error; None lets the request through."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each, oldest first."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which clients find it and are let in."""
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
        """What lies in a bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def around(self, application: Application) -> Application:
        def one_at_a_time(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            # Read first: a client that is cut off in the middle of it must not keep the others waiting.
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
    """A store in a thread of this process, which listens on `host`."""
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
