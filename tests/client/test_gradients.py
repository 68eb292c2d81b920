"""Exact sums of clipped gradients, against one example at a time by plain autograd."""

import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_client.gradients import ClippedSum, GradSampleMode
from hanse_common.errors import RecognizerError

FINE = -34
NORM = 0.7
CLASSES = 5


def linear() -> nn.Module:
    return nn.Linear(40, CLASSES)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, CLASSES, bias=False))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def partly_frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    model[1].requires_grad_(False)  # type: ignore[index, union-attr]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear, "mlp": mlp, "cnn": cnn, "partly_frozen": partly_frozen,
}  # fmt: skip
MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "ew")

every_model = pytest.mark.parametrize("name", MODELS)
every_mode = pytest.mark.parametrize("mode", MODES)


def make(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(5)
    shape = (1, 12, 12) if name == "cnn" else (40,)
    sizes = 10.0 ** torch.linspace(-3, 1, count)  # some gradients are clipped, some are not
    inputs = torch.randn(count, *shape, generator=generator) * sizes.view(-1, *[1] * len(shape))
    return MODELS[name](), inputs, torch.randint(0, CLASSES, (count,), generator=generator)


def reference(model: nn.Module, inputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """One example at a time, plain autograd in float64, clipped and summed; shape (d,)."""
    model = model.double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = torch.zeros(sum(parameter.numel() for parameter in trained), dtype=torch.float64)
    for row, target in zip(inputs.double(), targets, strict=True):
        loss = F.cross_entropy(model(row[None]), target[None])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])
        total += gradient * min(1.0, NORM / float(gradient.norm()))
    model.float()
    return total.numpy()


def own_sum(
    model: nn.Module, inputs: Tensor, targets: Tensor, mode: GradSampleMode = "hooks", microbatch: int = 8
) -> NDArray[np.int64]:
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=microbatch) as clipped:
        return clipped.sum(inputs, targets)


def exact_norm_squared(integers: NDArray[np.int64]) -> Fraction:
    return sum((Fraction(int(value)) ** 2 for value in integers), Fraction(0)) * Fraction(2) ** (2 * FINE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=str)
def test_sums_equal_a_loop_over_single_examples(dtype: torch.dtype, tolerance: float) -> None:
    failures = []
    for name in MODELS:
        for mode in MODES:
            model, inputs, targets = make(name, 21)
            expected = reference(model, inputs, targets) * (1 - 2.0**-20)
            found = own_sum(model.to(dtype), inputs.to(dtype), targets, mode) * 2.0**FINE
            error = np.abs(found - expected).max() / np.abs(expected).max()
            if found.shape != expected.shape or error > tolerance:
                failures.append(f"{name}, {mode}: {error:.1e}")
    assert not failures


@every_model
@every_mode
def test_no_example_is_longer_than_the_clipping_norm(name: str, mode: GradSampleMode) -> None:
    model, inputs, targets = make(name, 24)
    inputs[-1] = 1e30 * torch.ones_like(inputs[-1])  # the square of its gradient overflows float32
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=4) as clipped:
        norms = [
            exact_norm_squared(clipped.sum(inputs[i : i + 1], targets[i : i + 1])) for i in range(len(inputs))
        ]
    assert max(norms) <= Fraction(NORM) ** 2
    assert sum(norm > (Fraction(NORM) * Fraction("0.99999")) ** 2 for norm in norms) >= 3


def test_a_gradient_of_any_finite_length_is_clipped_rather_than_lost() -> None:
    model, inputs, targets = make("linear", 1)
    found = own_sum(model, torch.full_like(inputs, 1e30), targets)
    assert exact_norm_squared(found) > (Fraction(NORM) * Fraction("0.99999")) ** 2


