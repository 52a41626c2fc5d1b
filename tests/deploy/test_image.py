"""The image's entry point, run as the image would run it: see container.py for how far that goes."""

import json
import re
import time

import pytest
import yaml

from tests.deploy import container
from tests.deploy.container import Container, join, stages
from tests.helm.rendering import render, values_file

START_S = 240
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
KEY = "a-key-of-this-test"

needs_namespaces = pytest.mark.skipif(
    container.missing() is not None, reason=f"no container can be made here: {container.missing()}"
)


def wait_for(condition, what: str, seconds: float, *logs: Container) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        dead = [c for c in logs if not c.is_alive()]
        assert not dead, f"ended: {[c.log()[-3000:] for c in dead]}"
        assert time.monotonic() < deadline, f"no {what}: {[c.log()[-3000:] for c in logs]}"
        time.sleep(0.5)


@pytest.fixture
def make(tmp_path, smollm2):
    made = []

    def start(*arguments: str, name: str = "only", **options) -> Container:
        one = Container(tmp_path / name, smollm2, **options)
        made.append(one)
        one.start(*arguments)
        return one

    tmp_path.chmod(0o755)
    yield start
    for one in made:
        one.kill()


def test_the_stages_that_run_are_pinned_and_not_root():
    text = container.DOCKERFILE.read_text()
    assert ":latest" not in text
    for base in re.findall(r"^ARG \w+=(\S*:\S+)$", text, re.M):
        assert re.search(r":\S*\d", base), base
    for stage in ("cpu", "cuda"):
        lines = stages()[stage]
        assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
        assert any(line.startswith("HEALTHCHECK") for line in lines)
        assert lines[-2:] == [
            'ENTRYPOINT ["tini", "--", "peregrine-entrypoint"]',
            'CMD ["serve", "--host", "0.0.0.0"]',
        ]
        # Compilers of the device and credentials stay behind: what runs only copies.
        assert not any(re.search(r"pip install|nvcc|TOKEN|PASSWORD", line) for line in lines)


@needs_namespaces
@pytest.mark.model
@pytest.mark.parametrize("user", [container.USER, 1_000_660_000], ids=["the image's user", "any user"])
def test_commands_run_without_a_name_and_without_a_writable_root(make, user):
    one = make("fetch", user=user)
    wait_for(lambda: not one.is_alive(), "end", 60)
    assert one.log().strip().endswith("/cache/models/SmolLM2-135M-Instruct.gguf"), one.log()


@needs_namespaces
@pytest.mark.model
def test_the_mark_is_written_after_the_model_and_a_wait_ends(make):
    one = make("wait-for", "/cache/ready/x", "60")
    wait_for(lambda: "waiting for" in one.log(), "start", 10, one)
    early = one.run("peregrine-entrypoint", "wait-for", "/cache/never", "0")
    assert early.returncode == 1
    assert "is not there after 0 s" in early.stderr
    done = one.run("peregrine-entrypoint", "prefetch", "/cache/ready/x", "SmolLM2-135M-Instruct")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not one.is_alive(), "end", 30)
    absent = make("prefetch", "/cache/ready/y", "/no/such/model", name="second")
    wait_for(lambda: not absent.is_alive(), "end", 60)
    assert "no such file" in absent.log()


@needs_namespaces
@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.timeout(400)
def test_the_default_command_serves_and_ends_at_sigterm(make):
    one = make(*json.loads(stages()["cpu"][-1].removeprefix("CMD ")))
    wait_for(lambda: "Ready" in one.log(), "answer", START_S, one)
    health = stages()["cpu"][-3].partition(" CMD ")[2]
    assert one.run(*json.loads(health)).returncode == 0
    answer = one.run("peregrine-entrypoint", "smoke", "http://127.0.0.1:8000")
    assert "Paris" in answer.stdout, answer
    written = one.run("sh", "-c", "touch /x /usr/x /opt/peregrine/x /etc/x /home/peregrine/x")
    assert written.stderr.count("Read-only file system") == 5, written.stderr
    status = one.run("cat", "/proc/self/status").stdout
    assert re.search(r"NoNewPrivs:\s1", status)
    assert set(re.findall(r"Cap\w+:\s(\w+)", status)) == {"0" * 16}
    assert one.terminate(60) == 0, one.log()[-3000:]
    assert "Traceback" not in one.log()


