"""`hanse-server` as an operator types it: exit codes, what it says, and what the files are worth afterwards."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.errors import CatalogError, ConfigError, PlanRefused, RecognizerError
from hanse_common.plan import SignedPlan
from hanse_common.vision.backbones import load_backbone
from hanse_server import cli
from hanse_server.config import ServerConfig

CONFIG = {
    "signing_key": "operator.key",
    "plan": {
        "league": "shoes",
        "taxonomy": {"classes": ["Boot", "Sandal"]},
        "recipe": {
            "preprocessing": {"size": 16, "channels": 1},
            "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
        },
        "training": {
            "mode": "local",
            "rounds": 3,
            "repeats": 1,
            "local_steps": 2,
            "sampling_rate": 0.5,
            "expected_batch": 100,
            "clipping_norm": 1,
            "learning_rate": 1,
        },
        "privacy": {"epsilon": 1},
        "cohort": {"min_merchants": 3, "max_merchants": 4},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hanse-server.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def photos(folder: Path) -> Path:
    """Twelve photos in nested folders, among things that are none."""
    rng = np.random.default_rng(0)
    for index in range(12):
        path = folder / "photos" / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (folder / "photos" / "notes.txt").write_text("[red]no photo[/red]")
    (folder / "photos" / "empty.jpg").touch()
    (folder / "photos" / ".hidden.png").write_text("not looked at")
    return folder / "photos"


def type_in(
    folder: Path, *words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the command in `folder`; return exit code, standard output and standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["hanse-server", *words])
    capsys.readouterr()
    code: object = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.fixture
def server(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    return lambda *words: type_in(folder, *words, capsys=capsys, monkeypatch=monkeypatch)


def test_keygen_prints_the_half_that_merchants_pin(server, folder: Path) -> None:
    code, out, _ = server("keygen", "operator.key")
    assert code == 0
    assert (folder / "operator.key.pub").read_text().strip() in out
    assert "PRIVATE" not in out
    assert (folder / "operator.key").stat().st_mode & 0o077 == 0


def test_a_key_is_never_overwritten(server, folder: Path) -> None:
    server("keygen", "operator.key")
    before = (folder / "operator.key").read_bytes()
    code, _, err = server("keygen", "operator.key")
    assert code == ConfigError.exit_code
    assert "operator.key" in err
    assert (folder / "operator.key").read_bytes() == before


def test_check_says_what_merchants_pay_and_writes_nothing(server, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, _ = server("check")
    assert code == 0
    epsilon = float(re.search(r"ε = ([0-9.]+) at δ = 1e-05", out)[1])  # type: ignore[index]
    assert 0.99 < epsilon <= 1
    assert "3 (and up to 1 repeated), mode local" in out
    assert "Boot, Sandal" in out
    assert sorted(folder.iterdir()) == before


def test_check_refuses_an_optimizer_that_is_none(server, folder: Path) -> None:
    wrong = CONFIG | {"optimization": {"optimizer": {"name": "sdg"}}}
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(wrong))
    code, _, err = server("check")
    assert code == ConfigError.exit_code
    assert "found 'sdg', expected one of fedadagrad" in err


def test_check_lists_every_fault_with_its_line(server, folder: Path) -> None:
    (folder / "hanse-server.yaml").write_text("plan: {league: A}\nnonsense: 1\n")
    code, _, err = server("check")
    assert code == ConfigError.exit_code
    assert all(line.startswith("error: hanse-server.yaml:") for line in err.splitlines())
    for key in ("signing_key", "plan.league", "plan.taxonomy", "nonsense"):
        assert key in err


def test_a_plan_that_no_noise_can_meet_has_an_exit_code_of_its_own(server, folder: Path) -> None:
    hopeless = CONFIG | {"plan": {**CONFIG["plan"], "privacy": {"epsilon": 1e-9}}}  # type: ignore[dict-item]
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(hopeless))
    code, _, err = server("check")
    assert code == PlanRefused.exit_code
    assert "out of reach" in err


def test_a_signed_plan_opens_with_the_pinned_key_only(server, folder: Path) -> None:
    _, out, _ = server("keygen", "operator.key")
    key = bytes.fromhex(out.splitlines()[-1])
    code, out, _ = server("sign")
    assert code == 0
    plan = wire.decode(SignedPlan, (folder / "plan.hanse").read_bytes()).open(key)
    assert plan.league == "shoes"
    assert plan.digest.hex()[:16] in out
    code, _, err = server("sign")
    assert code == ConfigError.exit_code
    assert "plan.hanse" in err
    server("sign", "--out", "second.hanse")
    second = wire.decode(SignedPlan, (folder / "second.hanse").read_bytes()).open(key)
    assert second.digest != plan.digest  # a serial of its own


def test_signing_without_a_key(server) -> None:
    code, _, err = server("sign")
    assert code == ConfigError.exit_code
    assert "operator.key: cannot be read" in err


@pytest.mark.parametrize("words", [("sign", "-o", "no/plan"), ("fit-whitening", "photos", "-o", "no/w")])
def test_a_file_in_a_missing_folder_is_refused_before_the_work(server, words: tuple[str, ...]) -> None:
    code, _, err = server(*words)
    assert code == ConfigError.exit_code
    assert "there is no folder no" in err


def test_fitted_whitening_is_what_its_printed_lines_name(server, folder: Path, photos: Path) -> None:
    code, out, err = server("fit-whitening", "photos", "--dimensions", "5")
    assert code == 0
    assert "fitted to 12 of 14 files" in out
    assert "notes.txt" in err
    assert "empty.jpg" in err
    assert ".hidden" not in err
    file = folder / "whitening.safetensors"
    printed = yaml.safe_load("\n".join(line for line in out.splitlines() if line.startswith("  ")))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert printed == {"whitening": {"dimensions": 5, "weights": digest}}

    changed = yaml.safe_load((folder / "hanse-server.yaml").read_text())
    changed["plan"]["recipe"]["backbone"] |= printed
    (folder / "hanse-server.yaml").write_text(yaml.safe_dump(changed))
    recipe = load(ServerConfig, folder / "hanse-server.yaml").plan.recipe
    assert recipe.feature_dimension == 5
    load_backbone(recipe, whitening=file)


def test_a_limit_takes_photos_from_all_folders(server, photos: Path) -> None:
    (photos / "notes.txt").unlink()
    (photos / "empty.jpg").unlink()
    code, out, _ = server("fit-whitening", "photos", "--dimensions", "2", "--limit", "5")
    assert code == 0
    assert "fitted to 4 of 12 files" in out


def test_what_fit_whitening_refuses(server, folder: Path, photos: Path) -> None:
    code, _, err = server("fit-whitening", "photos", "--dimensions", "100")
    assert (code, "found 12 photos" in err) == (RecognizerError.exit_code, True)
    code, _, err = server("fit-whitening", "nowhere")
    assert (code, "no such folder" in err) == (CatalogError.exit_code, True)
    (folder / "bare").mkdir()
    code, _, err = server("fit-whitening", "bare")
    assert (code, "holds no files" in err) == (CatalogError.exit_code, True)
    (folder / "whitening.safetensors").touch()
    code, _, err = server("fit-whitening", "photos")
    assert (code, "a file already" in err) == (ConfigError.exit_code, True)


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "opacus"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from hanse_server.cli import main
for words in (["--help"], ["sign"], ["fit-whitening", "photos"]):
    sys.argv = ["hanse-server", *words]
    print("hanse-server", *words, file=sys.stderr, flush=True)
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code, file=sys.stderr, flush=True)
"""


def test_all_but_fit_whitening_work_without_torch(folder: Path, photos: Path) -> None:
    signing.create_key(folder / "operator.key")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER],
        cwd=folder, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    fine, _, rest = done.stderr.partition("hanse-server fit-whitening photos\n")
    assert fine == "hanse-server --help\nended with 0\nhanse-server sign\nended with 0\n"
    assert "torch is blocked" in rest
    assert "ended with 0" not in rest


def test_help_of_every_command_reads_well(server) -> None:
    _, out, _ = server("--help")
    commands = (
        "keygen", "keys", "card", "check", "rehearse", "sign", "fit-whitening", "run", "resume", "stop", "serve",
        "status", "page", "versions", "finish", "publish", "rollback", "export", "audit", "backup", "restore",
        "migrate",
    )  # fmt: skip
    for command in commands:
        assert command in out
        code, text, _ = server(command, "--help")
        assert code == 0
        assert "…" not in text, f"{command}: help is cut off"


def test_paths_are_printed_as_they_are(server, folder: Path, photos: Path) -> None:
    (photos / "[bold]x.png").write_text("no photo")
    _, _, err = server("fit-whitening", "photos", "--dimensions", "2")
    assert "[bold]x.png" in err
