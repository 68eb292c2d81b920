"""The gallery: what is put is found, filters leave k if there are k, and errors say what to do."""

import io
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pytest
from PIL import Image

from hanse_client.duplicates import SAME
from hanse_client.gallery import finding, followed
from hanse_client.gallery import index as indexes
from hanse_client.gallery.bounds import MAX_VIEWS
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Filter, Product
from hanse_common.errors import GalleryError
from hanse_common.vision import photo

OTHER = bytes(reversed(range(32)))


@pytest.fixture
def shelf(gallery: Gallery, jpeg, unit, embedding):
    """Thirty products of two photos each; returns their vectors (30, 2, d)."""
    vectors = unit(60).reshape(30, 2, -1)
    for number in range(30):
        product = Product(
            sku=f"{number:02}",
            price=Decimal(number),
            category=("shoes", "bags", "hats")[number % 3],
            attributes={"size": str(number % 5)},
        )
        gallery.put(product, [jpeg(2 * number), jpeg(2 * number + 1)], {embedding: vectors[number]})
    return vectors


def prototypes(vectors):
    means = vectors.mean(axis=1, dtype=np.float64)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def same(found, others) -> bool:
    """Whether the products are the same; similarities may differ in their last bits, by what was compared at once."""
    pairs = [
        (one, other)
        for matches, wanted in zip(found, others, strict=True)
        for one, other in zip(matches, wanted, strict=True)
    ]
    return all(
        (one.product, one.photo) == (other.product, other.photo) and abs(one.score - other.score) < 1e-6
        for one, other in pairs
    )


def test_products_come_by_the_mean_of_their_photos_and_name_the_nearest_one(
    gallery, shelf, unit, embedding
) -> None:
    queries = unit(7, seed=5)
    truth = queries @ prototypes(shelf).T
    for query, similarities, matches in zip(
        queries, truth, gallery.search(embedding, queries, 4), strict=True
    ):
        order = np.argsort(-similarities)[:4]
        assert [int(match.product.sku) for match in matches] == order.tolist()
        assert np.allclose([match.similarity for match in matches], similarities[order], atol=1e-6)
        assert [match.score for match in matches] == [match.similarity for match in matches]
        for match in matches:
            views = gallery.photos_of(match.product.sku)
            assert match.photo == views[int(np.argmax(shelf[int(match.product.sku)] @ query))]
            assert photo.content_digest(gallery.photo(match.photo)) == match.photo


@pytest.mark.parametrize("scanned", [0, 2000])
@pytest.mark.parametrize("where", [None, Filter(category="shoes")])
def test_the_very_picture_of_a_product_is_that_product_however_near_the_mean_of_another(
    gallery, jpeg, unit, embedding, monkeypatch, scanned, where
) -> None:
    monkeypatch.setattr(finding, "SCANNED", scanned)
    first, second, other = np.eye(unit(1).shape[1], dtype=np.float32)[:3]
    close = 0.9 * first + 0.19**0.5 * other
    seen = np.stack([first, second]), np.stack([close])
    for number, vectors in enumerate(seen):
        photos = [jpeg(10 * number + place) for place in range(len(vectors))]
        gallery.put(Product(sku=str(number), title="a shoe", category="shoes"), photos, {embedding: vectors})
    copied, visited = 0.995 * first + 0.0099**0.5 * second, 0.95 * first + 0.0975**0.5 * other
    for query, expected in ((first, "0"), (copied, "0"), (visited, "1")):
        queries = query.astype(np.float32)[np.newaxis]
        for text in (None, "shoe"):
            (alone,), (best, rest) = (gallery.search(embedding, queries, k, where, text)[0] for k in (1, 2))
            assert alone == best and best.product.sku == expected
            # Both have the same words.
            weight = 1.0 if text is None else 1 - finding.TEXT_WEIGHT
            assert best.score - rest.score == pytest.approx(weight * (best.looks - rest.looks), abs=1e-6)
            if expected == "0":
                assert best.similarity < rest.similarity and best.looks == best.nearest >= SAME


