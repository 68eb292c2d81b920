"""What must be looked at now and then while a server runs: its certificate's end.

    upkeep = Upkeep(service, reporter)
    while not stop.wait(POLL_SECONDS):
        upkeep.tick()

Merchants would notice the end of a certificate first, all at once.
"""

import time
from datetime import UTC, datetime

from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded
from hanse_server.certificates import examine
from hanse_server.config import Service
from hanse_server.reporting import Reporter

LOOK_SECONDS = 3600.0
MAX_PEM_BYTES = 1 << 20


class Upkeep:
    """Tells the operator what ends soon, each thing once."""

    def __init__(self, service: Service, reporter: Reporter) -> None:
        self._service = service
        self._reporter = reporter
        self._due = 0.0
        self._told: set[tuple[str, int]] = set()

    def tick(self) -> None:
        """Look, once an hour. What can't be read is told like what ends."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_SECONDS
        tls = self._service.tls
        try:
            state = examine(
                read_bounded(tls.certificate, MAX_PEM_BYTES, "a PEM certificate", ConfigError),
                read_bounded(tls.authority, MAX_PEM_BYTES, "a PEM certificate", ConfigError),
                self._service.aggregator.address.rpartition(":")[0],
                datetime.now(UTC),
            )
        except ConfigError as error:
            self._tell_once("unreadable", 0, str(error))
            return
        self._reporter.metrics.certificate(state.seconds_left)
        for notice in state.notices:
            self._tell_once(notice.about, notice.days, notice.text)

    def _tell_once(self, what: str, days: int, text: str) -> None:
        if (what, days) not in self._told:
            self._told.add((what, days))
            self._reporter.say("certificate", text, about=what)
