"""The operator's page, to this machine alone: how the league is, its rounds, figures, privacy, versions, audit log.

    app = application(state, live, metrics, token, port=9094)
    with listen(9094) as listening, serving(app, listening): ...

It only shows: no form on it changes anything but the reader's own language and session. `live` is of the process that
trains; with None, as for `hanse-server page`, the records alone speak. Beside the pages are `/metrics` for Prometheus,
with the token as a bearer, and `/health` and `/ready`, which say one word to anybody. Who may see the rest,
`page_access` says. Pages work without scripts; with them, the overview keeps itself up to date.
"""

import math
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hanse_common.errors import ConfigError, HanseError, StorageError
from hanse_common.files import read_bounded
from hanse_common.plan import noise_shares
from hanse_common.web.languages import Languages
from hanse_common.web.security import Guarded
from hanse_common.web.serving import HOST, static_routes
from hanse_server import charts, templates
from hanse_server.alerts import Alert, Facts, alerts
from hanse_server.audit import Head
from hanse_server.certificates import CertificateState, examine
from hanse_server.config import Service
from hanse_server.live import TRIPS, Live, Seen
from hanse_server.metrics import CONTENT_TYPE, Metrics
from hanse_server.page_access import Gate, Tell, deed
from hanse_server.page_data import ROLES, Reader, RoundView, TrainingView, reliability
from hanse_server.page_views import (
    answers,
    class_names,
    epsilon_of,
    facts_of,
    first_curve,
    matrix,
    moment,
    points,
    seen_pictures,
    suspicion,
    told,
)
from hanse_server.storage import State

HOSTS = (HOST, "localhost")
ROUNDS_DRAWN, ROUNDS_LISTED, ROUNDS_COUNTED = 60, 20, 50
BLOCKS_LISTED, ENTRIES_LISTED, LINES_LISTED = 10, 50, 12
LOOK_SECONDS = 60.0
READY_SECONDS = 1.0
CONNECT_SECONDS = 1.0
MAX_PEM_BYTES = 1 << 20

_BOUND = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is bound to all addresses is asked on loopback


