"""Which engine serves: no switch overtakes a request, and no request waits for a switch."""

import threading
from collections.abc import Callable
from typing import Any, cast

from hanse_client.recognition.engine import Engine
from hanse_client.recognition.engines import Engines

WAIT = 30.0
OLD, NEW, NEXT = (cast(Engine, name) for name in ("old", "new", "next"))


class Changing(threading.Thread):
    """Calls a change and tells when it has returned."""

    def __init__(self, change: Callable[[Any], None], engine: Engine | None) -> None:
        super().__init__(target=change, args=(engine,))
        self.start()


def test_a_switch_waits_for_those_who_began_before_and_for_nobody_else() -> None:
    engines = Engines(OLD)
    with engines.in_use() as before:
        change = Changing(engines.switch, NEW)
        while engines.serving is OLD:
            pass
        with engines.in_use() as after:
            assert (before, after) == ((OLD, None), (NEW, None))
            change.join(0.05)
            assert change.is_alive()
    change.join(WAIT)
    assert not change.is_alive()
    with engines.in_use():
        engines_changed = Changing(engines.switch, NEXT)
        while engines.serving is NEW:
            pass
        assert engines_changed.is_alive()
    engines_changed.join(WAIT)


def test_a_new_request_does_not_hold_up_a_switch() -> None:
    engines = Engines(OLD)
    engines.announce(NEW)
    release = threading.Event()
    entered = threading.Event()
    first = engines.in_use()
    first.__enter__()
    change = Changing(engines.switch, NEW)
    while engines.serving is OLD:
        pass

    def late() -> None:
        with engines.in_use():
            entered.set()
            release.wait(WAIT)

    other = threading.Thread(target=late)
    other.start()
    assert entered.wait(WAIT)
    first.__exit__(None, None, None)
    change.join(WAIT)
    assert not change.is_alive(), "who began on the new one does not count"
    release.set()
    other.join(WAIT)


def test_an_announcement_returns_when_everyone_who_adds_knows() -> None:
    engines = Engines(OLD)
    with engines.in_use() as unaware:
        change = Changing(engines.announce, NEW)
        while True:
            with engines.in_use() as aware:
                if aware[1] is NEW:
                    break
        assert unaware == (OLD, None) and change.is_alive() and engines.serving is OLD
    change.join(WAIT)
    assert not change.is_alive()
    engines.announce(None)
    with engines.in_use() as found:
        assert found == (OLD, None)