@every_model
@every_mode
def test_an_example_adds_its_own_vector_to_the_bit(name: str, mode: GradSampleMode) -> None:
    """Whatever its neighbours, its position, and the number of microbatches: the sum's sensitivity."""
    model, inputs, targets = make(name, 18)
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=8) as clipped:
        alone = [clipped.sum(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(inputs))]
        for count in (0, 1, 7, 8, 9, 15, 16, 17, 18):
            found = clipped.sum(inputs[:count], targets[:count])
            np.testing.assert_array_equal(found, sum(alone[:count], np.zeros_like(found)))


@every_mode
@pytest.mark.parametrize("microbatch", [1, 5, 32, 64])
@pytest.mark.parametrize("name", ["linear", "cnn"])
def test_bits_of_a_row_depend_on_no_other_row(name: str, microbatch: int, mode: GradSampleMode) -> None:
    """The kernels' property that the module's text names, at production's width."""
    torch.manual_seed(3)
    if name == "linear":
        model: nn.Module = nn.Linear(1500, 10)
        inputs = torch.randn(microbatch, 1500)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(128, 10),
        )  # fmt: skip
        inputs = torch.randn(microbatch, 1, 28, 28)
    targets = torch.randint(0, 10, (microbatch,))
    kept = microbatch // 2
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=microbatch) as clipped:
        before = clipped.sum(inputs[kept : kept + 1], targets[kept : kept + 1])
        others = 100 * torch.randn_like(inputs)
        others[1::3] = torch.nan
        order = torch.randperm(microbatch)
        without = torch.arange(microbatch) != kept
        crowd = clipped.sum(others[without], targets[without])
        others[kept] = inputs[kept]
        after = clipped.sum(others[order], targets[order])
    np.testing.assert_array_equal(after - crowd, before)


@every_model
def test_order_does_not_matter(name: str) -> None:
    model, inputs, targets = make(name, 21)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(
        own_sum(model, inputs, targets), own_sum(model, inputs[order], targets[order])
    )


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, -torch.inf, 3e38])
@every_model
@every_mode
def test_a_non_finite_example_counts_as_absent(name: str, mode: GradSampleMode, hostile: float) -> None:
    model, inputs, targets = make(name, 11)
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=8) as clipped:
        expected = clipped.sum(inputs, targets)
        poison = torch.full_like(inputs[:1], hostile)
        poison[..., ::2] *= -1
        alone = clipped.sum(poison, targets[:1])
        together = clipped.sum(
            torch.cat([inputs[:3], poison, inputs[3:]]), torch.cat([targets[:3], targets[:1], targets[3:]])
        )
    assert exact_norm_squared(alone) <= Fraction(NORM) ** 2
    if abs(hostile) == torch.inf or hostile != hostile:
        assert not alone.any()
    np.testing.assert_array_equal(together, expected + alone)


def test_a_non_finite_model_gives_zero() -> None:
    model, inputs, targets = make("mlp", 9)
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    assert not own_sum(model, inputs, targets).any()


def test_no_examples_sum_to_zero() -> None:
    model, inputs, targets = make("cnn", 1)
    found = own_sum(model, inputs[:0], targets[:0])
    assert found.dtype == np.int64
    assert found.shape == (sum(parameter.numel() for parameter in model.parameters()),)
    assert not found.any()


def test_dropout_masks_each_example_for_itself_and_repeats_with_its_seed() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, CLASSES))
    inputs, targets = torch.ones(64, 40), torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[union-attr, operator]
        model[1].bias.zero_()  # type: ignore[union-attr, operator]
    sums = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sums.append(own_sum(model, inputs, targets, microbatch=64))
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).any()
    used = sums[0][:40]  # a coordinate is the sum of the examples whose mask kept it
    assert len(np.unique(used)) > 5


