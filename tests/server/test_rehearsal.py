"""`hanse-server rehearse`: its figures beside the accountant's and real merchants' messages, and without a forecast."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from hanse_common import wire
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.messages import MAX_MESSAGE_BYTES
from hanse_common.secagg.messages import Agreed, Joined, Ready, Shares, Unmasked, Upload
from hanse_common.session import Answer, Ask, frames
from hanse_server import cli
from hanse_server.config import ServerConfig, make_evaluation_plan, make_plan
from hanse_server.forecast import forecast
from hanse_server.rehearsal import TRIP, Cost, Rehearsed, rehearse, streamed
from hanse_simulations import datasets, shops, simulation
from hanse_simulations.experiment import Experiment

Type = Callable[..., tuple[int, str, str]]
ANSWERS = (Joined, Shares, Ready, Upload, Agreed, Unmasked)

PLAN: dict[str, Any] = {
    "league": "shoes",
    "taxonomy": {"classes": ["Sneaker", "Sandal", "Bag"]},
    "recipe": {
        "preprocessing": {"size": 8, "channels": 1},
        "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
    },
    "training": {
        "mode": "distributed",
        "rounds": 6,
        "repeats": 1,
        "sampling_rate": 0.5,
        "expected_batch": 90,
        "clipping_norm": 1,
    },
    "privacy": {"epsilon": 2, "delta": 8e-6},
    "cohort": {"min_merchants": 3, "max_merchants": 4, "upload_slot": 0.25},
}
CONFIG: dict[str, Any] = {
    "signing_key": "operator.key",
    "plan": PLAN,
    "evaluation": {"privacy": {"epsilon": 1, "delta": 1e-6}, "holdout": 30},
    "optimization": {"optimizer": {"name": "fedavgm", "learning_rate": 1}},
}


@pytest.fixture
def typed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Type:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words: str, **changes: Any) -> tuple[int, str, str]:
        (tmp_path / "hanse-server.yaml").write_text(yaml.safe_dump(CONFIG | changes))
        monkeypatch.setattr("sys.argv", ["hanse-server", *words])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def row(text: str, name: str) -> list[str]:
    """Return the columns of the table's row with that name."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_a_records_size_is_that_of_its_frames() -> None:
    for size in (0, 1, 300, (1 << 18) - 20, 1 << 18, 3 << 18):
        for kind in (Ask, Answer):
            record = wire.encode(kind(trip=TRIP, payload=bytes(size)))
            assert streamed(kind, size) == sum(map(len, frames(record)))


def test_bytes_are_those_of_real_merchants(tmp_path: Path, data_folder: Path) -> None:
    experiment = Experiment.model_validate_json(
        json.dumps(
            {
                "name": "rehearsed",
                "data": {
                    "folder": str(data_folder),
                    "merchants": 4,
                    "photos_per_merchant": 45,
                    "test_photos": 10,
                },
                "plan": PLAN,
            }
        ),
        context={"folder": tmp_path},
    )
    made = shops.make_shops(
        experiment, tmp_path / "cache", tmp_path / "none", "cpu", lambda done, total: None
    )
    members = simulation.seeded_members(experiment, made.merchants, tmp_path, lambda name, text: None)
    up: Counter[str] = Counter()
    down: Counter[str] = Counter()
    by_merchant: Counter[str] = Counter()

    def counted(name: str, member: simulation.Member) -> simulation.Member:
        def handle(request: bytes) -> bytes:
            answer = member.handle(request)
            kind = wire.decode_any(ANSWERS, answer, MAX_MESSAGE_BYTES)
            up[type(kind).__name__] += streamed(Answer, len(answer))
            by_merchant[name] += streamed(Answer, len(answer))
            down[type(kind).__name__] += streamed(Ask, len(request))
            return answer

        return replace(member, handle=handle)

    league = simulation.League.assemble(
        experiment, {name: counted(name, member) for name, member in members.items()}, tmp_path
    )
    league.train()
    found = rehearse(league.plan, 4, 20)
    total = found.total(6)
    assert found.setups(6) == 1
    assert total.received == sum(up.values())
    assert total.up == max(by_merchant.values())
    # But for the directory, in which simulated merchants are listed without their own request.
    assert found.round.times(6).sent == sum(down[kind] for kind in ("Upload", "Agreed", "Unmasked"))
    assert abs(found.setup.sent / sum(down[kind] for kind in ("Joined", "Shares", "Ready")) - 1) < 0.3


