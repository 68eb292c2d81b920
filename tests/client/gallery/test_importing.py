"""Bulk import: every format that is read, what is bounded, and that one bad row stops nothing."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse_client.gallery import importing
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.importing import BATCH, MAX_PROBLEMS, import_products
from hanse_client.gallery.product import Filter, Product
from hanse_common.errors import GalleryError


class Embedder:
    """Sees a photo's mean colour, and counts what it was asked."""

    def __init__(self, name: bytes) -> None:
        self.name, self.batches = name, []

    def __call__(self, images: Sequence[Image.Image]):
        self.batches.append(len(images))
        rows = np.array([np.asarray(image).mean(axis=(0, 1)) + 1 for image in images])
        return {self.name: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)}


@pytest.fixture
def embed(embedding) -> Embedder:
    return Embedder(embedding)


@pytest.fixture
def table(tmp_path) -> Callable[..., Path]:
    """Return a function that writes lines as a CSV file in a folder with six photos."""
    folder = tmp_path / "shop"
    (folder / "photos").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (20, 10), (40 * number, 255 - 40 * number, 90)).save(
            folder / "photos" / f"{number}.png"
        )

    def write(*lines: str | bytes) -> Path:
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines)
        (folder / "products.csv").write_bytes(data)
        return folder / "products.csv"

    return write


def test_products_come_with_all_their_fields_and_photos(gallery: Gallery, table, embed, embedding) -> None:
    source = table(
        "\ufeffSKU,Title,price,currency,Category,photo,photo 2,Size,colour",
        'a,"Shoe, red",59.90,eur,shoes,photos/0.png,photos/1.png,42,red',
        'b,Boot,"1234,5",,shoes,photos/2.png|photos/3.png,,43,',
        "",
        "c,Bag,,,bags,,,,",
    )
    done = import_products(gallery, source, embed)
    assert (done.rows, done.products, done.photos, done.problems) == (3, 3, 4, [])
    assert gallery.get("a") == Product(
        sku="a",
        title="Shoe, red",
        price=Decimal("59.90"),
        currency="EUR",
        category="shoes",
        attributes={"Size": "42", "colour": "red"},
    )
    assert gallery.get("b").price == Decimal("1234.5")
    assert [len(gallery.photos_of(sku)) for sku in "abc"] == [2, 2, 0]
    assert gallery.missing(embedding, 9) == []
    assert embed.batches == [4]


def test_semicolons_divide_where_a_spreadsheet_wrote_them(gallery: Gallery, table, embed) -> None:
    source = table("sku;title;photo", "a;Shoe, red;photos/0.png", "b;Boot;photos/1.png|photos/2.png")
    assert import_products(gallery, source, embed).problems == []
    assert gallery.get("a") == Product(sku="a", title="Shoe, red")
    assert [len(gallery.photos_of(sku)) for sku in "ab"] == [1, 2]


def test_spaces_of_all_kinds_in_a_field_become_one(gallery: Gallery, table, embed) -> None:
    title = "Suppen\u00adteller\u00a0blau,\n tief\tund weiß"
    source = table("sku,title,photo,note", f'a,"{title}",photos/0.png,\u202f')
    assert import_products(gallery, source, embed).problems == []
    assert gallery.get("a") == Product(sku="a", title="Suppenteller blau, tief und weiß")
    assert len(gallery.photos_of("a")) == 1


def test_all_spellings_of_a_sku_are_one_product(gallery: Gallery, table, embed) -> None:
    source = table(
        "sku,title,photo,Gro\u0308\u00dfe,labels",
        "\u00e9,Cafe\u0301,photos/0.png,42,farbe=gru\u0308n",
        "e\u0301,,photos/1.png,43,",
        "\u200b\u00e9\ufeff,Caf\u00e9 \u06a9\u0641\u0634\u200c\u0647\u0627,,,",
    )
    done = import_products(gallery, source, embed)
    assert (done.problems, done.photos) == ([], 2)
    (product,) = gallery.products()
    assert (product.sku, product.title) == ("\u00e9", "Caf\u00e9 \u06a9\u0641\u0634\u200c\u0647\u0627")
    assert product.attributes == {"Gr\u00f6\u00dfe": "43", "farbe": "gr\u00fcn"}


