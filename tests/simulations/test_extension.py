"""An algorithm of one's own: `hanse-sim new-algorithm` writes a file that an experiment then uses."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_simulations.experiment import Experiment
from hanse_simulations.run import load_extensions

HANSE_SIM = Path(sys.executable).with_name("hanse-sim")
Write = Callable[..., Path]


def sim(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"}
    command = [str(HANSE_SIM), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_written_file_is_used(write_experiment: Write, tmp_path: Path) -> None:
    done = sim("new-algorithm", tmp_path / "mine.py")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "mine.py") in done.stdout
    changed = (tmp_path / "mine.py").read_text().replace('"my-algorithm"', '"mine"')
    (tmp_path / "mine.py").write_text(changed)
    optimizer = {"name": "mine", "learning_rate": 0.5, "ceiling": 0.01}
    path = write_experiment({"extensions": ["mine.py"], "optimization.optimizer": optimizer})
    done = sim("run", path, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    exact = load(Experiment, tmp_path / "results" / "tiny" / "run-001" / "experiment.yaml")
    assert exact.extensions == (tmp_path / "mine.py",)

    again = sim("new-algorithm", tmp_path / "mine.py")
    assert again.returncode == ConfigError.exit_code
    assert (tmp_path / "mine.py").read_text() == changed


def test_the_templates_numbers_are_checked_like_any(write_experiment: Write, tmp_path: Path) -> None:
    import hanse_simulations.template as template

    (tmp_path / "mine.py").write_text(Path(str(template.__file__)).read_text())
    extension = {"extensions": ["mine.py"]}
    good = {"name": "my-algorithm"}
    load_extensions(load(Experiment, write_experiment(extension | {"optimization.optimizer": good})))
    bad = {"name": "my-algorithm", "ceiling": -1, "speed": 3}
    settings = load(Experiment, write_experiment(extension | {"optimization.optimizer": bad}))
    with pytest.raises(ConfigError, match=r"(?s)optimizer\.ceiling.*optimizer\.speed"):
        load_extensions(settings)


def test_a_missing_extension_is_named(write_experiment: Write) -> None:
    settings = load(Experiment, write_experiment({"extensions": ["nowhere.py"]}))
    with pytest.raises(ConfigError, match=r"nowhere\.py: extensions: no such file"):
        load_extensions(settings)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    done = sim("new-algorithm", tmp_path / "no" / "mine.py")
    assert done.returncode == ConfigError.exit_code
    assert "there is no folder" in done.stderr
