"""Credentials in tracking.uri work, and stand nowhere."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from bnre_exp.cli import sync_mlflow
from bnre_exp.credentials import (
    PASSWORD,
    TOKEN,
    USERNAME,
    arguments_without_credentials,
    connectable,
    lent_credentials,
    redact,
    take_credentials,
)
from bnre_exp.errors import UserError
from bnre_exp.tracking import open_run, read_runs, undelivered
from bnre_exp.tracking.stores import first_line
from tests.tracking.serving import served


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a test takes into the environment is gone after it."""
    for name in (USERNAME, PASSWORD, TOKEN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


URIS = [
    ("http://alice:SECRET@host:5000/a", "http://host:5000/a", ("alice", "SECRET")),
    ("https://alice:S%2FE%40T@host", "https://host", ("alice", "S/E@T")),
    ("http://alice:S@T@host", "http://host", ("alice", "S@T")),
    ("http://alice:***@host", "http://host", ("alice", None)),
    ("http://***@host", "http://host", (None, None)),
    ("http://alice@host", "http://host", ("alice", None)),
    ("http://host", "http://host", (None, None)),
    ("postgresql://bob:SECRET@host:5432/db", "postgresql://bob@host:5432/db", (None, "SECRET")),
    ("mysql+pymysql://bob:SECRET@host/db?ssl=1", "mysql+pymysql://bob@host/db?ssl=1", (None, "SECRET")),
    ("postgresql://host/db?user=b&password=SECRET&x=1", "postgresql://host/db?user=b&x=1", (None, "SECRET")),
    ("postgresql://host/db?password=SECRET", "postgresql://host/db", (None, "SECRET")),
    ("sqlite:////home/a:b@c/mlflow.db", "sqlite:////home/a:b@c/mlflow.db", (None, None)),
    ("databricks://profile:prefix", "databricks://profile:prefix", (None, None)),
]


@pytest.mark.parametrize(("uri", "clean", "known"), URIS)
def test_credentials_go_from_the_uri_to_the_environment(uri, clean, known):
    assert take_credentials(uri) == clean
    assert (os.environ.get(USERNAME), os.environ.get(PASSWORD)) == known
    assert take_credentials(clean) == clean and redact(clean) == clean


@pytest.mark.parametrize("secret", ["S/E", "S#E", "12/E", "12#E", "S?E"])
def test_a_uri_that_cannot_be_read_is_refused_and_not_repeated(secret):
    with pytest.raises(UserError, match="%2F") as raised:
        take_credentials(f"http://alice:{secret}@host")
    assert f":{secret}" not in str(raised.value) and raised.value.__context__ is None


def test_a_password_of_a_database_is_put_back_for_the_connection():
    uri = "postgresql+psycopg2://bob:S%2FE@host/db"
    assert connectable(take_credentials(uri)) == uri
    assert connectable("http://host") == "http://host" and connectable("postgresql://host/db") == "postgresql://host/db"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET http://a:b@h/x and ftp://c@h", "GET http://***@h/x and ftp://***@h"),
        ("(postgresql://bob:SECRET@h/db)", "(postgresql://bob:***@h/db)"),
        ("postgresql://h/db?password=SECRET&x=1", "postgresql://h/db?password=***&x=1"),
        ("http://h/p, mail a@b; sqlite:////a@b/c", "http://h/p, mail a@b; sqlite:////a@b/c"),
        ('["http://h","a@b"]', '["http://h","a@b"]'),
    ],
)
def test_a_text_is_shown_without_credentials(text, shown):
    assert redact(text) == shown and first_line(ValueError(text)) == shown