def test_a_parameter_that_logits_do_not_use_contributes_zero() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 2)
            self.used = nn.Linear(40, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.used(x)
            return found

    _, inputs, targets = make("linear", 4)
    found = own_sum(Spare(), inputs, targets)
    assert not found[:8].any()
    assert found[8:].any()


@every_mode
def test_closing_leaves_the_model_as_it_was(mode: GradSampleMode) -> None:
    model, inputs, targets = make("cnn", 3)
    keys = list(model.state_dict())
    attributes = [set(vars(layer)) for layer in model.modules()]
    with ClippedSum(model, NORM, FINE, mode=mode, microbatch=4) as clipped:
        clipped.sum(inputs, targets)
    clipped.close()
    assert list(model.state_dict()) == keys
    assert model[2].inplace is True  # type: ignore[index, union-attr]
    assert [set(vars(layer)) for layer in model.modules()] == attributes
    for layer in model.modules():
        assert not layer._forward_hooks
        assert not layer._backward_hooks
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")
    with pytest.raises(ValueError, match="closed"):
        clipped.sum(inputs, targets)
    np.testing.assert_array_equal(  # and it can be opened again
        own_sum(model, inputs, targets, mode), own_sum(model, inputs, targets, mode)
    )


def test_parameters_may_change_between_sums() -> None:
    model, inputs, targets = make("mlp", 6)
    with ClippedSum(model, NORM, FINE, microbatch=8) as clipped:
        before = clipped.sum(inputs, targets)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        after = clipped.sum(inputs, targets)
    assert (before != after).any()
    np.testing.assert_array_equal(after, own_sum(model, inputs, targets))


def test_works_without_grad_mode_and_without_warnings() -> None:
    model, inputs, targets = make("linear", 6)
    expected = own_sum(model, inputs, targets)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(own_sum(model, inputs, targets), expected)


def test_what_mixes_examples_is_refused_with_every_fault_named() -> None:
    frozen = nn.BatchNorm1d(6, affine=False)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), frozen, nn.Linear(6, CLASSES))
    with pytest.raises(RecognizerError) as caught:
        ClippedSum(model, NORM, FINE)
    for part in ("1 (BatchNorm1d)", "2 (BatchNorm1d)", "BatchNorm cannot support", "GroupNorm"):
        assert part in str(caught.value)
    with pytest.raises(RecognizerError, match="training mode"):
        ClippedSum(linear().eval(), NORM, FINE)
    with pytest.raises(RecognizerError, match="no parameter is trainable"):
        ClippedSum(linear().requires_grad_(False), NORM, FINE)


def test_a_batch_norm_that_is_a_constant_is_accepted() -> None:
    constant = nn.BatchNorm1d(40).requires_grad_(False).eval()
    model = nn.Sequential(constant, linear())
    _, inputs, targets = make("linear", 5)
    assert own_sum(model, inputs, targets).any()


def test_a_layer_that_left_training_mode_is_an_error_not_a_zero() -> None:
    model, inputs, targets = make("mlp", 5)
    with ClippedSum(model, NORM, FINE, microbatch=8) as clipped:
        model[3].eval()  # type: ignore[index, operator]
        with pytest.raises(RecognizerError, match="training mode"):
            clipped.sum(inputs, targets)


class NoBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x).mean(dim=0, keepdim=True)
        return found


