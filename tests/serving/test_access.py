"""Test keys with roles, allowed hosts and origins, and that none of it costs a body."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twotower.cli import main
from twotower.errors import ConfigError
from twotower.serving import access as module
from twotower.serving.access import KEY_VARIABLE, KEYS_VARIABLE, Access, digest_of, new_key, role_of

Connect = Callable[..., AbstractContextManager[TestClient]]
PATHS = {"read": "/v1/recommend", "write": "/v1/events", "admin": "/admin/reload"}


def bearer(key: str) -> str:
    return f"Bearer {key}"


def allowed(access: Access, key: str | None) -> set[str]:
    """Return the roles whose paths a key opens."""
    return {role for role, path in PATHS.items() if access.denial(path, "" if key is None else bearer(key)) is None}


def test_a_key_opens_what_its_roles_say_and_several_keys_hold_at_once(tmp_path: Path) -> None:
    keys = {}
    file = tmp_path / "keys"
    with file.open("w") as target:
        for name, roles in {"r": ["read"], "w": ["write"], "rw": ["read", "write"], "a": ["admin"]}.items():
            keys[name], line = new_key(name, roles)
            target.write(f"# {name}\n\n{line}\n")
    access = Access(keys_file=file, variables={KEY_VARIABLE: "of the environment"})
    assert {name: allowed(access, key) for name, key in keys.items()} == {
        "r": {"read"}, "w": {"write"}, "rw": {"read", "write"}, "a": {"read", "write", "admin"},
    }  # fmt: skip
    assert allowed(access, "of the environment") == set(PATHS) and allowed(access, None) == set()
    assert allowed(access, keys["r"][:-1]) == allowed(access, digest_of(keys["r"])) == allowed(access, "\ud800") == set()
    public = Access(keys_file=file, public=True)
    assert allowed(public, None) == {"read"} and allowed(public, keys["w"]) == {"read", "write"}
    denial = access.denial("/admin/reload", bearer(keys["r"]))
    assert denial is not None and denial.status == 403 and "'admin' is needed" in denial.text


def test_keys_come_from_the_environment_too() -> None:
    key, line = new_key("one", ["write"])
    other, another = new_key("two", ["read"])
    access = Access(variables={KEYS_VARIABLE: f"{line};{another}"})
    assert allowed(access, key) == {"write"} and allowed(access, other) == {"read"}
    denial = access.denial("/admin/reload", bearer(key))
    assert denial is not None and (denial.status, denial.code) == (403, "forbidden") and KEY_VARIABLE in denial.text


def test_keys_are_exchanged_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", -1)
    (old, old_line), (new, new_line), file = new_key("old", ["read"]), new_key("new", ["read"]), tmp_path / "keys"
    file.write_text(f"{old_line}\n")
    access = Access(keys_file=file)
    file.write_text(f"{old_line}\n{new_line}\n")
    assert allowed(access, old) == allowed(access, new) == {"read"}
    file.write_text(f"{new_line}\n")
    assert allowed(access, old) == set() and allowed(access, new) == {"read"}
    for bad in (b"half a li", b"\xff\xfe\x00"):
        file.write_bytes(bad)
        assert allowed(access, new) == {"read"}, "a file with a mistake changes nothing"
    file.unlink()
    assert allowed(access, new) == {"read"}


@pytest.mark.parametrize(
    "line",
    ["a-clear-key", "name read", "name cook sha256:" + "0" * 64, "name read sha256:123", "name read md5:" + "0" * 64],
)
def test_an_invalid_key_line_is_refused_without_quoting_it(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# comment\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is not a key") as refused:
        Access(keys_file=file)
    assert line not in str(refused.value)


def test_a_file_of_bytes_and_a_short_key_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(os.urandom(100) + b"\xff")
    with pytest.raises(ConfigError, match="is not a text file"):
        Access(keys_file=tmp_path / "keys")
    with pytest.raises(ConfigError, match="Cannot read the keys"):
        Access(keys_file=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at least 16 are required") as refused:
        Access(variables={KEY_VARIABLE: "short-secret"})
    assert "short-secret" not in str(refused.value)


def test_new_key_prints_the_key_once_and_stores_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, keys = tmp_path / "keys", []
    for name, role in (("shop", "read"), ("till-7", "write")):
        assert main(["--quiet", "new-key", name, "--role", role, "--into", str(file)]) == 0
        keys.append(capsys.readouterr().out.strip())
    assert not any(key in file.read_text() for key in keys) and stat.S_IMODE(file.stat().st_mode) == 0o600
    access = Access(keys_file=file)
    assert [allowed(access, key) for key in keys] == [{"read"}, {"write"}]
    assert main(["new-key", "a name", "--role", "read", "--into", str(file)]) == 2


def test_every_route_has_the_role_it_should(client: TestClient) -> None:
    wanted = {
        path: role
        for role, paths in {
            "write": ["/v1/events", "/v1/events/export", "/v1/events/export/answers"],
            "admin": [f"/admin/{name}" for name in ("refresh", "reload", "versions", "promote", "rollback")],
        }.items()
        for path in paths
    }
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        default = None if path.startswith(("/health/", "/metrics")) else "read"
        for name, method in methods.items():
            role = role_of(path, name.upper())
            changes = {"delete": "admin" if path.startswith("/v1/users") else "write"}
            changes |= {"post": "write"} if path == "/v1/items" else {}
            assert role == changes.get(name, wanted.get(path, default)), path
            assert bool(method.get("security")) == (role is not None), path


def test_without_a_key_nothing_is_read(connect: Connect, keyed: dict[str, str]) -> None:
    with connect(public=False) as client:
        for path in ("/v1/about", "/v1/items", "/v1/items/x", "/v1/users/u/history", "/v1//items", "/v1/nowhere"):
            assert client.get(path).status_code == client.head(path).status_code == 401, path
        assert client.post("/v1/recommend", content=b"not even JSON").status_code == 401
        for path in ("/", "/docs", "/page/app.js", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/about", headers=keyed).status_code == 200
        assert client.get("/%76%31/about").status_code == 401, "however it is written"


def test_the_key_is_looked_at_before_the_body(connect: Connect, keyed: dict[str, str]) -> None:
    def body() -> Any:
        yield b"{"
        raise AssertionError("the body was read")

    with connect(public=False) as client:
        for path in PATHS.values():
            assert client.post(path, content=body(), headers=keyed).status_code == 500, "with the key it is read"
            for headers in ({}, {"Authorization": "Bearer of-another-client"}):
                assert client.post(path, content=body(), headers=headers).status_code == 401


def test_only_allowed_hosts_are_answered() -> None:
    access = Access(public=True, hosts=["example.org", "*.example.net", "::1"])
    for host in ("example.org", "EXAMPLE.org:8000", "a.example.net", "a.b.example.net:1", "[::1]:8000", "[::1]"):
        assert access.host_denial("/", host) is None, host
    for host in ("", "evil.org", "example.org.evil.org", "example.net", "xexample.org", "[::2]", "example.org@evil.org"):
        denial = access.host_denial("/v1/about", host)
        assert denial is not None and denial.status == 400
        assert access.host_denial("/health/ready", host) is None, "probes use the address"
    assert Access(public=True).host_denial("/", "anything") is None


def test_pages_of_other_sites_may_call_when_their_origin_is_allowed(bundle: Path, tmp_path: Path) -> None:
    from twotower.serving.app import create_app
    from twotower.serving.service import Service
    from twotower.utils.config_serving import Limits

    shop = "https://shop.example.org"
    service = Service(bundle, f"sqlite:{tmp_path / 'e'}", Limits(rate=0))
    with TestClient(create_app(service, Access(public=True, origins=[shop]))) as client:
        own = {"origin": "http://testserver"}
        assert client.post("/v1/recommend", json={}, headers={"origin": shop}).headers["access-control-allow-origin"] == shop
        assert "access-control-allow-origin" not in client.post("/v1/recommend", json={}, headers=own).headers
        for origin in ("https://evil.org", "null", "https://shop.example.org.evil.org", "http://testserver.evil.org"):
            answer = client.post("/v1/recommend", json={}, headers={"origin": origin})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin"
            assert "access-control-allow-origin" not in client.get("/v1/about", headers={"origin": origin}).headers
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        may = client.options("/v1/recommend", headers={"origin": shop, **ask})
        assert may.status_code == 204 and "authorization" in may.headers["access-control-allow-headers"]
        assert client.options("/v1/recommend", headers={"origin": "https://evil.org", **ask}).status_code == 403
