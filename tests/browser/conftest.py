"""Fixtures of the browser tests: a small trained bundle, `twotower serve` on it, and pages whose console must stay empty.

The environment variable TWOTOWER_SCREENSHOTS names a folder for screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from twotower.pipeline.stages import train_stage
from twotower.utils.config import parse_config

CHROMIUM = "/usr/bin/chromium"
START_S = 120
WIDE, PHONE, SMALL = (1440, 900), (390, 844), (320, 640)
KEY = "a-key-for-the-page"


class Opened(NamedTuple):
    """Options for opening a page: the address after "#", window size, colour scheme and motion."""

    address: str = ""
    size: tuple[int, int] = WIDE
    scheme: str = "light"
    motion: str = "reduce"  # screenshots and positions do not depend on timing
    refused: tuple[int, ...] = ()  # statuses the test provokes; the browser reports each as an error
    routes: tuple[tuple[str, Callable[[Any], None]], ...] = ()
    script: str = ""  # runs in the page before its own scripts
    of: str = ""  # address of another server


Open = Callable[..., Page]


@pytest.fixture(scope="session")
def bundle(town: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of the small town, trained for 30 steps."""
    out = tmp_path_factory.mktemp("served")
    tower = {"embedding_dim": 16, "hidden_dims": [16]}
    training = {"max_steps": 30, "batch_size": 128, "learning_rate": 0.01, "device": "cpu"}
    settings = {**town.config.model_dump(mode="json"), "training": training, "model": {"user_tower": tower, "item_tower": tower}}
    train_stage(parse_config(settings), town.folder, out / "model", bundle=out / "bundle")
    return out / "bundle"


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[str]:
    """Yield the address of a server process on the bundle. It ends with the tests."""
    with serving(bundle, "--public") as address:
        yield address


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[str]:
    """Yield the address of a server process on the bundle. It ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    events = f"sqlite:{bundle.parent / f'events-{port}.sqlite'}"
    command = [sys.executable, "-m", "twotower", "serve", str(bundle), "--port", str(port), "--events", events, *options]
    log = bundle.parent / f"server-{port}.log"
    environment = os.environ | {"TWOTOWER_API_KEY": KEY}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait(address, process, log)
            yield address
        finally:
            process.terminate()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}health/ready", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"The server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser(lacking: Callable[[str], None]) -> Iterator[Browser]:
    """Yield a headless Chromium for one module, because its event loop would disturb other modules."""
    found = CHROMIUM if Path(CHROMIUM).exists() else shutil.which("chromium")
    if found is None:
        lacking(f"needs Chromium: found none at {CHROMIUM} or on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: str) -> Iterator[Open]:
    """`visit(address="#…", size=…, scheme=…)` opens the page. At the end, its console must be empty."""
    contexts: list[BrowserContext] = []
    said: list[str] = []

    def visit(**how: Any) -> Page:
        opened = Opened(**how)
        width, height = opened.size
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=opened.scheme,  # type: ignore[arg-type]
            reduced_motion=opened.motion,  # type: ignore[arg-type]
            has_touch=opened.size in (PHONE, SMALL),
            is_mobile=opened.size in (PHONE, SMALL),
            device_scale_factor=2 if opened.size == PHONE else 1,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        if opened.script:
            page.add_init_script(opened.script)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.extend(_complaint(message, opened.refused)))
        for pattern, answer in opened.routes:
            page.route(pattern, answer)
        page.goto((opened.of or server) + opened.address)
        return page

    yield visit
    for context in contexts:
        for page in context.pages:
            page.unroute_all(behavior="wait")  # an answer still being changed would fail in the next test
        context.close()
    assert not said, "the page wrote to its console: " + "; ".join(said)


def _complaint(message: ConsoleMessage, refused: tuple[int, ...]) -> list[str]:
    expected = any(f"status of {status} " in message.text for status in refused) or (0 in refused and "net::ERR" in message.text)
    return [message.text] if message.type in ("error", "warning") and not expected else []


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[Page, str], None]:
    """Return a function that saves a screenshot of a page under a name."""
    folder = Path(os.environ.get("TWOTOWER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return keep


def cards(page: Page) -> Locator:
    """Return the cards of the recommendations."""
    return page.locator("#list > li.best")


def ids(page: Page) -> list[str]:
    """Return the item ids of the recommendations, best first."""
    return [str(card.get_attribute("data-id")) for card in cards(page).all()]


def asked(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """Return the body of the recommendation request that `act` sends, after its response is shown."""

    def own(request: Request) -> bool:
        return (
            request.url.endswith("/v1/recommend") and dict(request.post_data_json or {})["k"] != 500
        )  # requests for the background of the map

    with page.expect_request_finished(own) as sent:
        act()
    expect(page.locator("#list-column")).to_have_attribute("aria-busy", "false")
    return dict(sent.value.post_data_json or {})


def draw(page: Page) -> str:
    """Pick a random user and return its id."""
    expect(cards(page)).to_have_count(10)
    asked(page, lambda: page.get_by_role("button", name="Random user").click())
    expect(page.locator("#history > li.event").first).to_be_attached()  # a phone shows the history in a sheet
    return str(re.search(r"user=([^&]+)", page.url)[1])  # type: ignore[index]
