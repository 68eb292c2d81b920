"""The benchmark of a training step, in a tiny size: its figures are there, and its ways do what they say."""

import pytest
import torch
from torch import nn

from hanse_simulations.benchmarks import dp_step


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, object]]:
    return dp_step.run(tiny=True)


@pytest.mark.slow  # a dozen processes that each import torch
def test_every_case_and_way_has_its_figures(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    assert set(figures) == {"dp_over_plain", "opacus_over_plain", "samples_per_second", "peak_mib"}
    for key, found in figures.items():
        assert list(found) == ["head", "cnn", "resnet18"]
        for value in found.values():
            numbers = [value] if key.endswith("over_plain") else [value[way] for way in dp_step.WAYS]
            assert all(number > 0 for number in numbers)  # type: ignore[operator]
    assert min(figures["peak_mib"]["cnn"].values()) > 50  # a process with torch, not a difference
    dp_step.show(figures)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("name", dp_step.CASES)
@pytest.mark.parametrize("way", ["_plain", "_dp", "_opacus"])
def test_a_step_counts_the_photos_it_used(name: str, way: str) -> None:
    case = dp_step.TINY[name]
    torch.manual_seed(1)
    inputs, labels = torch.randn(case.photos, *case.shape), torch.zeros(case.photos, dtype=torch.int64)
    step = getattr(dp_step, way)(case, inputs, labels)
    counts = [step() for _ in range(3)]
    if way == "_dp":
        assert all(0 <= count < case.photos for count in counts)
    else:
        assert counts == [round(0.1 * case.photos)] * 3


def test_a_case_measured_in_a_process_of_its_own() -> None:
    figures = dp_step._child("cnn", dp_step.WAYS, 1, tiny=True)
    assert set(figures["over_plain"]) == set(dp_step.WAYS)
    assert figures["over_plain"]["plain"] == 1.0
    assert figures["peak_mib"] > 50


def test_cases_train_whole_nets_without_batch_normalisation() -> None:
    for case in dp_step.TINY.values():
        layers = list(case.build(case.side).modules())
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
        assert not any(getattr(layer, "inplace", False) for layer in layers)
