"""Another recognizer takes over under load: nobody is refused, and no answer mixes two of them."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.recognition import following
from hanse_client.recognition.answers import Found
from hanse_client.recognition.service import Recognition
from hanse_common.errors import GalleryError
from hanse_common.vision.photo import decode

from .shop import Shelf, picture, release

WAIT = 20.0
STABLE = 60

Open = Callable[..., Recognition]


def until(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def serves(recognition: Recognition, shelf: Shelf, which: tuple[int, int]) -> Callable[[], bool]:
    return lambda: recognition.status().recognizer.hex() == shelf.made[which].digest


def filled(recognition: Recognition, count: int = STABLE) -> None:
    for number in range(count):
        recognition.put(Product(sku=f"p{number}"), [picture(number)])


class Truth:
    """What each recognizer says of each picture, as the league's own code computes it, and not the engine."""

    def __init__(self, shelf: Shelf) -> None:
        images = [picture(number) for number in range(STABLE)]
        stored = [decode(Gallery.prepare(image)) for image in images]
        self.shares: dict[bytes, NDArray[np.float64]] = {}
        self.similarities: dict[bytes, NDArray[np.float32]] = {}
        for digest, recognizer in shelf.known.items():
            features = recognizer.features(images)
            self.shares[digest] = recognizer.probabilities(features)
            rows = recognizer.embeddings(recognizer.features(stored))
            self.similarities[recognizer.embedding_digest()] = recognizer.embeddings(features) @ rows.T

    def faults(self, number: int, found: Found) -> list[str]:
        """Return what is wrong with the answer for picture `number`: each similarity is that of one embedding."""
        expected = self.similarities[found.embedding][number]
        faults = [] if found.matches[0].product.sku == f"p{number}" else [f"p{number} is not the first"]
        for match in found.matches:
            kind, other = match.product.sku[0], int(match.product.sku[1:])
            if kind == "p" and abs(match.similarity - expected[other]) > 1e-3:
                faults.append(
                    f"{match.product.sku} for {number}: {match.similarity}, expected {expected[other]}"
                )
        return faults


class Load:
    """Threads that ask until told to stop. `faults` are failed or wrong answers, `done` counts answers by kind."""

    def __init__(self, recognition: Recognition, truth: Truth) -> None:
        self.faults: list[str] = []
        self.done: dict[str, int] = {}
        self.embeddings: set[bytes] = set()
        self._recognition, self._truth = recognition, truth
        self._stop = threading.Event()
        kinds = (self._classify, self._search, self._search, self._similar, self._change, self._change)
        self._threads = [
            threading.Thread(target=self._ask, args=(kind, seed)) for seed, kind in enumerate(kinds)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)

    def answered(self, count: int) -> bool:
        """Return whether there were more than so many answers."""
        return sum(self.done.values()) > count

    def _ask(self, kind: Callable[[int, int], list[str]], seed: int) -> None:
        step = 0
        while not self._stop.is_set():
            try:
                found = kind(seed, step)
            except Exception as error:
                found = [f"{kind.__name__}: {type(error).__name__}: {error}"]
            self.faults += found
            self.done[kind.__name__] = self.done.get(kind.__name__, 0) + 1
            step += 1

    def _classify(self, seed: int, step: int) -> list[str]:
        number = (7 * seed + step) % STABLE
        answer = self._recognition.classify(picture(number))
        best = float(self._truth.shares[answer.recognizer][number].max())
        fits = abs(answer.classes[0].probability - best) < 1e-3
        return [] if fits else [f"{number}: {answer}, expected {best}"]

    def _search(self, seed: int, step: int) -> list[str]:
        number = (7 * seed + step) % STABLE
        both = self._recognition.recognize(picture(number), k=20, top=1)
        self.embeddings.add(both.found.embedding)
        return self._truth.faults(number, both.found)

    def _similar(self, seed: int, step: int) -> list[str]:
        number = (7 * seed + step) % STABLE
        found = self._recognition.similar(f"p{number}", k=10)
        return [] if len(found.matches) == 10 else [f"similar p{number}: {len(found.matches)} found"]

    def _change(self, seed: int, step: int) -> list[str]:
        """Put a product, which is found at once, and remove it, which is not found any more."""
        sku, image = f"n{seed}{step:05}", picture(100_000 + 10_000 * seed + step)
        self._recognition.put(Product(sku=sku), [image])
        found = [match.product.sku for match in self._recognition.search(image, k=5).matches]
        faults = [] if found[:1] == [sku] else [f"{sku} was put and is not found: {found}"]
        self._recognition.remove(sku)
        if sku in {match.product.sku for match in self._recognition.search(image, k=100).matches}:
            faults.append(f"{sku} was removed and is found")
        return faults


