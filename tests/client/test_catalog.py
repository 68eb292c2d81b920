import hashlib
import hmac
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hanse_client.catalog import MAX_FIELD, Catalog, in_holdout
from hanse_common.errors import CatalogError, PhotoMissing, PhotoUnreadable
from hanse_common.vision.photo import PhotoLimits
from hanse_common.vision.taxonomy import LabelMap, Taxonomy

LABELS = LabelMap(Taxonomy(classes=("Shirt", "Sneaker")), {"Hemden": "Shirt", "Sale": None})
KEY = b"a merchant's key"


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def load(source: Path, **options) -> Catalog:
    return Catalog.load(source, LABELS, **{"holdout_key": KEY, "holdout_fraction": 0.5} | options)


@pytest.fixture
def shop(tmp_path) -> Path:
    folder = tmp_path / "shop"
    for number in range(6):
        put(folder / "Hemden" / f"{number}.png", png(number))
        put(folder / "sneaker" / "2024" / f"{number}.png", png(100 + number))
    return folder


def csv_file(folder: Path, text: str | bytes) -> Path:
    return put(folder / "shop.csv", text.encode() if isinstance(text, str) else text)


def test_a_folder_for_each_category(shop):
    catalog = load(shop)
    assert [(r.path.relative_to(shop).as_posix(), r.label) for r in catalog.records] == [
        *((f"Hemden/{n}.png", 0) for n in range(6)),
        *((f"sneaker/2024/{n}.png", 1) for n in range(6)),
    ]
    assert all(r.digest == hashlib.sha256(r.path.read_bytes()).digest() for r in catalog.records)
    assert catalog.problems == () and catalog.unmapped == {}
    assert set(catalog.train) | set(catalog.holdout) == set(catalog.records)
    assert not set(catalog.train) & set(catalog.holdout)


def test_a_csv_file_gives_the_same_photos_and_sku_and_title(shop):
    text = "Label,PATH,colour,sku,title\r\n" + "".join(
        f'{label},{folder}/{n}.png,red,S-{n},"Größe, ""{n}"""\r\n'
        for label, folder in (("Sneaker", "sneaker/2024"), ("Hemden", "Hemden"))
        for n in reversed(range(6))
    )
    catalog = load(csv_file(shop, b"\xef\xbb\xbf" + text.encode() + b"\r\n"))
    plain = load(csv_file(shop, text))
    assert catalog == plain
    assert [(r.digest, r.label, r.holdout) for r in catalog.records] == [
        (r.digest, r.label, r.holdout) for r in load(shop).records
    ]
    assert (catalog.records[2].sku, catalog.records[2].title) == ("S-2", 'Größe, "2"')


def test_bad_photos_are_problems_and_the_rest_is_used(shop):
    put(shop / "Hemden" / "zero.png", b"")
    put(shop / "Hemden" / "notes.txt", b"hello")
    put(shop / "Hemden" / "big.png", png(7) + bytes(5000))
    put(shop / "loose.png", png(8))
    os.mkfifo(shop / "Hemden" / "pipe.png")
    (shop / "Hemden" / "gone.png").symlink_to("nowhere")
    catalog = load(shop, limits=PhotoLimits(max_bytes=4000))
    assert len(catalog.records) == 12
    assert [(p.path.name, p.reason.partition(": ")[2].partition(",")[0]) for p in catalog.problems] == [
        ("big.png", "found more than 4000 bytes"),
        ("gone.png", "found no such file"),
        ("notes.txt", "found no image of an accepted format"),
        ("pipe.png", "found no regular file"),
        ("zero.png", "found an empty file"),
        ("loose.png", "lies in no category"),
    ]


def test_unmapped_labels_are_counted_and_left_out_ones_are_not(shop):
    put(shop / "Boots" / "1.png", png(1))
    put(shop / "Boots" / "2.png", b"not even a photo")
    put(shop / "Sale" / "1.png", png(2))
    catalog = load(shop)
    assert catalog.unmapped == {"Boots": 2} and catalog.problems == () and len(catalog.records) == 12


