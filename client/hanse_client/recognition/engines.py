"""Which engine serves, which one comes next, and when nobody uses the last one any more.

    engines = Engines(first)
    with engines.in_use() as (engine, _): ...     # for one request: it ends on the engine that it began with
    engines.announce(second)                       # from now on, who adds photos adds them for both
    engines.switch(second)                         # from now on, requests begin on the second

Read-copy-update [1]: requests never wait for a switch. Whoever changes what serves waits until all that began before
have ended.

References:
[1] McKenney, Slingwine 1998, "Read-copy update: using execution history to solve concurrency problems".
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.engine import Engine


class _Epoch:
    """What serves between two changes, and how many requests began in it and have not ended."""

    def __init__(self, serving: "Engine", coming: "Engine | None") -> None:
        self.serving = serving
        self.coming = coming
        self.users = 0


class Engines:
    """The engine that serves, and the one that comes. One thread changes them; any number use them."""

    def __init__(self, first: "Engine") -> None:
        self._changed = threading.Condition()
        self._epoch = _Epoch(first, None)

    @property
    def serving(self) -> "Engine":
        """The engine on which requests begin now."""
        return self._epoch.serving

    @contextmanager
    def in_use(self) -> Iterator[tuple["Engine", "Engine | None"]]:
        """Yield the engine that serves and the one that is announced, and hold on to both meanwhile."""
        with self._changed:
            epoch = self._epoch
            epoch.users += 1
        try:
            yield epoch.serving, epoch.coming
        finally:
            with self._changed:
                epoch.users -= 1
                self._changed.notify_all()

    def announce(self, coming: "Engine | None") -> None:
        """Announce the engine that comes, or that none does; return when all who did not know it have ended."""
        self._change(lambda serving: _Epoch(serving, coming))

    def switch(self, engine: "Engine") -> None:
        """Let requests begin on `engine`; return when all that began on the one before have ended."""
        self._change(lambda _: _Epoch(engine, None))

    def _change(self, made: Callable[["Engine"], _Epoch]) -> None:
        with self._changed:
            before = self._epoch
            self._epoch = made(before.serving)
            self._changed.wait_for(lambda: before.users == 0)
