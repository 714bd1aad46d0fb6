"""MLflow's own server in a thread, as slow as a test wants, or behind a password."""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager
from pathlib import Path


class Served:
    """uri: without credentials; calls: paths that were asked for, with their method; gate: closed, no call is answered;
    password: user:password, None for everyone."""

    def __init__(self, port: int) -> None:
        self.uri, self.calls = f"http://127.0.0.1:{port}", []
        self.password: str | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, environ, start_response):
        from mlflow.server import app

        self.calls.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].rpartition('/mlflow/')[2]}")
        self.gate.wait()
        wanted = self.password and "Basic " + base64.b64encode(self.password.encode()).decode()
        if wanted and environ.get("HTTP_AUTHORIZATION") != wanted:
            start_response("401 Unauthorized", [("Content-Type", "text/plain")])
            return [b"who are you?"]
        return app(environ, start_response)


@contextmanager
def served(folder: Path, monkeypatch):
    """folder: has the migrated store."""
    from werkzeug.serving import make_server

    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", (folder / "served").as_uri())
    monkeypatch.setattr("mlflow.server.handlers._tracking_store", None)
    server = make_server("127.0.0.1", 0, None, threaded=True)
    served = Served(server.server_port)
    server.app = served
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.gate.set()
        server.shutdown()
        thread.join()
