"""The Helm chart, rendered by Helm itself and checked against the schemas of Kubernetes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from twotower.cli import app
from twotower.serving.app import api_document
from twotower.utils.config_serving import Limits

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "twotower"
KUBERNETES = ("1.30", "1.34")
AFTER_DRAIN_S = 2.0  # the process ends at most so long after `drain_s`
LEAST: dict[str, Any] = {
    "bundle": {"volume": {"persistentVolumeClaim": {"claimName": "bundles"}}},
    "keys": {"existingSecret": "twotower-keys"},
    "events": {"redis": "redis://redis:6379/0"},
}
ALONE: dict[str, Any] = {**LEAST, "replicas": 1, "events": {"volume": {"persistentVolumeClaim": {"claimName": "events"}}}}
FULL: dict[str, Any] = {
    **LEAST,
    "image": {"repository": "registry.example.com/two-tower-rec", "tag": "1", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}],
    "keys": {"existingSecret": "twotower-keys", "trustedKey": True},
    "public": True,
    "events": {"existingSecret": "twotower-events"},
    "server": {
        "allowedHosts": ["recommend.example.com"],
        "allowedOrigins": ["https://shop.example.com"],
        "trustedProxies": ["10.0.0.0/8"],
        "rate": 1_000_000,
        "refreshSeconds": 0.5,
        "extraArgs": ["--tls-cert=/x", "--tls-key=/y"],
        "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    },
    "ingress": {"enabled": True, "className": "nginx", "annotations": {"a": "b"}, "host": "r.example.com", "tlsSecret": "tls"},
    "autoscaling": {"enabled": True, "minReplicas": 3},
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}],
        "redis": [{"podSelector": {"matchLabels": {"app": "redis"}}}],
        "extraEgress": [{"ports": [{"port": 4318}]}],
    },
    "prometheus": {"annotations": False, "serviceMonitor": True},
    "podAnnotations": {"c": "d"},
    "podLabels": {"team": "shop"},
    "nodeSelector": {"e": "f"},
    "tolerations": [{"key": "g", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}
SETTINGS = {
    "least": LEAST,
    "alone": ALONE,
    "full": FULL,
    "open": {**LEAST, "keys": {}, "public": True, "preStopSeconds": 0, "podLabels": {"a": "b"}},
    "isolated": {**ALONE, "networkPolicy": {"enabled": True}, "disruptionBudget": {"enabled": False}},
}
Objects = list[dict[str, Any]]
Render = Callable[[dict[str, Any]], Objects]


@pytest.fixture(scope="module")
def helm(lacking: Any) -> Any:
    try:
        from helm_python import chart
    except ImportError:
        lacking("needs helm-python-sdk, which comes with the development tools on Linux x86-64")
    return chart


@pytest.fixture(scope="module")
def render(helm: Any) -> Render:
    """Return a function that renders the chart and returns its objects."""

    def rendered(values: dict[str, Any]) -> Objects:
        files = helm.Chart.load(str(CHART)).render(values, name="shop", namespace="recommend")
        texts = [text for name, text in files.items() if name.endswith(".yaml")]
        return [one for text in texts for one in yaml.safe_load_all(text) if one]

    return rendered


def only(objects: Objects, kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def container(objects: Objects) -> dict[str, Any]:
    (found,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("name", SETTINGS)
def test_helm_finds_nothing(helm: Any, name: str) -> None:
    report = helm.lint(str(CHART), SETTINGS[name], strict=True)
    assert not report["errors"] and report["total_charts_linted"] == 1
    assert [one["error"] for one in report["messages"] if one["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", SETTINGS)
def test_kubernetes_takes_every_object(render: Render, name: str, version: str) -> None:
    objects = render(SETTINGS[name])
    assert len({(one["kind"], one["metadata"]["name"]) for one in objects}) == len(objects) >= 2
    for one in objects:
        if one["kind"] != "ServiceMonitor":  # of the Prometheus operator
            kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_object_would_be_found(render: Render) -> None:
    deployment = only(render(LEAST), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["slep"] = {"seconds": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_server_knows_its_arguments(render: Render, name: str) -> None:
    command, *words = container(render(SETTINGS[name]))["args"]
    assert command == "serve"
    with click.Context(app) as parent:
        given = app.commands[command].make_context(command, words, parent=parent).params
    assert given["host"] == "0.0.0.0" and given["port"] == 8000
    if name == "full":
        assert given["rate"] == 1_000_000 and given["refresh_s"] == 0.5 and given["public"]
        assert (given["allowed_hosts"], given["trusted_proxies"]) == (("recommend.example.com",), ("10.0.0.0/8",))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pod_has_the_time_that_the_server_takes_to_end(render: Render, name: str) -> None:
    objects = render(SETTINGS[name])
    before = container(objects).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    given = only(objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert given >= before + Limits().drain_s + AFTER_DRAIN_S
    assert (before == 0) == (name == "open")


def test_probes_ask_routes_of_the_server(render: Render) -> None:
    server = container(render(LEAST))
    paths = {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert set(paths.values()) <= api_document()["paths"].keys()
    (port,) = server["ports"]
    assert {server[f"{name}Probe"]["httpGet"]["port"] for name in paths} == {port["name"]}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120


@pytest.mark.parametrize("name", SETTINGS)
def test_objects_find_the_pods(render: Render, name: str) -> None:
    objects = render(SETTINGS[name])
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for one in objects:
        spec = one["spec"]
        chosen = spec.get("selector") or spec.get("podSelector") or {}
        if one["kind"] not in ("Ingress", "HorizontalPodAutoscaler"):
            assert chosen.get("matchLabels", chosen).items() <= labels, one["kind"]
    kinds = {one["kind"] for one in objects}
    assert ("PodDisruptionBudget" in kinds) == (name in ("least", "full", "open"))
    assert ("HorizontalPodAutoscaler" in kinds) == (name == "full") != ("replicas" in only(objects, "Deployment")["spec"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pod_has_no_rights_that_it_does_not_need(render: Render, name: str) -> None:
    objects = render(SETTINGS[name])
    pod, server = only(objects, "Deployment")["spec"]["template"]["spec"], container(objects)
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert str(pod["securityContext"]["runAsUser"]) in (ROOT / "Dockerfile").read_text()
    rights = server["securityContext"]
    assert (
        rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"] and rights["capabilities"] == {"drop": ["ALL"]}
    )
    assert {"requests", "limits"} <= server["resources"].keys()
    mounted = {one["name"]: one for one in server["volumeMounts"]}
    assert mounted.keys() == {one["name"] for one in pod["volumes"]}
    assert mounted["bundle"]["readOnly"] and server["args"][1].startswith(mounted["bundle"]["mountPath"] + "/")
    text = yaml.safe_dump(objects)
    assert "TWOTOWER_API_KEY" not in text  # keys come in a file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": {}}, "bundle.volume is empty"),
        ({"keys": {}}, "no client could read"),
        ({"keys": {"trustedKey": True}, "public": True}, "Put bundle.pub into a secret"),
        ({"events": {}}, "Several replicas need Redis"),
        ({"events": {}, "replicas": 1}, "would be lost with the pod"),
        ({"events": {"volume": {"emptyDir": {}}}, "replicas": 1, "autoscaling": {"enabled": True}}, "need Redis"),
        ({"events": {"redis": "redis://r", "existingSecret": "s"}}, "Give one of them"),
        ({"events": {"redis": "redis://:password@r"}}, "events"),
        ({"replica": 3}, "replica"),
        ({"preStopSeconds": "5s"}, "preStopSeconds"),
    ],
)
def test_settings_that_cannot_work_are_refused(render: Render, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        render({**LEAST, **change})


def test_the_chart_has_the_version_of_the_project() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert about["version"] == about["appVersion"] == version
