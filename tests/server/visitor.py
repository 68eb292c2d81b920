"""Those who come to the operator's page: they log in by the admin token."""

import httpx
from starlette.types import ASGIApp
from tests import browser
from tests.browser import FORM

TOKEN = "a-long-token-of-43-characters-for-this-test"  # noqa: S105
ORIGIN = "http://127.0.0.1:9094"


class Visitor(browser.Visitor):
    """A browser of few words, at `address`."""

    def __init__(self, app: ASGIApp, address: str = "127.0.0.1") -> None:
        super().__init__(app, ORIGIN, address=address)

    def log_in(self, token: str = TOKEN, **headers: str) -> httpx.Response:
        return self.ask("POST", "/login", data={"token": token}, headers=FORM | headers)

    def bearer(self, token: str = TOKEN, path: str = "/metrics") -> httpx.Response:
        return self.get(path, headers={"Authorization": f"Bearer {token}"})


class Person(browser.Person):
    """Somebody at a browser, who knows the token."""

    pictures = "operator-"

    def log_in(self) -> None:
        self.page.goto(f"{self.origin}/")
        self.page.get_by_label("Admin token").fill(TOKEN)
        self.press("Log in")
        self.page.wait_for_url(f"{self.origin}/")
