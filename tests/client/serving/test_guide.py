"""The guide's section on the recognizer at work is typed as it stands: its commands, its curl lines, its Python."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hanse_client import cli
from hanse_client.config import ClientConfig
from hanse_common.config import load

from .conftest import WAIT, Served, picture, release, running, settings_in

BLOCK = re.compile(r"<!-- shop: ([a-z-]+) -->\n```(?:sh|python)\n(.*?)```", re.S)
PHOTOS = {"shoe": 1, "boot": 2, "shoe-side": 3, "sandal": 4, "shelf": 1}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def blocks(root: Path) -> dict[str, str]:
    return dict(BLOCK.findall((root / "client" / "README.md").read_text()))


def furnish(folder: Path) -> None:
    """Put the photos and files of the guide into a shop's folder."""
    for name, seed in PHOTOS.items():
        (folder / f"{name}.jpg").write_bytes(picture(seed))
    (folder / "notes.txt").write_text("no photo")
    (folder / "products.csv").write_text(
        "sku,title,price,currency,category,photo,size\n1003,Sandal,19.90,EUR,shoes,sandal.jpg,38\n"
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shop of the guide, which serves."""
    with running(tmp_path_factory.mktemp("guide")) as served:
        furnish(served.source.parent)
        yield served


@pytest.fixture
def types(shop: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return a function that types a block's commands in the shop's folder, and returns what each says."""
    monkeypatch.chdir(shop.source.parent)
    monkeypatch.setenv("COLUMNS", "200")

    def type_(block: str) -> list[str]:
        said = []
        for line in block.splitlines():
            program, *words = shlex.split(line)
            assert program == "hanse-client"
            done = CliRunner().invoke(cli.app, words)
            assert done.exit_code == 0, f"{line}: {done.output} {done.exception!r}"
            said.append(done.output)
        return said

    return type_


def bash(shop: Served, text: str) -> str:
    """Type `text` in the shop's folder, with the shop's ports in place of the guide's; curl fails on errors."""
    for written, port in (("8766", shop.config.serve.port), ("8767", shop.config.serve.grpc_port)):
        text = text.replace(written, str(port))
    text = text.replace("curl ", "curl -sS --fail-with-body -w '\\n' ")
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        cwd=shop.source.parent,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guides_blocks_do_what_it_says(
    shop: Served, blocks: dict[str, str], types: Callable[[str], list[str]]
) -> None:
    assert set(blocks) == {"products", "ask", "import", "rest", "import-rest", "grpc", "export"}
    said = types(blocks["products"])
    assert said[0] == "Added 1001 with 1 photo.\n" and "has 2 photos" in said[2]
    assert "1001" in said[3] and "1002" not in said[3] and "49.90 EUR" in said[4]

    classes, together, found, text, similar, counted = types(blocks["ask"])
    assert together.startswith("shoe.jpg, shoe-side.jpg: ") and len(together.splitlines()) == 1
    assert "shoe.jpg: " in classes and "%" in classes
    assert found.startswith("shoe.jpg:") and "1001" in found and "1002" in text.splitlines()[0]
    assert "1002" in similar and "1001" not in similar
    assert "Looked at 1 photo" in counted

    imported, checked, changed, removed = types(blocks["import"])
    assert "1001: show " in checked and "1003: show " in checked
    assert imported == "Took in 1 product with 1 photo.\n" and changed == "Changed 1003; it has 1 photo.\n"
    assert removed == "Removed 1003.\n"

    answers = [json.loads(line) for line in bash(shop, blocks["rest"]).splitlines() if line]
    assert answers[0]["products"] == 2 and len(answers[1]["classes"]) == 3
    assert answers[3]["matches"][0]["product"]["sku"] == "1001"
    assert [match["product"]["sku"] for match in answers[4]["matches"]] == ["1002"]
    assert answers[5]["matches"][0]["product"]["title"] == "Ankle boot"
    assert [match["product"]["sku"] for match in answers[6]["matches"]] == ["1002"]
    assert [match["product"]["sku"] for match in answers[7]["matches"]] == ["1002"]
    assert answers[11]["price"] == "14.90" and len(answers[11]["photos"]) == 1
    assert [each["sku"] for each in answers[12]["products"]] == ["1001"]
    assert [each["label"] for each in answers[-1]["corrections"]] == ["trail shoe", None]

    (exported,) = types(blocks["export"])
    assert "edge" in exported

    progress = [json.loads(line) for line in bash(shop, blocks["import-rest"]).splitlines() if line]
    assert progress[0]["lines"] == 1 and progress[0]["failed"] == 0

    python = blocks["grpc"].replace("8767", str(shop.config.serve.grpc_port))
    done = subprocess.run(
        [sys.executable, "-c", python],
        cwd=shop.source.parent,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1001 Trail shoe") and lines[-3].startswith("shoe.jpg 1001")
    assert lines[-2].startswith("boot.jpg 1002") and lines[-1].startswith("notes.txt photo: found no image")


def invoke(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, words)
    return getattr(done.exception, "exit_code", done.exit_code), f"{done.output}{done.exception or ''}"


def test_commands_print_json_and_tell_what_is_wrong(shop: Served, types: Any) -> None:
    """Every command has `--json`, and each mistake an exit code of its own."""
    assert invoke("products", "add", "J-1", "--photo", "boot.jpg", "-a", "color=red", "--json")[0] == 0
    (listed,) = [
        json.loads(line) for line in invoke("products", "list", "-a", "color=red", "--json")[1].splitlines()
    ]
    assert listed["sku"] == "J-1" and listed["attributes"] == {"color": "red"}
    for words in (
        ("products", "show", "J-1"),
        ("products", "update", "J-1", "--title", "new"),
        ("search", "boot.jpg"),
        ("search", "--text", "new"),
        ("similar", "J-1"),
        ("inventory", "."),
        ("classify", "boot.jpg"),
        ("products", "import", "products.csv"),
        ("products", "check"),
        ("products", "remove", "J-1"),
    ):
        code, said = invoke(*words, "--json")
        assert code == (14 if words == ("inventory", ".") and code else 0), said
        assert isinstance(json.loads(said.splitlines()[0]), dict)
    for code, *words in (
        (30, "products", "remove", "J-1"),
        (30, "products", "show", "J-1"),
        (30, "products", "update", "J-1"),
        (30, "products", "add", "1003"),
        (30, "products", "add", "J-2", "--price", "dear"),
        (30, "products", "add", "J-2", "--price", "-1"),
        (30, "products", "add", "J-2", "-a", "color"),
        (22, "products", "add", "J-2", "--photo", "notes.txt"),
        (30, "products", "import", "nowhere.csv"),
        (30, "similar", "J-1"),
        (30, "products", "check", "--pictures", "."),
        (30, "search"),
        (21, "search", "nowhere.jpg"),
        (22, "search", "notes.txt"),
        (10, "inventory", "shelf.jpg", "--grid", "many"),
    ):
        found, said = invoke(*words)
        assert found == code and said and "Traceback" not in said, (words, found, said)
    assert invoke("products", "show", "J-2")[0] == 30, "nothing was added that had a fault"


@pytest.mark.slow
def test_the_command_serves_drains_and_ends_in_order(tmp_path: Path, wait_until: Callable[..., Any]) -> None:
    """Ready when it says so; SIGTERM lets it answer what is under way; a second one is told that the port is taken."""
    import httpx
    from tests.client.released import Made

    source = tmp_path / "hanse-client.yaml"
    source.write_text(yaml.safe_dump(settings_in(tmp_path)))
    config = load(ClientConfig, source)
    release(config, Made(tmp_path / "made"), 1)
    log = tmp_path / "said"
    command = [str(BIN / "hanse-client"), "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    try:
        wait_until("the service", lambda: "Your page:" in log.read_text() or process.poll() is not None)
        token = (config.state / "serve.token").read_text()
        assert token not in log.read_text(), "what goes to a file or a journal has other readers"
        with httpx.Client(base_url=config.serve.address, timeout=WAIT) as client:
            assert client.get("/ready").status_code == 200

            def slow() -> Iterator[bytes]:
                data = picture(1)
                yield data[:100]
                process.send_signal(signal.SIGTERM)
                wait_until("the end", lambda: "Ending" in log.read_text())
                yield data[100:]

            headers = {"Authorization": f"Bearer {token}", "Content-Type": "image/jpeg"}
            again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
            assert again.returncode == 31 and "cannot be used on this machine" in again.stderr, again
            assert client.post("/v1/classify", content=slow(), headers=headers).status_code == 200
        assert process.wait(WAIT) == 0 and "Stopped." in log.read_text()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{config.serve.address}/health")
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text() + (config.state / "serve.log").read_text()
