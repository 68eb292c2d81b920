"""The owner's page, to this machine alone: how the daemon is, plans, ledger, history, members, settings.

    python -m hanse_client.page hanse-client.yaml       # ends when its standard input does

It reads what the daemon writes and leaves word for it in the state folder (`control`, `approvals`), and never asks it
anything: with the daemon gone, it shows what is on disk. Who may see it, `page_access` says. Pages work without
scripts; with them, the overview keeps itself up to date.
"""

import math
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hanse_client import receipt as receipts
from hanse_client import templates
from hanse_client.approvals import Approvals, Standing
from hanse_client.charges import Budget, Charge, Spent
from hanse_client.config import ClientConfig
from hanse_client.control import FOR_GOOD, Control, State, Status
from hanse_client.explanation import SUSPICION, about, posterior_bound, upward
from hanse_client.journal import Journal
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.page_access import Gate, address, deed, read_token
from hanse_client.receipt import Receipt
from hanse_client.releases import Releases
from hanse_common import commands
from hanse_common.config import MAX_BYTES, load
from hanse_common.errors import BudgetExceeded, ConfigError, HanseError, LedgerError, PlanRefused, WireError
from hanse_common.files import read_bounded
from hanse_common.fingerprint import words
from hanse_common.plan import Plan, noise_shares
from hanse_common.web.languages import Languages
from hanse_common.web.security import Guarded
from hanse_common.web.serving import HOST, listen, serving, static_routes

HOSTS = (HOST, "localhost")
MAX_FORM_BYTES = 4096
MAX_PLANS = 100
EVENTS_READ, EVENTS_SHOWN = 5000, 100
ENTRIES_A_PAGE = 50
LOCK_SECONDS = 3.0
"""How long to wait for a daemon that is writing to its ledger."""

PAUSES = {"1h": timedelta(hours=1), "8h": timedelta(hours=8), "always": None}
"""The pauses that the overview offers; None is until the owner resumes."""

_MONTH = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")


@dataclass(frozen=True)
class Privacy:
    """What the ledger says, for a page. Without it, `trouble` is why it can't be read.

    `epsilon` and `bound` are told upward, `left` downward; the former are None when nothing can be promised.
    """

    budget: Budget
    spent: Spent | None
    trouble: str = ""

    @property
    def rounds(self) -> int:
        """How many rounds were charged."""
        return sum(plan.rounds for plan in self.spent.plans) if self.spent else 0

    @property
    def epsilon(self) -> str | None:
        """What was spent."""
        return told(self.spent.epsilon) if self.spent else None

    @property
    def left(self) -> str:
        """What is left."""
        spent = self.spent.epsilon if self.spent else math.inf
        return f"{math.floor(round(1000 * max(0.0, self.budget.epsilon - spent), 6)) / 1000:g}"

    @property
    def bound(self) -> str | None:
        """What a suspicion of 1 % can become, in per cent."""
        if self.spent is None or math.isinf(self.spent.epsilon):
            return None
        return upward(100 * posterior_bound(self.spent.epsilon, SUSPICION), 2)

    @property
    def chance(self) -> str:
        """One in how many is the chance that the bound fails."""
        return f"{1 / self.spent.delta:,.0f}" if self.spent and self.spent.delta else ""

    @property
    def in_shares(self) -> bool:
        """Whether the bound rests on other merchants, too."""
        return any(plan.shares > 1 for plan in self.spent.plans) if self.spent else False


@dataclass(frozen=True)
class PlanView:
    """A plan that the owner was asked about. `plan` is None when its file is not sound; `trouble` says why.

    `cost` is the ε of the whole plan, infinite when none can be promised, None when the plan takes more steps than the
    policy allows: computing it is work, too.
    """

    name: str
    standing: Standing
    plan: Plan | None
    cost: float | None = None
    trouble: str = ""

    @property
    def epsilon(self) -> str | None:
        """The cost, told upward; None when none can be told."""
        return None if self.cost is None else told(self.cost)

    @property
    def bound(self) -> str | None:
        """What a suspicion of 1 % can become by this plan alone, in per cent."""
        if self.cost is None or math.isinf(self.cost):
            return None
        return upward(100 * posterior_bound(self.cost, SUSPICION), 2)

    @property
    def about(self) -> str:
        """What its ε is said of."""
        return about(self.plan.training) if self.plan else ""

    @property
    def shares(self) -> int:
        """In how many shares its noise is."""
        return noise_shares(self.plan.training, self.plan.cohort) if self.plan else 0


