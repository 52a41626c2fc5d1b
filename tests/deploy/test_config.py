"""The YAML configuration: every wrong key and value is named."""

from pathlib import Path

import pytest

from deploy.config import DEFAULT_MODEL, ConfigError, load_config

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "peregrine.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "peregrine.yaml"
    path.write_text(text)
    return path


def test_defaults():
    config = load_config(None)
    assert config.engine.model == DEFAULT_MODEL
    assert (config.cluster.host, config.cluster.port, config.cluster.replicas) == ("127.0.0.1", 8000, 1)


def test_the_example_holds_the_defaults_and_every_key():
    import dataclasses

    import yaml

    assert load_config(EXAMPLE) == load_config(None)
    raw = yaml.safe_load(EXAMPLE.read_text())
    config = load_config(None)
    # Left out on purpose: one block size is supported, and num_blocks is for tests.
    engine_keys = {f.name for f in dataclasses.fields(config.engine)} - {"block_size", "num_blocks"}
    assert set(raw["engine"]) == engine_keys
    assert set(raw["serving"]) == set(type(config.serving).model_fields)
    assert set(raw["routing"]) == set(type(config.routing).model_fields)
    assert set(raw["cluster"]) == set(type(config.cluster).model_fields)
    assert set(raw["logs"]) == set(type(config.logs).model_fields)
    assert set(raw["traces"]) == set(type(config.traces).model_fields)
    assert set(raw["tenants"]) == set(type(config.tenants).model_fields)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, False),
        ({"cluster": {"replicas": 2}}, True),
        ({"cluster": {"replicas": 1, "autoscaling": {"max_replicas": 2}}}, True),
        ({"routing": {"policy": "latency"}}, True),
        ({"routing": {"policy": "none"}, "cluster": {"replicas": 2}}, False),
    ],
)
def test_a_single_replica_needs_no_router(sections, expected):
    assert load_config(None, sections).needs_router == expected


def test_options_win_over_the_file(tmp_path):
    path = write(tmp_path, "cluster: {port: 9000, replicas: 3}\nengine: {max_num_seqs: 8}\n")
    config = load_config(path, {"cluster": {"port": 9001}})
    assert (config.cluster.port, config.cluster.replicas, config.engine.max_num_seqs) == (9001, 3, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: {replica: 2}", r"cluster\.replica: unknown key; did you mean cluster\.replicas\?"),
        ("engin: {}", r"engin: unknown key; did you mean engine\?"),
        ("engine: {max_seqs: 2}", r"engine\.max_seqs: unknown key; did you mean engine\.max_num_seqs\?"),
        ("serving: {api_key: x}", r"did you mean serving\.api_keys\?"),
        ("cluster: {port: high}", r"cluster\.port: .*integer"),
        ("cluster: {port: 70000}", r"cluster\.port: .*65535"),
        ("cluster: {haproxy: maybe}", r"cluster\.haproxy: .*'auto', 'on' or 'off'"),
        ("routing: {policy: fastest}", r"routing\.policy: .*'auto', 'latency'.*'none'"),
        ("cluster: {autoscaling: {max_replicas: 0}}", r"cluster\.autoscaling\.max_replicas: .*"),
        ("engine: {device: tpu}", r"engine\.device: .*'auto', 'cpu' or 'cuda'"),
        ("engine: {kv_cache_dtype: int8}", r"engine\.kv_cache_dtype: .*'auto' or 'fp8'"),
        ("engine: {token_budget: 8}", r"engine\.token_budget: must be at least max_num_seqs"),
        ("logs: {level: loud}", r"logs\.level: .*'debug', 'info', 'warning' or 'error'"),
        ("logs: {prompt: true}", r"did you mean logs\.prompts\?"),
        ("traces: {endpoint: collector}", r"traces\.endpoint: .*https\?"),
        ("traces: {sample_ratio: 2}", r"traces\.sample_ratio: .*less than or equal to 1"),
        ("engine: 5", r"engine: must be a mapping"),
        ("- a", r"must be a mapping with the sections"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_wrong_api_key_is_not_repeated(tmp_path):
    with pytest.raises(ConfigError, match=r"serving\.api_keys\.0: .*string") as error:
        load_config(write(tmp_path, "serving: {api_keys: [770077]}"))
    assert "770077" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")


TENANT = "tenants: {members: {acme: {keys: [%s]}}}"
HASH = "sha256:" + "0" * 64


def test_tenants_in_the_file_are_read_again_from_it(tmp_path):
    path = write(tmp_path, TENANT % HASH)
    assert load_config(path).tenants.file == path.resolve()
    assert load_config(write(tmp_path, "tenants: {usage_days: 3}")).tenants.is_on is False
    elsewhere = load_config(write(tmp_path, "tenants: {file: /run/tenants.yaml}")).tenants
    assert (elsewhere.file, elsewhere.is_on) == (Path("/run/tenants.yaml"), True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TENANT % "sk-in-plain-text", r"tenants\.members\.acme\.keys\.0: .*pattern"),
        ("tenants: {members: {acme: {key: sk-in-plain-text}}}", r"tenants\.members\.acme\.key: Extra inputs"),
        ("tenants: {members: {Acme Ltd: {}}}", r"tenants\.members\.Acme Ltd\.\[key\]: .*pattern"),
        (
            "tenants: {members: {acme: {requests_per_minute: 0}}}",
            r"requests_per_minute: .*greater than",
        ),
        (
            "tenants: {members: {acme: {tiers: [gold]}}}",
            r"acme\.tiers: must be of agent, .*, got 'gold'",
        ),
        ("tenants: {member: {}}", r"did you mean tenants\.members\?"),
        ("tenants: {members: {acme: {}}, file: x.yaml}", r"members and file: give one of them"),
    ],
)
def test_tenants_errors_name_the_key_and_no_secret(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "sk-in-plain-text" not in str(error.value)
