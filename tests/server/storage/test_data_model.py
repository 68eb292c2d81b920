"""server/DATA_MODEL.md says what the code does: every table, every state and step, every kind of audit entry."""

import re
from pathlib import Path

import pytest

from hanse_server.storage import scripts
from hanse_server.storage.backup import SKIPPED_ATTEMPTS
from hanse_server.storage.history import MAX_REASON
from hanse_server.storage.progress import MAX_DETAIL
from hanse_server.storage.schema import TRANSITIONS, Record

CHECK = re.compile(r"(\w+) IN \(([^)]*)\)")
KIND = re.compile(r"""append\(\s*(?:session, [^"]*?, )?"([a-z-]+)",""", re.DOTALL)


@pytest.fixture(scope="module")
def document(root: Path) -> str:
    return (root / "server" / "DATA_MODEL.md").read_text()


@pytest.fixture(scope="module")
def sections(document: str) -> dict[str, str]:
    """The text of each record by its table's name."""
    parts = re.split(r"^### `(\w+)`$", document.partition("\n## How much it grows")[0], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_table_has_its_section(sections: dict[str, str]) -> None:
    assert set(sections) == set(Record.metadata.tables)


def test_every_step_between_states_is_drawn_and_no_other(sections: dict[str, str]) -> None:
    for table, text in sections.items():
        drawn = set(re.findall(r"^    (\w+) --> (\w+)", text, flags=re.MULTILINE))
        steps = {(before, after) for before, then in TRANSITIONS.get(table, {}).items() for after in then}
        assert drawn == steps, table


def test_every_state_that_the_database_takes_is_named(sections: dict[str, str]) -> None:
    for table in Record.metadata.sorted_tables:
        for constraint in table.constraints:
            found = CHECK.search(str(getattr(constraint, "sqltext", "")))
            for state in re.findall(r"'(\w+)'", found[2]) if found else ():
                assert re.search(rf"\b{state}\b", sections[table.name]), (table.name, state)


def test_every_kind_of_audit_entry_is_listed(root: Path, sections: dict[str, str]) -> None:
    written = {
        kind
        for path in (root / "server" / "hanse_server").rglob("*.py")
        if path.name != "audit_log.py"
        for kind in KIND.findall(path.read_text())
    }
    listed = set(re.findall(r"^\| `([a-z-]+)` \|", sections["audit"], flags=re.MULTILINE))
    assert listed == written


def test_every_version_and_bound_is_named(document: str) -> None:
    listed = re.findall(r"^\| `(\d{4})` \|", document, flags=re.MULTILINE)
    assert tuple(listed) == scripts.known_versions()
    for number in (SKIPPED_ATTEMPTS, MAX_REASON, MAX_DETAIL):
        assert f"{number:,}" in document