class Facts:
    """What the pages show of the shop whose configuration is `config`."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.control = Control(config.state)
        self.journal = Journal(config.state)
        self.approvals = Approvals(config.plans_path)
        self._ledger: Ledger | None = None
        self._plans: dict[str, tuple[Plan, float | None]] = {}

    def ledger(self) -> Ledger | None:
        """Return the ledger, None before the first charge. Raises `LedgerError`."""
        if not self.config.ledger_path.exists():
            self._ledger = None
        elif self._ledger is None:
            self._ledger = Ledger(self.config.ledger_path, self.config.policy.budget, LOCK_SECONDS)
        return self._ledger

    def privacy(self, anew: bool = False) -> Privacy:
        """Return what was spent, or why that can't be said. `anew` reads all of the ledger, not only what is new."""
        self._ledger = None if anew else self._ledger
        budget = self.config.policy.budget
        try:
            kept = self.ledger()
            return Privacy(budget, Spent((), 0.0, 0.0) if kept is None else kept.spent())
        except LedgerError as error:
            self._ledger = None  # to be read as a whole once it is mended
            return Privacy(budget, None, str(error))

    def plans(self) -> list[PlanView]:
        """Return the plans that the owner was asked about, the newest first."""
        found = list(self.approvals.list().items())[-MAX_PLANS:]
        return [self._view(name, standing) for name, standing in reversed(found)]

    def plan(self, name: str) -> PlanView:
        """Return the plan with the digest `name`. Raises `HTTPException` when there is none."""
        standing = self.approvals.list().get(name)
        if standing is None:
            raise HTTPException(404)
        return self._view(name, standing)

    def against(self, plan: Plan) -> list[str]:
        """Return what speaks against taking part in `plan`: the policy's reasons, then the budget's."""
        reasons = self.config.policy.reasons(plan, self.config.league.taxonomy)
        if reasons:
            return reasons
        try:
            kept = self.ledger()
            if kept is not None and kept.last_work(plan.digest) is None:
                kept.check(Charge.of(plan))
        except (BudgetExceeded, LedgerError) as error:
            return [str(error)]
        return []

    def decide(self, name: str, standing: Standing) -> None:
        """Say yes or no to a plan. Raises `PlanRefused` for a yes to one that the policy refuses."""
        if standing is Standing.APPROVED:
            view = self.plan(name)
            if view.plan is None:
                raise WireError(view.trouble)
            if reasons := self.config.policy.reasons(view.plan, self.config.league.taxonomy):
                raise PlanRefused("\n".join(reasons))
        self.approvals.decide(name, standing)

    def state(self, status: Status | None, until: datetime | None) -> str:
        """Return how the daemon is: a `State`, or never, pausing, resuming."""
        if status is None:
            return "never"
        if status.state is State.STOPPED:
            return status.state
        if until is not None and status.state is not State.PAUSED:
            return "pausing" if status.state is State.TRAINING else State.PAUSED
        return "resuming" if until is None and status.state is State.PAUSED else status.state

    def _view(self, name: str, standing: Standing) -> PlanView:
        if name not in self._plans:
            try:
                plan = self.approvals.plan(name).open(bytes.fromhex(self.config.league.operator_key))
                if plan.digest.hex() != name:
                    raise WireError(f"{name}: found another plan in this file.")
            except HanseError as error:
                return PlanView(name, standing, None, trouble=str(error))
            self._plans[name] = plan, self._cost(plan)  # a name is a digest, so both stay what they are
        return PlanView(name, standing, *self._plans[name])

    def _cost(self, plan: Plan) -> float | None:
        if plan.training.work > self.config.policy.max_steps:
            return None
        try:
            return plan.epsilon()
        except ValueError:
            return math.inf