@pytest.mark.parametrize("scanned", [0, 2000])
def test_a_filter_leaves_k_if_there_are_k_however_they_are_looked_for(
    gallery, shelf, unit, embedding, monkeypatch, scanned: int
) -> None:
    monkeypatch.setattr(finding, "SCANNED", scanned)
    monkeypatch.setattr(finding, "FEWEST", 1)
    monkeypatch.setattr(finding, "ASKED", 2)
    (query,) = unit(1, seed=6)
    for where in (
        Filter(category="hats"),
        Filter(price_min=Decimal(28)),
        Filter(price_max=Decimal("0.5")),
        Filter(category="hats", attributes={"size": "3"}),
        Filter(category="gloves"),
    ):
        (matches,) = gallery.search(embedding, query[None], 9, where)
        right = [
            one for one in np.argsort(-(prototypes(shelf) @ query)) if where.matches(gallery.get(f"{one:02}"))
        ]
        assert [int(match.product.sku) for match in matches] == right[:9]


def test_a_large_gallery_answers_with_its_index_as_a_small_one_does_exactly(
    gallery, folder, shelf, unit, embedding, monkeypatch
) -> None:
    queries = unit(20, seed=5)
    exact = (
        gallery.search(embedding, queries, 3, Filter(category="bags")),
        gallery.search(embedding, queries, 3),
    )
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    gallery.search(embedding, queries, 1)
    gallery.settle()
    assert len(list(folder.glob("*.index"))) == 1
    assert gallery._followed[embedding]._index.approximate
    assert same(gallery.search(embedding, queries, 3), exact[1])
    monkeypatch.setattr(finding, "SCANNED", 0)
    monkeypatch.setattr(finding, "FEWEST", 1)
    assert same(gallery.search(embedding, queries, 3, Filter(category="bags")), exact[0])
    monkeypatch.setattr(finding, "MOST", 1)
    assert same(gallery.search(embedding, queries, 3, Filter(category="bags")), exact[0])


def test_the_kept_index_is_used_again_and_follows_what_came_since(
    gallery, folder, shelf, jpeg, unit, embedding, monkeypatch
) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    gallery.search(embedding, unit(1), 1)
    gallery.settle()
    gallery.close()
    with Gallery.open(folder) as writer:  # never searches, so never looks at the index
        new = unit(1, seed=9)
        writer.put(Product(sku="new"), [jpeg(999)], {embedding: new})
        writer.remove_photo("07", writer.photos_of("07")[0])
    monkeypatch.setattr(followed.Followed, "_build", None)  # a building would fail
    with Gallery.open(folder) as again:
        (matches,) = again.search(embedding, new, 1)
        assert matches[0].product.sku == "new"
        (matches,) = again.search(embedding, shelf[7][1:], 1)
        assert (matches[0].product.sku, matches[0].similarity) == ("07", pytest.approx(1.0, abs=1e-6))
        assert again._followed[embedding]._index.approximate