def test_under_load_no_request_fails_and_no_answer_mixes_two_recognizers(
    config: ClientConfig, shelf: Shelf, following_at_once: Open
) -> None:
    recognition = following_at_once(config)
    filled(recognition)
    truth = Truth(shelf)
    with Load(recognition, truth) as load:
        swaps = [(1, 0), (0, 1), (0, 0), (2, 0), (1, 0), (0, 0)]
        for number, which in enumerate(swaps, start=2):
            release(config, shelf.made[which], number)
            until(f"swap {number}", serves(recognition, shelf, which))
            before = sum(load.done.values())
            until("some answers", partial(load.answered, before + 20))
    assert not load.faults, load.faults[:5]
    assert set(load.done) == {"_classify", "_search", "_similar", "_change"} and min(load.done.values()) > 5
    assert load.embeddings == {one.embedding_digest() for one in shelf.known.values()}
    until("the old ones to be forgotten", lambda: len(recognition.gallery.embeddings()) == 1)
    assert recognition.gallery.embeddings() == [recognition.status().embedding]


def test_a_request_ends_on_the_recognizer_it_began_with(
    config: ClientConfig, shelf: Shelf, following_at_once: Open
) -> None:
    """Requests are held up after the network, until requests begin on the other one: then they search."""
    recognition = following_at_once(config)
    filled(recognition, 20)
    gallery, engines, batcher = recognition.gallery, recognition._engines, recognition._batcher
    old, first = recognition.status().embedding, engines.serving
    submit, calibrate = batcher.submit, gallery.open_set.calibrate
    begun = threading.Semaphore(0)

    def slow(engine: Any, image: Any, **how: Any) -> Any:
        future = submit(engine, image, **how)
        if engine is first:
            future.result(WAIT)
            begun.release()
            until("the other one", lambda: engines.serving is not first)
        return future

    answers: list[Found] = []
    requests = [
        threading.Thread(target=lambda: answers.append(recognition.search(picture(3), k=5))),
        threading.Thread(target=lambda: answers.append(recognition.recognize(picture(3), k=5).found)),
    ]

    def just_before_the_switch(embedding: bytes, *rest: Any) -> Any:
        if embedding != old:
            batcher.submit = slow  # type: ignore[method-assign]
            for request in requests:
                request.start()
                assert begun.acquire(timeout=WAIT)
        return calibrate(embedding, *rest)

    gallery.open_set.calibrate = just_before_the_switch  # type: ignore[method-assign, assignment]
    release(config, shelf.made[1, 0], 2)
    until("the switch", lambda: engines.serving is not first)
    for request in requests:
        request.join(WAIT)
    assert len(answers) == 2
    for found in answers:
        assert found.embedding == old and found.matches[0].product.sku == "p3"
        assert found.matches[0].similarity > 0.95 and len(found.matches) == 5
    again = recognition.search(picture(3), k=5)
    assert again.embedding != old and again.matches[0].product.sku == "p3"


