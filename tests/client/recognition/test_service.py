"""The core: what a shop's photos show, and which of its products they are of."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.client.released import CLASSES, Made

from hanse_client.config import ClientConfig
from hanse_client.gallery.bounds import MAX_VIEWS
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.rejection import DEFAULT_THRESHOLD, Rejection
from hanse_client.recognition.service import Recognition
from hanse_common.errors import Busy, ConfigError, GalleryError, RecognizerError
from hanse_common.vision.photo import content_digest, decode
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import SmallCnn

from .shop import DIMENSION, Shelf, picture, release, shop


def fill(recognition: Recognition, count: int = 12) -> None:
    for number in range(count):
        product = Product(
            sku=f"p{number}", title=f"Thing {number}", category="even" if number % 2 == 0 else "odd"
        )
        recognition.put(product, [picture(number), picture(number, 50, 42)])


def view(seed: int, number: int) -> Image.Image:
    """Return a picture that has much of `picture(seed)`, another one for each number."""
    return Image.blend(picture(seed), picture(100_000 + 1000 * number + seed), 0.2)


def test_it_says_what_the_recognizer_says(recognition: Recognition, shelf: Shelf) -> None:
    (recognizer,) = (one for one in shelf.known.values() if one.digest() == recognition.status().recognizer)
    image = picture(3)
    answer = recognition.classify(image)
    shares = recognizer.predict([image])[0]
    assert [guess.label for guess in answer.classes] == [CLASSES[i] for i in np.argsort(-shares)]
    assert np.allclose(
        [guess.probability for guess in answer.classes], sorted(shares, reverse=True), atol=1e-4
    )
    assert answer.recognizer == recognizer.digest() and answer.personal is None
    assert len(recognition.classify(image, top=2).classes) == 2
    embedded = recognition.embed(image)
    assert np.allclose(embedded.vector, recognizer.embeddings(recognizer.features([image]))[0], atol=1e-4)
    assert embedded.embedding == recognizer.embedding_digest()
    assert np.array_equal(recognition.submit(image).result(30).embedding, embedded.vector)


def test_products_are_found_by_photos_of_them(recognition: Recognition) -> None:
    fill(recognition)
    found = recognition.search(picture(5), k=3)
    assert found.matches[0].product.sku == "p5" and len(found.matches) == 3
    assert found.matches[0].similarity > 0.95 and found.known
    assert found.embedding == recognition.status().embedding
    odd = recognition.search(picture(4), where=Filter(category="odd"), k=20)
    assert {match.product.category for match in odd.matches} == {"odd"} and len(odd.matches) == 6
    both = recognition.recognize(picture(5), k=3, top=1)
    assert both.found == found and both.classification == recognition.classify(picture(5), top=1)
    assert [one.matches[0].product.sku for one in recognition.search_all([picture(2), picture(7)], k=1)] == [
        "p2",
        "p7",
    ]
    assert recognition.search_all([]) == []


def test_products_are_found_by_words(recognition: Recognition) -> None:
    fill(recognition)
    found = recognition.search(text="Thing 11", k=2)
    assert found.matches[0].product.sku == "p11" and found.known is None
    with pytest.raises(GalleryError, match="neither a photo nor a text"):
        recognition.search()


def test_similar_products_leave_the_product_out(recognition: Recognition) -> None:
    fill(recognition)
    recognition.put(Product(sku="twin"), [picture(5, 49, 41)])
    found = recognition.similar("p5", k=4)
    assert found.matches[0].product.sku == "twin" and len(found.matches) == 4
    assert "p5" not in {match.product.sku for match in found.matches}
    assert found.known is None  # a product of the shop was asked about, no photo
    assert {m.product.category for m in recognition.similar("p5", where=Filter(category="even")).matches} == {
        "even"
    }
    with pytest.raises(GalleryError, match="'none'"):
        recognition.similar("none")
    recognition.put(Product(sku="bare"))
    with pytest.raises(GalleryError, match="no photo"):
        recognition.similar("bare")


def test_a_product_is_found_from_when_it_is_put_until_it_is_removed(recognition: Recognition) -> None:
    (digest,) = recognition.put(Product(sku="one"), [picture(1)])
    assert recognition.search(picture(1)).matches[0].product.sku == "one"
    recognition.put(Product(sku="one", title="renamed"))
    assert recognition.search(picture(1)).matches[0].product.title == "renamed"
    assert recognition.remove_photo("one", digest) and not recognition.remove_photo("one", digest)
    assert recognition.search(picture(1)).matches == ()
    assert recognition.search(picture(1)).known is False
    assert recognition.remove("one") and not recognition.remove("one")
    assert recognition.status().products == 0


def test_photos_are_embedded_as_they_are_stored(recognition: Recognition) -> None:
    (digest,) = recognition.put(Product(sku="large"), [picture(1, 1400, 1200)])
    stored = recognition.gallery.photo(digest)
    assert stored is not None
    (vector,) = recognition.gallery.vectors_of("large", recognition.status().embedding)
    assert np.allclose(recognition.embed(decode(stored)).vector, vector, atol=1e-5)


def test_too_many_photos_are_refused_before_any_work(recognition: Recognition) -> None:
    with pytest.raises(GalleryError, match=f"expected at most {MAX_VIEWS}"):
        recognition.put(Product(sku="many"), [picture(1)] * (MAX_VIEWS + 1))
    assert recognition.status().products == 0


def test_what_has_no_vector_yet_is_completed_by_the_first_search(
    recognition: Recognition, shelf: Shelf
) -> None:
    for number in range(40):
        recognition.gallery.put(Product(sku=f"p{number}"), [Gallery.prepare(picture(number))])
    assert recognition.search(picture(33)).matches[0].product.sku == "p33"
    assert recognition.gallery.missing(recognition.status().embedding, 1) == []
    recognition.gallery.put(Product(sku="late"), [Gallery.prepare(picture(99))])
    heard: list[tuple[int, int]] = []
    recognition.complete(lambda done, total: heard.append((done, total)))
    assert heard == [(40, 41)]


def test_a_reference_photo_that_is_damaged_does_not_stop_the_rest(
    recognition: Recognition, caplog: pytest.LogCaptureFixture
) -> None:
    jpeg = Gallery.prepare(picture(1))
    recognition.gallery.put(Product(sku="half"), [jpeg[: len(jpeg) // 2]])
    recognition.gallery.put(Product(sku="whole"), [Gallery.prepare(picture(2))])
    assert [match.product.sku for match in recognition.search(picture(2)).matches] == ["whole"]
    assert "cannot be read any more" in caplog.text


def test_a_reference_photo_that_is_not_what_was_written_does_not_stop_the_rest(
    recognition: Recognition, caplog: pytest.LogCaptureFixture
) -> None:
    jpeg = Gallery.prepare(picture(1))
    recognition.gallery.put(Product(sku="rotted"), [jpeg])
    recognition.gallery.put(Product(sku="whole"), [Gallery.prepare(picture(2))])
    with recognition.gallery._store.write() as db:
        number, stored = db.execute("SELECT id, jpeg FROM photo ORDER BY id LIMIT 1").fetchone()
        db.execute("UPDATE photo SET jpeg = ? WHERE id = ?", (stored[:-40] + bytes(40), number))
    with pytest.raises(GalleryError, match="not what was written"):
        recognition.gallery.photo(content_digest(jpeg))
    assert [match.product.sku for match in recognition.search(picture(2)).matches] == ["whole"]
    assert "cannot be read any more" in caplog.text


def test_many_threads_get_what_one_gets(recognition: Recognition) -> None:
    fill(recognition)
    alone = [recognition.classify(picture(number)).classes[0].label for number in range(12)]
    wrong: list[str] = []

    def ask(start: int) -> None:
        for step in range(24):
            number = (start + step) % 12
            answer = recognition.recognize(picture(number), k=1)
            if (answer.classification.classes[0].label, answer.found.matches[0].product.sku) != (
                alone[number],
                f"p{number}",
            ):
                wrong.append(f"{number}: {answer}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_threshold_that_is_calibrated_decides_what_is_known(recognition: Recognition) -> None:
    for number in range(40):
        recognition.put(Product(sku=f"p{number}"), [view(number, 0), view(number, 1)])
    rejection = recognition.gallery.open_set.calibrate(recognition.status().embedding)
    assert rejection.calibrated and recognition.status().threshold == rejection.threshold
    found = [recognition.search(picture(seed)) for seed in (*range(40), *range(1000, 1100))]
    assert all(one.threshold == rejection.threshold for one in found)
    assert [one.known for one in found] == [one.matches[0].similarity > rejection.threshold for one in found]
    assert all(one.known for one in found[:40]) and sum(bool(one.known) for one in found[40:]) < 20


def test_a_filter_does_not_change_what_is_known(recognition: Recognition) -> None:
    for number in range(12):
        category = "even" if number % 2 == 0 else "odd"
        product = Product(sku=f"p{number}", title=f"Thing {number}", category=category)
        recognition.put(product, [view(number, 0), view(number, 1)])
    nothing = recognition.search(picture(5), where=Filter(category="none"))
    assert nothing.matches == () and nothing.known
    assert recognition.search(picture(5), where=Filter(category="even"), k=1).known
    assert recognition.recognize(picture(5), where=Filter(category="even"), k=1).found.known
    assert [one.known for one in recognition.search_all([picture(5)], where=Filter(category="none"))] == [
        True
    ]
    assert recognition.search(picture(5), text="Thing 2", where=Filter(category="even"), k=1).known
    for where in (None, Filter(category="none"), Filter(category="even")):
        assert recognition.search(picture(77), where=where).known is False


def test_the_shops_own_photos_are_known_whatever_the_threshold(recognition: Recognition) -> None:
    """Products whose two photos are nothing like each other, so that none is near its product's mean."""
    for number in range(20):
        recognition.put(Product(sku=f"p{number}"), [picture(number), picture(100 + number)])
    embedding = recognition.status().embedding
    recognition.search(picture(1))
    with recognition.gallery._store.write() as db:
        db.execute("UPDATE rejection SET threshold = 0.999")
    assert recognition.gallery.open_set.rejection(embedding).threshold == 0.999
    for number in range(20):
        found = recognition.search(picture(number), k=1)
        assert found.matches[0].similarity < 0.999 and found.known
    assert not any(recognition.search(picture(seed)).known for seed in range(1000, 1020))


