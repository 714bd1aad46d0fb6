"""Open MLflow's page of a run or a sweep: bnre-exp ui [RUN, SWEEP or OUTPUT_DIR]. Without a server, MLflow's own is
started on the store, and ends with Ctrl-C. Of an OUTPUT_DIR, the newest run's page is opened, or its sweep's."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bnre_exp.credentials import connectable, redact, take_credentials
from bnre_exp.errors import UserError
from bnre_exp.tracking.journal import NAME, all_tags, read_records
from bnre_exp.tracking.links import compare_link, ui_address
from bnre_exp.tracking.notes import goes_to_mlflow, read_note
from bnre_exp.tracking.stores import absolute_uri, database_of

HOST = "127.0.0.1"
LONGEST_START = 120.0  # seconds that MLflow's server has to answer


@dataclass(frozen=True)
class Page:
    """A page of MLflow. uri: of the store; experiment: its id, None if it is not known; view: key of a saved one; run:
    id of the run whose own page it is."""

    uri: str
    experiment: str | None = None
    metric: str = ""
    is_ascending: bool = False
    view: str | None = None
    run: str | None = None

    def address(self, server: str) -> str:
        if self.experiment is None:
            return server
        if self.run is not None:
            return f"{server}/#/experiments/{self.experiment}/runs/{self.run}"
        return compare_link(self.experiment, self.metric, self.is_ascending, server, self.view)


def page_of(place: Path) -> Page:
    """The page of a run's, a sweep's or an output folder. Raises ``UserError`` if nothing there goes to MLflow."""
    is_run = (place / NAME).is_file()
    journals = [place / NAME] if is_run else list(place.rglob(NAME))
    for path in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True):
        folder, records = path.parent, read_records(path.parent)
        if not goes_to_mlflow(records):
            continue
        about, note = records[0]["run"], read_note(folder)
        sweep = folder / about["parent"] if about.get("parent") else folder
        view = any("view" in record for record in read_records(sweep)) and read_note(sweep).get("run_id")
        metric, is_ascending = _order(all_tags(records))
        uri = take_credentials(note.get("uri") or about["uri"])
        own = note.get("run_id") if is_run and not (view and sweep == folder) else None
        return Page(uri, note.get("experiment_id"), metric, is_ascending, view[:12] if view else None, own)
    if (place / "mlflow.db").is_file():
        return Page(absolute_uri(f"sqlite:///{place / 'mlflow.db'}"))
    raise UserError(f"{place.absolute()}: there is no run that goes to MLflow. Name the folder of a run or its output.")


def _order(tags: dict[str, str]) -> tuple[str, bool]:
    try:
        headline = json.loads(tags["bnre.headline"])
        return f"fold/{headline['name']}", not headline["higher_is_better"]
    except (KeyError, TypeError, ValueError):  # a sweep's own run
        return "sweep/jobs", False


@contextmanager
def served(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server on a store, which answers; it ends with the block. Raises ``UserError`` if it does not start."""
    database = database_of(uri)
    if database is not None and not database.is_file():
        raise UserError(f"there is no store {database}. Run this where the runs were, or name --uri.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} is taken ({error.strerror}): name another with --port.") from error
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", HOST, "--port", str(port)]
    quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # In the environment: other users see arguments, and a database's URI may hold a password
    environment = {**os.environ, **quick, "MLFLOW_BACKEND_STORE_URI": connectable(uri)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_for(f"http://{HOST}:{port}", process, output)
            yield process
        finally:
            _end(process)


def _wait_for(server: str, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    """Return when the server answers. Raises ``UserError``, with what it said, if it does not."""
    end = time.monotonic() + LONGEST_START
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{server}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    output.seek(0)
    said = redact(output.read().decode(errors="replace")).strip().splitlines()[-5:]
    raise UserError("\n".join(["MLflow did not start:", *said]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. arguments: None means those of the process."""
    parser = argparse.ArgumentParser(prog="bnre-exp ui", description=__doc__)
    default = Path(os.environ.get("BNRE_OUTPUT_DIR", "outputs"))
    parser.add_argument("place", nargs="?", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--uri", help="of a store or server, all of it, instead of what the runs say")
    parser.add_argument("--port", type=int, default=5000, help="of this machine; default: %(default)s")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    given = parser.parse_args(arguments)
    try:
        page = Page(absolute_uri(take_credentials(given.uri))) if given.uri else page_of(given.place)
        if page.uri.startswith("http"):
            _show(page.address(ui_address(page.uri)), given.no_browser)
            return 0
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C, so that the server ends too
        sys.stdout.write(f"Starting MLflow on {redact(page.uri)}; Ctrl-C ends it.\n")
        sys.stdout.flush()
        with served(page.uri, given.port) as server:
            _show(page.address(f"http://{HOST}:{given.port}"), given.no_browser)
            return 1 if server.wait() else 0
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 0


def _show(address: str, is_quiet: bool) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    if not is_quiet:
        with suppress(webbrowser.Error):  # none here: the address is printed
            webbrowser.open(address)


if __name__ == "__main__":
    sys.exit(main())
