"""How often in a row a plan's runs were lost without a round: a server that serves stops trying by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common.plan import SignedPlan
from hanse_server.storage import State


def test_runs_that_were_lost_at_the_same_round_are_counted(
    make_plan: Callable[..., Any], tmp_path: Path
) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    plan, other = make_plan(), make_plan(league="other")
    with State.open(tmp_path) as state:
        for one in (plan, other):
            state.progress(SignedPlan.sign(one, key), one)
        history = state.history
        assert history.lost_in_a_row(plan.digest, 0) == 0
        for expected in (1, 2, 3):
            history.begin_run(plan.digest, after=4)  # the one before is lost by it
            assert history.lost_in_a_row(plan.digest, 4) == expected
        assert history.lost_in_a_row(plan.digest, 5) == 0  # a round was done since
        assert history.lost_in_a_row(other.digest, 4) == 0
        history.end_run(history.begin_run(plan.digest, after=4), "stopped")
        assert history.lost_in_a_row(plan.digest, 4) == 0
        history.begin_run(plan.digest, after=4)
        assert history.lost_in_a_row(plan.digest, 4) == 1