@pytest.mark.parametrize(
    ("rounds", "every", "setup_rounds"), [(100, 0, 20), (100, 30, 20), (7, 7, 3), (1, 5, 20), (60, 20, 20)]
)
def test_set_ups_are_counted_as_they_come_about(rounds: int, every: int, setup_rounds: int) -> None:
    settings = load_plan()
    found = Rehearsed(make_plan(settings.plan, bytes(16)), 4, setup_rounds, Cost(up=1000), Cost(up=1))
    setups = left = 0
    for round_ in range(rounds):
        if left == 0 or (every and round_ and round_ % every == 0):
            setups, left = setups + 1, setup_rounds
        left -= 1
    assert found.setups(rounds, every) == setups
    assert found.total(rounds, every) == Cost(up=1000 * setups + rounds)


def load_plan() -> ServerConfig:
    return ServerConfig.model_validate_json(json.dumps(CONFIG), context={"folder": Path()})


def test_it_shows_what_the_accountant_says_and_writes_nothing(typed: Type, tmp_path: Path) -> None:
    code, out, err = typed("rehearse", "--no-forecast")
    assert (code, err) == (0, "")
    settings = load(ServerConfig, tmp_path / "hanse-server.yaml")
    assert settings.evaluation is not None
    training = make_plan(settings.plan, bytes(16))
    evaluation = make_evaluation_plan(settings.plan, settings.evaluation, bytes(16))
    epsilons = [training.epsilon(), evaluation.epsilon()]
    assert row(out, "ε, for any one photo") == [f"{value:.3f}" for value in (*epsilons, sum(epsilons))]
    assert row(out, "δ") == ["8e-06", "1e-06", "9e-06"]
    assert row(out, "rounds") == ["6", "1", "7"]
    assert row(out, "set-ups") == ["1", "1", "2"]
    found = rehearse(training, 4, 20).total(6)
    assert row(out, "each merchant sends")[0] == f"{found.up / 1e3:.1f} kB"
    assert row(out, "the server receives")[0] == f"{found.received / 1e3:.1f} kB"
    assert re.search(r"the rounds take: +at least [12] s, as uploads leave 0\.25 s after", out)
    assert "No forecast of accuracy: left out by --no-forecast" in out
    assert "Mind" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"hanse-server.yaml"}


def test_its_help_reads_well(typed: Type) -> None:
    code, out, _ = typed("rehearse", "--help")
    assert code == 0
    assert "…" not in out
    assert "--no-forecast" in out


def test_it_warns_of_a_delta_that_no_usual_policy_allows(typed: Type) -> None:
    _, out, _ = typed("rehearse", "--no-forecast", plan=PLAN | {"privacy": {"epsilon": 2}})
    assert (
        "a merchant's policy allows δ = 1e-05 in all unless it says otherwise, and this takes 1.1e-05" in out
    )


def test_merchants_that_the_plan_does_not_take_are_refused(typed: Type) -> None:
    code, _, err = typed("rehearse", "--no-forecast", "--merchants", "5")
    assert code == ConfigError.exit_code
    assert "--merchants: found 5; expected 3 to 4" in err


def test_without_simulations_it_says_why_there_is_no_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "hanse_simulations"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import nothing_like_matplotlib\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, reason = forecast([], lambda line: None)
    assert found is None
    assert "nothing_like_matplotlib" in reason
    assert "pip install 'hanse[simulations]'" in reason


def test_what_the_forecast_complains_of_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hanse_simulations"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys\nprint('embedding')\nprint('error: no such thing', file=sys.stderr)\nsys.exit(10)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard: list[str] = []
    assert forecast([], heard.append) == (None, "no such thing")
    assert heard == ["embedding"]


@pytest.mark.slow
def test_a_real_forecast_on_a_folder_of_photos(typed: Type, tmp_path: Path, data_folder: Path) -> None:
    source = datasets.fashion_mnist(data_folder)
    for name in ("Bag", "Sandal", "Trouser"):
        folder = tmp_path / "public" / name
        folder.mkdir(parents=True)
        code = datasets.CLASSES.index(name)
        for number, image in enumerate(source.train_images[source.train_labels == code][:120]):
            Image.fromarray(image).resize((40, 60)).save(folder / f"{number}.jpg")
    code, out, err = typed("rehearse", "--proxy", str(tmp_path / "public"))
    assert (code, err) == (0, "")
    assert "Classes of" in out
    assert "stand for the league's: Bag, Sandal, Trouser" in out
    found = re.search(r"Accuracy, forecast on .*public: (\d+\.\d) % \(\d+\.\d to \d+\.\d in 3 runs\)", out)
    assert found is not None, out
    assert float(found[1]) > 60
    assert "to look at its 45 photos" in out
    # More classes than there are: the rest is shown all the same.
    many = PLAN | {"taxonomy": {"classes": [f"class {number}" for number in range(11)]}}
    code, out, _ = typed("rehearse", plan=many)
    assert code == 0
    assert "No forecast of accuracy: Fashion-MNIST has 10 classes and the league 11" in out
    assert row(out, "rounds") == ["6", "1", "7"]