def test_hidden_files_and_system_clutter_are_passed_over(shop):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".thumbs/0.png", "__MACOSX/x.png"):
        put(shop / "Hemden" / name, b"clutter")
        put(shop / name, b"clutter")
    assert load(shop) == load(shop) and len(load(shop).records) == 12 and load(shop).problems == ()


def test_links_that_loop_end(shop):
    (shop / "Hemden" / "again").symlink_to("..")
    (shop / "Hemden" / "itself").symlink_to("itself")
    (shop / "whole").symlink_to(".")
    catalog = load(shop)
    assert len(catalog.records) == 12
    assert [p.path.name for p in catalog.problems] == ["itself"]
    assert catalog.unmapped == {"whole": 12 + 1}


def test_duplicates_stay_and_share_their_side(shop):
    put(shop / "Hemden" / "copy.png", png(0))
    first, copy = (r for r in load(shop).records if r.digest == hashlib.sha256(png(0)).digest())
    assert first.holdout == copy.holdout and first.path != copy.path


@pytest.mark.parametrize("removed", range(6))
def test_no_record_depends_on_another(shop, removed):
    before = {r.path: r for r in load(shop).records}
    gone = shop / "Hemden" / f"{removed}.png"
    gone.unlink()
    after = {r.path: r for r in load(shop).records}
    assert after == {path: r for path, r in before.items() if path != gone}


def test_the_side_follows_content_and_key_not_name_label_or_order(shop, tmp_path):
    sides = {r.digest: r.holdout for r in load(shop).records}
    other = tmp_path / "other"
    for number, record in enumerate(load(shop).records):
        put(other / "Sneaker" / f"{number:03}.jpg", record.path.read_bytes())
    assert {r.digest: r.holdout for r in load(other).records} == sides
    assert {r.digest: r.holdout for r in load(shop, holdout_key=b"quite another key").records} != sides


def test_the_side_is_the_keyed_hash():
    digest = hashlib.sha256(b"photo").digest()
    share = int.from_bytes(hmac.new(KEY, digest, "sha256").digest()) / 2**256
    assert in_holdout(KEY, digest, share + 1e-9) and not in_holdout(KEY, digest, share - 1e-9)
    assert not in_holdout(KEY, digest, 0.0)
    for key, fraction in ((b"short", 0.5), (KEY, 1.0), (KEY, -0.1), (KEY, float("nan"))):
        with pytest.raises(ValueError, match="Expected"):
            in_holdout(key, digest, fraction)


@given(st.sampled_from([0.05, 0.1, 0.3]), st.binary(min_size=16, max_size=32))
def test_about_the_fraction_is_held_out(fraction, key):
    held = sum(in_holdout(key, n.to_bytes(32), fraction) for n in range(4000))
    assert abs(held - 4000 * fraction) < 7 * (4000 * fraction * (1 - fraction)) ** 0.5


def test_a_record_opens_the_very_photo_that_was_loaded(shop):
    record = load(shop, limits=PhotoLimits(max_pixels=16)).records[3]
    image = record.open()
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (3, 3, 3)
    put(record.path, png(99))
    with pytest.raises(PhotoUnreadable, match=r"3\.png: found other content"):
        record.open()
    record.path.unlink()
    with pytest.raises(PhotoMissing):
        record.open()


def test_damage_that_the_header_hides_shows_when_the_photo_is_opened(shop):
    data = png(3)
    put(shop / "Hemden" / "torn.png", data[:-20])
    torn = next(r for r in load(shop).records if r.path.name == "torn.png")
    with pytest.raises(PhotoUnreadable, match=r"torn\.png: found a damaged PNG"):
        torn.open()


def test_progress_counts_every_photo(shop):
    put(shop / "Hemden" / "zero.png", b"")
    seen: list[tuple[int, int]] = []
    load(shop, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 13) for n in range(1, 14)]


