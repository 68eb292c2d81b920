"""The command `hanse-client` as a shop owner meets it: what it prints, and what it exits with."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from hanse_client import cli
from hanse_client.charges import Budget, Charge
from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common import errors, signing, wire
from hanse_common.config import load
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.recognizer import Recognizer

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

CONFIG = """\
photos: photos
labels: labels.yaml
state: state
recognizer: recognizer
holdout_fraction: 0.25
league:
  operator_key: {key}
  league_key: a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1
  taxonomy: {{classes: [shirt, shoe, bag]}}
policy:
  league: test
  epsilon: 4.0
  delta: 1e-5
"""

MakePlan = Callable[..., Plan]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shop: Path) -> Run:
    """Return a function that calls the command in the shop's folder."""
    monkeypatch.chdir(shop)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["hanse-client", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8))


@pytest.fixture
def shop(tmp_path: Path, make_plan: MakePlan) -> Path:
    plan = make_plan()
    for number, category in enumerate(["Hemden"] * 6 + ["shoe"] * 5 + ["Sale"] * 2 + ["Hüte [b]:shoe:"] * 2):
        path = tmp_path / "photos" / category / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "photos" / "shoe" / "notes.txt").write_text("not a photo")
    (tmp_path / "labels.yaml").write_text("Hemden: shirt\nSale: null\n")
    (tmp_path / "hanse-client.yaml").write_text(CONFIG.format(key=signing.public_bytes(KEY).hex()))
    vector = np.random.default_rng(1).normal(size=plan.dimension).astype(np.float32)
    recognizer = Recognizer.create(plan.recipe, plan.taxonomy, vector, created=datetime.now(UTC))
    recognizer.save(tmp_path / "recognizer")
    return tmp_path


def write_plan(path: Path, plan: Plan, key: Ed25519PrivateKey = KEY) -> str:
    path.write_bytes(wire.encode(SignedPlan.sign(plan, key)))
    return str(path)


def settings(shop: Path) -> ClientConfig:
    return load(ClientConfig, shop / "hanse-client.yaml")


# classify


def test_classify_says_what_is_on_a_photo(run: Run, shop: Path) -> None:
    result = run("classify", "photos/Hemden/0.png")
    assert (result.code, result.err) == (0, "")
    path, _, rest = result.out.strip().partition(": ")
    assert path == "photos/Hemden/0.png"
    shown = [entry.rsplit(" ", 2) for entry in rest.split(", ")]
    assert {name for name, _, _ in shown} == {"shirt", "shoe", "bag"}
    shares = [float(share) for _, share, _ in shown]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)
    assert all(unit == "%" for _, _, unit in shown)
    assert run("classify", "--top", "1", "photos/Hemden/0.png").out.count("%") == 1


def test_classify_without_configuration(run: Run, shop: Path) -> None:
    (shop / "hanse-client.yaml").unlink()
    assert run("classify", "-r", "recognizer", "photos/Hemden/0.png").code == 0
    result = run("classify", "photos/Hemden/0.png")
    assert result.code == 10 and "hanse-client.yaml: no such file" in result.err


def test_classify_in_json(run: Run, shop: Path) -> None:
    odd = "photos/shoe/[red]:shoe:\n.png"
    picture(1).save(shop / odd)
    result = run("classify", "--json", "photos/shoe/6.png", odd)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["photo"] for line in lines] == ["photos/shoe/6.png", odd]
    for line in lines:
        assert set(line["probabilities"]) == {"shirt", "shoe", "bag"}
        assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_odd_names_are_shown_as_they_are(run: Run, shop: Path) -> None:
    picture(1).save(shop / "[red]:shoe:.png")
    assert run("classify", "[red]:shoe:.png").out.startswith("[red]:shoe:.png: ")
    picture(1).save(shop / "a\x1b[2Jb.png")
    assert "\x1b" not in run("classify", "a\x1b[2Jb.png").out


@pytest.fixture
def bad_photos(shop: Path) -> dict[str, int]:
    """Files that are no photo for us, with the exit code of each."""
    (shop / "text.txt").write_text("This is not a photo.\n")
    (shop / "empty.jpg").touch()
    whole = (shop / "photos" / "shoe" / "6.png").read_bytes()
    (shop / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (10_000, 10_000)).save(shop / "huge.png")
    return {"text.txt": 22, "missing.png": 21, "huge.png": 23, "empty.jpg": 22, "half.png": 22, "photos": 22}


