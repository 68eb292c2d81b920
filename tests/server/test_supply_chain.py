"""What is released can be made again: a wheel to the byte, versions from a lock, a bill of materials from both."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = {
    "hanse_server": "server",
    "hanse_client": "client",
    "hanse_common": "common",
    "hanse_simulations": "simulations",
}


@pytest.fixture(scope="module")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that the wheel is built from."""
    copy = tmp_path_factory.mktemp("sources")
    for file in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy2(root / file, copy)
    for package, folder in PACKAGES.items():
        shutil.copytree(root / folder / package, copy / folder / package)
    return copy


@pytest.fixture
def build(root: Path, sources: Path, tmp_path: Path) -> Callable[..., bytes]:
    """Return a function that builds the wheel from another copy of the sources, as `make wheel` does."""

    def make(name: str, *, mode: int = 0o644, time: int | None = None, epoch: int | None = None) -> bytes:
        copy = tmp_path / name
        shutil.copytree(sources, copy)
        for path in sorted(copy.rglob("*"), reverse=bool(time)):
            if path.is_file():
                path.chmod(mode)
            if time is not None:
                os.utime(path, (time, time))
        environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        if epoch is not None:
            environment["SOURCE_DATE_EPOCH"] = str(epoch)
        recipe = (root / "Makefile").read_text()
        command = re.search(r"^\t@\$\(BIN\)/python (-m hatchling build .+)$", recipe, re.M)
        assert command is not None
        subprocess.run(
            [sys.executable, *command[1].split()],
            cwd=copy,
            env=environment,
            check=True,
            capture_output=True,
        )
        (wheel,) = (copy / "dist").glob("*.whl")
        return wheel.read_bytes()

    return make


def test_two_builds_of_the_same_sources_are_the_same_to_the_byte(build: Callable[..., bytes]) -> None:
    one = build("here")
    other = build("somewhere/else", mode=0o600, time=1_000_000_000)
    assert hashlib.sha256(one).hexdigest() == hashlib.sha256(other).hexdigest()


def test_a_build_has_the_date_that_it_is_given(build: Callable[..., bytes]) -> None:
    dated = build("dated", epoch=1_700_000_000)
    assert dated == build("again", epoch=1_700_000_000, time=1_000_000_000)
    with zipfile.ZipFile(io.BytesIO(dated)) as wheel:
        assert {entry.date_time[:3] for entry in wheel.infolist()} == {(2023, 11, 14)}


def test_the_wheel_holds_the_packages_and_nothing_else(sources: Path, build: Callable[..., bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(build("copy"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        rows = [
            row for name in wheel.namelist() if name.endswith("/RECORD") for row in csv.reader(
                wheel.read(name).decode().splitlines()
            )
        ]  # fmt: skip
        for name, digest, _ in rows:
            if digest:
                found = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).rstrip(b"=")
                assert digest == f"sha256={found.decode()}"
    ours = {
        path.relative_to(sources / folder).as_posix()
        for package, folder in PACKAGES.items()
        for path in (sources / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == ours
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def locked(root: Path) -> dict[str, str]:
    """The locked version of each package, by its canonical name."""
    lines = (root / "requirements.lock").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_the_lock_pins_every_package_once_in_order(root: Path) -> None:
    lines = (root / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!-]+", line) for line in lines)
    names = [line.partition("==")[0].lower() for line in lines]
    assert names == sorted(names)
    assert len(locked(root)) == len(lines)


def test_the_lock_has_all_that_hanse_needs_and_what_that_needs(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"]]
    asked += [text for extra in project["project"]["optional-dependencies"].values() for text in extra]
    versions, seen, waiting = locked(root), set(), [Requirement(text) for text in asked]
    waiting = [found for found in waiting if found.name != "hanse"]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        assert name in versions, f"{requirement.name} is needed, and not in requirements.lock"
        assert requirement.specifier.contains(versions[name], prereleases=True), (
            f"{requirement}: {versions[name]}"
        )
        try:
            needed = distribution(name).requires or ()
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed; run make install")
        for text in needed:
            inner = Requirement(text)
            if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)


@pytest.fixture(scope="module")
def bill(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make sbom` writes."""
    recipe = (root / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"\$\(BIN\)/cyclonedx-py (.+) --output-file \S+$", recipe, re.M)
    assert command is not None
    made = tmp_path_factory.mktemp("sbom") / "hanse.cdx.json"
    program = Path(sys.executable).with_name("cyclonedx-py")
    subprocess.run(
        [program, *command[1].split(), "--output-file", made], cwd=root, check=True, capture_output=True
    )
    return json.loads(made.read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_bill_of_materials_is_by_the_schema(bill: dict[str, Any]) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bill)) is None
    assert validator.validate_str(json.dumps(bill | {"bomFormat": "another"})) is not None


@pytest.mark.slow
def test_the_bill_of_materials_has_all_that_is_locked(root: Path, bill: dict[str, Any]) -> None:
    found = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert found == locked(root)
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"])
    about = bill["metadata"]["component"]
    assert (about["name"], about["version"]) == ("hanse", distribution("hanse").version)
    assert "timestamp" not in bill["metadata"] and "serialNumber" not in bill