def test_what_is_put_while_another_comes_is_found_as_soon_as_it_serves(
    config: ClientConfig, shelf: Shelf, following_at_once: Open
) -> None:
    """The moment that counts: after the last look for photos without a vector, before the switch."""
    recognition = following_at_once(config)
    filled(recognition, 20)
    gallery, engines = recognition.gallery, recognition._engines
    calibrate, switch = gallery.open_set.calibrate, engines.switch
    coming = bytes.fromhex(shelf.made[1, 0].digest)
    found: list[str] = []

    def put_now(embedding: bytes, *rest: Any) -> Any:
        if embedding == shelf.known[coming].embedding_digest():
            recognition.put(Product(sku="late"), [picture(777)])
        return calibrate(embedding, *rest)

    def search_now(engine: Any) -> None:
        switch(engine)
        found.extend(match.product.sku for match in recognition.search(picture(777), k=1).matches)

    gallery.open_set.calibrate = put_now  # type: ignore[method-assign, assignment]
    engines.switch = search_now  # type: ignore[method-assign]
    release(config, shelf.made[1, 0], 2)
    until("the switch", lambda: found)
    assert found == ["late"]


def test_while_photos_are_embedded_anew_the_old_one_answers_and_status_tells(
    config: ClientConfig, shelf: Shelf, following_at_once: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "CHUNK", 4)
    recognition = following_at_once(config)
    filled(recognition, 20)
    held, put_vectors = threading.Semaphore(0), recognition.gallery.put_vectors

    def one_at_a_time(*arguments: Any) -> None:
        assert held.acquire(timeout=WAIT)
        put_vectors(*arguments)

    recognition.gallery.put_vectors = one_at_a_time  # type: ignore[method-assign, assignment]
    old = recognition.status().recognizer
    release(config, shelf.made[1, 0], 2)

    def done_so_far() -> int:
        rebuild = recognition.status().rebuild
        return -1 if rebuild is None else rebuild.done

    for done in (0, 4, 8):
        until(f"{done} of 20", partial(lambda wanted: done_so_far() == wanted, done))
        status = recognition.status()
        assert status.recognizer == old and status.rebuild is not None and status.rebuild.total == 20
        assert recognition.search(picture(5), k=1).matches[0].product.sku == "p5"
        held.release()
    for _ in range(3):
        held.release()
    until("the switch", serves(recognition, shelf, (1, 0)))
    until("the end", lambda: recognition.status().rebuild is None)


def test_nothing_is_embedded_anew_when_the_head_alone_is_another(
    config: ClientConfig, shelf: Shelf, following_at_once: Open
) -> None:
    recognition = following_at_once(config)
    filled(recognition, 10)
    recognition.gallery.put_vectors = None  # type: ignore[method-assign, assignment]
    before = recognition.status()
    answer = recognition.classify(picture(1))
    release(config, shelf.made[0, 1], 2)
    until("the swap", serves(recognition, shelf, (0, 1)))
    after = recognition.status()
    assert after.embedding == before.embedding and after.problem is None and after.version == 1
    assert recognition.classify(picture(1)) != answer
    assert recognition.search(picture(4), k=1).matches[0].product.sku == "p4"


def test_one_that_cannot_be_loaded_leaves_the_old_one_serving(
    config: ClientConfig, shelf: Shelf, following_at_once: Open, caplog: pytest.LogCaptureFixture
) -> None:
    recognition = following_at_once(config)
    filled(recognition, 5)
    release(config, shelf.made[1, 0], 2)
    until("the swap", serves(recognition, shelf, (1, 0)))
    damaged = shelf.made[2, 0]
    folder = config.recognizers_path / damaged.digest
    folder.mkdir()
    for name, data in damaged.files.items():
        (folder / name).write_bytes(data[:-1] if name == "model.safetensors" else data)
    (config.recognizers_path / "link").symlink_to(folder.name)
    (config.recognizers_path / "link").rename(config.recognizers_path / "current")
    until("the problem", lambda: recognition.status().problem)
    status = recognition.status()
    assert status.problem is not None and "model.safetensors" in status.problem
    assert status.recognizer.hex() == shelf.made[1, 0].digest
    assert recognition.search(picture(4), k=1).matches[0].product.sku == "p4"
    recognition.gallery.put(Product(sku="other"), [Gallery.prepare(picture(50))])
    until("photos of others", lambda: not recognition.gallery.missing(status.embedding, 1))
    time.sleep(0.1)
    assert caplog.text.count("The recognizer that serves goes on") == 1, "told once, and not at each look"
    release(config, shelf.made[0, 0], 4)
    until("a sound one", serves(recognition, shelf, (0, 0)))
    assert recognition.status().problem is None


