"""Early stop, against a plain account of the whole history."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_server.early_stop import EarlyStop, EarlyStopState

SCORES = st.lists(st.one_of(st.floats(0, 1), st.just(math.nan), st.just(math.inf)), max_size=60)
SETTINGS = st.builds(EarlyStop, patience=st.integers(1, 6), minimum=st.floats(0, 0.2))


def told(settings: EarlyStop, scores: list[float]) -> list[EarlyStopState]:
    state, states = EarlyStopState(), []
    for index, score in enumerate(scores):
        state = settings.advance(state, index, score)
        states.append(state)
    return states


def test_it_stops_after_patience_scores_without_a_gain() -> None:
    settings = EarlyStop(patience=3, minimum=0.01)
    states = told(settings, [0.5, 0.6, 0.605, 0.59, 0.6, 0.9])
    assert [settings.stops(state) for state in states] == [False, False, False, False, True, False]
    assert [state.misses for state in states] == [0, 0, 1, 2, 3, 0]


def test_small_steps_upwards_add_up_to_a_gain() -> None:
    settings = EarlyStop(patience=3, minimum=0.01)
    assert not any(map(settings.stops, told(settings, [0.5 + 0.005 * step for step in range(50)])))
    assert any(map(settings.stops, told(settings, [0.5 + 0.003 * step for step in range(50)])))


def test_with_a_minimum_of_zero_the_same_again_is_no_gain() -> None:
    settings = EarlyStop(patience=2, minimum=0.0)
    assert settings.stops(told(settings, [0.5, 0.5, 0.5])[-1])


@settings(deadline=None)
@given(settings=SETTINGS, scores=SCORES)
def test_the_state_is_what_the_whole_history_says(settings: EarlyStop, scores: list[float]) -> None:
    states = told(settings, scores)
    gain, misses = None, 0
    for score, state in zip(scores, states, strict=True):
        misses += 1
        if math.isfinite(score) and (gain is None or (score > gain and score - gain >= settings.minimum)):
            gain, misses = score, 0
        assert (state.gain_score, state.misses) == (gain, misses)
        assert settings.stops(state) == (misses >= settings.patience)


@settings(deadline=None)
@given(settings=SETTINGS, scores=SCORES, again=st.data())
def test_a_round_told_again_after_a_restart_changes_nothing(
    settings: EarlyStop, scores: list[float], again: st.DataObject
) -> None:
    for index, state in enumerate(told(settings, scores)):
        earlier = again.draw(st.integers(0, index))
        assert settings.advance(state, earlier, again.draw(st.floats(0, 2))) == state


@settings(deadline=None)
@given(settings=SETTINGS, scores=SCORES)
def test_the_state_survives_a_checkpoint(settings: EarlyStop, scores: list[float]) -> None:
    for state in told(settings, scores):
        assert EarlyStopState.model_validate_json(state.model_dump_json()) == state


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(ValueError, match="misses"):
        EarlyStopState.model_validate_json('{"misses": -1}')
