"""The command that exports, and the guide's example on what it wrote."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hanse_client import cli
from hanse_client.cli.export import _photos
from hanse_client.config import ClientConfig
from hanse_common.config import load
from hanse_common.vision import edge

from .personal.conftest import shop  # noqa: F401
from .personal.shelf import CLASSES, picture

GUIDE = Path(__file__).parents[2] / "docs" / "edge.md"


@pytest.fixture
def export(
    shop: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hanse-client", "export", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def test_what_is_exported_is_checked_and_runs_by_the_guides_example(
    export: Callable[..., tuple[int, str, str]],
    shop: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, text, _ = export("--out", "edge", "--int8", "--json")
    assert code == 0
    found = json.loads(text)
    assert set(found) == {"recognizer.onnx", "recognizer-int8.onnx"}
    assert found["recognizer.onnx"]["difference"] < edge.TOLERANCE
    assert found["recognizer.onnx"]["agreement"] == 1.0
    assert found["recognizer-int8.onnx"]["photos"] == 40
    assert (shop / "edge" / "recognizer.onnx").stat().st_size == found["recognizer.onnx"]["bytes"]

    picture(1, 5).save(shop / "photo.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)  # noqa: S102
    assert names["classes"] == list(CLASSES)
    assert re.fullmatch(r"(shirt|shoe): \d+\.\d %\n", capfd.readouterr().out)


def test_a_file_that_is_not_the_recognizer_is_not_kept(
    export: Callable[..., tuple[int, str, str]],
    shop: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge, "TOLERANCE", 0.0)
    monkeypatch.setattr(edge, "to_onnx", lambda recognizer: b"")
    monkeypatch.setattr(edge, "parity", lambda *_: edge.Parity(1, 0.5, 1.0, None))
    code, _, complaint = export("--out", "edge")
    assert (code, (shop / "edge").exists()) == (15, False)
    assert "Nothing was written" in complaint


def test_too_few_photos_for_8_bits_and_a_missing_extra_are_said(
    export: Callable[..., tuple[int, str, str]],
    shop: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in sorted((shop / "photos").rglob("*.png"))[20:]:
        path.unlink()
    code, _, complaint = export("--out", "edge", "--int8")
    assert code == 14
    assert "20 usable photos" in complaint
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, complaint = export("--out", "edge")
    assert code == 10
    assert "hanse[edge]" in complaint
    assert not (shop / "edge").exists()


def test_photos_to_calibrate_on_are_not_those_compared_on(shop: Path) -> None:  # noqa: F811
    compared, calibration = _photos(load(ClientConfig, shop / "hanse-client.yaml"))
    assert (len(compared), len(calibration)) == (40, 80)
    assert not {photo.tobytes() for photo in compared} & {photo.tobytes() for photo in calibration}