class _Careless(nn.Module):
    """Does with its layers what formulas cannot see, or what they can."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.first = nn.Linear(40, 40)
        self.last = nn.Linear(40, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        if self.fault == "changed in place":
            hidden.mul_(2.0)
        elif self.fault == "by calling that layer":
            hidden = F.linear(hidden, self.first.weight)
        elif self.fault == "one row for each example":
            hidden = self.first(hidden.repeat(2, 1))[: len(inputs)]
        elif self.fault == "none":
            hidden = self.first(hidden.tanh())
        logits: Tensor = self.last(hidden)
        return logits


@pytest.mark.parametrize("fault", ["changed in place", "by calling that layer", "one row for each example"])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_what_formulas_would_get_wrong_is_refused(fault: str, mode: GradSampleMode) -> None:
    _, inputs, targets = make("linear", 5)
    with pytest.raises(RecognizerError, match=fault):
        own_sum(_Careless(fault), inputs, targets, mode)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_a_layer_called_twice_gets_both_gradients(mode: GradSampleMode) -> None:
    _, inputs, targets = make("linear", 5)
    model = _Careless("none")
    expected = reference(model, inputs, targets)
    found = own_sum(model, inputs, targets, mode) * 2.0**FINE
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_failed_sum_leaves_nothing_behind() -> None:
    model, inputs, targets = make("mlp", 6)
    expected = own_sum(model, inputs, targets)
    with ClippedSum(model, NORM, FINE, microbatch=8) as clipped:
        for _ in range(2):
            with pytest.raises(ValueError, match="classes"):
                clipped.sum(inputs, targets + CLASSES)
            np.testing.assert_array_equal(clipped.sum(inputs, targets), expected)


def test_arguments_are_checked() -> None:
    model, inputs, targets = make("linear", 6)
    with pytest.raises(RecognizerError, match="logits"):
        own_sum(NoBatch(), inputs, targets)
    for bad in (CLASSES, -1):
        with pytest.raises(ValueError, match="classes 0 to 4"):
            own_sum(model, inputs, torch.full_like(targets, bad))
    with pytest.raises(ValueError, match="int64"):
        own_sum(model, inputs, targets.int())
    with pytest.raises(ValueError, match="shape"):
        own_sum(model, inputs, targets[:-1])
    with pytest.raises(ValueError, match="floating point"):
        own_sum(model, inputs.long(), targets)
    for norm in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="clipping_norm"):
            ClippedSum(model, norm, FINE)
    with pytest.raises(ValueError, match="coarser"):
        ClippedSum(model, 1.0, -53)
    with pytest.raises(ValueError, match="within ±100"):
        ClippedSum(model, 2.0**-60, -101)
    with pytest.raises(ValueError, match="microbatch"):
        ClippedSum(model, 1.0, FINE, microbatch=0)


def test_a_sum_that_int64_could_not_hold_is_refused() -> None:
    model = nn.Linear(1, 2)
    with ClippedSum(model, 1.0, -52) as clipped, pytest.raises(ValueError, match="int64"):
        clipped.sum(torch.ones(2**11, 1), torch.zeros(2**11, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_model
@every_mode
def test_cuda_agrees_with_cpu(name: str, mode: GradSampleMode) -> None:
    model, inputs, targets = make(name, 21)
    expected = own_sum(model, inputs, targets, mode)
    found = own_sum(model.cuda(), inputs.cuda(), targets.cuda(), mode)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(found, own_sum(model, inputs.cuda(), targets.cuda(), mode))


@pytest.mark.parametrize(("features", "classes"), [(33, 7), (3969, 10), (11907, 3), (5, 2)])
def test_odd_widths_do_not_let_one_example_move_the_others(features: int, classes: int) -> None:
    """Unaligned rows are rounded by their position: thousands of others would move by more than C has room for."""
    torch.manual_seed(features)
    model = nn.Linear(features, classes)
    inputs = torch.nn.functional.normalize(torch.randn(200, features))
    targets = torch.randint(0, classes, (200,))
    with ClippedSum(model, 0.3, FINE) as clipped:
        whole = clipped.sum(inputs, targets)
        for left_out in (0, 1, 2, 77):
            kept = [i for i in range(200) if i != left_out]
            own = clipped.sum(inputs[left_out : left_out + 1], targets[left_out : left_out + 1])
            assert np.array_equal(whole - own, clipped.sum(inputs[kept], targets[kept]))


class _PositionDependent(nn.Module):
    """Stands for a kernel that rounds a row by its place in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        places = torch.arange(len(inputs), dtype=inputs.dtype)[:, None]
        logits: Tensor = self.linear(inputs) * (1 + 1e-6 * places)
        return logits