@pytest.mark.parametrize(
    "harm", ["flip", "cut", "other", "old", "elsewhere", "embedding", "large", "unreadable"]
)
def test_a_kept_index_that_does_not_fit_is_built_anew(
    gallery, folder, shelf, unit, embedding, monkeypatch, tmp_path, caplog, harm: str
) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 100)
    before = gallery.search(embedding, unit(5), 3)
    gallery.settle()
    gallery.close()
    (path,) = folder.glob("*.index")
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "unreadable":
        path.unlink()
        path.mkdir()
    elif harm == "old":  # what releases before this one wrote: a digest without a key
        path.write_bytes(b'{"format": 1, "dimension": 16, "made_for": 30, "sha256": ""}\n' + data[32:])
    elif harm == "large":
        path.write_bytes(data + bytes(1 << 16))
    elif harm == "other":
        index = indexes.VectorIndex.build(np.arange(1000, 1030), unit(30))
        index.upto = (1030, 0)
        index.save(path, gallery._store.key(b"index" + embedding))
    else:
        with Gallery.open(folder if harm == "embedding" else tmp_path / "elsewhere") as another:
            key = another._follower(bytes(32) if harm == "embedding" else embedding)._key
        index = indexes.VectorIndex.build(np.arange(1, 31), unit(30))
        index.upto = (30, 0)
        index.save(path, key)
    with Gallery.open(folder) as again:
        assert same(again.search(embedding, unit(5), 3), before)
        again.settle()
        if harm != "unreadable":
            kept = indexes.VectorIndex.load(path, again._store.key(b"index" + embedding), 1 << 20)
            assert set(kept.ids().tolist()) == set(range(1, 31))
    assert "built anew" in caplog.text
    assert harm != "large" or "more than" in caplog.text


def test_a_new_embedding_is_filled_while_the_old_one_serves(gallery, shelf, unit, embedding) -> None:
    new = unit(60, seed=11, d=24)
    missing = gallery.missing(OTHER, 100)
    assert len(missing) == 60
    before = gallery.search(embedding, shelf[:3, 0], 5)
    for start in range(0, 60, 16):
        assert gallery.missing(OTHER, 16) == missing[start : start + 16]
        gallery.put_vectors(
            OTHER, dict(zip(missing[start : start + 16], new[start : start + 16], strict=True))
        )
        assert gallery.search(embedding, shelf[:3, 0], 5) == before
    assert gallery.missing(OTHER, 5) == []
    assert gallery.count_vectors(OTHER) == 60
    gallery.forget(embedding)
    assert gallery.embeddings() == [OTHER]
    assert gallery.search(embedding, shelf[:3, 0], 5) == [[], [], []]
    truth = prototypes(new.reshape(30, 2, -1)) @ new[4]
    assert int(gallery.search(OTHER, new[4:5], 1)[0][0].product.sku) == int(np.argmax(truth))
    gallery.put_vectors(
        embedding, {missing[0]: unit(1, d=8)[0]}
    )  # once forgotten, it may come back as it likes
    assert len(gallery.search(embedding, unit(1, d=8), 5)[0]) == 1


def test_a_photo_of_two_products_goes_with_the_last(gallery, jpeg, unit, embedding) -> None:
    (digest,) = gallery.put(Product(sku="a"), [jpeg(1)], {embedding: unit(1)})
    gallery.put(Product(sku="b"), [jpeg(1)])  # its vector is known
    assert [match.similarity for match in gallery.search(embedding, unit(1), 5)[0]] == [pytest.approx(1)] * 2
    assert (gallery.count(), gallery.count_photos(), gallery.count_vectors(embedding)) == (2, 1, 1)
    assert gallery.remove("a")
    assert gallery.photo(digest) == jpeg(1)
    assert [match.product.sku for match in gallery.search(embedding, unit(1), 5)[0]] == ["b"]
    assert gallery.remove_photo("b", digest)
    assert gallery.photo(digest) is None
    assert gallery.search(embedding, unit(1), 5) == [[]]
    assert gallery.get("b") == Product(sku="b")
    assert not gallery.remove_photo("b", digest)
    assert not gallery.remove("a")


def test_a_product_put_again_has_the_new_fields_and_all_photos(gallery, jpeg) -> None:
    gallery.put(Product(sku="a", title="old", attributes={"size": "1"}), [jpeg(1)])
    gallery.put(Product(sku="a", title="new", price=Decimal(3)), [jpeg(2), jpeg(1)])
    assert gallery.get("a") == Product(sku="a", title="new", price=Decimal(3))
    assert gallery.photos_of("a") == [photo.content_digest(jpeg(1)), photo.content_digest(jpeg(2))]
    assert gallery.products() == [gallery.get("a")]


