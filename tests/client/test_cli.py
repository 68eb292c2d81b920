"""The command `hanse-client` as a shop owner meets it: what it prints, and what it exits with."""

import hashlib
import json
import math
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dp_accounting
import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from PIL import Image

from hanse_client import cli, ledger_view
from hanse_client.charges import Budget, Charge
from hanse_client.config import ClientConfig
from hanse_client.explanation import posterior_bound
from hanse_client.ledger import Ledger
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.modes import DistributedTraining
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
  charter: a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1
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


def test_classify_takes_photos_as_views_of_one_product(run: Run, shop: Path) -> None:
    paths = ["photos/Hemden/0.png", "photos/shoe/6.png"]
    each = [json.loads(line)["probabilities"] for line in run("classify", "--json", *paths).out.splitlines()]
    (line,) = run("classify", "--json", "--one-product", *paths, "nowhere.png").out.splitlines()
    together = json.loads(line)
    assert together["photos"] == paths
    means = {name: (each[0][name] * each[1][name]) ** 0.5 for name in each[0]}
    assert together["probabilities"] == pytest.approx(
        {name: mean / sum(means.values()) for name, mean in means.items()}
    )
    assert run("classify", "--one-product", *paths).out.startswith(f"{paths[0]}, {paths[1]}: ")


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
    assert "the ledger was moved or deleted" in result.out
    assert not (shop / "state").exists()


Fill = Callable[..., Ledger]


@pytest.fixture
def fill(shop: Path, make_plan: MakePlan) -> Fill:
    """Return a function that charges three rounds of a plan, changed by keyword, to the shop's ledger."""

    def fill(serial: int = 0, **policy: str) -> Ledger:
        config = shop / "hanse-client.yaml"
        if policy:
            config.write_text(
                config.read_text() + "".join(f"  {key}: {value}\n" for key, value in policy.items())
            )
        plan = make_plan(serial=bytes([serial]) * 16)
        ledger = Ledger(settings(shop).ledger_path, settings(shop).policy.budget)
        for round_ in range(3):
            ledger.charge(Charge.of(plan, round_, 0, 2))
        return ledger

    return fill


def one_of(lines: str, start: str) -> str:
    """Return the only line that begins so."""
    (found,) = [line for line in lines.splitlines() if line.startswith(start)]
    return found


def test_ledger(run: Run, fill: Fill, make_plan: MakePlan) -> None:
    kept, plan = fill(), make_plan()
    result = run("ledger")
    assert (result.code, result.err) == (0, "")
    epsilon = plan.mechanism(8).epsilon(plan.delta)
    shown = math.ceil(1000 * epsilon) / 1000
    words, table, rest = result.out.split("\n\n")
    percent = math.ceil(10 * 100 * posterior_bound(epsilon, 0.01)) / 10
    assert words.splitlines() == [
        (
            "After 3 rounds, someone who knew everything else could raise a 1 % suspicion about any one photo to at "
            f"most {percent} %. The chance that this bound fails is about 1 in 100,000."
        ),
        f"Spent: ε = {shown:.3f} of the 4 you allow, δ = 1e-05 of 1e-05. Left: ε = {4 - shown:.3f}, δ = 0.",
        "No other plan fits beside these unless you raise the budget in your policy.",
        "A plan is paid in full when its first round starts, whether or not the others follow (sum).",
    ]
    row = table.splitlines()[1].split()
    assert row == [plan.digest.hex()[:16], "3", "6", "of", "8", "photo", f"{shown:.3f}", "1e-05"]
    assert rest == "Entries in the ledger: 3. None is altered or out of order.\n"
    entries = run("ledger", "--entries").out.splitlines()[:3]
    assert [line.split("round ")[1] for line in entries] == [
        f"{round_}, attempt 1, 2 steps" for round_ in (1, 2, 3)
    ]
    assert kept.counter == 3


def test_ledger_that_counts_steps(run: Run, fill: Fill) -> None:
    spent = fill(accounting="rdp-8").spent()
    out = run("ledger").out
    shown = math.ceil(1000 * spent.epsilon) / 1000
    assert one_of(out, "Spent") == (
        f"Spent: ε = {shown:.3f} of the 4 you allow, at δ = 1e-05. Left: ε = {4 - shown:.3f}."
    )
    assert one_of(out, "Each round is paid when it starts").endswith("(rdp-8).")
    assert "paid in full" not in out and "No other plan" not in out
    header = one_of(out, "plan ").split()
    assert header == ["plan", "rounds", "steps", "protects", "one"], "plans' own ε would not add up"