def test_arguments_are_cleaned_before_hydra_sees_them():
    given = ["-m", "+tracking.uri='http://alice:SE\\'T@h'", "seed=1,2", "tracking.experiment=a@b", "model=x"]
    cleaned = arguments_without_credentials(given)
    assert cleaned == ["-m", "+tracking.uri='http://h'", *given[2:]] and os.environ[PASSWORD] == "SE'T"
    kept = ["tracking.uri='http://${oc.env:U}:${oc.env:P}@h'"]
    assert arguments_without_credentials(kept) == kept
    with pytest.raises(UserError, match="several stores") as raised:
        arguments_without_credentials(["tracking.uri=http://a:b1@h,http://c:d2@i"])
    assert "d2" not in str(raised.value)


def test_credentials_are_of_their_store_alone(monkeypatch):
    monkeypatch.setenv(USERNAME, "mine")
    with lent_credentials("http://alice:SECRET@h") as clean:
        assert (clean, os.environ[USERNAME], os.environ[PASSWORD]) == ("http://h", "alice", "SECRET")
    assert os.environ[USERNAME] == "mine" and PASSWORD not in os.environ


def test_a_server_behind_a_password_takes_a_run_which_holds_no_secret(tmp_path, migrated, monkeypatch, caplog):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    about = {"params": {"tracking.uri": "http://alice:SECRET@h"}, "output_dir": tmp_path, "experiment": "tests"}
    with served(tmp_path, monkeypatch) as server:
        server.password = "alice:SECRET"
        uri = server.uri.replace("//", "//alice:SECRET@")
        with open_run(tmp_path / "a", tags={"overrides": f"tracking.uri={uri}"}, run_name="a", uri=uri, **about) as log:
            log.metrics({"fp32/top1": 0.5})
        assert log.undelivered == 0 and log.uri == server.uri
        (run,) = read_runs(uri, "tests")
        assert run["metrics"] == {"fp32/top1": 0.5} and run["params"] == {"tracking.uri": "http://***@h"}
        assert "SECRET" not in json.dumps(run)
        os.environ[PASSWORD] = "wrong"
        with (
            pytest.raises(ValueError, match="x"),
            open_run(tmp_path / "b", tags={}, run_name="b", uri=server.uri, **about),
        ):
            raise ValueError(f"x {uri}")
        assert undelivered(tmp_path / "b") == 3 and f"credentials are taken from {USERNAME}" in caplog.text
        os.environ[PASSWORD] = "SECRET"
        assert sync_mlflow.main([str(tmp_path / "b")]) == 0 and undelivered(tmp_path / "b") == 0
        assert [run["status"] for run in read_runs(server.uri, "tests")] == ["FINISHED", "FAILED"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4 and not [path for path in written if b"SECRET" in path.read_bytes()]
    assert "SECRET" not in caplog.text


def test_a_run_whose_server_is_gone_goes_elsewhere_with_its_sweep(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    about = {
        "params": {}, "tags": {}, "output_dir": tmp_path, "experiment": "tests", "uri": "http://a:SECRET@127.0.0.1:9",
    }  # fmt: skip
    with open_run(tmp_path / "m" / "s", run_name="sweep", **about):
        for name in ("0", "1"):
            with open_run(tmp_path / "m" / "s" / name, run_name=name, parent=tmp_path / "m" / "s", **about) as log:
                log.metrics({"fp32/top1": 0.5})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert sync_mlflow.main([str(tmp_path / "m" / "s" / "0"), "--uri", uri]) == 0  # its sweep's run comes along
    assert sync_mlflow.main([str(tmp_path / "m"), "--uri", uri]) == 0
    for note in tmp_path.glob("m/s/*/mlflow.json"):  # as if killed between sending and taking note of it
        note.write_text(json.dumps({**json.loads(note.read_text()), "count": 0}))
    assert sync_mlflow.main([str(tmp_path / "m")]) == 0  # it lives there from now on
    runs = {run["name"]: run for run in read_runs(uri, "tests")}
    assert len(runs) == len(read_runs(uri, "tests")) == 3
    assert {runs[name]["parent"] for name in "01"} == {runs["sweep"]["id"]}
    assert {run["status"] for run in runs.values()} == {"FINISHED"} and sync_mlflow.waiting(tmp_path) == []
