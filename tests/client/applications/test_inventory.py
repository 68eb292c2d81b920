"""The inventory, on shelves made of real product photos: counts, what is set aside, and what can't be used."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hanse_client.applications.inventory import SUFFIXES, WHOLE, Grid, look, photos_in, take_inventory
from hanse_client.gallery.product import Filter
from hanse_client.recognition.service import Recognition
from hanse_common.errors import ConfigError
from hanse_common.vision.photo import LIMITS

Pictures = list[tuple[Image.Image, str]]
AnotherPhoto = Callable[[Image.Image, np.random.Generator], Image.Image]

WALL = (150, 140, 130)


def shelf(rows: int, columns: int, items: list[Image.Image | None]) -> Image.Image:
    """One item a cell of 120 pixels, None is an empty place."""
    photo = Image.new("RGB", (120 * columns, 120 * rows), WALL)
    for cell, item in enumerate(items):
        row, column = divmod(cell, columns)
        if item is not None:
            photo.paste(item.resize((120, 120)), (120 * column, 120 * row))
    return photo


def test_one_product_a_photo_is_counted_by_sku(
    recognition: Recognition, pictures: Pictures, another_photo: AnotherPhoto, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    shown = [3, 7, 3, 11, 3, 7]
    for number, product in enumerate(shown):
        another_photo(pictures[product][0], rng).save(tmp_path / f"{number}.png")
    Image.new("RGB", (50, 50), WALL).save(tmp_path / "wall.png")
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    (tmp_path / "notes.txt").write_text("no photo either")
    found = take_inventory(recognition, photos_in(tmp_path))
    assert [(line.sku, line.count) for line in found.counts] == [("P-03", 3), ("P-07", 2), ("P-11", 1)]
    assert found.counts[0].title == f"{pictures[3][1]} 3"
    assert found.photos == 7
    (unknown,) = found.unknown
    assert (
        unknown.photo == str(tmp_path / "wall.png")
        and unknown.picture is None
        and unknown.box == (0, 0, 50, 50)
    )
    (problem,) = found.problems
    assert "broken.jpg" in problem
    assert json.loads(found.model_dump_json())["counts"][0] == {
        "sku": "P-03",
        "title": "Trouser 3",
        "count": 3,
    }


def test_a_shelf_is_counted_by_its_grid_and_empty_places_are_set_aside(
    recognition: Recognition, pictures: Pictures, another_photo: AnotherPhoto, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    true: dict[str, int] = {}
    for number in range(5):
        products = rng.integers(0, 20, 12)
        items = [None if cell == 4 else another_photo(pictures[p][0], rng) for cell, p in enumerate(products)]
        for cell, product in enumerate(products):
            if cell != 4:
                true[f"P-{product:02}"] = true.get(f"P-{product:02}", 0) + 1
        shelf(3, 4, items).save(tmp_path / f"{number}.png")
    folder = tmp_path / "set" / "aside"
    found = take_inventory(
        recognition, sorted(tmp_path.glob("*.png")), Grid(rows=3, columns=4), unknown_folder=folder
    )
    counted = {line.sku: line.count for line in found.counts}
    wrong = sum(abs(true.get(sku, 0) - counted.get(sku, 0)) for sku in true.keys() | counted.keys())
    assert sum(true.values()) == 55 and wrong <= 2
    assert sum(counted.values()) + len(found.unknown) == 60
    empty = [one for one in found.unknown if one.box == (0, 120, 120, 240)]
    assert len(empty) == 5
    files = sorted(folder.iterdir())
    assert [str(file) for file in files] == [one.picture for one in found.unknown]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    with Image.open(str(empty[0].picture)) as image:
        assert image.size == (120, 120) and not image.getexif()
        assert np.abs(np.asarray(image).mean(axis=(0, 1)) - WALL).max() < 3


def test_what_was_set_aside_before_stays(recognition: Recognition, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), WALL).save(tmp_path / "wall.png")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/000007.jpg").write_bytes(b"of yesterday")
    found = take_inventory(recognition, [tmp_path / "wall.png"], unknown_folder=tmp_path / "unknown")
    assert [one.picture for one in found.unknown] == [str(tmp_path / "unknown/000008.jpg")]
    again = take_inventory(recognition, [tmp_path / "wall.png"], unknown_folder=tmp_path / "unknown")
    assert [one.picture for one in again.unknown] == [str(tmp_path / "unknown/000009.jpg")]
    assert (tmp_path / "unknown/000007.jpg").read_bytes() == b"of yesterday"


def test_cells_tell_the_nearest_product_and_whether_it_is_known(
    recognition: Recognition, pictures: Pictures
) -> None:
    cells = look(recognition, shelf(1, 2, [pictures[9][0], None]), Grid(rows=1, columns=2))
    assert [cell.box for cell in cells] == [(0, 0, 120, 120), (120, 0, 240, 120)]
    first, empty = cells
    assert first.known and first.nearest is not None and first.nearest.product.sku == "P-09"
    assert not empty.known and empty.nearest is not None


def test_a_product_that_a_filter_left_out_is_not_counted_as_another(
    recognition: Recognition, pictures: Pictures
) -> None:
    picture, kind = pictures[9]
    for where, known in ((Filter(category=kind), True), (Filter(category="Bag"), kind == "Bag")):
        (cell,) = look(recognition, picture, where=where)
        assert cell.known is known and cell.nearest is not None


@given(st.integers(1, 64), st.integers(1, 64), st.integers(64, 999), st.integers(64, 999))
def test_cells_cover_the_photo_once(rows: int, columns: int, width: int, height: int) -> None:
    boxes = Grid(rows=rows, columns=columns).boxes(width, height)
    assert len(boxes) == rows * columns
    assert sum((right - left) * (lower - upper) for left, upper, right, lower in boxes) == width * height
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)
    sizes = {(right - left, lower - upper) for left, upper, right, lower in boxes}
    assert max(w for w, _ in sizes) - min(w for w, _ in sizes) <= 1


def test_grids_are_read_and_refused_in_words() -> None:
    assert Grid.parse("3x5") == Grid(rows=3, columns=5) and WHOLE.boxes(7, 9) == [(0, 0, 7, 9)]
    for text in ("", "3", "3x", "0x4", "65x1", "ax2", "3x4x5", "x" * 1000):
        with pytest.raises(ConfigError, match="expected ROWSxCOLUMNS"):
            Grid.parse(text)
    with pytest.raises(ConfigError, match="4 x 9 pixels"):
        Grid(rows=1, columns=5).boxes(4, 9)


def test_a_photo_too_small_for_the_grid_is_a_problem_and_others_count(
    recognition: Recognition, pictures: Pictures, tmp_path: Path
) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    shelf(1, 2, [pictures[9][0], pictures[9][0]]).save(tmp_path / "b.png")
    found = take_inventory(recognition, photos_in(tmp_path), Grid(rows=1, columns=2))
    assert found.photos == 1 and [(line.sku, line.count) for line in found.counts] == [("P-09", 2)]
    assert found.problems[0].startswith("a.png: grid")


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/2.png", "a/1.webp", ".hidden.png", ".git/3.png", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in photos_in(tmp_path)] == [
        "b.JPG",
        "a/1.webp",
        "a/2.png",
    ]
    with pytest.raises(ConfigError, match="no such folder"):
        list(photos_in(tmp_path / "none"))


def test_all_formats_that_photos_may_have_are_looked_for() -> None:
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in LIMITS.formats}
    assert known >= SUFFIXES and {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == set(
        LIMITS.formats
    )


def test_a_folder_that_can_not_be_written_is_told(recognition: Recognition, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), WALL).save(tmp_path / "wall.png")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        take_inventory(recognition, [tmp_path / "wall.png"], unknown_folder=tmp_path / "file")