def test_photos_that_cannot_be_used_get_one_line_and_a_code(run: Run, bad_photos: dict[str, int]) -> None:
    for name, code in bad_photos.items():
        result = run("classify", name)
        assert (result.code, result.out) == (code, ""), name
        (line,) = result.err.splitlines()
        assert line.startswith(f"error: {name}: found ") and " expected " in line


def test_one_bad_photo_does_not_hinder_the_others(run: Run, bad_photos: dict[str, int]) -> None:
    result = run("classify", "photos/Hemden/0.png", "huge.png", "text.txt", "photos/shoe/6.png")
    assert [line.split(":")[0] for line in result.out.splitlines()] == [
        "photos/Hemden/0.png", "photos/shoe/6.png",
    ]  # fmt: skip
    assert result.code == 23 and len(result.err.splitlines()) == 2


def test_classify_without_a_recognizer(run: Run, shop: Path) -> None:
    result = run("classify", "-r", "nowhere", "photos/shoe/6.png")
    assert result.code == 15 and result.err.startswith("error: nowhere/")
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text().replace("recognizer: recognizer\n", ""))
    result = run("classify", "photos/shoe/6.png")
    assert result.code == 10 and "--recognizer" in result.err


# catalog


def test_catalog(run: Run) -> None:
    result = run("catalog")
    assert (result.code, result.err) == (0, "")
    table, unmapped, problems = result.out.split("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert sum(map(int, rows["shirt"])) == 6 and sum(map(int, rows["shoe"])) == 5
    assert rows["bag"] == ["0", "0"] and sum(map(int, rows["all"])) == 11
    assert "labels.yaml" in unmapped and "'Hüte [b]:shoe:': 2 photos" in unmapped and "Sale" not in unmapped
    assert problems.startswith("1 photo can't be used:\n  photos/shoe/notes.txt: found no image")


def test_catalog_lists_as_many_problems_as_asked(run: Run, shop: Path) -> None:
    for number in range(5):
        (shop / "photos" / "shoe" / f"{number}.txt").touch()
    assert "... and 4 more" in run("catalog", "--problems", "2").out
    assert "more" not in run("catalog").out
    assert run("catalog", "--problems", "-1").code == 2


def test_catalog_keeps_its_holdout(run: Run) -> None:
    assert run("catalog").out == run("catalog").out


@pytest.mark.parametrize(
    ("old", "new", "code", "text"),
    [
        ("photos: photos", "photos: nowhere", 14, "nowhere: found neither a folder nor a CSV file"),
        ("labels.yaml", "nolabels.yaml", 10, "nolabels.yaml: no such file"),
        ("state: state", "state: labels.yaml", 10, "labels.yaml"),
    ],
)
def test_catalog_when_something_is_missing(
    run: Run, shop: Path, old: str, new: str, code: int, text: str
) -> None:
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text().replace(old, new))
    result = run("catalog")
    assert result.code == code and text in result.err and "Traceback" not in result.err


def test_a_configuration_with_several_faults_lists_them_all(run: Run, shop: Path) -> None:
    config = shop / "hanse-client.yaml"
    text = config.read_text().replace("photos: photos\n", "").replace("epsilon: 4.0", "epsilon: many")
    config.write_text(
        text.replace("0.25", "0.75").replace("recognizer:", "recogniser:") + "  minimum_cohort: 1\n"
    )
    result = run("catalog")
    assert result.code == 10 and result.out == ""
    lines = result.err.splitlines()
    assert all(line.startswith("error: hanse-client.yaml:") for line in lines)
    for fault in (
        "photos: missing", "epsilon: found 'many'", "holdout_fraction: found 0.75", "did you mean recognizer?",
        "minimum_cohort: found 1, expected",
    ):  # fmt: skip
        assert sum(fault in line for line in lines) == 1, fault
    assert len(lines) == 5


# explain


def test_explain_a_plan_that_is_allowed(run: Run, shop: Path, make_plan: MakePlan) -> None:
    result = run("explain", write_plan(shop / "plan.hanse", make_plan()))
    assert (result.code, result.err) == (0, "")
    assert "What this means" in result.out and "shirt, shoe, bag" in result.out
    assert result.out.endswith("Your policy allows this plan, and your budget has room for it.\n")
    assert not (shop / "state").exists(), "judging a plan leaves nothing behind"


def test_explain_a_plan_that_is_refused(run: Run, shop: Path, make_plan: MakePlan) -> None:
    plan = make_plan({"noise_multiplier": 0.6}, league="other")
    result = run("explain", write_plan(shop / "plan.hanse", plan))
    assert result.code == 3
    _, _, reasons = result.out.partition("Your policy refuses this plan:\n")
    assert [line.split(":")[0] for line in reasons.splitlines()] == ["- league", "- ε"]