def test_what_is_added_and_removed_by_commands_calibrates_the_threshold_at_the_next_search(
    recognition: Recognition,
) -> None:
    def fill() -> None:
        for number in range(30):
            recognition.put(Product(sku=f"p{number}"), [view(number, 0), view(number, 1)])

    def searched() -> float:
        return recognition.search(picture(1)).threshold

    embedding = recognition.status().embedding
    fill()
    first = searched()
    rejection = recognition.gallery.open_set.rejection(embedding)
    assert rejection.calibrated and rejection.threshold == first != DEFAULT_THRESHOLD
    recognition.put(Product(sku="p30"), [picture(30)])
    assert searched() == first and recognition.gallery.open_set.rejection(embedding) == rejection
    for number in range(15):
        recognition.remove(f"p{number}")
    searched()
    assert recognition.gallery.open_set.rejection(embedding).impostor == 31
    for number in range(31):
        recognition.remove(f"p{number}")
    assert searched() == DEFAULT_THRESHOLD
    fill()
    recognition.complete()
    assert recognition.gallery.open_set.rejection(embedding) == rejection


def test_the_configuration_says_how_many_photos_may_be_turned_away(config: ClientConfig) -> None:
    found: list[Rejection] = []
    for share in (0.9, 0.1):
        search = config.search.model_copy(update={"false_reject": share, "false_accept": 0.1})
        with Recognition.open(config.model_copy(update={"search": search})) as recognition:
            if not found:
                for number in range(20):
                    recognition.put(
                        Product(sku=f"p{number}"), [picture(number + 100 * view) for view in range(3)]
                    )
            recognition.complete()
            found.append(recognition.status().rejection)
    assert [(one.targets.false_accept, one.targets.false_reject) for one in found] == [(0.1, 0.9), (0.1, 0.1)]
    strict, lenient = found
    assert lenient.threshold < strict.threshold
    assert lenient.false_reject is not None and lenient.false_reject <= 0.1
    assert strict.false_accept is not None and lenient.false_accept is not None
    assert strict.false_accept <= 0.1 < lenient.false_accept


