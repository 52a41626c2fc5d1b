"""`peregrine keys` and `peregrine usage`."""

import http.server
import json
import threading

import pytest
import yaml
from typer.testing import CliRunner

from deploy.cli import app
from serving.tenants.keys import hash_key

ROW = {"hour": "2026-01-01T00:00:00Z", "tenant": "acme", "model": "m", "requests": 3}


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_new_key_is_shown_once_and_its_hash_is_configuration():
    made = run("keys", "new", "--tenant", "acme")
    key = made.stderr.split()[-1]
    members = yaml.safe_load(made.stdout)["tenants"]["members"]
    assert members == {"acme": {"keys": [hash_key(key.encode())]}}
    assert key not in made.stdout
    assert run("keys", "new", "--tenant", "acme").stdout != made.stdout


def test_a_name_that_is_none_is_refused():
    refused = run("keys", "new", "--tenant", "Acme Ltd")
    assert refused.exit_code == 1
    assert "--tenant: must be up to 63 lower-case letters" in refused.stderr


@pytest.fixture
def server():
    """Yields its address; answers the key `good`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["authorization"] == "Bearer good"
            is_csv = "format=csv" in self.path
            error = json.dumps({"error": {"message": "Incorrect API key provided."}})
            rows = json.dumps({"object": "list", "data": [ROW]})
            text = error if not is_known else "hour,tenant\n" if is_csv else rows
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_usage_is_a_table_or_csv(server):
    shown = run("usage", "--base-url", server, "--api-key", "good")
    assert shown.exit_code == 0
    assert "acme" in shown.stdout
    assert run("usage", "--base-url", f"{server}/v1", "--api-key", "good", "--csv").stdout == "hour,tenant\n"


def test_usage_tells_why_there_is_none(server):
    refused = run("usage", "--base-url", server, "--api-key", "bad")
    assert refused.exit_code == 1
    assert "Incorrect API key" in refused.stderr
    assert "bad" not in refused.stderr
    assert run("usage", "--base-url", "http://127.0.0.1:1").exit_code == 1
