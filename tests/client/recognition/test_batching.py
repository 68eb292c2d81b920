"""Photos of many threads in batches: what goes together, in which order, and who bears a failure."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest
from PIL import Image

from hanse_client.recognition.batching import PIECE, Batcher
from hanse_client.recognition.engine import Engine
from hanse_common.errors import Busy, PhotoUnreadable

WAIT = 30.0


class Scripted:
    """Answers with the photo itself, when it is let to; a photo of -1 fails with all that go with it."""

    def __init__(self, largest: int = 16, free: bool = False) -> None:
        self.largest = largest
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.free = free

    def prepare(self, image: int) -> int:
        if image == -2:
            raise PhotoUnreadable("photo: found no picture.")
        return image

    def see(self, photos: list[int]) -> list[int]:
        self.batches.append(list(photos))
        self.begun.release()
        if not self.free:
            assert self.may_end.acquire(timeout=WAIT)
        if -1 in photos:
            raise RuntimeError("a broken photo")
        return photos

    def let_all(self) -> None:
        self.free = True
        self.may_end.release()


def submit(batcher: Batcher, engine: Scripted, photo: int) -> "Future[Any]":
    return cast("Future[Any]", batcher.submit(cast(Engine, engine), cast(Image.Image, photo)))


def see_all(batcher: Batcher, engine: Scripted, photos: range) -> list[Any]:
    return batcher.see_all(cast(Engine, engine), cast("list[Image.Image]", photos))


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def open_batcher(engine: Scripted) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(**settings: Any) -> Batcher:
        made.append(Batcher(**settings))
        return made[-1]

    yield make
    engine.let_all()
    for batcher in made:
        batcher.close()


def occupied(batcher: Batcher, engine: Scripted) -> "Future[Any]":
    """Have the thread compute a photo, which ends when it is let to."""
    first = submit(batcher, engine, 0)
    assert engine.begun.acquire(timeout=WAIT)
    return first


def test_a_photo_that_finds_the_thread_idle_is_not_kept_waiting(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=10 * WAIT)
    engine.let_all()
    assert submit(batcher, engine, 7).result(WAIT) == 7
    assert submit(batcher, engine, 8).result(WAIT) == 8, "one by one, nobody waits for company"


def test_what_comes_while_a_batch_is_computed_goes_together_in_order(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=0)
    occupied(batcher, engine)
    futures = [submit(batcher, engine, photo) for photo in range(1, 41)]
    engine.let_all()
    assert [future.result(WAIT) for future in futures] == list(range(1, 41))
    assert engine.batches == [[0], [*range(1, 17)], [*range(17, 33)], [*range(33, 41)]]


def test_after_a_batch_the_thread_waits_for_those_who_ask_again_together(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=WAIT)
    occupied(batcher, engine)
    first = [submit(batcher, engine, photo) for photo in range(3)]
    engine.let_all()
    assert [future.result(WAIT) for future in first] == [0, 1, 2]
    again = [submit(batcher, engine, photo) for photo in range(3)]
    assert [future.result(WAIT) for future in again] == [0, 1, 2]
    assert [len(batch) for batch in engine.batches] == [1, 3, 3]


def test_a_photo_that_fails_fails_alone(engine: Scripted, open_batcher: Callable[..., Batcher]) -> None:
    batcher = open_batcher(wait_seconds=0)
    occupied(batcher, engine)
    good, bad, also_good = (submit(batcher, engine, photo) for photo in (1, -1, 2))
    engine.let_all()
    assert (good.result(WAIT), also_good.result(WAIT)) == (1, 2)
    with pytest.raises(RuntimeError, match="broken"):
        bad.result(WAIT)
    with pytest.raises(PhotoUnreadable):
        submit(batcher, engine, -2)
    assert submit(batcher, engine, 3).result(WAIT) == 3, "and the thread goes on"


def test_too_many_are_refused_and_come_in_again_when_there_is_room(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(queue=4, wait_seconds=0)
    occupied(batcher, engine)
    waiting = [submit(batcher, engine, photo) for photo in range(4)]
    with pytest.raises(Busy, match="4 photos wait already") as refused:
        submit(batcher, engine, 5)
    assert refused.value.exit_code == 29 and refused.value.retry_after > 0
    with pytest.raises(Busy):
        batcher.submit_all(cast(Engine, engine), cast("list[Image.Image]", [1, 2, 3, 4, 5]))
    engine.let_all()
    assert [future.result(WAIT) for future in waiting] == [0, 1, 2, 3]
    assert submit(batcher, engine, 5).result(WAIT) == 5


def test_what_is_cancelled_in_time_is_not_computed(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=0)
    occupied(batcher, engine)
    kept, given_up = submit(batcher, engine, 1), submit(batcher, engine, 2)
    assert given_up.cancel()
    engine.let_all()
    assert kept.result(WAIT) == 1
    with pytest.raises(CancelledError):
        given_up.result(WAIT)
    assert engine.batches == [[0], [1]]


def test_no_batch_mixes_two_engines(engine: Scripted, open_batcher: Callable[..., Batcher]) -> None:
    batcher = open_batcher(wait_seconds=0)
    occupied(batcher, engine)
    other = Scripted(free=True)
    futures = [submit(batcher, (engine, other)[photo > 2], photo) for photo in (1, 2, 3, 4)]
    last = submit(batcher, engine, 1)
    engine.let_all()
    assert [future.result(WAIT) for future in futures] == [1, 2, 3, 4] and last.result(WAIT) == 1
    assert engine.batches == [[0], [1, 2], [1]] and other.batches == [[3, 4]]


def test_a_request_waits_for_one_piece_of_patient_work_at_most(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=0)
    found: list[Any] = []
    patient = threading.Thread(target=lambda: found.extend(see_all(batcher, engine, range(100, 150))))
    patient.start()
    assert engine.begun.acquire(timeout=WAIT)
    request = submit(batcher, engine, 1)
    engine.let_all()
    assert request.result(WAIT) == 1
    patient.join(WAIT)
    assert found == list(range(100, 150))
    assert all(len(batch) <= PIECE + 1 for batch in engine.batches)
    place = next(place for place, batch in enumerate(engine.batches) if 1 in batch)
    assert place <= 1


def test_patient_work_waits_for_room(engine: Scripted, open_batcher: Callable[..., Batcher]) -> None:
    batcher = open_batcher(queue=PIECE, wait_seconds=0)
    occupied(batcher, engine)
    submit(batcher, engine, 1)
    found: list[Any] = []
    patient = threading.Thread(target=lambda: found.extend(see_all(batcher, engine, range(20))))
    patient.start()
    engine.let_all()
    patient.join(WAIT)
    assert found == list(range(20))


def test_closing_answers_what_waits_and_takes_nothing_more(engine: Scripted) -> None:
    batcher = Batcher(wait_seconds=WAIT)
    occupied(batcher, engine)
    waiting = [submit(batcher, engine, photo) for photo in range(20)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    engine.let_all()
    closing.join(WAIT)
    assert not closing.is_alive() and [future.result(0) for future in waiting] == list(range(20))
    for ask in (lambda: submit(batcher, engine, 1), lambda: see_all(batcher, engine, range(2))):
        with pytest.raises(Busy, match="about to end"):
            ask()


def test_many_threads_each_get_their_own_answers(open_batcher: Callable[..., Batcher]) -> None:
    batcher, free = open_batcher(), Scripted(free=True)
    wrong: list[int] = []

    def ask(start: int) -> None:
        mine = range(start, start + 100)
        wrong.extend(photo for photo in mine if submit(batcher, free, photo).result(WAIT) != photo)

    threads = [threading.Thread(target=ask, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong and sum(map(len, free.batches)) == 800


def test_a_photo_that_goes_alone_goes_in_no_batch(
    engine: Scripted, open_batcher: Callable[..., Batcher]
) -> None:
    batcher = open_batcher(wait_seconds=0.0)
    futures = [submit(batcher, engine, 0)]
    engine.begun.acquire(timeout=WAIT)
    for photo, alone in ((1, False), (2, True), (3, True), (4, False), (5, False)):
        asked = batcher.submit(cast(Engine, engine), cast(Image.Image, photo), alone=alone)
        futures.append(cast("Future[Any]", asked))
    engine.let_all()
    assert [future.result(timeout=WAIT) for future in futures] == [0, 1, 2, 3, 4, 5]
    assert engine.batches == [[0], [1], [2], [3], [4, 5]]