class Pages:
    """The pages of one shop, whose configuration is `config`, in the file `source`."""

    def __init__(self, config: ClientConfig, source: Path) -> None:
        self._shop = Facts(config)
        self._config = config
        self._source = source
        language = config.page.language if config.page else "en"
        self.languages = Languages(templates.FOLDER, language)

    def app(self) -> Starlette:
        """Return the application, without what keeps strangers out."""
        pages = (
            ("/", self._overview),
            ("/status", self._status),
            ("/plans", self._plan_list),
            ("/plan/{name}", self._plan),
            ("/ledger", self._ledger),
            ("/receipt/{month}", self._receipt),
            ("/history", self._history),
            ("/members", self._members),
            ("/settings", self._settings),
        )
        deeds = (
            ("/pause", self._pause),
            ("/resume", self._resume),
            ("/plan/{name}/approve", lambda request, fields: self._decide(request, Standing.APPROVED)),
            ("/plan/{name}/refuse", lambda request, fields: self._decide(request, Standing.REFUSED)),
            ("/language", lambda request, fields: self.languages.chosen(fields)),
        )
        return Starlette(
            routes=[
                *(Route(path, page) for path, page in pages),
                *(Route(path, deed(act, MAX_FORM_BYTES), methods=["POST"]) for path, act in deeds),
                *static_routes(),
            ],
            exception_handlers={
                HTTPException: lambda request, error: self._failed(request, error.status_code),
                HanseError: lambda request, error: self._failed(request, 409, str(error)),
                OSError: lambda request, error: self._failed(
                    request, 409, str(error)
                ),  # a file that just went
            },
        )

    def _page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        common = {"served": True, "key": request.state.key, "here": request.url.path}
        return HTMLResponse(self.languages.of(request).render(template, **{**common, **values}), code)

    def _failed(self, request: Request, code: int, text: str = "") -> HTMLResponse:
        return self._page(
            request, "page-error.html", code, here="/", code_shown=code, lines=text.splitlines()
        )

    # What can be seen

    def _facts(self) -> dict[str, Any]:
        status = self._shop.control.status()
        until = self._shop.control.paused_until(datetime.now(UTC))
        return {
            "state": self._shop.state(status, until),
            "status": status,
            "until": None if until in (None, FOR_GOOD) else moment(until),
            "paused": until is not None,
            "since": moment(status.since) if status else "",
            "now": f"{datetime.now():%H:%M:%S}",
            "hours": self._config.schedule,
            "limit": self._config.network.monthly_megabytes,
            "league": self._config.policy.league,
            "privacy": self._shop.privacy(),
            "waiting": [plan for plan in self._shop.plans() if plan.standing is Standing.WAITING],
        }

    def _overview(self, request: Request) -> Response:
        return self._page(request, "page-overview.html", **self._facts())

    def _status(self, request: Request) -> Response:
        return self._page(request, "page-status.html", **self._facts())

    def _plan_list(self, request: Request) -> Response:
        manual = self._config.policy.approval == "manual"
        return self._page(request, "page-plans.html", plans=self._shop.plans(), manual=manual)

    def _plan(self, request: Request) -> Response:
        view = self._shop.plan(request.path_params["name"])
        policy, plan = self._config.policy, view.plan
        against = self._shop.against(plan) if plan else []
        explained = policy.explain(plan) if plan and view.cost is not None else []
        return self._page(request, "page-plan.html", view=view, against=against, explained=explained)

    def _ledger(self, request: Request) -> Response:
        found: dict[str, Any] = {
            "privacy": self._shop.privacy(anew=True),
            "head": None,
            "events": [],
            "months": [],
        }
        kept = None if found["privacy"].trouble else self._shop.ledger()
        known = self._shop.approvals.list()
        page = pages = 1
        if kept is not None:
            events = list(kept.events())
            pages = max(1, math.ceil(len(events) / ENTRIES_A_PAGE))
            page = min(pages, _number(request.query_params.get("page", "1")))
            start = (page - 1) * ENTRIES_A_PAGE
            found["events"] = events[::-1][start : start + ENTRIES_A_PAGE]
            found["months"] = sorted({event.time[:7] for event in events}, reverse=True)
            found["head"] = kept.head if "verify" in request.query_params else None
        adds_up = self._config.policy.budget.filter.whole_plans
        return self._page(
            request,
            "page-ledger.html",
            known=known,
            page=page,
            pages=pages,
            adds_up=adds_up,
            told=told,
            **found,
        )

    def _receipt(self, request: Request) -> Response:
        month, _, file = request.path_params["month"].partition(".")
        kept = self._shop.ledger()
        now = datetime.now(UTC)
        if kept is None or not _MONTH.fullmatch(month) or month > f"{now:%Y-%m}" or file not in ("", "html"):
            raise HTTPException(404)
        pages = self.languages.of(request)
        made = Receipt.of(kept, month, language=pages.language, now=now)
        if file:
            name = {"Content-Disposition": f'attachment; filename="receipt-{month}.html"'}
            return HTMLResponse(receipts.page(made), headers=name)
        return HTMLResponse(
            pages.render("receipt.html", served=True, r=made, record=made.model_dump_json(indent=1))
        )

    def _history(self, request: Request) -> Response:
        read = self._shop.journal.recent(EVENTS_READ)
        kinds = sorted({event.kind for event in read})
        kind = request.query_params.get("kind", "")
        events = [event for event in reversed(read) if kind in ("", event.kind)][:EVENTS_SHOWN]
        lines = [(moment(event.time), event.kind, event.text) for event in events]
        return self._page(request, "page-history.html", events=lines, kinds=kinds, kind=kind)

    def _members(self, request: Request) -> Response:
        seen, trouble, path = None, "", self._config.markers_path
        if path.exists():
            try:
                seen = Markers(path).directory(bytes.fromhex(self._config.league.charter))
            except LedgerError as error:
                trouble = str(error)
        return self._page(
            request,
            "page-members.html",
            seen=seen,
            trouble=trouble,
            verified=self._config.policy.trusted,
            own=self._config.member.name if self._config.member else None,
            words=words,
            day=_day,
        )

    def _settings(self, request: Request) -> Response:
        try:
            text, trouble = read_bounded(self._source, MAX_BYTES, "your configuration", ConfigError), ""
        except ConfigError as error:
            text, trouble = b"", str(error)
        return self._page(
            request,
            "page-settings.html",
            config=self._config,
            path=str(self._source.absolute()),
            text=text.decode("utf-8", "replace"),
            trouble=trouble,
            **self._recognizers(),
        )

    def _recognizers(self) -> dict[str, Any]:
        """Return the league's recognizer in use, the one that waits, and why that can't be said."""
        releases = Releases.of(self._config)
        try:
            return {"release": releases.in_use(), "newer": releases.waiting(), "doubt": ""}
        except HanseError as error:
            return {"release": None, "newer": None, "doubt": str(error)}

    # What can be done

    def _pause(self, request: Request, fields: Mapping[str, str]) -> Response:
        if fields.get("length") not in PAUSES:
            raise HTTPException(400)
        self._shop.control.pause(PAUSES[fields["length"]])
        return RedirectResponse("/", 303)

    def _resume(self, request: Request, fields: Mapping[str, str]) -> Response:
        self._shop.control.resume()
        return RedirectResponse("/", 303)

    def _decide(self, request: Request, standing: Standing) -> Response:
        name = request.path_params["name"]
        self._shop.plan(name)
        self._shop.decide(name, standing)
        return RedirectResponse(f"/plan/{name}", 303)


