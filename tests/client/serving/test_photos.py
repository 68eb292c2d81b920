"""Photos that are large in memory, however small their files, take turns."""

import io

import pytest
from PIL import Image

from hanse_client.gallery.bounds import MAX_VIEWS
from hanse_client.gallery.gallery import Gallery
from hanse_client.serving import photos
from hanse_client.serving.photos import Room, decoded, references
from hanse_client.serving.problems import Refused
from hanse_common.errors import Busy, PhotoTooLarge, PhotoUnreadable
from hanse_common.vision.photo import LIMITS, PhotoLimits

from .conftest import picture


def test_a_photo_has_its_room_until_nobody_holds_it() -> None:
    room = Room(pixels=100 * 100, seconds=0.05)
    held = room.decoded(picture(1, size=100), LIMITS)
    with pytest.raises(Busy):
        room.decoded(picture(2, size=10), LIMITS)
    del held
    assert room.decoded(picture(2, size=10), LIMITS).size == (10, 10)


def test_what_is_damaged_gives_its_room_back() -> None:
    room = Room(pixels=100 * 100, seconds=0.05)
    for damaged in (b"no photo", picture(1, size=100)[:-300]) * 2:
        with pytest.raises(PhotoUnreadable):
            room.decoded(damaged, LIMITS)
    assert room.decoded(picture(1, size=100), LIMITS).size == (100, 100)


def test_of_a_products_photos_one_is_large_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "ROOM", Room(pixels=900 * 900, seconds=0.05))
    found = references([picture(seed, size=900) for seed in range(4)])
    assert [one.size for one in found] == [(512, 512)] * 4


def test_no_more_photos_are_decoded_than_a_product_has() -> None:
    with pytest.raises(Refused, match="65"):
        references([b"never decoded"] * (MAX_VIEWS + 1))


def test_a_file_over_the_bound_is_not_decoded() -> None:
    with pytest.raises(PhotoTooLarge):
        decoded(picture(1), PhotoLimits(max_bytes=100))


def test_a_reduced_photo_is_stored_as_the_photo_is() -> None:
    image = Image.open(io.BytesIO(picture(3, size=1300)))
    assert Gallery.prepare(Gallery.reduced(image)) == Gallery.prepare(image)
