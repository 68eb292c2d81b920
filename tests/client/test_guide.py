"""The merchant's guide is kept true: exit codes have pages, commands exist, unit and image hold together."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from hanse_client import cli, doctor
from hanse_common import errors

FOR_MERCHANTS = {
    error.exit_code
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.HanseError)
} - {16, 17, 18, 26}  # of rounds, data sets, runs and the server's records, which no merchant's command has


@pytest.fixture
def guide(root: Path) -> str:
    return (root / "client" / "README.md").read_text()


def test_each_exit_code_has_a_page_that_says_what_to_do(root: Path, guide: str) -> None:
    pages = {int(path.stem): path for path in (root / "client" / "exit-codes").glob("*.md")}
    assert set(pages) == FOR_MERCHANTS | {2, doctor.EXIT_CODE, 130}
    for code, path in pages.items():
        text = path.read_text()
        assert text.startswith(f"# Exit code {code}: ")
        happened, do = text.split("## What happened\n")[1].split("## What to do\n")
        assert len(happened.split()) > 3 and len(do.split()) > 5
    table = guide[guide.index("## Exit codes") :]
    linked = {int(code) for code in re.findall(r"\(exit-codes/(\d+)\.md\)", table)}
    assert linked | {21, 22} == set(pages)


def test_every_command_in_the_guide_exists_and_every_command_is_in_the_guide(guide: str) -> None:
    app = typer.main.get_command(cli.app)
    commands = app.commands  # type: ignore[attr-defined]
    groups = {"league", "products"}
    known = set(commands) | {f"{group} {name}" for group in groups for name in commands[group].commands}
    named = set(re.findall(r"hanse-client ((?:league|products) [a-z-]+|[a-z][a-z-]+)", guide))
    assert named <= known | groups, named - known
    unnamed = {name for name in known - groups if not re.search(rf"`?{name}\b", guide)}
    assert not unnamed


def test_links_lead_somewhere(root: Path, guide: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", guide):
        assert (root / "client" / target).exists(), target
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", guide, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", guide)) <= anchors


UNITS = ("hanse-client.service", "hanse-client-serve.service")


def test_the_units_and_the_image_leave_the_photos_alone(root: Path) -> None:
    unit, serve = [(root / "client" / name).read_text() for name in UNITS]
    for line in (
        "User=hanse",
        "ReadOnlyPaths=/srv/hanse/photos",
        "ProtectSystem=strict",
        "NoNewPrivileges=true",
    ):
        assert f"\n{line}\n" in unit and f"\n{line}\n" in serve
    image = (root / "client" / "Dockerfile").read_text()
    assert "/srv/hanse/photos:ro" in image
    last = image.rpartition("FROM ")[2]
    assert last.index("USER hanse") < last.index("ENTRYPOINT")
    stop = re.search(r"TimeoutStopSec=(\d+)", unit)
    assert stop and int(stop[1]) > 20 + 2 * 6, "a round that is paid for, then the children"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_unit(root: Path, tmp_path: Path, name: str) -> None:
    text = (root / "client" / name).read_text()
    path = tmp_path / name
    path.write_text(text.replace("/opt/hanse/.venv/bin/hanse-client", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "hanse-client" in line]
    assert not said, said
