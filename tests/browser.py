"""Who comes to the pages: a browser of few words, and a person at a real one.

    visitor = Visitor(app, "http://127.0.0.1:8765", form="/settings")
    visitor.post("/pause", length="1h").status_code

    ada = Person(browser, origin)                  # `browser` is a fixture
    ada.press("Pause for 1 hour")
    ada.look("pausing")
    assert ada.complaints == []

`Visitor` asks the application itself; `Person` needs a server, and Chromium.
"""

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

FORM = {"Sec-Fetch-Site": "same-origin"}
"""What a browser says of a form of the page itself."""

SCREENSHOTS = os.environ.get("HANSE_SCREENSHOTS")
"""A folder to put pictures of the pages into, for people to look at."""

FAULTS = (Path(__file__).parent / "page_faults.js").read_text(encoding="utf-8")
CONTRASTS = (Path(__file__).parent / "page_contrasts.js").read_text(encoding="utf-8")


class Visitor:
    """A browser of few words, at `address`: what it asks `app` for, its cookies, and the key of its session's forms.

    `origin` is where the page is for it, and `form` a page of it that has a form.
    """

    def __init__(self, app: ASGIApp, origin: str, form: str = "/", address: str = "127.0.0.1") -> None:
        self._app = app
        self._origin = origin
        self._form = form
        self._address = address
        self.cookies = httpx.Cookies()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=(self._address, 1))
            async with httpx.AsyncClient(
                transport=transport, base_url=self._origin, cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def key(self) -> str:
        found = re.search(r'name="key" value="([^"]+)"', self.get(self._form).text)
        assert found
        return found[1]

    def post(self, path: str, headers: Mapping[str, str] = FORM, **fields: str) -> httpx.Response:
        return self.ask("POST", path, data={"key": self.key()} | fields, headers=dict(headers))


class Person:
    """Somebody at a browser, who notes what it complains of and whatever it asks elsewhere."""

    pictures = ""
    """What the names of pictures begin with."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        self.origin = origin
        self.context = browser.new_context(**({"viewport": {"width": 1100, "height": 800}} | options))
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._watch(request.url))
        self.page.on("requestfailed", self._failed)

    def _watch(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:", "file:")):
            self.complaints.append(f"asked elsewhere: {url}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving the page
            self.complaints.append(f"failed: {request.url}")

    def enter(self, address: str) -> None:
        """Come by an address that lets in."""
        self.page.goto(address)
        self.page.wait_for_url(f"{self.origin}/")

    def look(self, name: str) -> None:
        """Check the page that is open, and keep a picture of it when somebody wants one."""
        assert self.page.evaluate(FAULTS) == []
        assert self.page.evaluate(CONTRASTS) == []
        if SCREENSHOTS:
            self.page.screenshot(path=f"{SCREENSHOTS}/{self.pictures}{name}.png", full_page=True)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()
        self.page.wait_for_load_state()

    def follow(self, name: str) -> None:
        self.page.get_by_role("link", name=name, exact=True).first.click()
        self.page.wait_for_load_state()

    def tab_to(self, name: str) -> None:
        """Go on by the tab key to what `name` begins, and see where the keyboard is."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("document.activeElement.innerText").split("\n")[0].startswith(name):
                outline = self.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid"
                return
        raise AssertionError(f"no way to {name}")

    def text(self) -> str:
        found: str = self.page.inner_text("body")
        return found