def test_ledger_of_products_and_shares(run: Run, shop: Path, make_plan: MakePlan) -> None:
    training = {"rounds": 4, "sampling_rate": 0.2, "expected_batch": 20.0, "clipping_norm": 1.0}
    product = DistributedTraining(**training, noise_multiplier=8.0, unit="product")
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text() + "  unit: product\n")
    kept = Ledger(settings(shop).ledger_path, settings(shop).policy.budget)
    assert run("ledger").out.splitlines()[0].endswith("for any one product with all its photos.")
    kept.charge(Charge.of(make_plan().model_copy(update={"training": product, "delta": 1e-6}), steps=1))
    out = run("ledger").out
    assert one_of(out, "After 1 round, ").count("about any one product with all its photos to at most")
    assert one_of(out, "Some of the noise was in shares")
    assert "No other plan fits" not in out
    row = next(line for line in out.splitlines() if " 1 of " in line).split()
    assert "product" in row


def test_explain_a_plan_of_another_unit_than_the_policys(run: Run, shop: Path, make_plan: MakePlan) -> None:
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text() + "  unit: product\n")
    result = run("explain", write_plan(shop / "plan.hanse", make_plan()))
    assert result.code == 3
    _, _, reasons = result.out.partition("Your policy refuses this plan:\n")
    assert reasons == (
        "- unit: its ε is said of one photo, your policy keeps account of one product; the two do not add up.\n"
    )


def test_ledger_in_the_policys_other_unit(run: Run, shop: Path, fill: Fill) -> None:
    fill()
    assert "in shares" not in run("ledger").out
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text() + "  unit: product\n")
    result = run("ledger")
    assert result.code == 13 and "Put `unit: photo` back into the policy" in result.err


def test_ledger_without_charges_and_one_without_a_promise(run: Run, shop: Path, fill: Fill) -> None:
    Ledger(settings(shop).ledger_path, Budget(4.0, 1e-5, "rdp-8"))
    config = shop / "hanse-client.yaml"
    before = config.read_text()
    config.write_text(before + "  accounting: rdp-8\n")
    assert run("ledger").out.startswith("Nothing was charged yet. You allow ε = 4 and δ = 1e-05")
    config.write_text(before)
    fill(accounting="rdp-8")
    config.write_text(config.read_text().replace("delta: 1e-5", "delta: 1e-16"))
    out = run("ledger").out
    assert "nothing can be promised about any one photo" in one_of(out, "After 3 rounds")
    assert "Spent: ε = inf" in out and "Left: ε = 0.000" in out


def test_ledger_in_the_policys_other_filter(run: Run, shop: Path, fill: Fill) -> None:
    fill()
    config = shop / "hanse-client.yaml"
    config.write_text(config.read_text() + "  accounting: rdp-16\n")
    result = run("ledger")
    assert result.code == 13 and "Put `accounting: sum` back into the policy" in result.err


def test_verify_shows_length_and_last_hash(run: Run, fill: Fill) -> None:
    *_, last = fill().events()
    result = run("ledger", "--verify")
    assert (result.code, result.err) == (0, "")
    sound, hash_, advice = result.out.splitlines()
    assert sound == "state/ledger.sqlite is sound. Entries: 3; none is altered, missing or out of order."
    assert hash_ == f"Hash of the last entry: {last.hash.hex()}"
    assert advice.startswith("Note number and hash down away from this machine")


