"""The contact sheet: what is on it, what must not be, how large it may get."""

import base64
import io
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse_client import contact_sheet
from hanse_client.catalog import Catalog
from hanse_client.catalog_check import ClassCount, Doubts, Findings, Group, Suspect, class_counts
from hanse_client.contact_sheet import EDGE, write
from hanse_client.contact_sheet import contact_sheet as make_sheet
from hanse_common.errors import ConfigError
from hanse_common.vision.taxonomy import LabelMap, Taxonomy
from hanse_common.web.pages import faults

CLASSES = ("Shirt", "Shoe <b>&", "Bag")


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split()).replace("/ ", "/")

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def noise(number: int, height: int = 40, width: int = 20) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


def fill(folder: Path, count: int, height: int = 40, width: int = 20) -> None:
    for number in range(count):
        path = folder / ("Shirt" if number % 2 else "shoe") / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, height, width).save(path)


def load(folder: Path) -> Catalog:
    labels = LabelMap(Taxonomy(classes=CLASSES), {"shoe": "Shoe <b>&"})
    return Catalog.load(folder, labels, holdout_key=bytes(16), holdout_fraction=0.3)


def findings(catalog: Catalog, **changes: object) -> Findings:
    fields = {
        "catalog": catalog,
        "classes": class_counts(catalog, CLASSES),
        "problems": catalog.problems,
        "copies": (),
        "alike": (),
        "doubts": None,
    }
    return Findings(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    fill(folder, 8)
    return folder


@pytest.fixture
def full(shop: Path) -> Findings:
    """Something in every section."""
    evil = "<img src=x onerror=alert(1)>&.png"
    noise(50).save(shop / "Shirt" / evil)
    (shop / "Shirt" / "<script>broken.jpg").write_bytes(b"no photo")
    (shop / "Boots & <i>").mkdir()
    noise(51).save(shop / "Boots & <i>" / "1.png")
    catalog = load(shop)
    by_name = {record.path.name: record for record in catalog.records}
    assert evil in by_name
    return findings(
        catalog,
        copies=(
            Group((by_name["0000.png"], by_name["0001.png"])),
            Group((by_name["0003.png"], by_name["0005.png"])),
        ),
        alike=(Group((by_name["0002.png"], by_name["0004.png"], by_name["0006.png"])),),
        doubts=Doubts(0.875, (Suspect(by_name[evil], "Bag", 0.004, 0.93),)),
    )


def test_every_finding_is_on_the_sheet(shop: Path, full: Findings) -> None:
    page = Page(make_sheet(full, shop))
    for text in (
        "filed as Shirt (< 1 %)",
        "looks like Bag (93 %)",
        "Shirt/<img src=x onerror=alert(1)>&.png",
        "One photo lies in its class more than once",
        "<script>broken.jpg: found no image of an accepted format",
        "Boots & <i>: one photo",
        "What happens to a photo may depend on that photo alone",
        "Shoe <b>&",
    ):
        assert text in page.text
    conflicts = page.text.partition("At most one of them is right.")[2].partition(
        "Photos that look the same"
    )[0]
    assert "shoe/0000.png" in conflicts and "Shirt/0001.png" in conflicts and "0002.png" not in conflicts
    alike = page.text.partition("the figures flatter.")[2].partition("Can't be used")[0]
    assert all(name in alike for name in ("0002.png", "0004.png", "0006.png")) and "0003.png" not in alike
    sides = {record.holdout for record in full.alike[0].records}
    assert ("trained on and tested with" in alike) == (len(sides) == 2)
    samples = page.text.partition("Samples of each class")[2]
    assert all(f"{number:04}.png" in samples for number in range(8))


def test_names_cannot_become_markup_and_nothing_runs_or_comes_from_elsewhere(
    shop: Path, full: Findings
) -> None:
    page = Page(make_sheet(full, shop))
    assert not {"script", "i", "b", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("style", "href", "srcset") for name in attributes)
    pictures = page.of("img")
    assert len(pictures) == 1 + 2 + 3 + 9
    assert all((each["src"] or "").startswith("data:image/jpeg;base64,") for each in pictures)
    (policy,) = [each for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy["content"] or "") and "script" not in (policy["content"] or "")


def test_pictures_are_small_and_carry_no_notes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "Shirt").mkdir(parents=True)
    notes = Image.Exif()
    notes[0x010E] = "where it was taken"
    noise(1, 400, 200).save(folder / "Shirt" / "1.jpg", exif=notes, comment=b"secret note")
    (source,) = [each["src"] or "" for each in Page(make_sheet(findings(load(folder)), folder)).of("img")]
    data = base64.b64decode(source.partition(",")[2])
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "JPEG" and picture.size == (EDGE // 2, EDGE)
    assert not picture.getexif() and b"taken" not in data and b"secret" not in data


def everything_of(folder: Path, times: int) -> Findings:
    """Every finding of each photo, `times` over, and labels without number."""
    catalog = load(folder)
    records = tuple(sorted(catalog.records, key=lambda record: record.label)) * times
    return findings(
        Catalog(records, catalog.problems, {f"label {number}" * 50: 1 for number in range(5000)}),
        alike=tuple(Group(records[start : start + 30]) for start in range(0, len(records), 30)) * 3,
        copies=tuple(Group(records[:60]) for _ in range(500)),
        doubts=Doubts(0.9, tuple(Suspect(record, "Bag", 0.1, 0.8) for record in records)),
    )


def test_what_has_no_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "PICTURE_BYTES", 30_000)
    folder = tmp_path / "photos"
    fill(folder, 60)
    page = Page(make_sheet(everything_of(folder, 5), folder))
    assert 20_000 < sum(len(each["src"] or "") for each in page.of("img")) <= 30_000
    assert page.text.count("no picture") > 100
    for left in (100, 54, 440):  # of suspects, of a group, of groups
        assert f"And {left} more, not shown here." in page.text


