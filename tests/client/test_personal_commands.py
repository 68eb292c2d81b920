"""`personalize` in words: what its owner reads of how sure it is."""

import re

import pytest

from hanse_client.cli import personal
from hanse_client.personal.head import Judgement


@pytest.mark.parametrize(
    ("p_value", "said"),
    [
        (0.0, "under 1 %"),
        (1e-9, "under 1 %"),
        (0.0099, "under 1 %"),
        (0.01, "1 %"),
        (0.0499, "5 %"),
        (0.125, "12 %"),
        (1.0, "100 %"),
    ],
)
@pytest.mark.parametrize("better", [True, False])
def test_a_probability_is_told_in_whole_percent(p_value: float, said: str, better: bool) -> None:
    judged = Judgement(photos=10, shared_right=4, own_right=6, differing=4, p_value=p_value, better=better)
    told = personal._conclusion(judged, "your own head")
    assert re.search(rf"with a probability of {said}\W", told), told
