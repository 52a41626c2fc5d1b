"""The dashboards: valid by Grafana's own types, without overlaps; a second push changes nothing."""

import json
import re

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as Schema
from typer.testing import CliRunner

from deploy.dashboards import app
from monitoring.dashboards import DASHBOARDS
from monitoring.dashboards.build import build
from tests.monitoring.grafana_double import TOKEN, GrafanaDouble, serving

TITLES = {spec.uid: spec.title for spec in DASHBOARDS}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize("spec", DASHBOARDS, ids=TITLES)
def test_the_schemas_types_read_back_what_was_written(spec):
    made = build(spec)
    assert json.loads(json.dumps(Schema.from_json(made), cls=JSONEncoder)) == made


@pytest.mark.parametrize("spec", DASHBOARDS, ids=TITLES)
def test_panels_lie_beside_each_other(spec):
    taken = set()
    panels = build(spec)["panels"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells
        taken |= cells
    ids = [panel["id"] for panel in panels]
    assert ids == list(range(1, len(ids) + 1))


@pytest.mark.parametrize("spec", DASHBOARDS, ids=TITLES)
def test_panels_explain_themselves(spec):
    titles = [panel.title for panel in spec.panels]
    assert len(set(titles)) == len(titles)
    assert all(panel.description.endswith(".") and panel.unit and panel.targets for panel in spec.panels)


def test_export_writes_a_file_for_each(tmp_path):
    assert run("export", str(tmp_path / "new"))[0] == 0
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "new").iterdir()}
    assert {uid: made["title"] for uid, made in files.items()} == TITLES


def test_push_creates_everything_and_the_second_one_changes_nothing():
    double = GrafanaDouble()
    with serving(double) as url:
        options = ("push", "--url", url, "--token", TOKEN, "--prometheus", "http://prometheus:9090")
        status, text = run(*options)
        assert (status, text.count("saved")) == (0, 2 + len(DASHBOARDS))
        assert double.unknown == []
        assert double.folders["peregrine"]["title"] == "Peregrine"
        source = double.sources["peregrine-prometheus"]
        assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
        assert {uid: d["dashboard"]["title"] for uid, d in double.dashboards.items()} == TITLES
        for uid in TITLES:
            meta, dashboard = double.dashboards[uid].values()
            assert meta["folderUid"] == "peregrine"
            assert dashboard["templating"]["list"][0]["current"]["value"] == "peregrine-prometheus"

        double.calls.clear()
        status, text = run(*options)
        assert (status, text.count("as it is")) == (0, 2 + len(DASHBOARDS))
        assert {call.split()[0] for call in double.calls} == {"GET"}
        assert all(d["dashboard"]["version"] == 1 for d in double.dashboards.values())


def test_what_somebody_changed_is_put_right_and_nothing_else_touched():
    double = GrafanaDouble(prefix="/sub/path")
    with serving(double) as url:
        options = ("push", "--url", f"{url}/", "--token", TOKEN, "--prometheus", "http://prometheus:9090")
        run(*options)
        double.folders["peregrine"].update(title="Mine", version=4)
        double.dashboards["peregrine-router"]["dashboard"]["title"] = "Edited"
        double.dashboards["peregrine-engine"]["meta"]["folderUid"] = ""
        double.sources["peregrine-prometheus"].update(url="http://old:9090", jsonData={"timeInterval": "5s"})
        status, text = run(*options)
        assert (status, text.count("saved")) == (0, 4)
        assert double.folders["peregrine"]["title"] == "Peregrine"
        assert double.dashboards["peregrine-router"]["dashboard"]["version"] == 2
        assert double.dashboards["peregrine-engine"]["meta"]["folderUid"] == "peregrine"
        assert double.dashboards["peregrine-overview"]["dashboard"]["version"] == 1
        source = double.sources["peregrine-prometheus"]
        assert (source["url"], source["jsonData"]) == ("http://prometheus:9090", {"timeInterval": "5s"})
        assert run(*options)[1].count("as it is") == 2 + len(DASHBOARDS)


def test_without_prometheus_no_data_source_is_touched():
    double = GrafanaDouble(may_administrate=False)
    with serving(double) as url:
        assert run("push", "--url", url, "--token", TOKEN)[0] == 0
    assert not any("datasources" in call for call in double.calls)
    variable = double.dashboards["peregrine-router"]["dashboard"]["templating"]["list"][0]
    assert "current" not in variable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--token", "wrong"), "Unauthorized"),
        (("--token", TOKEN, "--prometheus", "http://p"), "cannot create data source.*403.*permissions"),
    ],
)
def test_a_refusal_is_one_line_that_says_what(arguments, message):
    with serving(GrafanaDouble(may_administrate=False)) as url:
        status, text = run("push", "--url", url, *arguments)
    assert status == 1
    assert re.search(message, text.replace("\n", " "))
    assert "Traceback" not in text


@pytest.mark.parametrize("url", ["grafana.example", "http://127.0.0.1:1"])
def test_an_address_that_is_none(url):
    status, text = run("push", "--url", url, "--token", TOKEN)
    assert status == 1
    assert "no address" in text or "not reachable" in text