def test_explain_a_plan_for_which_no_budget_is_left(run: Run, shop: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    ledger = Ledger(settings(shop).ledger_path, Budget(4.0, 1e-5))
    ledger.charge(Charge(plan.digest, 0, 0, plan.mechanism(2), plan.training.total_steps, plan.delta))
    assert run("explain", write_plan(shop / "plan.hanse", plan)).code == 0, "it is paid for"
    result = run("explain", write_plan(shop / "next.hanse", make_plan(serial=b"n" * 16)))
    assert result.code == 4 and "budget" in result.err and "has room" not in result.out
    assert ledger.counter == 1


def test_explain_what_is_no_plan_of_this_league(run: Run, shop: Path, make_plan: MakePlan) -> None:
    forged = write_plan(shop / "forged.hanse", make_plan(), Ed25519PrivateKey.generate())
    result = run("explain", forged)
    assert result.code == 12 and result.out == "" and "forged.hanse: not signed" in result.err
    result = run("explain", "labels.yaml")
    assert result.code == 11 and "labels.yaml: not a plan file" in result.err
    result = run("explain", "nowhere.hanse")
    assert result.code == 10 and "nowhere.hanse: cannot be read (No such file" in result.err


# ledger


def test_ledger_of_a_shop_that_never_took_part(run: Run, shop: Path) -> None:
    result = run("ledger")
    assert result.code == 0 and "Nothing was ever charged from here" in result.out
    assert not (shop / "state").exists()


def test_ledger(run: Run, shop: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    ledger = Ledger(settings(shop).ledger_path, Budget(4.0, 1e-5))
    for round_ in range(3):
        steps = plan.training.total_steps
        ledger.charge(Charge(plan.digest, round_, 0, plan.mechanism(2), steps, plan.delta))
    result = run("ledger")
    assert (result.code, result.err) == (0, "")
    epsilon = plan.mechanism(8).epsilon(plan.delta)
    row = result.out.splitlines()[1].split()
    assert row == [plan.digest.hex()[:16], "3", "6", "of", "8", f"{epsilon:.3f}", "1e-05"]
    assert f"ε = {epsilon:.3f} of 4, δ = 1e-05 of 1e-05" in result.out
    assert "Entries in the ledger: 3." in result.out
    entries = run("ledger", "--entries").out.splitlines()[:3]
    assert [line.split("round ")[1] for line in entries] == [
        f"{round_}, attempt 1, 2 steps" for round_ in (1, 2, 3)
    ]


def test_a_damaged_ledger(run: Run, shop: Path) -> None:
    (shop / "state").mkdir()
    (shop / "state" / "ledger.sqlite").write_bytes(b"x" * 5000)
    result = run("ledger")
    assert result.code == 13 and "Take part in nothing" in result.err and "Traceback" not in result.err


# The command itself


@pytest.mark.parametrize("command", [(), ("catalog",), ("explain",), ("ledger",), ("classify",)])
def test_help(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.code == 0 and "Usage: hanse-client" in result.out
    assert result.out == run(*command, "-h").out


def test_without_arguments_it_shows_its_help(run: Run) -> None:
    result = run()
    assert "classify" in result.out + result.err


def test_the_installed_command(shop: Path, bad_photos: dict[str, int]) -> None:
    """As installed, in a process of its own."""
    command = [
        str(Path(sys.executable).with_name("hanse-client")),
        "classify",
        "text.txt",
        "photos/shoe/6.png",
    ]
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True, timeout=120)
    assert done.returncode == 22
    assert done.stdout.startswith("photos/shoe/6.png: ") and done.stderr.startswith("error: text.txt: ")


def test_an_interrupted_command_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hanse_client.shop.Catalog.load", interrupted)
    result = run("catalog")
    assert result.code == 130 and "Traceback" not in result.err


def test_the_guide_lists_every_exit_code(root: Path) -> None:
    guide = (root / "client" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", guide.partition("## Exit codes")[2], re.MULTILINE)
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {kind.exit_code for kind in kinds if issubclass(kind, errors.HanseError)}
    others = {
        errors.RoundFailed.exit_code,
        errors.RunStopped.exit_code,
        errors.DatasetUnavailable.exit_code,
    }  # the server's, the simulation's
    assert [int(code) for code, _ in rows] == sorted(raised - others | {0, 2, 130})
    assert all(cell.strip() for code, cells in rows if code != "0" for cell in cells.split(" | "))
