"""schemathesis, which nobody here wrote, asks a real server what its description allows, and much that it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Served

HERE = Path(__file__).parent


def find(served: Served, *words: str) -> None:
    """Let schemathesis look for faults: errors, undescribed answers, refusals without a reason, and the token."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("--config-file", str(HERE / "schemathesis.toml"), "run", f"{served.url}/openapi.json"),
        *("-H", f"Authorization: Bearer {served.token}", "--continue-on-failure", "--no-color", *words),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        command,
        cwd=served.config.state,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    with served.client() as client:
        paths = client.get("/openapi.json").json()["paths"].values()
    assert f"Tested: {sum(map(len, paths))}" in done.stdout and "Failures:" not in done.stdout, done.stdout[
        -3000:
    ]


def test_schemathesis_finds_nothing_in_some_seconds(served: Served) -> None:
    find(served, "--phases", "fuzzing", "--generation-deterministic", "-n", "2")


@pytest.mark.slow
def test_schemathesis_finds_nothing_by_a_long_search(served: Served) -> None:
    find(served, "--phases", "coverage,fuzzing,stateful", "-n", "60", "--max-time", "100")


def test_the_description_needs_no_token_and_names_the_error_everywhere(served: Served) -> None:
    with served.client(follow_redirects=False) as client:
        document = client.get("/openapi.json", headers={"Authorization": ""}).json()
    assert document["components"]["securitySchemes"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path.startswith("/v1"):
                assert operation["security"], (method, path)
                said = operation["responses"]["401"]["content"]["application/problem+json"]
                assert said["schema"] == {"$ref": "#/components/schemas/Problem"}
