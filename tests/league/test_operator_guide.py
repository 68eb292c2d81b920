"""From nothing to a published model by the operator's guide: its own blocks, typed in order in one shell.

Of `server/README.md` nothing is changed but the four ports, which others may have on this machine.
"""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import typer
import yaml

from hanse_client.policy import Policy
from hanse_common import errors
from hanse_common.config import load
from hanse_server import cli
from hanse_server.config import ServerConfig, make_evaluation_plan, make_plan
from hanse_simulations.daemons import ONE_THREAD
from hanse_simulations.processes import command, free_ports

WAIT = 900.0
PORTS = ("9091", "9092", "9093", "9094")
BIN = Path(command("hanse-server")).parent

BLOCK = re.compile(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```|```sh\n(.*?)```", re.S)


@pytest.fixture
def guide(root: Path) -> str:
    return (root / "server" / "README.md").read_text()


def script(guide: str) -> str:
    """Return what a newcomer types and saves, in order."""
    parts = [
        f"cat > {name} <<'END OF FILE'\n{content}END OF FILE\n" if name else typed
        for name, content, typed in BLOCK.findall(guide)
    ]
    return "\n".join(parts)


@pytest.mark.slow
def test_the_guide_from_nothing_to_a_published_model(tmp_path: Path, guide: str) -> None:
    text = script(guide)
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        assert port in text
        text = text.replace(port, str(free))
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "120", "XDG_CACHE_HOME": str(tmp_path)}
    shell = subprocess.Popen(
        ["bash", "-e", "-c", text],
        cwd=tmp_path,
        env=os.environ | ONE_THREAD | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=WAIT)
    finally:
        with suppress(
            ProcessLookupError
        ):  # the shops' daemons are left, if the guide did not come to its end
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said
    assert re.search(r"Accuracy, forecast on Fashion-MNIST: \d\d\.\d %", said)
    assert "Round 40 of 40: 4 merchants." in said
    assert re.search(r"After round 40: accuracy \d\d\.\d %", said)
    assert "Version 1 is released, as number 1 of the league's releases." in said
    assert re.search(r"(?m)^1 +released ", said)
    shown = re.findall(r"(?m)^shops/photos-to-try/(.+)\.png: (.+) \d+\.\d %$", said)
    assert len(shown) == 10
    assert sum(name == found for name, found in shown) >= 6, shown


def test_the_guides_configuration_can_be_signed_and_fits_a_usual_policy(tmp_path: Path, guide: str) -> None:
    ((name, content, _),) = [block for block in BLOCK.findall(guide) if block[0]]
    (tmp_path / name).write_text(content.replace("PUT-THE-DIGEST-HERE", "ab" * 32))
    config = load(ServerConfig, tmp_path / name)
    assert config.service is not None
    assert config.evaluation is not None
    plans = [
        make_plan(config.plan, bytes(16)),
        make_evaluation_plan(config.plan, config.evaluation, bytes(16)),
    ]
    assert sum(plan.delta for plan in plans) <= Policy(league="textiles", epsilon=4).delta
    assert {str(config.service.admin.port), str(config.service.fleet.port)} < set(PORTS)


def test_all_yaml_in_the_guide_is_yaml(guide: str) -> None:
    found = re.findall(r"```yaml\n(.*?)```", guide, re.S)
    assert len(found) > 2
    for text in found:
        assert isinstance(yaml.safe_load(text), dict)


def test_commands_and_links_in_the_guide_are_there(guide: str, root: Path) -> None:
    group = typer.main.get_command(cli.app)
    known = set(group.commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"hanse-server ([a-z-]+)", guide))
    assert named <= known
    assert known <= named | {"export", "page"}, "every command is in the guide"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", guide):
        assert (root / "server" / link).exists(), link


def test_exit_codes_in_the_guide_are_those_of_the_errors(guide: str) -> None:
    table = guide.partition("## Exit codes")[2]
    codes = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", table)}
    known = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.HanseError)
    }
    assert codes - {0, 2, 130} <= known
    assert {3, 10, 16, 18, 19, 26, 27} <= codes