def told(epsilon: float) -> str | None:
    """Return ε with three decimals, never less than it is; None when it is infinite."""
    return f"{math.ceil(round(1000 * epsilon, 6)) / 1000:g}" if math.isfinite(epsilon) else None


def moment(time: datetime) -> str:
    """Return `time` by this machine's clock."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"


def _day(seconds: int) -> str | None:
    """Return the day of a time in a directory; None is for good."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}" if seconds < 1 << 36 else None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and 0 < len(text) < 7 and int(text) else 1


def build(config: ClientConfig, source: Path, port: int) -> ASGIApp:
    """Return the page of the shop whose configuration is `config`, in the file `source`, with all that guards it."""
    pages = Pages(config, source)
    gate = Gate(
        pages.app(),
        f"hanse-{port}",
        lambda: read_token(config.state),
        pages.languages,
        "hanse-client page",
    )
    return Guarded(gate, HOSTS)


def serve(config: Annotated[Path, typer.Argument(help="Your configuration.", metavar="FILE")]) -> None:
    """Serve the page until standard input or the process is ended."""
    settings = load(ClientConfig, config)
    address(settings)  # makes the token
    if settings.page is None:
        raise ConfigError(f"{config}: page: missing; expected a section with a port.")
    port = settings.page.port
    app = build(settings, config, port)
    with commands.until_stopped() as stop, listen(port) as listening, serving(app, listening):
        threading.Thread(target=_end_with_input, args=(stop,), daemon=True).start()
        stop.wait()


def _end_with_input(stop: threading.Event) -> None:
    with suppress(OSError):
        while os.read(0, 1024):
            pass
    stop.set()


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(serve)
    commands.run(command)