def test_a_catalog_file_is_read_with_a_row_for_each_photo(gallery: Gallery, table, embed) -> None:
    source = table(
        "path,label,sku,title",
        "photos/0.png,shoe,a,Runner",
        "photos/1.png,shoe,a,",
        "photos/2.png,bag,b,Tote",
    )
    done = import_products(gallery, source, embed)
    assert (done.rows, done.products, done.photos, done.problem_count) == (3, 2, 3, 0)
    assert gallery.get("a") == Product(sku="a", title="Runner", category="shoe")
    assert len(gallery.photos_of("a")) == 2


def test_the_columns_of_vision_product_search_are_read(gallery: Gallery, table, embed) -> None:
    source = table(
        "image-uri,image-id,product-set-id,product-id,product-category,product-display-name,labels,bounding-poly",
        'photos/0.png,i1,set,p1,apparel-v2,Dress,"style=midi,colour=red","0,0,1,1"',
        "photos/1.png,i2,set,p1,apparel-v2,,,",
        "gs://bucket/2.png,i3,set,p2,apparel-v2,Skirt,,",
        "photos/3.png,i3,set,p3,apparel-v2,Skirt,midi,",
    )
    done = import_products(gallery, source, embed)
    assert gallery.get("p1").attributes == {"style": "midi", "colour": "red"}
    assert len(gallery.photos_of("p1")) == 2
    assert gallery.get("p2") == Product(sku="p2", title="Skirt", category="apparel-v2")
    assert [problem.line for problem in done.problems] == [4, 5]
    assert "no such file" in done.problems[0].reason
    assert "expected key=value" in done.problems[1].reason


def test_a_bad_row_is_told_by_its_line_and_stops_nothing(gallery: Gallery, table, embed, tmp_path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "shop" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "shop" / "broken.png").write_bytes(b"\x89PNG broken")
    rows = {
        ",no sku,,": "sku is empty",
        "x" * 65 + ",long,,": "sku: found 'xxx",
        "d,t,ten,": "price: found 'ten'",
        "e,t,1e5,": "price: found '1e5'",
        "f,t": "found 2 fields, expected 4",
        "g,t,,../secret.png": "leads out of the file's folder",
        "h,t,,link.png": "leads out of the file's folder",
        "i,t,,/etc/hostname": "leads out of the file's folder",
        "j,t,,photos/none.png": "no such file",
        "k,t,,broken.png": "broken.png",
        "l,t,,photos": "no regular file",
        "m,t,,photos/0\0.png": "NUL",
        "n," + "t" * 301 + ",,": "title: found",
        "o," + "t" * 5000 + ",,": "a field of 5000 characters",
        "p,t,," + "|".join(["photos/0.png"] * 65): "found 65 photos",
        "q,\x1b[31m,,": "title: found '\\x1b[31m'",
    }
    done = import_products(gallery, table("sku,title,price,photo", *rows, "good,t,1,photos/0.png"), embed)
    assert [problem.line for problem in done.problems] == list(range(2, 2 + len(rows)))
    for problem, reason in zip(done.problems, rows.values(), strict=True):
        assert reason in problem.reason
        assert f"products.csv:{problem.line}: " in problem.reason
    assert gallery.photos_of("good")
    assert (done.rows_left_out, done.photos_left_out) == (len(rows) - 7, 7)
    # A product without its bad photo is there all the same.
    assert {product.sku for product in gallery.products()} == {*"ghijklm", "good"}


