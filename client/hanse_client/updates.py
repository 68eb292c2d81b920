"""Looks for recognizers that the league releases, and takes them.

    found = updates.look(stop.is_set, take=True)            # once; None: there is nothing later
    with UpdateKeeper(updates, may_look, note) as keeper:   # on connecting, each hour, and when nudged
        keeper.nudge()

The server hears who asks, when, and the number of the last release that this shop knows. What the owner hears is one
line for each release.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.config import ClientConfig
from hanse_client.control import Control
from hanse_client.participant import printable
from hanse_client.release_stream import ReleaseStream, open_release_stream
from hanse_client.releases import Fetch, Releases
from hanse_client.stream import Lost, NotServed, Refused
from hanse_client.traffic import Traffic
from hanse_common.errors import ConfigError, HanseError, ReleaseRefused
from hanse_common.release import Release, ReleasedFile
from hanse_common.wire import Buffer

log = logging.getLogger(__name__)

TRIES = 3
FIRST_PAUSE = 2.0
LOOK_SECONDS = 3600.0
"""Time between two looks while nothing happens."""

REST_SECONDS = 10.0
"""Time between two looks at least, whatever happens."""

SPREAD_SECONDS = 3.0
"""Over how much time a league's merchants spread their looks when all of them are told at once."""

POLL_SECONDS = 0.2

END_SECONDS = 5.0
"""How long the end waits for a look; one that is cut off in a swap leaves one whole recognizer in use."""

_JITTER = secrets.SystemRandom()


@dataclass(frozen=True)
class Found:
    """A release that came: the one before, and whether the new one is in use now."""

    release: Release
    before: Release | None
    taken: bool

    def told(self) -> str:
        """Return it in words. The operator's reason is on one line, and printable."""
        version, before = self.release.version, self.before
        back = before is not None and before.version > version
        reason = one_line(self.release.reason)
        said = f"The league {'went back to' if back else 'released'} version {version}{': ' if reason else ''}{reason}"
        ending = "It is in use now." if self.taken else "It waits for your word: hanse-client update."
        return f"{said.rstrip('.')}. {ending}"


class Updates:
    """What one shop fetches, and whom it believes: `authority` is the PEM by which the server is known."""

    def __init__(
        self, config: ClientConfig, identity: Ed25519PrivateKey, authority: bytes, traffic: Traffic
    ) -> None:
        self._identity = identity
        self._authority = authority
        self._control = Control(config.state)
        self._traffic = traffic
        self._releases = Releases.of(config)
        self.automatic = config.policy.updates == "automatic"

    @property
    def can_look(self) -> bool:
        """Whether a training has said where recognizers come from."""
        return self._control.aggregator() is not None

    def look(self, over: Callable[[], bool], *, take: bool) -> Found | None:
        """Return the release that is new here, in use now if it was to be taken; None when there is none.

        Ends early once `over` says so. Raises `ConfigError` before the first training, or when the disk does not take
        it; `ReleaseRefused`, `SignatureInvalid` and `WireError` when it is not to be taken; `stream.Refused` and
        `stream.Lost` when it can't be fetched, the latter after some tries.
        """
        address = self._control.aggregator()
        if address is None:
            raise ConfigError(
                "No training yet: the first one says where recognizers come from. Keep hanse-client run running."
            )
        pause = FIRST_PAUSE
        for left in reversed(range(TRIES)):
            try:
                with open_release_stream(
                    address, self._identity, self._authority, over, self._traffic.add
                ) as stream:
                    return self._heed(stream, take)
            except Lost:
                if not left or over():
                    raise
            _wait(pause * _JITTER.uniform(0.5, 1.5), over)
            pause *= 4
        return None

    def _heed(self, stream: ReleaseStream, take: bool) -> Found | None:
        before = self._releases.in_use()
        signed = stream.latest(self._releases.number())
        if signed is None:
            return None
        release = self._releases.consider(signed)
        if take:
            self._releases.take(release, self._affordable(release, stream))
        self._traffic.save()
        return Found(release, before, take)

    def _affordable(self, release: Release, stream: ReleaseStream) -> Fetch:
        """Return how the files are fetched: while this month's traffic allows all that are left."""
        left = sum(file.size for file in release.files)

        def fetch(file: ReleasedFile) -> Iterable[Buffer]:
            nonlocal left
            reason = self._traffic.exceeded_by(left, "the new recognizer has")
            if reason is not None:
                raise ReleaseRefused(reason)
            left -= file.size
            return stream.pieces(file)

        return fetch


class UpdateKeeper:
    """Looks from time to time while entered, in a thread of its own, and only while `may` says so.

    `note` hears a kind and a line: of each release once, and of what speaks against it once while it stays the same.
    """

    def __init__(self, updates: Updates, may: Callable[[], bool], note: Callable[[str, str], None]) -> None:
        self._updates = updates
        self._may = may
        self._note = note
        self._told = ""
        self._ending = threading.Event()
        self._nudged = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="updates", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join(END_SECONDS)

    def nudge(self) -> None:
        """Have it look soon. For any thread."""
        self._nudged.set()

    def _keep(self) -> None:
        due, earliest = math.inf, 0.0
        was = False
        while not self._ending.wait(POLL_SECONDS):
            now = time.monotonic()
            may = self._may()
            if self._nudged.is_set() or (may and not was):
                self._nudged.clear()
                due = min(due, max(earliest, now + _JITTER.uniform(0, SPREAD_SECONDS)))
            was = may
            if may and now >= due:
                self._look()
                now = time.monotonic()
                due, earliest = now + LOOK_SECONDS * _JITTER.uniform(0.8, 1.2), now + REST_SECONDS

    def _look(self) -> None:
        if not self._updates.can_look:
            return
        try:
            found = self._updates.look(
                lambda: self._ending.is_set() or not self._may(), take=self._updates.automatic
            )
        except (Lost, NotServed) as error:
            log.info("No recognizer was looked for: %s", error)
        except (HanseError, Refused) as error:
            self._tell("not-taken", f"A recognizer that the league released was not taken: {error}")
        except Exception:  # the next look may do better
            log.exception("Looking for a recognizer failed.")
        else:
            if found is not None:
                self._tell("release", found.told())

    def _tell(self, kind: str, text: str) -> None:
        text = one_line(text)
        if text != self._told:
            self._told = text
            self._note(kind, text)


def one_line(text: str) -> str:
    """Return `text`, from outside, on one line and printable."""
    return printable(" ".join(text.split()))


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not over():
        time.sleep(POLL_SECONDS)