def test_paths_that_leave_the_csv_files_folder_are_refused(shop, tmp_path):
    outside = put(tmp_path / "private.png", png(50))
    (shop / "link.png").symlink_to(outside)
    (shop / "sub").symlink_to(tmp_path)
    inside = shop / "Hemden" / "0.png"
    paths = ["../private.png", str(outside), "link.png", "sub/private.png", "Hemden/../../private.png"]
    rows = "".join(f"{path},Shirt\n" for path in [*paths, inside, "sneaker/../Hemden/1.png"])
    catalog = load(csv_file(shop, f"path,label\n{rows}"))
    assert [r.digest for r in catalog.records] == [hashlib.sha256(png(n)).digest() for n in (0, 1)]
    assert len(catalog.problems) == 5 and all("leads out of" in p.reason for p in catalog.problems)
    assert any("shop.csv:2: " in p.reason for p in catalog.problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: found the columns '', expected 'path' once"),
        ("path;label\na;b\n", ":1: found the columns 'path;label', expected 'path' once"),
        ("path,label,label\n", ":1: found the columns 'path,"),
        ("path,label\na.png\n", ":2: found 1 fields, expected 2"),
        ("path,label\n\na.png,Shirt,x\n", ":3: found 3 fields, expected 2"),
        ("path,label\n,Shirt\n", ":2: path is empty"),
        ("path,label\na.png, \n", ":2: label is empty"),
        ('path,label\na.png,"Shirt\n', ":2: not CSV"),
        ('path,label\na.png,"Sh"irt\n', ":2: not CSV"),
        (b"path,label\na.png,Gr\xf6\xdfe\n", ":2: not UTF-8"),
        ("path,label\na\0.png,Shirt\n", ":2: path holds a NUL"),
        (f"path,label\na.png,{'x' * (MAX_FIELD + 1)}\n", ":2: found a field of 4097 characters"),
        (f"path,label\na.png,{'x' * (1 << 20)}\n", ":2: longer than 65536 bytes"),
        ("path,label\n" + '"' + "x\n" * 200_000, "not CSV"),
        ("path,label\nnone.png,Shirt\n", "found no usable photo. 1 with problems, the first: "),
        ("path,label\nHemden/0.png,Boot\n", "No class for the labels 'Boot' (1): map them"),
    ],
)
def test_a_malformed_csv_file_is_refused_by_line(shop, text, words):
    source = csv_file(shop, text)
    with pytest.raises(CatalogError) as caught:
        load(source)
    assert str(caught.value).startswith(str(source)) and words in str(caught.value)


def test_rows_are_bounded(shop, monkeypatch):
    monkeypatch.setattr("hanse_client.catalog.MAX_ROWS", 2)
    with pytest.raises(CatalogError, match=r"shop\.csv:4: more than 2 rows"):
        load(csv_file(shop, "path,label\n" + "Hemden/0.png,Shirt\n" * 3))


def test_sources_without_photos_are_refused(tmp_path):
    with pytest.raises(CatalogError, match="neither a folder nor a CSV file"):
        load(tmp_path / "none")
    with pytest.raises(CatalogError, match="a folder for each category"):
        load(tmp_path)
    put(tmp_path / "Shirt" / "a.png", b"")
    with pytest.raises(CatalogError, match=r"1 with problems, the first: .*a\.png"):
        load(tmp_path)


def test_a_photo_listed_twice_is_one_record(shop):
    rows = "Hemden/0.png,Shirt\nHemden/1.png,Shirt\nHemden/../Hemden/0.png,Shirt\n"
    catalog = load(csv_file(shop, f"path,label\n{rows}"))
    assert len(catalog.records) == 2
    (problem,) = catalog.problems
    assert ":4: found 'Hemden/../Hemden/0.png' again, expected it once (line 2)" in problem.reason
