"""Those who come to the operator's page: a browser of few words, and a person at a real one."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

TOKEN = "a-long-token-of-43-characters-for-this-test"  # noqa: S105
ORIGIN = "http://127.0.0.1:9094"
FORM = {"Sec-Fetch-Site": "same-origin"}
SCREENSHOTS = os.environ.get("HANSE_SCREENSHOTS")
"""A folder to put pictures of the pages into, for people to look at."""

CHROMIUM = Path("/usr/bin/chromium")


class Visitor:
    """A browser of few words, at `address`."""

    def __init__(self, app: ASGIApp, address: str = "127.0.0.1") -> None:
        self._app = app
        self._address = address
        self.cookies = httpx.Cookies()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=(self._address, 1))
            async with httpx.AsyncClient(
                transport=transport, base_url=ORIGIN, cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def log_in(self, token: str = TOKEN, **headers: str) -> httpx.Response:
        return self.ask("POST", "/login", data={"token": token}, headers=FORM | headers)

    def bearer(self, token: str = TOKEN, path: str = "/metrics") -> httpx.Response:
        return self.get(path, headers={"Authorization": f"Bearer {token}"})


FAULTS = (Path(__file__).parent.parent / "page_faults.js").read_text(encoding="utf-8")

CONTRASTS = (Path(__file__).parent.parent / "page_contrasts.js").read_text(encoding="utf-8")


class Person:
    """Somebody at a browser, who notes what it complains of and whatever it asks elsewhere."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        self.origin = origin
        self.context = browser.new_context(**({"viewport": {"width": 1000, "height": 800}} | options))
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._watch(request.url))
        self.page.on("requestfailed", self._failed)

    def _watch(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:")):
            self.complaints.append(f"asked elsewhere: {url}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving the page
            self.complaints.append(f"failed: {request.url}")

    def log_in(self) -> None:
        self.page.goto(f"{self.origin}/")
        self.page.get_by_label("Admin token").fill(TOKEN)
        self.press("Log in")
        self.page.wait_for_url(f"{self.origin}/")

    def look(self, name: str) -> None:
        """Check the page that is open, and keep a picture of it when somebody wants one."""
        assert self.page.evaluate(FAULTS) == []
        assert self.page.evaluate(CONTRASTS) == []
        if SCREENSHOTS:
            self.page.screenshot(path=f"{SCREENSHOTS}/operator-{name}.png", full_page=True)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()
        self.page.wait_for_load_state()

    def follow(self, name: str) -> None:
        self.page.get_by_role("link", name=name, exact=True).first.click()
        self.page.wait_for_load_state()

    def text(self) -> str:
        found: str = self.page.inner_text("body")
        return found