def test_where_kernels_depend_on_position_rows_are_computed_one_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(1)
    model = _PositionDependent()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs, targets = torch.randn(70, 6), torch.randint(0, 3, (70,))
    with ClippedSum(model, 1.0, FINE) as clipped:
        whole = clipped.sum(inputs, targets)
        own = clipped.sum(inputs[:1], targets[:1])
        assert np.array_equal(whole - own, clipped.sum(inputs[1:], targets[1:]))
    assert "one at a time" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_trial_leaves_dropout_and_parameters_as_they_were() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with ClippedSum(model, 1.0, FINE) as clipped:
        clipped.sum(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))
    assert model[0].training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# How many rows at once


def wide() -> nn.Module:
    """A net whose gradients are 0.4 MB a photo."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(100, 1000), nn.Tanh(), nn.Linear(1000, 3))


@pytest.mark.parametrize(("mebibytes", "rows"), [(5, 1), (8, 8), (13, 16), (None, 32)])
@pytest.mark.parametrize("photos", [1, 70])
def test_the_microbatch_follows_from_memory_and_not_from_photos(
    mebibytes: int | None, rows: int, photos: int
) -> None:
    memory = None if mebibytes is None else mebibytes * 2**20
    heights = []
    model = wide()
    with ClippedSum(model, NORM, FINE, memory=memory) as clipped:
        clipped.prepare(torch.full((photos, 100), torch.nan))
        assert clipped.microbatch == rows
        model.register_forward_pre_hook(lambda _, inputs: heights.append(len(inputs[0])))
        for count in (0, 1, 5, photos):
            clipped.sum(torch.randn(count, 100), torch.zeros(count, dtype=torch.int64))
        assert clipped.microbatch == rows
    assert set(heights) == {rows}, "after the trials never another height"


def test_one_example_moves_no_other_at_the_microbatch_found() -> None:
    torch.manual_seed(2)
    inputs, targets = torch.randn(30, 100), torch.randint(0, 3, (30,))
    model = wide()[1:]
    with ClippedSum(model, NORM, FINE, memory=8 * 2**20) as clipped:
        whole, own = clipped.sum(inputs, targets), clipped.sum(inputs[:1], targets[:1])
        assert np.array_equal(whole - own, clipped.sum(inputs[1:], targets[1:]))


def test_preparing_changes_nothing_and_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with ClippedSum(model, NORM, FINE) as clipped:
        clipped.prepare(torch.zeros(1, 100))
        assert torch.equal(torch.randn(4), expected), "dropout masks must not depend on when it is done"
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        for name in ("fitting_rows", "_fill"):
            monkeypatch.setattr(f"hanse_client.gradients.{name}", None)
        clipped.sum(torch.randn(40, 100), torch.zeros(40, dtype=torch.int64))


def test_a_net_too_large_for_the_memory_is_refused() -> None:
    with (
        ClippedSum(wide(), NORM, FINE, memory=2**20) as clipped,
        pytest.raises(RecognizerError, match=r"One photo at a time takes \d+ MB here, found 1 MB allowed"),
    ):
        clipped.prepare(torch.zeros(1, 100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_model
def test_one_example_moves_no_other_on_cuda(name: str) -> None:
    model, inputs, targets = make(name, 300)
    inputs, targets = inputs.cuda(), targets.cuda()
    with ClippedSum(model.cuda(), NORM, FINE) as clipped:
        clipped.prepare(inputs)
        rows = clipped.microbatch
        whole, own = clipped.sum(inputs, targets), clipped.sum(inputs[:1], targets[:1])
        assert np.array_equal(whole - own, clipped.sum(inputs[1:], targets[1:]))
        assert clipped.microbatch == rows > 1, "as many rows as the GPU has room for, not one at a time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_microbatch_keeps_to_its_memory_on_cuda() -> None:
    inputs, targets = torch.randn(300, 100, device="cuda"), torch.zeros(300, dtype=torch.int64, device="cuda")
    memory = 200 * 2**20
    with ClippedSum(wide().cuda(), NORM, FINE, memory=memory) as clipped:
        clipped.prepare(inputs)
        assert 64 <= clipped.microbatch <= 512, "0.4 MB a photo"
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        clipped.sum(inputs, targets)
        assert torch.cuda.max_memory_allocated() - held <= memory
