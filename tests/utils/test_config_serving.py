"""Test the settings of the server: where they come from, what comes first, and mistakes that are told at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from twotower.cli import app
from twotower.errors import ConfigError
from twotower.utils.config import Config, load_config, parse_config
from twotower.utils.config_serving import ServingConfig, serving_settings, variable_of
from twotower.utils.settings_reference import settings_schema


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("serving: {port: 1, rate: 1, refresh_s: 1, log_level: error}")
    environment = {variable_of("port"): "2", variable_of("rate"): "2", variable_of("refresh_s"): "2"}
    found = load_config(
        file, ["serving.rate=3", "serving.refresh_s=3"], environment=environment, flags={"serving": {"refresh_s": 4}}
    )
    serving = found.serving
    assert (serving.log_level, serving.port, serving.rate, serving.refresh_s) == ("error", 2, 3, 4)
    assert serving.host == ServingConfig().host


def test_every_setting_can_come_from_the_environment() -> None:
    values = {
        "allowed_hosts": "a.org, *.b.org",
        "allowed_origins": "https://a.org",
        "trusted_proxies": "10.0.0.0/8",
        "log_level": "debug",
        "workers": "7",
        "log_clients": "none",
        "root_path": "/shop",
        "host": "::",
        "map_tiles": "https://tiles.example.org/{z}/{x}/{y}.png",
        "split": "90,10",
        "keep_versions": "7",
        "explore": "0.5",
    }
    for name, field in ServingConfig.model_fields.items():
        value = values.get(name, "true" if field.annotation is bool else "/tmp/x" if "Path" in str(field.annotation) else "777")
        extra = {variable_of("tls_cert"): "/tmp/x", variable_of("tls_key"): "/tmp/x"} if name.startswith("tls_") else {}
        found = load_config(environment={variable_of(name): value, **extra}).serving
        assert getattr(found, name) != getattr(ServingConfig(), name), name
    assert load_config(environment={variable_of("allowed_hosts"): values["allowed_hosts"]}).serving.allowed_hosts == [
        "a.org",
        "*.b.org",
    ]


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_none(value: str) -> None:
    assert load_config(environment={variable_of("port"): value}) == Config()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("TWOTOWER_SERVING_PROT", "TWOTOWER_SERVING_PORT"),
        ("TWOTOWER_SERVE_PORT", "TWOTOWER_SERVING_PORT"),
        ("TWOTOWER_SERVER_PORT", "TWOTOWER_SERVING_PORT"),
        ("TWOTOWER_SERVICE_RATE", "TWOTOWER_SERVING_RATE"),
        ("TWOTOWER_PORT", "TWOTOWER_SERVING_PORT"),
        ("TWOTOWER_EVENTS", "TWOTOWER_SERVING_EVENTS"),
        ("TWOTOWER_SERVING_TLS_CRT", "TWOTOWER_SERVING_TLS_CERT"),
        ("TWOTOWER_SERVING_refresh_s", "TWOTOWER_SERVING_REFRESH_S"),
    ],
)
def test_a_mistyped_variable_is_an_error_that_names_the_right_one(variable: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown environment variable '{variable}'. Did you mean '{meant}'"):
        load_config(environment={variable: "5"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TWOTOWER_API_KEY", "a-secret-of-sixteen"),
        ("TWOTOWER_API_KEYS", ""),
        ("TWOTOWER_DATA", "/data"),
        ("TWOTOWER_SERVICE_HOST", "10.0.0.1"),  # what Kubernetes sets for a service named twotower
        ("TWOTOWER_SERVICE_PORT", "8000"),
        ("TWOTOWER_SERVICE_PORT_HTTP", "8000"),
        ("TWOTOWER_PORT", "tcp://10.0.0.1:8000"),
        ("TWOTOWER_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("PORT", "5"),
    ],
)
def test_variables_of_others_are_left_alone(variable: str, value: str) -> None:
    assert serving_settings({variable: value}) == {}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("port", "http", "integer"), ("port", "65536", "65535"), ("rate", "-1", "greater"), ("log_level", "loud", "'debug'")],
)
def test_an_invalid_value_names_its_variable(name: str, value: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"Setting '{variable_of(name)}'.*{wanted}.*Got '{value}'"):
        load_config(environment={variable_of(name): value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prot": 1}, r"Unknown setting 'serving.prot'. Did you mean 'port'"),
        ({"workers": 0}, "serving.workers"),
        ({"root_path": "shop"}, "serving.root_path"),
        ({"root_path": "/shop/"}, "serving.root_path"),
        ({"tls_cert": "a.pem"}, "only one of tls_cert and tls_key"),
        ({"burst": 0}, "serving.burst"),
        *(
            ({"allowed_origins": [one]}, "is not a site")
            for one in ("shop", "*", "null", "https://a.org/b", "https://a.org, https://b.org")
        ),
        *(
            ({"allowed_hosts": [one]}, "is not a name of a host")
            for one in ("https://a.org", "a b", "a.org:80", "a.*.org", "", "::g")
        ),
    ],
)
def test_an_invalid_section_is_an_error_of_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_config({"serving": given})
    assert "\n" not in str(error.value)


def test_names_and_addresses_of_hosts_and_sites_are_valid() -> None:
    hosts = ["shop", "a-1.b_2.org", "*.b.org", "10.0.0.7", "::1", "[fe80::1]"]
    origins = ["https://a.org", "http://localhost:8080/", "http://[::1]:80", "capacitor://localhost"]
    serving = parse_config({"serving": {"allowed_hosts": hosts, "allowed_origins": origins}}).serving
    assert (serving.allowed_hosts, serving.allowed_origins) == (hosts, origins)


def test_the_settings_of_the_server_are_no_part_of_a_run() -> None:
    assert "serving" not in parse_config({"serving": {"port": 1}}).model_dump()
    assert "serving" in settings_schema()["properties"]


def test_show_prints_them_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable_of("events"), "redis://:hush-hush@store:6379/0")
    shown = CliRunner().invoke(app, ["config", "--show", "--set", "serving.port=9"]).output
    assert "hush-hush" not in shown
    assert yaml.safe_load(shown)["serving"] == json.loads(
        ServingConfig(port=9, events="redis://***@store:6379/0").model_dump_json()
    )


@pytest.mark.parametrize("mistake", [["--set", "serving.prot=9"], ["TWOTOWER_SERVING_PROT=9"]])
def test_a_mistake_is_told_before_anything_heavy_is_loaded(mistake: list[str], tmp_path: Path) -> None:
    options = [one for one in mistake if not one.startswith("TWOTOWER")]
    variables = dict(one.split("=") for one in mistake if one.startswith("TWOTOWER"))
    code = f"import sys; from twotower.cli import main; print(main(['serve', {str(tmp_path)!r}, *{options}]), *sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, check=True)
    status, *modules = ran.stdout.split()
    assert status == "2" and "Did you mean" in ran.stderr
    assert not {"torch", "pyarrow", "fastapi", "faiss", "onnxruntime", "uvloop"} & set(modules)