class Pages:
    """The pages over `state`. `live` and `metrics` are None where another process trains, or none does."""

    def __init__(
        self, state: State, live: Live | None, metrics: Metrics | None, service: Service | None
    ) -> None:
        self._state = state
        self._reader = Reader(state)
        self._live = live
        self._metrics = metrics
        self._service = service
        self._looked: tuple[float, CertificateState | None, str] = (-math.inf, None, "")
        self._found_ready: tuple[float, bool] = (-math.inf, False)
        self.languages = Languages(templates.FOLDER, "en")

    def app(self, ready: Callable[[], bool]) -> FastAPI:
        """Return the application, without what keeps strangers out. `ready` says whether the listeners are up."""
        style = FileResponse(templates.STYLE)
        app = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            routes=[
                Route("/static/operator.css", lambda request: style),
                *static_routes(),
                Route(
                    "/language", deed(lambda request, fields: self.languages.chosen(fields)), methods=["POST"]
                ),
            ],
            exception_handlers=dict.fromkeys(
                (HTTPException, RequestValidationError, HanseError), self._failed
            ),
        )
        for path, page in (
            ("/", self.overview),
            ("/live", self.parts),
            ("/rounds", self.rounds),
            ("/figures", self.figures),
            ("/privacy", self.privacy),
            ("/versions", self.versions),
            ("/audit", self.audit),
        ):
            app.get(path, response_class=HTMLResponse)(page)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        app.get("/health", response_class=PlainTextResponse)(lambda: PlainTextResponse("ok\n"))
        app.get("/ready", response_class=PlainTextResponse)(lambda: self._readiness(ready))
        return app

    # What can be seen

    def overview(self, request: Request) -> Response:
        """How the league is now, and what is to be done."""
        return self._page(request, "page-overview.html", **self._now())

    def parts(self, request: Request) -> Response:
        """What of the overview changes by itself, for its script."""
        return self._page(request, "page-live.html", **self._now())

    def rounds(self, request: Request) -> Response:
        """Who took part."""
        training = self._reader.training()
        rounds = self._reader.rounds(training.digest, ROUNDS_DRAWN)
        bars = [charts.Bar(one.number, tuple((role, one.count(role)) for role in ROLES)) for one in rounds]
        return self._page(
            request,
            "page-rounds.html",
            training=training,
            bars=bars,
            rounds=rounds[::-1][:ROUNDS_LISTED],
            merchants=reliability(rounds[-ROUNDS_COUNTED:]),
            counted=len(rounds[-ROUNDS_COUNTED:]),
            blocks=self._reader.blocks(training.digest, BLOCKS_LISTED),
            roles=ROLES,
        )

    def figures(
        self,
        request: Request,
        number: Annotated[int | None, Query(ge=1, lt=1 << 31)] = None,
        of: Annotated[int | None, Query(ge=0, lt=1000)] = None,
    ) -> Response:
        """How good the models are: the evaluation `number`, or the last one, and the ROC curve of the class `of`."""
        training = self._reader.training()
        tried = self._reader.evaluations(training.digest)
        named = tried[-1:] if number is None else [one for one in tried if one.number == number]
        if number is not None and not named:
            raise HTTPException(404)
        chosen = named[0] if named else None
        report = self._reader.report(chosen.number) if chosen else None
        classes = class_names(training.plan, report)
        if of is not None and of >= len(classes):
            raise HTTPException(404)
        return self._page(
            request,
            "page-figures.html",
            training=training,
            tried=tried,
            accuracy=points(tried, "accuracy"),
            loss=points(tried, "loss"),
            chosen=chosen,
            report=report,
            classes=classes,
            of=first_curve(report) if of is None else of,
            matrix=matrix(report, classes),
        )

    def privacy(self, request: Request) -> Response:
        """What the plan promises, what merchants say they spent, what the server saw."""
        training = self._reader.training()
        seen = self._live.snapshot().seen if self._live else Seen()
        spent = self._reader.spent()
        promised = epsilon_of(training.plan) if training.plan else math.inf
        return self._page(
            request,
            "page-privacy.html",
            training=training,
            plans=[plan for plan in (training.plan, training.evaluation) if plan is not None],
            shares=noise_shares,
            epsilon=epsilon_of,
            bound=suspicion(promised),
            spent=spent,
            most=max(
                [1e-9, *(one.epsilon for one in spent), *([promised] if math.isfinite(promised) else [])]
            ),
            seen=seen,
            pictures=seen_pictures(seen),
        )

    def versions(self, request: Request) -> Response:
        """The league's recognizers."""
        found = self._reader.releases()
        return self._page(
            request,
            "page-versions.html",
            found=found,
            accuracies=self._reader.accuracies(found.versions),
            numbers={one.digest: one.number for one in found.versions},
        )

    def audit(self, request: Request) -> Response:
        """The last entries of the audit log."""
        entries = self._reader.audit(ENTRIES_LISTED)
        return self._page(
            request,
            "page-audit.html",
            entries=[(entry, facts_of(entry)) for entry in entries],
            head=Head.of(entries[0]) if entries else None,
        )

    def metrics(self) -> Response:
        """What Prometheus scrapes."""
        if self._metrics is None:
            raise HTTPException(404)
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

    # How it is found out

    def _now(self) -> dict[str, Any]:
        training = self._reader.training()
        rounds = self._reader.rounds(training.digest, ROUNDS_LISTED)
        releases = self._reader.releases()
        tried = self._reader.evaluations(training.digest, last=1)
        now = self._live.snapshot() if self._live else None
        return {
            "training": training,
            "alerts": self._alerts(training, rounds),
            "live": now,
            "trips": () if now is None else [(kind, *answers(now.trips, kind)) for kind in TRIPS],
            "lines": () if now is None else now.lines[::-1][:LINES_LISTED],
            "last": rounds[-1] if rounds else None,
            "releases": releases,
            "tried": tried[-1] if tried else None,
            "epsilon": epsilon_of(training.plan) if training.plan else None,
            "now": f"{datetime.now():%H:%M:%S}",
        }

    def _alerts(self, training: TrainingView, rounds: list[RoundView]) -> list[Alert]:
        certificate, trouble = self._certificate()
        try:
            usage = shutil.disk_usage(self._state.folder)
            disk = (usage.free, usage.total)
        except OSError:
            disk = None
        facts = Facts(
            training,
            rounds,
            self._live.snapshot().lines if self._live else (),
            certificate.notices if certificate else (),
            trouble,
            disk,
        )
        return alerts(facts, time.time())

    def _certificate(self) -> tuple[CertificateState | None, str]:
        """Return how the server's certificate stands, or why that can't be said; looked at once a minute."""
        if self._service is None:
            return None, ""
        at, found, trouble = self._looked
        if time.monotonic() - at > LOOK_SECONDS:
            found, trouble = None, ""
            tls = self._service.tls
            try:
                found = examine(
                    read_bounded(tls.certificate, MAX_PEM_BYTES, "a PEM certificate", ConfigError),
                    read_bounded(tls.authority, MAX_PEM_BYTES, "a PEM certificate", ConfigError),
                    self._service.aggregator.address.rpartition(":")[0],
                    datetime.now(UTC),
                )
            except ConfigError as error:
                trouble = str(error)
            self._looked = (time.monotonic(), found, trouble)
        return found, trouble

    def _readiness(self, ready: Callable[[], bool]) -> Response:
        """Say whether database and listeners are there. Strangers may ask, so it is found out once a second."""
        at, found = self._found_ready
        if time.monotonic() - at > READY_SECONDS:
            try:
                found = ready() and self._reader.reachable()
            except StorageError:
                found = False
            self._found_ready = (time.monotonic(), found)
        return PlainTextResponse("ready\n" if found else "not ready\n", 200 if found else 503)

    def _page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        pages = self.languages.of(request)
        common = {
            "gap": "" if pages.language == "zh" else " ",
            "key": getattr(request.state, "key", ""),
            "here": request.url.path,
            "attended": self._live is not None,
            "charts": charts,
            "moment": moment,
            "told": told,
        }
        page = pages.render(template, served=True, **{**common, **values})
        return HTMLResponse(page, code)

    async def _failed(self, request: Request, error: Exception) -> Response:
        """Say what went wrong: an address that is none, a form that is none of ours, records that can't be read."""
        code = {RequestValidationError: 404, HTTPException: getattr(error, "status_code", 404)}.get(
            type(error), 503
        )
        lines = str(error).splitlines() if isinstance(error, HanseError) else []
        return self._page(request, "page-error.html", code, here="/", code_shown=code, lines=lines)


def application(
    state: State,
    live: Live | None,
    metrics: Metrics | None,
    token: bytes,
    *,
    port: int,
    service: Service | None = None,
    ready: Callable[[], bool] = lambda: True,
    tell: Tell = lambda kind, text: None,
) -> ASGIApp:
    """Return the operator's page over `state`, with all that guards it, for those who show `token`.

    `port` is where it is served, `service` names the certificate to watch, `ready` says whether the listeners are up,
    and `tell` hears, as a kind and a text, of too many wrong tokens. Without `live` and `metrics` the records alone are
    shown.
    """
    pages = Pages(state, live, metrics, service)
    return Guarded(Gate(pages.app(ready), token, f"hanse-operator-{port}", pages.languages, tell), HOSTS)


def listens(host: str, port: int) -> bool:
    """Return whether something on this machine takes connections at `host`, as it is bound, and `port`."""
    with suppress(OSError), socket.create_connection((_BOUND.get(host, host), port), CONNECT_SECONDS):
        return True
    return False