def test_products_are_imported_from_a_file(recognition: Recognition, tmp_path: Path) -> None:
    lines = ["sku,title,photo"]
    for number in range(30):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(f"i{number},Imported {number},{number}.png")
    (tmp_path / "products.csv").write_text("\n".join([*lines, "bad,Bad,none.png"]) + "\n")
    heard: list[tuple[int, int]] = []
    done = recognition.import_products(
        tmp_path / "products.csv", lambda read, total: heard.append((read, total))
    )
    assert done.photos == 30 and done.problem_count == 1 and heard[-1][0] == heard[-1][1]
    status = recognition.status()
    assert recognition.gallery.missing(status.embedding, 1) == []
    assert recognition.gallery.open_set.rejection(status.embedding).calibrated
    assert recognition.search(picture(17)).matches[0].product.sku == "i17"


def test_status_tells_what_serves(recognition: Recognition, shelf: Shelf) -> None:
    fill(recognition, 2)
    status = recognition.status()
    assert status.recognizer.hex() == shelf.made[0, 0].digest and status.version == 1
    assert (status.dimension, status.classes, status.personal_labels) == (DIMENSION, CLASSES, ())
    assert (status.products, status.photos, status.rebuild, status.problem) == (2, 4, None, None)


def test_a_shop_without_a_recognizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recognizer: missing"):
        Recognition.open(shop(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecognizerError, match=r"card\.json"):
        Recognition.open(shop(tmp_path, recognizer=tmp_path / "empty"))


def test_a_net_trained_whole_classifies_and_keeps_products(tmp_path: Path) -> None:
    whole = Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=None, model=SmallCnn(width=4))
    Made(tmp_path / "whole", recipe=whole)
    with Recognition.open(shop(tmp_path, recognizer=tmp_path / "whole")) as recognition:
        assert len(recognition.classify(picture(1)).classes) == 3
        recognition.put(Product(sku="one"), [picture(1)])
        assert recognition.status().version is None and recognition.status().dimension == 0
        for ask in (recognition.search, recognition.embed, recognition.recognize):
            with pytest.raises(RecognizerError, match="has no embedding"):
                ask(picture(1))
        with pytest.raises(RecognizerError):
            recognition.similar("one")


def test_after_the_end_requests_are_told_so(config: ClientConfig, shelf: Shelf) -> None:
    recognition = Recognition.open(config, follow=True)
    recognition.close()
    with pytest.raises(Busy, match="about to end"):
        recognition.classify(picture(1))
    release(config, shelf.made[1, 0], 2)


def test_the_end_waits_for_those_who_were_answered_by_the_network(config: ClientConfig) -> None:
    recognition = Recognition.open(config)
    recognition.put(Product(sku="one"), [picture(1)])
    search, begun, may_go = recognition.gallery.search, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert may_go.wait(30)
        return search(*arguments)

    recognition.gallery.search = slow  # type: ignore[method-assign, assignment]
    found: list[str] = []
    request = threading.Thread(
        target=lambda: found.append(recognition.search(picture(1)).matches[0].product.sku)
    )
    closing = threading.Thread(target=recognition.close)
    request.start()
    assert begun.wait(30)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    may_go.set()
    request.join(30)
    closing.join(30)
    assert found == ["one"] and not closing.is_alive()
