"""A bucket on this machine: gcp-storage-emulator, with the preconditions of the real service.

python gcs_server.py PORT FOLDER        serves the bucket BUCKET, whose objects lie in the folder

The emulator ignores `ifGenerationMatch`, with which locks are taken and renewed; here it answers
412 as the real service does. It also sends the generation of an object that is read, and serves
several connections at a time.
"""

import contextlib
import functools
import http.server
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from cptjax.common import buckets

INSTALLED = all(
    importlib.util.find_spec(name) for name in ("gcp_storage_emulator", "gcsfs", "tensorstore")
)
BUCKET = "test-bucket"


class Server:
    """A process that serves a folder; it may be stopped and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.port), str(self.folder)]
        )
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise TimeoutError("the server did not start")

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def use(self, monkeypatch: Any, cache: Path) -> None:
        """Let this process use the server and a cache folder of its own."""
        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(buckets, "_local", threading.local())  # a new client

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables with which a process uses this server and a cache folder of its own."""
        address = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,  # Orbax's array store
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service
            "XDG_CACHE_HOME": str(cache),
        }


@contextlib.contextmanager
def serve_bucket(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def main(port: int, folder: str) -> None:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    asked = threading.local()  # the generation that the request of this thread expects

    class Refused(Exception):
        pass

    writing = threading.RLock()

    class CheckedStorage(Storage):
        def check(self, bucket: str, name: str) -> None:
            if asked.generation is None:
                return
            try:
                generation = self.get_file_obj(bucket, name)["generation"]
            except NotFound:
                generation = "0"
            if generation != asked.generation:
                raise Refused

        def create_file(self, bucket: str, name: str, *rest: object) -> None:
            self.check(bucket, name)
            super().create_file(bucket, name, *rest)

        def delete_file(self, bucket: str, name: str) -> None:
            self.check(bucket, name)
            super().delete_file(bucket, name)

    def tell_generation(handle: Callable[..., None]) -> Callable[..., None]:
        def answer(request: Any, response: Any, storage: Storage) -> None:
            handle(request, response, storage)
            if request.method == "GET" and response.status in (200, 206):
                place = request.params or {}
                if {"bucket_name", "object_id"} <= place.keys():
                    described = storage.get_file_obj(place["bucket_name"], place["object_id"])
                    response["x-goog-generation"] = described["generation"]

        return answer

    server.HANDLERS = tuple(
        (path, {method: tell_generation(handle) for method, handle in by_method.items()})
        for path, by_method in server.HANDLERS
    )

    class Handler(server.RequestHandler):
        def change(self, act: Callable[[], None]) -> None:
            query = parse_qs(urlparse(self.path).query)
            asked.generation = query.get("ifGenerationMatch", [None])[0]
            try:
                with writing:
                    act()
            except Refused:
                self.send_response(412, "Precondition Failed")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_POST(self) -> None:
            self.change(super().do_POST)

        def do_PUT(self) -> None:
            self.change(super().do_PUT)

        def do_DELETE(self) -> None:
            self.change(super().do_DELETE)

        def log_message(self, *_: object) -> None:
            pass

    def end(*_: object) -> None:
        writing.acquire()  # an object is replaced as a whole or not at all
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    storage = CheckedStorage(data_dir=folder)
    with contextlib.suppress(Exception):
        buckets.create_bucket(BUCKET, storage)
    handler = functools.partial(Handler, storage)
    service = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    service.handle_error = lambda *_: None  # of clients that were killed
    service.serve_forever()


if __name__ == "__main__":
    logging.disable()
    main(int(sys.argv[1]), sys.argv[2])