def test_what_goes_wrong_is_told_once_each_time(
    config: ClientConfig, following_at_once: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    recognition = following_at_once(config, tell=told.append)
    looks: list[None] = []

    def full(*_: Any) -> Any:
        looks.append(None)
        raise GalleryError("the disk is full")

    for times in (1, 2):
        before = len(looks)
        with monkeypatch.context() as patch:
            patch.setattr(recognition.gallery, "missing", full)
            until("some looks", lambda before=before: len(looks) > before + 3)
        until("a look that goes well", lambda: recognition._follower._told is None)
        assert told == times * ["What changed among your products cannot be followed: the disk is full"]


def test_what_personalize_did_is_taken_up_and_told(config: ClientConfig, following_at_once: Open) -> None:
    told: list[str] = []
    recognition = following_at_once(config, tell=told.append)
    before = recognition.status().recognizer
    config.personal_path.mkdir(parents=True)
    (config.personal_path / "head.json").write_text("{}")
    until("the change", lambda: told)
    assert told == ["What `personalize` did last holds from now on."]
    assert recognition.status().recognizer == before


def test_after_an_interrupted_rebuild_the_earlier_one_serves_until_it_is_done(
    config: ClientConfig, shelf: Shelf, following_at_once: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recognition.open(config) as recognition:
        filled(recognition, 20)
    release(config, shelf.made[1, 0], 2)
    with Gallery.open(config.gallery_path) as gallery:  # as far as the rebuild had come
        engine = shelf.known[bytes.fromhex(shelf.made[1, 0].digest)]
        for digest in gallery.missing(engine.embedding_digest(), 3):
            data = gallery.photo(digest)
            assert data is not None
            rows = engine.embeddings(engine.features([decode(data)]))
            gallery.put_vectors(engine.embedding_digest(), {digest: rows[0]})
    go_on, embed = threading.Event(), following.embed_missing

    def later(*arguments: Any, **settings: Any) -> bool:
        assert go_on.wait(WAIT)
        return embed(*arguments, **settings)

    monkeypatch.setattr(following, "embed_missing", later)
    recognition = following_at_once(config)
    assert serves(recognition, shelf, (0, 0))()
    assert recognition.search(picture(17), k=1).matches[0].product.sku == "p17"
    go_on.set()
    until("the new one", serves(recognition, shelf, (1, 0)))
    assert recognition.search(picture(17), k=1).matches[0].product.sku == "p17"


def test_photos_that_another_process_added_are_embedded_and_the_threshold_is_calibrated(
    config: ClientConfig, following_at_once: Open
) -> None:
    recognition = following_at_once(config)
    with Gallery.open(config.gallery_path) as other:
        for number in range(40):
            other.put(Product(sku=f"p{number}"), [Gallery.prepare(picture(number))])
    embedding = recognition.status().embedding
    until("the vectors", lambda: recognition.gallery.count_vectors(embedding) == 40)
    assert recognition.search(picture(33), k=1).matches[0].product.sku == "p33"
    until("a threshold", lambda: recognition.gallery.open_set.rejection(embedding).calibrated)
    first = recognition.gallery.open_set.rejection(embedding).impostor
    filled(recognition, 60)
    until("another", lambda: recognition.gallery.open_set.rejection(embedding).impostor > first)


def test_closing_in_the_middle_of_a_rebuild_ends_it(
    config: ClientConfig, shelf: Shelf, following_at_once: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "CHUNK", 1)
    recognition = following_at_once(config)
    filled(recognition, 30)
    release(config, shelf.made[1, 0], 2)
    until("the rebuild", lambda: recognition.status().rebuild)
    closing = threading.Thread(target=recognition.close)
    closing.start()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert recognition._engines.serving.digest.hex() == shelf.made[0, 0].digest
