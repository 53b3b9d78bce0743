"""The Grafana dashboard: it asks for nothing but what the jobs and Ray export, in sound PromQL."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.metrics import METRICS

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "carn.json"
# Of Ray's own metrics, those that the dashboard asks for: `ray_` and the names that
# ray/dashboard/modules/reporter/reporter_agent.py and Ray's core give them.
RAY_METRICS = {
    "ray_node_cpu_utilization": ("instance", "SessionName"),
    "ray_node_gpus_utilization": ("instance", "SessionName", "GpuIndex"),
    "ray_node_mem_used": ("instance", "SessionName"),
    "ray_node_network_receive_speed": ("instance", "SessionName"),
    "ray_node_network_send_speed": ("instance", "SessionName"),
    "ray_object_store_memory": ("instance", "SessionName", "Location"),
}
# What Ray and Prometheus add to every metric of a job.
ADDED_LABELS = ("SessionName", "NodeAddress", "WorkerId", "Component", "Version", "instance")
WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels_of(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [
        target["expr"] for panel in panels_of(dashboard) for target in panel.get("targets", ())
    ]
    return [as_promql(text) for text in found]


def as_promql(text: str) -> str:
    """What Grafana sends: with its variables replaced."""
    text = text.replace("$__rate_interval", "1m").replace("$SessionName", ".*")
    assert "$" not in text, f"an unknown variable: {text}"
    return text


def names_in(expression: str) -> set[str]:
    """Words that are metrics: they stand before a selector."""
    return set(re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{", expression))


def known_labels(name: str) -> set[str]:
    if name in RAY_METRICS:
        return set(RAY_METRICS[name])
    (spec,) = [spec for spec in METRICS.values() if spec.exported_name == name]
    return {*spec.labels, *ADDED_LABELS}


def test_every_expression_asks_for_known_metrics_and_labels(dashboard: dict[str, Any]) -> None:
    exported = {spec.exported_name for spec in METRICS.values()}
    asked = expressions(dashboard)
    assert asked
    for expression in asked:
        names = names_in(expression)
        assert names, expression
        assert names <= exported | set(RAY_METRICS), expression
        # Every metric has a selector, or it would be of all sessions at once.
        assert {word for word in WORD.findall(expression) if word.startswith("ray_")} == names
        labels = set().union(*map(known_labels, names))
        selected = set(re.findall(r"(\w+)\s*=~?\"", expression))
        for group in re.findall(r"(?:by|ignoring|on) \(([^)]*)\)", expression):
            selected |= {label.strip() for label in group.split(",")}
        assert selected <= labels, expression


def test_values_that_are_selected_exist(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        for name, selector in re.findall(r"(ray_carn_\w+)\{([^}]*)\}", expression):
            (spec,) = [spec for spec in METRICS.values() if spec.exported_name == name]
            for label, values in re.findall(r"(\w+)=~?\"([^\"]*)\"", selector):
                if spec.labels.get(label):
                    assert set(values.split("|")) <= set(spec.labels[label]), expression


def test_counters_are_shown_as_rates_or_totals_and_gauges_as_they_are(
    dashboard: dict[str, Any],
) -> None:
    for expression in expressions(dashboard):
        for name in names_in(expression) & {spec.exported_name for spec in METRICS.values()}:
            rated = re.search(rf"rate\({name}\{{", expression) is not None
            if not name.endswith("_total"):
                assert not rated, expression
            elif name != "ray_carn_sr_slides_total":
                assert rated, expression


def test_every_metric_of_the_jobs_is_shown(dashboard: dict[str, Any]) -> None:
    shown = set().union(*map(names_in, expressions(dashboard)))
    assert {spec.exported_name for spec in METRICS.values()} <= shown


def test_the_names_of_rays_own_metrics_are_in_its_source() -> None:
    import ray

    root = Path(ray.__file__).parent
    places = (
        root / "dashboard/modules/reporter/reporter_agent.py",
        root / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py",
    )
    text = "".join(path.read_text() for path in places)
    for name in RAY_METRICS:
        assert name in text or f'"{name.removeprefix("ray_")}"' in text, name


def test_promql_is_well_formed(dashboard: dict[str, Any]) -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for expression in expressions(dashboard):
        parser.parse(expression)
    with pytest.raises(ValueError, match=r".+"):
        parser.parse("sum(rate(x[5m])")


def test_brackets_close(dashboard: dict[str, Any]) -> None:
    pairs = {")": "(", "]": "[", "}": "{"}
    for expression in expressions(dashboard):
        open_ones: list[str] = []
        for letter in re.sub(r"\"[^\"]*\"", "", expression):
            if letter in pairs.values():
                open_ones.append(letter)
            elif letter in pairs:
                assert open_ones, expression
                assert open_ones.pop() == pairs[letter], expression
        assert not open_ones, expression


def test_it_is_a_dashboard_that_grafana_imports(dashboard: dict[str, Any]) -> None:
    assert 36 <= dashboard["schemaVersion"] <= 42
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    # An id belongs to one Grafana's database; with one, importing would be changing.
    assert dashboard.get("id") is None
    variables = {item["name"]: item for item in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    query = variables["SessionName"]["query"]["query"]
    (name,) = re.findall(r"label_values\((\w+), SessionName\)", query)
    assert name in RAY_METRICS
    source = {"type": "prometheus", "uid": "${datasource}"}
    found = list(panels_of(dashboard))
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        assert panel["type"] in ("row", "timeseries", "stat")
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == source
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(set(letters)) == len(letters)
        assert all(target["datasource"] == source for target in panel["targets"])


def test_panels_lie_on_the_grid_without_covering_each_other(dashboard: dict[str, Any]) -> None:
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