def test_a_product_is_found_however_its_sku_is_spelt(gallery, jpeg, unit, embedding) -> None:
    composed, apart = "Caf\u00e9-1", "Cafe\u0301-1"
    (first,) = gallery.put(Product(sku=apart, title="old"), [jpeg(1)], {embedding: unit(1)})
    (second,) = gallery.put(Product(sku=composed, title="new"), [jpeg(2)], {embedding: unit(1, seed=1)})
    assert list(gallery.skus()) == [composed]
    assert gallery.get(apart).title == gallery.get(composed).title == "new"
    assert gallery.photos_of(apart) == gallery.photos_of(composed) == [first, second]
    assert gallery.vectors_of(apart, embedding).shape == (2, 16)
    assert gallery.products(after=apart) == []
    assert gallery.remove_photo(apart, first)
    assert gallery.photos_of(composed) == [second]
    assert gallery.remove(apart)
    assert gallery.count() == 0


def test_a_sku_that_nothing_can_have_is_not_there(gallery, embedding) -> None:
    for sku in ("\udcff", "", "e" + "\u0301\u0323" * 1_000_000):
        assert gallery.get(sku) is None
        assert gallery.photos_of(sku) == []
        assert gallery.vectors_of(sku, embedding).shape == (0, 0)
        assert not gallery.remove(sku)
        assert not gallery.remove_photo(sku, bytes(32))


def test_products_come_in_pages_by_sku(gallery, shelf) -> None:
    first = gallery.products(Filter(category="shoes"), limit=6)
    rest = gallery.products(Filter(category="shoes"), after=first[-1].sku)
    assert [product.sku for product in first + rest] == [f"{number:02}" for number in range(0, 30, 3)]
    assert gallery.categories() == ["bags", "hats", "shoes"]


def test_a_stored_photo_is_small_and_tells_nothing_but_the_picture() -> None:
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "Camera of Alice"
    Image.effect_noise((2000, 1000), 50).convert("RGBA").save(data, "PNG", exif=exif)
    image = Image.open(io.BytesIO(data.getvalue()))
    image.load()
    stored = Gallery.prepare(image)
    with Image.open(io.BytesIO(stored)) as found:
        assert (found.format, found.size, found.mode) == ("JPEG", (512, 256), "RGB")
    assert b"Alice" not in stored
    assert Gallery.prepare(image) == stored
    assert image.size == (2000, 1000)


def too_large() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (513, 512)).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"no photo", too_large(), b"\x89PNG"], ids=["empty", "text", "large", "png"]
)
def test_what_is_no_stored_photo_is_refused_and_nothing_is_done(gallery, data: bytes) -> None:
    with pytest.raises(GalleryError, match=r"Product 'a': .*Gallery\.prepare"):
        gallery.put(Product(sku="a"), [data])
    assert gallery.count() == 0


def test_a_product_has_only_so_many_photos_and_nothing_is_done(gallery, jpeg) -> None:
    gallery.put(Product(sku="a", title="before"), [jpeg(number) for number in range(MAX_VIEWS)])
    with pytest.raises(GalleryError, match="would have 65 photos, expected at most 64"):
        gallery.put(Product(sku="a", title="after"), [jpeg(999)])
    assert gallery.get("a").title == "before"
    assert gallery.count_photos() == MAX_VIEWS