@pytest.mark.slow
def test_a_sheet_stays_below_10_megabytes(tmp_path: Path) -> None:
    """Photos of noise, which JPEG hardly makes smaller, and long names."""
    folder = tmp_path / "photos"
    fill(folder, 60, EDGE, EDGE)
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name("n" * 200 + path.name))
    page = make_sheet(everything_of(folder, 40), folder)
    assert 6_500_000 < len(page) < 10_000_000


@pytest.mark.slow
def test_a_thousand_classes_each_have_a_sample(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    fill(folder, 2)
    catalog = load(folder)
    (first, _) = catalog.records
    classes = tuple(f"class {number}" for number in range(1000))
    records = (
        tuple(type(first)(first.path, n, None, None, first.digest, False, first.limits) for n in range(1000))
        * 2
    )
    counts = tuple(ClassCount(name, 2, 0) for name in classes)
    page = make_sheet(findings(Catalog(records, (), {}), classes=counts), folder)
    assert len(Page(page).of("img")) == 1000 and len(page) < 10_000_000


def test_the_language_and_what_it_says_without_findings(shop: Path) -> None:
    english, chinese = (Page(make_sheet(findings(load(shop)), shop, each)) for each in ("en", "zh"))
    assert english.of("html")[0]["lang"] == "en" and chinese.of("html")[0]["lang"] == "zh-Hans"
    assert english.text.count("None.") == 3 and chinese.text.count("没有。") == 3
    assert "There is no recognizer yet." in english.text and "None." not in chinese.text
    unsure = make_sheet(findings(load(shop), doubts=Doubts(0.25, ())), shop)
    assert "It agrees with your labels for 25 % of a class's photos" in Page(unsure).text


def test_every_text_has_its_chinese() -> None:
    folder = Path(contact_sheet.__file__).parent / "templates"
    texts = set(_texts(folder))
    assert len(texts) > 30
    assert not [fault for fault in faults(folder) if any(text in fault for text in texts)]


def _texts(folder: Path) -> list[str]:
    page = (folder / "contact-sheet.html").read_text()
    return [text for text in page.split('_("') if '")' in text for text in [text.partition('")')[0]]]


def test_a_photo_that_is_gone_leaves_a_gap(shop: Path) -> None:
    found = findings(load(shop))
    (shop / "Shirt" / "0001.png").unlink()
    page = Page(make_sheet(found, shop))
    assert page.text.count("no picture") == 1 and len(page.of("img")) == 7


def test_odd_names_are_shown(shop: Path) -> None:
    noise(60).save(shop / "Shirt" / "a\x1b\u202egpj.png")
    noise(61).save(shop / "Shirt" / "b\udcff.png")
    text = Page(make_sheet(findings(load(shop)), shop)).text
    assert "Shirt/a\ufffd\ufffdgpj.png" in text and "Shirt/b\ufffd.png" in text


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sheet.html"
    path.write_text("older")
    path.chmod(0o644)
    write(path, b"page")
    assert path.read_bytes() == b"page" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"sheet\.html: the contact sheet cannot be written"):
        write(tmp_path / "none" / "sheet.html", b"page")


def test_progress_is_told_for_each_picture(shop: Path, full: Findings) -> None:
    calls: list[None] = []
    progress: Callable[[], None] = lambda: calls.append(None)  # noqa: E731
    make_sheet(full, shop, progress=progress)
    assert len(calls) == 1 + 2 + 3 + 9
