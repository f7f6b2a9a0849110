"""The ledger where people and machines read it: `proctor ledger`, `proctor status`, the interface and its metrics."""

import csv
import io
import json
import time
from dataclasses import replace

import pytest
from conftest import new_frame
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from cluster.accounts import RedisAccounts
from cluster.cli import app
from cluster.http import build_http
from cluster.shift_report import shift_table
from cluster.status import Status, render
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings


@pytest.fixture
def eventful(server, valkey, monkeypatch):
    """A shift in which one frame waits, one went to the dead letters, two were shed and three are lost."""
    monkeypatch.setenv("PROCTOR_REDIS__URL", valkey.url)
    publisher = Publisher(server, PublisherSettings(policy="drop_newest", max_in_flight=2))
    publisher.publish(new_frame(1))
    stream = RedisStream(server, "r", WorkerSettings())
    (entry,) = stream.read(1, 1)
    stream.dead_letter(entry, "cam-1", "delivered too often")
    for seq in (5, 6, 7, 8):
        publisher.publish(new_frame(seq))
    long_ago = time.time_ns() - 7200 * 10**9
    publisher.publish(replace(new_frame(1, camera="cam-2"), captured_at_ns=long_ago))
    return server


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_shift_is_one_json_document(eventful):
    document = json.loads(run("ledger", "--since", "1h", "--json"))
    assert document["balanced"]
    (camera,) = document["cameras"]
    counts = (camera["captured"], camera["judged"], camera["dead"], camera["lost"], camera["in_flight"])
    assert counts == (8, 0, 1, 3, 2)
    assert camera["shed"] == {"drop_newest frames": 2}
    assert [(gap["first"], gap["last"]) for gap in camera["gaps"]] == [(2, 4)]
    assert [each["camera"] for each in json.loads(run("ledger", "--since", "3h", "--json"))["cameras"]] == [
        "cam-1",
        "cam-2",
    ]
    assert json.loads(run("ledger", "--since", "3h", "--until", "1h", "--json"))["cameras"][0]["camera"] == "cam-2"
    assert json.loads(run("ledger", "--product", "nut", "--json"))["cameras"] == []


def test_a_shift_is_a_csv_line_for_each_camera(eventful):
    first, _ = csv.DictReader(io.StringIO(run("ledger", "--since", "8h", "--format", "csv")))
    wanted = {"captured": "8", "shed": "2", "dead": "1", "lost": "3", "in_flight": "2", "gaps": "2-4"}
    assert {name: first[name] for name in wanted} == wanted
    assert first["shed_by"] == "drop_newest frames=2"


def test_a_shift_is_a_table_that_names_what_is_lost(eventful):
    text = run("ledger")
    assert "balanced" in text
    assert "NOT BALANCED" not in text
    assert "bolt/cam-1 shed 2: drop_newest frames" in text
    assert "bolt/cam-1 lost 3: 2 to 4" in text


def test_the_tables_fit_a_terminal(eventful):
    console = Console(width=80, record=True, file=io.StringIO())
    accounts, start, end = RedisAccounts(eventful).shift("8h", None)
    console.print(shift_table(accounts, start, end))
    console.print(render(Status.read(eventful)))
    text = console.export_text()
    assert "…" not in text
    assert "bolt/cam-1: 3 LOST" in text
    assert "bolt/cam-1: 2 shed, drop_newest frames" in text


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_time_that_is_none_is_said(eventful, option):
    result = CliRunner().invoke(app, ["ledger", option, "yesterday"])
    assert result.exit_code != 0
    assert f"{option} 'yesterday': give a time" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "1h", "--until", "2h"], "the shift ends at 2h, before it starts at 1h"),
        (["--since", "60d"], "tallies are kept for 35 days"),
        (["--since", "99999999d"], "give a time"),
    ],
)
def test_a_span_that_cannot_be_told_is_said(eventful, arguments, said):
    result = CliRunner().invoke(app, ["ledger", *arguments])
    assert result.exit_code != 0
    assert said in str(result.exception)


@pytest.fixture
def client(eventful):
    return TestClient(build_http(None, RedisAccounts(eventful), token="secret"))


BEARER = {"Authorization": "Bearer secret"}


def test_the_interface_answers_with_the_ledger(client):
    live = client.get("/api/v1/ledger", headers=BEARER).json()
    assert live["balanced"]
    assert live["products"][0]["cameras"][0]["lost"] == 3
    shift = client.get("/api/v1/ledger?since=1h", headers=BEARER).json()
    assert shift["cameras"][0]["shed"] == {"drop_newest frames": 2}
    for wrong in ("since=soon", "since=99999999d", "until=2h", "since=1h&until=2h"):
        assert client.get(f"/api/v1/ledger?{wrong}", headers=BEARER).status_code == 400
    assert client.get("/api/v1/ledger?since=1h&product=nut", headers=BEARER).json()["cameras"] == []


@pytest.mark.parametrize("path", ["/api/v1/ledger", "/metrics"])
def test_the_account_is_not_for_strangers(client, path):
    assert client.get(path).status_code == 401


def test_prometheus_reads_the_metrics(client):
    text = client.get("/metrics", headers=BEARER).text
    values = {
        (sample.name, sample.labels.get("camera"), sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["proctor_frames_captured_total", "cam-1", None] == 8
    assert values["proctor_frames_lost_total", "cam-1", None] == 3
    assert values["proctor_frames_shed_total", "cam-1", "drop_newest frames"] == 2
    assert values["proctor_frames_in_flight", "cam-1", None] == 2
    assert values["proctor_ledger_balanced", "cam-1", None] == 1
    assert 0 < values["proctor_oldest_seconds", "cam-1", None] < 60
    assert abs(values["proctor_clock_skew_seconds", "cam-1", None]) < 1


def test_a_server_that_is_away_is_said_to_the_interface(mortal):
    server = mortal.client()
    client = TestClient(build_http(None, RedisAccounts(server), token=""))
    mortal.kill()
    for path in ("/api/v1/ledger", "/metrics"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert "Redis did not answer" in answer.json()["detail"]
    server.close()