@pytest.mark.parametrize(
    ("vectors", "text"),
    [
        (np.ones((1, 4), np.float32), "neither 1 nor 0"),
        (np.full((1, 4), np.nan, np.float32), "neither 1 nor 0"),
        (np.eye(1, 4), "found float64"),
        (np.eye(2, 4, dtype=np.float32), r"of shape \(2, 4\)"),
        (np.ones(4, np.float32), "of shape"),
        (np.eye(1, 4097, dtype=np.float32), "found 4097 numbers"),
        (np.empty((1, 0), np.float32), "found 0 numbers"),
        (np.eye(1, 8, dtype=np.float32), "but this embedding has 4"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_nothing_is_done(
    gallery, jpeg, embedding, vectors, text
) -> None:
    gallery.put(Product(sku="first"), [jpeg(0)], {embedding: np.eye(1, 4, dtype=np.float32)})
    with pytest.raises(GalleryError, match=text):
        gallery.put(Product(sku="a"), [jpeg(1)], {embedding: vectors})
    assert gallery.count() == 1
    with pytest.raises(GalleryError, match="a name of 3 bytes"):
        gallery.put(Product(sku="a"), [jpeg(1)], {b"abc": np.eye(1, 4, dtype=np.float32)})


def test_an_embedding_that_sees_nothing_is_stored(gallery, jpeg, unit, embedding) -> None:
    gallery.put(Product(sku="dark"), [jpeg(1)], {embedding: np.zeros((1, 16), np.float32)})
    assert gallery.search(embedding, unit(1), 1)[0][0].similarity == 0.0


def test_photos_that_cancel_out_make_no_number_that_is_none(gallery, jpeg, unit, embedding) -> None:
    (vector,) = unit(1)
    gallery.put(Product(sku="a"), [jpeg(1), jpeg(2)], {embedding: np.stack([vector, -vector])})
    assert gallery.search(embedding, unit(1), 1)[0][0].similarity == 0.0


def test_a_search_that_cannot_be_is_refused(gallery, shelf, unit, embedding) -> None:
    for k in (0, -1, 1001):
        with pytest.raises(GalleryError, match="expected 1 to 1000"):
            gallery.search(embedding, unit(1), k)
    with pytest.raises(GalleryError, match="queries of 8 numbers, expected 16"):
        gallery.search(embedding, unit(1, d=8), 1)
    assert gallery.search(embedding, np.empty((0, 16), np.float32), 3) == []
    assert len(gallery.search(embedding, unit(1), 1000)[0]) == 30


def test_threads_share_one_gallery(gallery, jpeg, unit, embedding) -> None:
    vectors, failures = unit(40), []

    def work(start: int) -> None:
        try:
            for number in range(start, start + 10):
                gallery.put(
                    Product(sku=str(number)), [jpeg(number)], {embedding: vectors[number : number + 1]}
                )
                assert gallery.search(embedding, vectors[number : number + 1], 1)[0][0].product.sku == str(
                    number
                )
                if number % 2:
                    gallery.remove(str(number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {product.sku for product in gallery.products()} == {str(number) for number in range(0, 40, 2)}


def test_a_search_waits_for_no_one_who_writes(gallery, folder, shelf, embedding) -> None:
    query = shelf[3, :1]
    with ThreadPoolExecutor(1) as pool, gallery._store.write() as db:
        db.execute("DELETE FROM product WHERE sku = '03'")
        ((found,),) = pool.submit(gallery.search, embedding, query, 1).result(30)
        assert found.product.sku == "03", "it is there until the write is whole"

        def opened() -> int:
            with Gallery.open(folder) as another:
                return another.count()

        assert pool.submit(opened).result(10) == 30
    ((found,),) = gallery.search(embedding, query, 1)
    assert found.product.sku != "03"


def test_a_removal_ends_however_many_search(gallery, shelf, embedding) -> None:
    ended = threading.Event()

    def search() -> int:
        count = 0
        while not ended.is_set():
            gallery.search(embedding, shelf[:4, 0], 5)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        searching = [pool.submit(search) for _ in range(4)]
        try:
            for number in range(20):
                assert gallery.remove(f"{number:02}")
        finally:
            ended.set()
        assert all(each.result(30) for each in searching)
    assert gallery.count() == 10


def test_the_folder_is_the_owners_alone(gallery, folder, shelf) -> None:
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


# Damage.


def test_a_file_that_is_no_database_is_named_with_what_to_do(folder) -> None:
    folder.mkdir()
    (folder / "gallery.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(
        GalleryError, match=r"gallery\.sqlite: this is no SQLite database.*import the products again"
    ):
        Gallery.open(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("PRAGMA user_version = 1", "of version 1, expected 2; use the release"),
        ("PRAGMA user_version = 3", "of version 3, expected 2; use the release"),
        ("PRAGMA application_id = 7", "another program's database"),
        ("DROP TABLE prototype", "its tables are not as they were made"),
    ],
)
def test_a_gallery_that_is_not_as_it_was_made_is_named_with_what_to_do(
    folder, unit, embedding, change, text
) -> None:
    Gallery.open(folder).close()
    with sqlite3.connect(folder / "gallery.sqlite") as db:
        db.execute(change)
    db.close()
    with pytest.raises(GalleryError, match=text), Gallery.open(folder) as gallery:
        gallery.put(Product(sku="a"))
        gallery.search(embedding, unit(1), 1)
        gallery.remove("a")


def test_damage_anywhere_gives_the_right_answer_or_an_error_that_says_what_to_do(
    gallery, folder, shelf, unit, embedding
) -> None:
    right = gallery.search(embedding, unit(5), 3), gallery.products()
    photos = {digest: gallery.photo(digest) for one in right[1] for digest in gallery.photos_of(one.sku)}
    gallery.close()
    path = folder / "gallery.sqlite"
    whole = path.read_bytes()
    chance, errors = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        start = int(chance.integers(0, len(whole), 1)[0]) // 4096 * 4096
        damaged[start : start + 4096] = chance.bytes(len(damaged[start : start + 4096]))
        path.write_bytes(damaged)
        try:
            with Gallery.open(folder) as again:
                again.search(embedding, unit(5), 3)
                again.products()
                for digest, data in photos.items():
                    assert again.photo(digest) in (data, None)
        except GalleryError as error:
            errors += 1
            assert "again" in str(error) or "check" in str(error)
    assert errors > 20


def test_a_photo_that_rotted_is_not_handed_out(gallery, folder, jpeg) -> None:
    (digest,) = gallery.put(Product(sku="a"), [jpeg(1)])
    with sqlite3.connect(folder / "gallery.sqlite") as db:
        db.execute("UPDATE photo SET jpeg = ?", (bytes(477) + jpeg(2),))
    db.close()
    with pytest.raises(GalleryError, match=f"photo {digest.hex()} is not what was written"):
        gallery.photo(digest)


def test_a_gallery_that_another_process_holds_says_so(gallery, folder, monkeypatch) -> None:
    monkeypatch.setattr("hanse_client.gallery.store.LOCK_SECONDS", 0.05)
    with (
        Gallery.open(folder) as other,
        gallery._store.write(),
        pytest.raises(GalleryError, match="another process"),
    ):
        other.put(Product(sku="a"))


def test_a_search_looks_up_what_it_needs_however_much_there_is(gallery, jpeg, unit, embedding) -> None:
    """Counted in steps of SQLite's machine: a statement that walked a table would take ten times as many."""
    vectors, steps = unit(600), []

    def search() -> int:
        count = [0]

        def step() -> int:
            count[0] += 1
            return 0

        gallery._store._reader.set_progress_handler(step, 10)
        gallery.search(embedding, vectors[:1], 5)
        gallery.search(embedding, vectors[:1], 5, Filter(category="few"))
        gallery._store._reader.set_progress_handler(None, 0)
        return count[0]

    gallery._store._writer.execute("PRAGMA synchronous = OFF")
    for number in range(600):
        product = Product(sku=str(number), category="few" if number < 20 else "many")
        gallery.put(product, [jpeg(number)], {embedding: vectors[number : number + 1]})
        if number in (60, 599):
            gallery.search(embedding, vectors[:1], 5)  # follows
            steps.append(search())
    assert steps[1] < 1.2 * steps[0]
