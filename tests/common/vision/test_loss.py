"""A recipe's loss against its definition and torch's own, and its residuals against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from hanse_common.errors import RecognizerError
from hanse_common.vision.loss import Objective
from hanse_common.vision.recipe_model import Loss

LOSSES = [
    Loss(),
    Loss(class_weights=(0.1, 1.0, 7.5)),
    Loss(class_offsets=(-4.0, -1.0, -0.2)),
    Loss(smoothing=0.3),
    Loss(class_weights=(0.1, 1.0, 7.5), class_offsets=(-4.0, 0.0, 2.0), smoothing=0.1),
]


def given_rows(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_definition(loss: Loss) -> None:
    logits, labels = given_rows()
    found = Objective(loss, 3).of(logits, labels).numpy()
    for row, label, each in zip(logits.numpy(), labels.tolist(), found, strict=True):
        shifted = row + np.array(loss.class_offsets or (0.0,) * 3)
        target = np.full(3, loss.smoothing / 3)
        target[label] += 1 - loss.smoothing
        weight = (loss.class_weights or (1.0,) * 3)[label]
        expected = weight * (target @ (np.log(np.exp(shifted).sum()) - shifted))
        assert each == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_residuals_are_what_autograd_finds(loss: Loss) -> None:
    logits, labels = given_rows()
    objective = Objective(loss, 3)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(objective.of(logits, labels).sum(), logits)
    torch.testing.assert_close(objective.residuals(logits.detach(), labels), expected, rtol=1e-12, atol=1e-14)


def test_torch_weights_and_smooths_alike_where_it_does_one_of_them() -> None:
    """With both, torch weights each class's part of a smoothed target; here a whole example has its class's weight."""
    logits, labels = given_rows()
    weights = torch.tensor([0.1, 1.0, 7.5], dtype=torch.float64)
    weighted = F.cross_entropy(logits, labels, weight=weights, reduction="none")
    torch.testing.assert_close(Objective(LOSSES[1], 3).of(logits, labels), weighted)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(Objective(LOSSES[3], 3).of(logits, labels), smoothed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 39), st.sampled_from(LOSSES))
def test_a_row_does_not_depend_on_the_others(index: int, loss: Loss) -> None:
    logits, labels = given_rows()
    objective = Objective(loss, 3)
    alone = objective.residuals(logits[index : index + 1].float(), labels[index : index + 1])
    assert torch.equal(objective.residuals(logits.float(), labels)[index], alone[0])


def test_numbers_for_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss.class_weights: found 3 numbers, expected one for each of 4"):
        Objective(Loss(class_weights=(1.0, 2.0, 3.0)), 4)
    with pytest.raises(ValueError, match=r"loss.class_offsets: found 2"):
        Objective(Loss(class_offsets=(1.0, 2.0)), 3)
    with pytest.raises(RecognizerError, match="expected logits of shape"):
        Objective(Loss(), 3).of(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    "change",
    [{"class_weights": [0.0, 1.0]}, {"class_weights": [101.0]}, {"smoothing": 1.0}, {"class_offsets": [31]}],
)
def test_numbers_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Loss.model_validate(change)
