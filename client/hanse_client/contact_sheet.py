"""The contact sheet: what a check of the catalog found, as one HTML file with small pictures.

    write(Path("sheet.html"), contact_sheet(findings, Path("photos"), "en"))

The file needs nothing else and runs nothing: pictures are JPEG inside it, without what a camera noted, and there is no
script. It shows the merchant's photos, so nobody else may read it (mode 0600). Counts and bytes are bounded, whatever
the catalog holds: what has no room is counted, not shown. Suspects come first, so that they get the room.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hanse_client.catalog import Record
from hanse_client.catalog_check import Findings, Group, relative
from hanse_common.errors import ConfigError, PhotoError
from hanse_common.files import write_atomically
from hanse_common.web.pages import Language, Pages

EDGE = 96
"""Bound of a picture's edges, in pixels."""

PICTURE_BYTES = 7_500_000
"""Bound of all pictures together, in characters; with all texts a file stays below 10 MB."""

MAX_SUSPECTS = 200
MAX_GROUPS = 60
"""Groups shown in each section of duplicates."""

MAX_OF_GROUP = 6
MAX_PROBLEMS = 200
MAX_SAMPLES = 600
"""Sample photos of all classes together, though each class with photos has at least one."""

SAMPLE = 12
"""Sample photos of one class."""

MAX_TEXT = 160
"""Characters of a file's name or a reason that are shown: its end, or its beginning."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Picture:
    """A photo as the page shows it. `source` is a data URI, None where there is no room or no picture."""

    name: str
    label: str
    holdout: bool
    source: str | None


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """The first pictures of a group, and how many photos of it are not shown."""

    pictures: tuple[Picture, ...]
    left: int
    across_border: bool


def contact_sheet(
    findings: Findings,
    folder: Path,
    language: Language = "en",
    progress: Callable[[], None] = lambda: None,
) -> bytes:
    """Return the page, in UTF-8; photos' names are shown from `folder` on. `progress` is called for each picture."""
    album = _Album(folder, [each.name for each in findings.classes], progress)
    doubts = findings.doubts
    suspects = [
        (album.picture(each.record), each.instead, _percent(each.given), _percent(each.likelier))
        for each in (doubts.suspects[:MAX_SUSPECTS] if doubts else ())
    ]
    conflicts = [group for group in (*findings.copies, *findings.alike) if group.across_classes]
    alike = sorted(
        (group for group in findings.alike if not group.across_classes),
        key=lambda group: not group.across_border,
    )
    shown_conflicts, shown_alike = album.groups(conflicts), album.groups(alike)
    page = Pages(_TEMPLATES, language).render(
        "contact-sheet.html",
        findings=findings,
        suspects=suspects,
        agreement=_percent(doubts.agreement) if doubts else "",
        conflicts=shown_conflicts,
        conflicts_left=len(conflicts) - len(shown_conflicts),
        alike=shown_alike,
        alike_left=len(alike) - len(shown_alike),
        same_class_copies=sum(not group.across_classes for group in findings.copies),
        problems=[_clipped_end(each.reason) for each in findings.problems[:MAX_PROBLEMS]],
        unmapped=[
            (_clipped_end(label), count)
            for label, count in list(findings.catalog.unmapped.items())[:MAX_PROBLEMS]
        ],
        samples=album.samples(findings.catalog.records),
        largest=max(each.total for each in findings.classes),
    )
    return page.encode()


def write(path: Path, page: bytes) -> None:
    """Write the sheet to `path`, for this user alone, in place of an older one. Raises `ConfigError`."""
    try:
        write_atomically(path, page)
    except OSError as error:
        raise ConfigError(
            f"{path}: the contact sheet cannot be written ({error.strerror}), expected a file's name in a folder that "
            "is there. Name another."
        ) from None


class _Album:
    """Makes the pictures, and no more of them than there is room for."""

    def __init__(self, folder: Path, classes: Sequence[str], progress: Callable[[], None]) -> None:
        self._folder = folder
        self._classes = classes
        self._progress = progress
        self._room = PICTURE_BYTES

    def picture(self, record: Record) -> Picture:
        self._progress()
        source = _data_uri(record) if self._room > 0 else None
        if source is not None and len(source) > self._room:
            source, self._room = None, 0
        self._room -= len(source or "")
        name = _clipped_start(relative(record.path, self._folder))
        return Picture(name, self._classes[record.label], record.holdout, source)

    def groups(self, groups: Iterable[Group]) -> list[ShownGroup]:
        return [
            ShownGroup(
                tuple(self.picture(record) for record in group.records[:MAX_OF_GROUP]),
                max(0, len(group.records) - MAX_OF_GROUP),
                group.across_border,
            )
            for group in list(groups)[:MAX_GROUPS]
        ]

    def samples(self, records: Sequence[Record]) -> list[tuple[str, list[Picture]]]:
        """Return the sample of each class that has photos: by content digest, so any, and the same each time."""
        by_class: dict[int, list[Record]] = {}
        for record in sorted(records, key=lambda record: (record.digest, str(record.path))):
            by_class.setdefault(record.label, []).append(record)
        each = max(1, min(SAMPLE, MAX_SAMPLES // len(by_class)))
        return [
            (self._classes[label], [self.picture(record) for record in by_class[label][:each]])
            for label in sorted(by_class)
        ]


def _data_uri(record: Record) -> str | None:
    try:
        image = record.open()
    except PhotoError:
        return None
    image.thumbnail((EDGE, EDGE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    file = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(file, "JPEG", quality=75, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _percent(share: float) -> str:
    """Return `share` in words that no line break divides."""
    text = f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "< 1 %"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _clipped_start(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= MAX_TEXT else "…" + text[1 - MAX_TEXT :]


def _clipped_end(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= 2 * MAX_TEXT else text[: 2 * MAX_TEXT - 1] + "…"


def _printable(text: str) -> str:
    """Return `text` with what no page shows, such as the bytes of a name that is not UTF-8, as �."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