def test_quotes_that_do_not_close_swallow_no_more_than_a_bound(gallery: Gallery, table, embed) -> None:
    lines = [f'row{number},"open' + "x" * 4000 for number in range(100)]
    done = import_products(
        gallery, table("sku,title", "first,t", *lines[:1], *["y" * 3000] * 60, "last,t"), embed
    )
    assert gallery.get("first")
    assert gallery.get("last")
    assert done.problem_count > 0


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "expected 'sku' once"),
        (["title,price"], "expected 'sku' once"),
        (["sku,sku"], "expected 'sku' once"),
        (["sku,title,Name"], "expected 'title' once"),
        (["sku," + ",".join(f"a{number}" for number in range(256))], "found 257 columns"),
        (["sku,title", b"a,\xff"], "products.csv:2: not UTF-8"),
        (["sku,title", "a," + "x" * 70_000], "products.csv:2: longer than 65536 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused_by_line(gallery: Gallery, table, embed, lines, text: str) -> None:
    with pytest.raises(GalleryError, match=text):
        import_products(gallery, table(*lines), embed)


def test_a_missing_file_is_named(gallery: Gallery, tmp_path, embed) -> None:
    with pytest.raises(GalleryError, match=r"none\.csv: cannot be read"):
        import_products(gallery, tmp_path / "none.csv", embed)


def test_an_import_that_stopped_goes_on_without_doing_again_what_is_done(
    gallery: Gallery, table, embed
) -> None:
    rows = [f"p{number},t,photos/{number % 6}.png" for number in range(2 * BATCH)]
    source = table("sku,title,photo", *rows)

    def stops(images):
        if embed.batches:
            raise KeyboardInterrupt
        return embed(images)

    with pytest.raises(KeyboardInterrupt):
        import_products(gallery, source, stops)
    assert gallery.count() == BATCH
    seen: list[tuple[int, int]] = []
    done = import_products(gallery, source, embed, progress=lambda read, size: seen.append((read, size)))
    pictures = [6, 6]  # one that several products show is embedded once
    assert embed.batches == pictures
    assert (done.rows, done.products, done.photos) == (2 * BATCH, BATCH, BATCH)
    assert gallery.count() == 2 * BATCH
    assert seen == sorted(seen)
    assert seen[-1] == (source.stat().st_size, source.stat().st_size)
    assert import_products(gallery, source, embed).products == 0
    assert embed.batches == pictures


def test_what_changed_in_the_file_changes_in_the_gallery(gallery: Gallery, table, embed) -> None:
    import_products(gallery, table("sku,title,price,photo", "a,old,1,photos/0.png"), embed)
    import_products(gallery, table("sku,title,price,photo", "a,new,2,photos/0.png"), embed)
    assert gallery.get("a") == Product(sku="a", title="new", price=Decimal(2))
    assert embed.batches == [1]


def test_a_file_changes_nothing_that_it_does_not_name(gallery: Gallery, table, embed) -> None:
    shoe = Product(
        sku="a", title="Shoe", price=Decimal(1), currency="EUR", category="shoes", attributes={"size": "42"}
    )
    gallery.put(shoe)
    import_products(gallery, table("sku,price,colour", "a,2,red"), embed)
    there = shoe.model_copy(update={"price": Decimal(2), "attributes": {"size": "42", "colour": "red"}})
    assert gallery.get("a") == there
    for line in ("a,,,,,", ",".join("a" + " " * 5)):
        import_products(gallery, table("sku,title,price,currency,category,size", line), embed)
        assert gallery.get("a") == there


def test_rows_that_change_a_field_and_change_it_back_leave_it_as_it_was(
    gallery: Gallery, table, embed
) -> None:
    gallery.put(Product(sku="a", title="X"))
    source = table("sku,title", "a,Y", "a,X")
    for _ in range(2):
        import_products(gallery, source, embed)
        assert gallery.get("a") == Product(sku="a", title="X")


def test_photos_that_two_rows_name_count_once(gallery: Gallery, table, embed, monkeypatch) -> None:
    monkeypatch.setattr(importing, "MAX_VIEWS", 3)
    rows = ["a,t,photos/0.png,photos/1.png", "a,u,photos/1.png,photos/0.png"]
    done = import_products(gallery, table("sku,title,photo,photo2", *rows), embed)
    assert not done.problems and (done.products, done.photos) == (1, 2)
    assert gallery.get("a") == Product(sku="a", title="u") and embed.batches == [2]


def test_an_import_waits_for_who_changes_a_product_and_keeps_what_the_file_does_not_name(
    gallery: Gallery, folder, table, embed
) -> None:
    gallery.put(Product(sku="a", title="Shoe", price=Decimal(1)))
    with Gallery.open(folder) as other, ThreadPoolExecutor(1) as pool:
        with other.changing:  # as another process has it
            waiting = pool.submit(import_products, gallery, table("sku,size", "a,42"), embed)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
            other.put(Product(sku="a", title="Boot", price=Decimal(7)))
        waiting.result(60)
    wanted = Product(sku="a", title="Boot", price=Decimal(7), attributes={"size": "42"})
    assert gallery.get("a") == wanted


def test_a_product_that_was_removed_meanwhile_comes_with_its_photos_or_not_at_all(
    gallery: Gallery, table, embed
) -> None:
    import_products(gallery, table("sku,title,photo", "a,old,photos/0.png"), embed)

    def removing(images):
        gallery.remove("a")
        return embed(images)

    done = import_products(
        gallery, table("sku,title,photo", "a,new,photos/0.png", "b,,photos/1.png"), removing
    )
    assert gallery.get("a") == Product(sku="a", title="new") and len(gallery.photos_of("a")) == 1
    assert (done.products, done.photos) == (2, 2) and gallery.missing(embed.name, 9) == []


def test_a_file_leaves_what_another_changed_between_its_rows(
    gallery: Gallery, table, embed, monkeypatch
) -> None:
    monkeypatch.setattr(importing, "BATCH", 1)
    changed: list[int] = []

    def another(done: int, total: int) -> None:
        if gallery.get("a") is not None and not changed:
            changed.append(done)
            gallery.put(Product(sku="a", title="Shoe", price=Decimal(7)))

    source = table("sku,title,size", "a,Shoe,", "b,,", "a,,42")
    import_products(gallery, source, embed, progress=another)
    assert changed and gallery.get("a") == Product(
        sku="a", title="Shoe", price=Decimal(7), attributes={"size": "42"}
    )


def test_a_photo_is_called_as_the_file_calls_it(gallery: Gallery, table, embed) -> None:
    (table("sku").parent / "text.png").write_text("no photo")
    done = import_products(gallery, table("sku,photo", "a,photos/none.png", "b,./text.png"), embed)
    for problem, name, sku in zip(done.problems, ("photos/none.png", "text.png"), "ab", strict=True):
        assert f"products.csv:{problem.line}: {name}: found no " in problem.reason
        assert f"Product '{sku}' was taken in without this photo." in problem.reason
    assert (done.products, done.rows_left_out, done.photos_left_out) == (2, 0, 2)


@pytest.mark.parametrize("price", ["1,299", "1.299", "12,500"])
def test_a_price_with_a_mark_that_may_divide_thousands_is_asked_about(
    gallery: Gallery, table, embed, price: str
) -> None:
    done = import_products(gallery, table("sku;price", f"a;{price}", "b;1299", "c;1,2990", "d;0,299"), embed)
    whole = price.replace(",", "").replace(".", "")
    assert [problem.line for problem in done.problems] == [2]
    assert f"price: found '{price}', which may be {whole} or " in done.problems[0].reason
    assert [product.price for product in gallery.products()] == [
        Decimal(1299),
        Decimal("1.299"),
        Decimal("0.299"),
    ]


def test_what_is_wrong_in_a_field_is_told_in_words(gallery: Gallery, table, embed) -> None:
    source = table("sku,currency,price,size", "a,EURO,,", "b,,dear,", "c,,," + "x" * 257)
    told = [problem.reason for problem in import_products(gallery, source, embed).problems]
    assert told[0].endswith(":2: currency: found 'EURO', expected three capital letters, such as EUR.")
    assert "price: found 'dear', expected a number such as 59.90" in told[1]
    assert "attributes.size: found 'xxx" in told[2] and "expected a value of at most 256" in told[2]


def test_a_product_of_too_many_photos_is_a_problem(gallery: Gallery, jpeg, table, embed) -> None:
    gallery.put(Product(sku="a"), [jpeg(number) for number in range(64)])
    done = import_products(gallery, table("sku,photo", "a,photos/0.png", "b,photos/0.png"), embed)
    (problem,) = done.problems
    assert "products.csv:2: product 'a' would have 64 + 1 photos, expected at most 64." in problem.reason
    assert gallery.photos_of("b")


def test_problems_are_counted_beyond_those_that_are_told(gallery: Gallery, table, embed) -> None:
    done = import_products(gallery, table("sku,price", *["a,x"] * (MAX_PROBLEMS + 5)), embed)
    assert (len(done.problems), done.problem_count) == (MAX_PROBLEMS, MAX_PROBLEMS + 5)


def test_what_was_imported_is_found(gallery: Gallery, table, embed, embedding) -> None:
    source = table(
        "sku,category,photo", *[f"p{number},c{number % 2},photos/{number}.png" for number in range(6)]
    )
    import_products(gallery, source, embed)
    with Image.open(source.parent / "photos" / "3.png") as image:
        query = embed([image])[embedding]
    assert gallery.search(embedding, query, 1)[0][0].product.sku == "p3"
    assert gallery.search(embedding, query, 1, Filter(category="c0"))[0][0].product.sku in {"p2", "p4"}
