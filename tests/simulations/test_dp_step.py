"""The benchmark of a training step, in a tiny size: its figures are there, and its ways do what they say."""

from typing import Any

import pytest
import torch
from torch import nn

from hanse_common.errors import ConfigError
from hanse_common.privacy.mechanism import Mechanism
from hanse_simulations.benchmarks import dp_step

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def check(figures: dict[str, Any], device: str) -> None:
    over = {"dp_over_plain", "opacus_over_plain"}
    assert set(figures) == over | {"samples_per_second", "peak_mib", "epsilon", "device"}
    assert figures["device"] == device
    for key, found in figures.items():
        if key != "device":
            assert list(found) == ["head", "cnn", "resnet18"]
            for value in found.values():
                assert all(number > 0 for number in (value.values() if isinstance(value, dict) else [value]))
    dp_step.show(figures)


@pytest.mark.slow  # a dozen processes that each import torch
def test_every_case_and_way_has_its_figures() -> None:
    figures = dp_step.run(tiny=True)
    check(figures, "cpu")
    assert min(figures["peak_mib"]["cnn"].values()) > 50  # a process with torch, not a difference


class TestGpu:
    """What only a GPU can show."""

    pytestmark = gpu

    def test_every_case_and_way_has_its_figures(self) -> None:
        figures = dp_step.run(tiny=True, device="cuda:0")
        check(figures, "cuda:0")
        assert figures["epsilon"]["cnn"] == dp_step._child("cnn", ("dp",), 1, tiny=True)["epsilon"]


def test_a_device_that_is_not_there_is_an_error_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match=r"device: found"):
        dp_step.run(tiny=True, device="cuda:999")


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "resnet18" else name for name in dp_step.CASES],
)
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


@pytest.mark.slow
def test_a_case_measured_in_a_process_of_its_own() -> None:
    figures = dp_step._child("cnn", dp_step.WAYS, 1, tiny=True)
    assert set(figures["over_plain"]) == set(dp_step.WAYS)
    assert figures["over_plain"]["plain"] == 1.0
    assert figures["peak_mib"] > 50
    case = dp_step.TINY["cnn"]
    dimension = sum(parameter.numel() for parameter in case.build(case.side).parameters())
    assert figures["epsilon"] == Mechanism(1.0, dimension, 1.0, 0.1, steps=dp_step.TRAINING).epsilon(
        dp_step.DELTA
    )
    assert 1 < figures["epsilon"] < 20


def test_cases_train_whole_nets_without_batch_normalisation() -> None:
    for case in dp_step.TINY.values():
        layers = list(case.build(case.side).modules())
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
        assert not any(getattr(layer, "inplace", False) for layer in layers)