def ray_start(group: dict, *first: str) -> str:
    """As KubeRay makes it of rayStartParams, which it adds some to."""
    parameters = {
        "dashboard-agent-listen-port": "52365",
        "metrics-export-port": "8080",
        **group["rayStartParams"],
    }
    return " ".join(["ray start", *first, "--block", *(f"--{k}={v} " for k, v in parameters.items())])


@needs_namespaces
@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.timeout(900)
def test_two_nodes_take_the_charts_own_serve_config_and_drain(make, tmp_path):
    """Head and worker as KubeRay starts them, and the document that it would send, of values-cpu.yaml."""
    values = {**values_file("values-cpu.yaml"), "auth": {"existingSecret": "keys"}}
    manifests = render(values)
    service = manifests.one("RayService")["spec"]
    cluster = service["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
    arguments = {n: g["template"]["spec"]["containers"][0]["args"] for n, g in groups.items()}
    token = "a-token-of-this-test"
    shared = {
        "PEREGRINE_CONFIG": "/etc/peregrine/peregrine.yaml",
        "PEREGRINE_API_KEY": KEY,
        "RAY_AUTH_MODE": cluster["authOptions"]["mode"],
        "RAY_AUTH_TOKEN": token,
        **{
            v["name"]: v["value"]
            for v in groups["worker"]["template"]["spec"]["containers"][0]["env"]
            if "value" in v
        },
    }
    config = manifests.one("ConfigMap")["data"]["peregrine.yaml"]
    starts = {
        "head": ray_start(groups["head"], "--head"),
        "worker": ray_start(groups["worker"], f"--address={HEAD}:6379"),
    }
    nodes = {
        name: make(
            *arguments[name],
            name=name,
            address=address,
            config=config,
            extra={**shared, "RAY_ADDRESS": f"{HEAD}:6379", "KUBERAY_GEN_RAY_START_CMD": starts[name]},
        )
        for name, address in (("head", HEAD), ("worker", WORKER))
    }
    head, worker = nodes["head"], nodes["worker"]
    join(head, worker)

    def get(url: str, *, method: str = "GET", body: str = "", bearer: str = token) -> tuple[int, str]:
        code = (
            "import sys, urllib.request, urllib.error\n"
            "u, m, b, t = sys.argv[1:]\n"
            "h = {'Authorization': 'Bearer ' + t, 'Content-Type': 'application/json'}\n"
            "r = urllib.request.Request(u, method=m, data=b.encode() or None, headers=h)\n"
            "try: a = urllib.request.urlopen(r, timeout=60); print(a.status, a.read().decode())\n"
            "except urllib.error.HTTPError as e: print(e.code, e.read().decode())\n"
            "except OSError as e: print(0, e)\n"
        )
        done = head.run("python", "-c", code, url, method, body, bearer, timeout_s=90)
        status, _, text = done.stdout.partition(" ")
        return int(status or 0), text or done.stderr

    def is_probed(node: str, kind: str, address: str) -> bool:
        probe = groups[node]["template"]["spec"]["containers"][0][kind]["httpGet"]
        port = {"serve": 8000}.get(probe["port"], probe["port"])
        return get(f"http://{address}:{port}{probe['path']}", bearer="")[0] == 200

    wait_for(lambda: is_probed("head", "startupProbe", HEAD), "head", 150, head, worker)
    wait_for(lambda: is_probed("worker", "startupProbe", WORKER), "worker", 150, head, worker)
    assert not is_probed("worker", "readinessProbe", WORKER)  # nothing is deployed yet
    applications = f"http://{HEAD}:8265/api/serve/applications/"
    document = json.dumps(yaml.safe_load(service["serveConfigV2"]))
    assert get(applications, method="PUT", body=document, bearer="wrong")[0] in (401, 403)
    status, text = get(applications, method="PUT", body=document)
    assert status == 200, text

    def state() -> str:
        application = json.loads(get(applications)[1])["applications"]["peregrine"]
        assert application["status"] != "DEPLOY_FAILED", application
        return application["status"]

    wait_for(lambda: state() == "RUNNING", "application", START_S, head, worker)
    wait_for(lambda: is_probed("worker", "readinessProbe", WORKER), "readiness", 60, head, worker)

    def running_replicas() -> list[dict]:
        deployments = json.loads(get(applications)[1])["applications"]["peregrine"]["deployments"]
        return [r for r in deployments["Replica"]["replicas"] if r["state"] == "RUNNING"]

    replicas = running_replicas()
    assert [r["node_ip"] for r in replicas] == [WORKER]

    # What `helm test` runs; the key is asked for.
    test = manifests.one("Pod")["spec"]["containers"][0]
    command = [
        *test["command"][2:],
        *(a.replace("pg-peregrine-serve-svc.llm.svc", WORKER) for a in test["args"]),
    ]
    answer = head.run(*command)
    assert answer.returncode == 0, answer
    assert get(f"http://{WORKER}:8000/v1/models", bearer="wrong")[0] == 401
    # What the PodMonitor scrapes: a replica and two routers here, two routers on the head.
    for address, ports in ((WORKER, (9464, 9465, 9466)), (HEAD, (9464, 9465))):
        texts = [get(f"http://{address}:{port}/metrics")[1] for port in ports]
        assert all("peregrine_" in text for text in texts), texts
    # `kubectl logs` has a line of each request.
    wait_for(lambda: '"route": "/v1/completions"' in worker.log(), "line of the request", 10, head)

    # Another number and back, as an upgrade and a roll back would send it: nothing is replaced. (The second
    # replica finds no node. Taken back, Ray ends it like one with streams, so that the application's status
    # is not waited for.)
    two = render({**values, "config": {**values["config"], "cluster": {"replicas": 2}}}).one("RayService")
    for text in (two["spec"]["serveConfigV2"], service["serveConfigV2"]):
        assert get(applications, method="PUT", body=json.dumps(yaml.safe_load(text)))[0] == 200
        time.sleep(3)
        assert [r["replica_id"] for r in running_replicas()] == [r["replica_id"] for r in replicas]
        assert head.run(*command).returncode == 0

    # The pod ends: its hook returns after the stream that runs, which ends as it should.
    body = json.dumps({"model": "SmolLM2-135M-Instruct", "prompt": "Once", "max_tokens": 600, "stream": True,
                       "ignore_eos": True})  # fmt: skip
    stream = (
        "import sys, urllib.request\n"
        "h = {'Authorization': 'Bearer ' + sys.argv[3], 'Content-Type': 'application/json'}\n"
        "r = urllib.request.Request(sys.argv[1], data=sys.argv[2].encode(), headers=h)\n"
        "print(urllib.request.urlopen(r, timeout=300).read().decode()[-400:])\n"
    )
    running = head.spawn("python", "-c", stream, f"http://{WORKER}:8000/v1/completions", body, KEY)
    wait_for(
        lambda: '"num_running":1' in get(f"http://{WORKER}:8000/stats")[1].replace(" ", ""),
        "stream",
        30,
        head,
    )
    hook = groups["worker"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    begin = time.monotonic()
    drained = worker.run("timeout", "300", *hook, timeout_s=320)
    print(f"drained after {time.monotonic() - begin:.0f} s", drained.stderr)
    assert drained.returncode == 0, (drained, worker.log()[-2000:])
    text, _ = running.communicate(timeout=60)
    assert "data: [DONE]" in text, text
    assert '"finish_reason":"length"' in text.replace(" ", ""), text
    worker.terminate(60)