@pytest.mark.parametrize("what", ["row", "index"])
def test_verify_finds_damage(run: Run, fill: Fill, what: str) -> None:
    path = fill().path
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        if what == "row":
            (trigger,) = db.execute(
                "SELECT sql FROM sqlite_schema WHERE name = 'charge_never_changed'"
            ).fetchone()
            db.execute("DROP TRIGGER charge_never_changed")
            db.execute("UPDATE charge SET steps = 1 WHERE number = 2")
            db.execute(trigger)
        else:  # what only SQLite's own check sees: an index that points nowhere
            db.execute("PRAGMA writable_schema = ON")
            (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'charge_once'").fetchone()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if what == "index":
        content = bytearray(path.read_bytes())
        size = int.from_bytes(content[16:18], "big")
        content[(page - 1) * size + 3 : (page - 1) * size + 5] = bytes(2)  # no cells
        path.write_bytes(content)
    result = run("ledger", "--verify")
    assert (result.code, result.out) == (13, "")
    assert ("row 2 is not what was written" if what == "row" else "SQLite finds") in result.err


def test_what_is_exported_is_enough_to_recompute_chain_and_epsilon(
    run: Run, shop: Path, root: Path, fill: Fill
) -> None:
    """As the guide tells a stranger to, with none of Hanse's code."""
    kept = fill()
    result = run("ledger", "--export", "out.jsonl")
    assert (result.code, result.err) == (0, "") and result.out.startswith("Wrote out.jsonl: 3 entries.")
    assert (shop / "out.jsonl").stat().st_mode & 0o777 == 0o600
    entries = [json.loads(line) for line in (shop / "out.jsonl").read_text().splitlines()]
    assert len(entries) == 3
    previous = hashlib.sha256(b"hanse ledger 2 sum photo").hexdigest()
    assert "`hanse ledger 2 sum photo`" in (root / "client" / "README.md").read_text()
    assert {(entry["filter"], entry["unit"]) for entry in entries} == {("sum", "photo")}
    for entry in entries:
        assert entry["previous"] == previous
        values = list(entry.values())[:14]
        values[2] = bytes.fromhex(entry["plan_digest"])
        previous = hashlib.sha256(bytes.fromhex(previous) + msgpack.packb(values)).hexdigest()
        assert entry["hash"] == previous
    assert previous == kept.head[1].hex()
    plan = entries[0]
    event = dp_accounting.PoissonSampledDpEvent(
        plan["sampling_rate"], dp_accounting.GaussianDpEvent(plan["noise_multiplier"])
    )
    epsilon = PLDAccountant().compose(event, plan["plan_steps"]).get_epsilon(plan["delta"])
    assert epsilon == pytest.approx(kept.spent().epsilon, rel=3e-3)


def test_what_is_exported_gives_epsilon_by_rdp_too(run: Run, shop: Path, fill: Fill) -> None:
    fill(accounting="rdp-8")
    kept = fill(serial=1)
    run("ledger", "--export", "out.jsonl")
    accountant = RdpAccountant(orders=[8])
    for entry in map(json.loads, (shop / "out.jsonl").read_text().splitlines()):
        assert entry["filter"] == "rdp-8"
        event = dp_accounting.GaussianDpEvent(entry["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry["sampling_rate"], event), entry["steps"])
    assert accountant.get_epsilon(1e-5) == pytest.approx(kept.spent().epsilon, rel=3e-3)


def test_the_guide_and_the_views_text_name_every_exported_field(
    run: Run, shop: Path, root: Path, fill: Fill
) -> None:
    fill()
    run("ledger", "--export", "out.jsonl")
    fields = json.loads((shop / "out.jsonl").read_text().splitlines()[0])
    guide = (root / "client" / "README.md").read_text()
    for text in (ledger_view.__doc__ or "", guide[guide.index("`number`") :]):
        places = [text.find(f"`{name}`") for name in fields]
        assert -1 not in places
        assert places == sorted(places), "in the order of the hash"


def test_an_export_overwrites_nothing(run: Run, shop: Path, fill: Fill) -> None:
    kept = fill()
    result = run("ledger", "--export", "state/ledger.sqlite")
    assert result.code == 10 and "there is a file already" in result.err
    assert kept.counter == 3
    result = run("ledger", "--export", "nowhere/out.jsonl")
    assert result.code == 10 and "cannot be written (No such file or directory)" in result.err


def test_a_damaged_ledger(run: Run, shop: Path) -> None:
    (shop / "state").mkdir()
    (shop / "state" / "ledger.sqlite").write_bytes(b"x" * 5000)
    for options in ([], ["--verify"], ["--export", "out.jsonl"], ["--entries"]):
        result = run("ledger", *options)
        assert result.code == 13 and "Take part in nothing" in result.err and "Traceback" not in result.err
    assert not (shop / "out.jsonl").exists()


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
