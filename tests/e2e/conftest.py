"""A live cluster of two replicas: real Ray, real HAProxy, real model.

PEREGRINE_TEST_MODEL names another checkpoint of the same model, e.g. what `peregrine quantize` wrote.
"""

import os

import openai
import pytest

from deploy.cluster import running_cluster
from deploy.config import load_config
from deploy.ray_environment import free_port

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def metrics_targets(tmp_path_factory):
    """Where the cluster's processes say where their metrics are."""
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="session")
def cluster(smollm2, metrics_targets):
    """Base URL of two replicas."""
    engine = {"model": os.environ.get("PEREGRINE_TEST_MODEL", str(smollm2)), "served_model_name": MODEL}
    serving = {"metrics": {"targets_dir": str(metrics_targets)}}
    cluster = {"replicas": 2, "port": free_port()}
    config = load_config(None, {"engine": engine, "serving": serving, "cluster": cluster})
    with running_cluster(config) as url:
        yield url


@pytest.fixture(scope="session")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client
