"""Local training against plain DP-SGD stepped by torch's optimizer; its noise; its silence about photos."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.nn import functional as F

from hanse_client.examples import Examples, resolve_device
from hanse_client.training import ShopTrainer
from hanse_common.errors import ConfigError
from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.privacy.sampling import poisson_sample
from hanse_common.randomness import AesCtrStream, Randomness
from hanse_common.vision import model as models
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import Augmentation, Linear, SmallCnn

MakePlan = Callable[..., Plan]
Update = NDArray[np.float64]

ALPHA = 1e-6
FEATURES, CLASSES, DIMENSION = 6, 3, 21

CNN = Recipe(
    preprocessing=Preprocessing(size=8, channels=3),
    augmentation=Augmentation(crop_padding=1, flip=0.5, rotation=10.0, brightness=0.2, hue=0.1),
    backbone=None,
    model=SmallCnn(width=4, dropout=0.3),
)


def arrays(count: int = 50, seed: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    features = rng.normal(size=(count, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]
    return features.astype(np.float32), labels


def trainer(
    plan: Plan, inputs: Any, labels: Any, key: int = 1, device: str = "cpu", randomness: Any = None
) -> ShopTrainer:
    source: Randomness = randomness or AesCtrStream(bytes([key]) * 32)
    return ShopTrainer(plan.recipe, plan.taxonomy, Examples.of(inputs, labels, device), source)


def start_at(plan: Plan, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=0.3, size=plan.dimension).astype(np.float32)


@pytest.fixture
def noise_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is released is the exact sum, so that the rest can be compared number by number."""
    monkeypatch.setattr(Mechanism, "release", lambda self, fine, randomness: fine * self.grid.fine_unit)


def with_model(plan: Plan, **changes: Any) -> Recipe:
    return plan.recipe.model_copy(update={"model": Linear(**changes)})


# Against a reference


def dp_sgd(plan: Plan, round_: int, model: NDArray[np.float32], inputs: Any, labels: Any) -> Update:
    """One example at a time in float64, stepped by torch.optim.SGD: Abadi et al. 2016, algorithm 1, no noise."""
    training = plan.training
    layer = torch.nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(model.astype(np.float64)), layer.parameters())
    optimizer = torch.optim.SGD(
        layer.parameters(),
        lr=training.learning_rate * ((1 - round_ / training.rounds) if training.decay else 1),
        momentum=training.momentum,
        weight_decay=plan.recipe.model.l2,
    )
    parameters = list(layer.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    for _ in range(training.local_steps):
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for x, y in zip(torch.from_numpy(inputs).double(), torch.from_numpy(labels), strict=True):
            gradient = torch.autograd.grad(F.cross_entropy(layer(x), y), parameters)
            norm = torch.sqrt(sum((part**2).sum() for part in gradient))
            scale = min(1.0, training.clipping_norm / float(norm))
            total = [one + scale * part for one, part in zip(total, gradient, strict=True)]
        # Li et al. 2020, equation 2: FedProx adds μ/2·‖w − w_t‖² to what a merchant minimises.
        distance = sum(((one - then) ** 2).sum() for one, then in zip(parameters, start, strict=True))
        proximal = torch.autograd.grad(training.proximal / 2 * distance, parameters)
        for parameter, one, pull in zip(parameters, total, proximal, strict=True):
            penalty = plan.recipe.model.l1 * torch.sign(parameter.detach())
            parameter.grad = one / training.expected_batch + penalty + pull
        optimizer.step()
    reached = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    return reached - model.astype(np.float64)


@pytest.mark.parametrize(
    ("training", "model", "round_"),
    [
        ({}, {}, 0),
        ({"local_steps": 1, "clipping_norm": 0.05}, {}, 3),
        ({"local_steps": 5, "momentum": 0.9, "decay": True}, {}, 3),
        ({"local_steps": 4, "clipping_norm": 100.0, "learning_rate": 0.1}, {"l1": 0.02, "l2": 0.3}, 1),
        ({"local_steps": 3, "momentum": 0.5}, {"l1": 0.1, "l2": 0.1}, 2),
        ({"local_steps": 5, "proximal": 0.1}, {}, 0),
        ({"local_steps": 4, "momentum": 0.5, "decay": True, "proximal": 0.05}, {"l2": 0.1}, 1),
    ],
)
@pytest.mark.usefixtures("noise_free")
def test_it_is_dp_sgd(
    make_plan: MakePlan, training: dict[str, Any], model: dict[str, Any], round_: int
) -> None:
    plan = make_plan({"sampling_rate": 1.0, "expected_batch": 33.0} | training)
    plan = make_plan(plan.training.model_dump(), recipe=with_model(plan, **model))
    inputs, labels = arrays()
    start = start_at(plan)
    expected = dp_sgd(plan, round_, start, inputs, labels)
    assert np.abs(expected).max() > 0.005
    update = trainer(plan, inputs, labels).local_update(plan, round_, start)
    assert update.dtype == np.float64
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=2e-6)


def test_the_proximal_term_pulls_an_update_back(make_plan: MakePlan) -> None:
    """FedProx, with noise: the more so the larger μ. One step from the start it has nothing to pull back."""
    inputs, labels = arrays()
    lengths, firsts = [], []
    for proximal in (0.0, 0.05, 0.15):
        for steps, found in ((8, lengths), (1, firsts)):
            plan = make_plan({"local_steps": steps, "learning_rate": 2.0, "proximal": proximal})
            found.append(trainer(plan, inputs, labels).local_update(plan, 0, start_at(plan)))
    norms = [float(np.linalg.norm(update)) for update in lengths]
    assert norms[0] > norms[1] > norms[2] > 0
    assert np.array_equal(firsts[0], firsts[1])
    assert np.array_equal(firsts[0], firsts[2])


def test_two_proximal_steps_are_the_closed_form(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one gradient g throughout: −ηg, then −ηg − η(g + μ·(−ηg)) = −ηg·(2 − ημ)."""
    gradient = np.linspace(-1, 1, DIMENSION)
    monkeypatch.setattr(Mechanism, "release", lambda self, fine, randomness: 20.0 * gradient)
    plan = make_plan({"local_steps": 2, "learning_rate": 0.5, "proximal": 0.8, "expected_batch": 20.0})
    update = trainer(plan, *arrays()).local_update(plan, 0, start_at(plan))
    np.testing.assert_allclose(update, -0.5 * gradient * (2 - 0.5 * 0.8), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_proximal_term_that_diverges_still_uploads(make_plan: MakePlan) -> None:
    """A plan may be foolish; after the charge nothing raises."""
    plan = make_plan({"local_steps": 60, "proximal": 1e9, "learning_rate": 5.0})
    inputs, labels = arrays(5)
    residues = trainer(plan, inputs, labels).contribution(plan, 0, start_at(plan))
    assert residues.shape == (DIMENSION,)


@pytest.mark.usefixtures("noise_free")
def test_each_step_has_a_poisson_sample_of_its_own(make_plan: MakePlan) -> None:
    """Equal photos add up to a multiple of one gradient: the number of them in the sample."""
    plan = make_plan({"sampling_rate": 0.3, "local_steps": 1, "learning_rate": 1.0, "expected_batch": 1.0})
    inputs, labels = np.ones((200, FEATURES), np.float32), np.zeros(200, np.int64)
    start = np.zeros(DIMENSION, np.float32)
    sampled = trainer(plan, inputs, labels, key=5)
    sizes = [float(np.linalg.norm(sampled.local_update(plan, 0, start))) for _ in range(30)]
    np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-3)
    # A step draws 200 coins, and the word that seeds dropout and augmentation.
    stream = AesCtrStream(bytes([5]) * 32)
    expected = []
    for _ in range(30):
        expected.append(len(poisson_sample(200, 0.3, stream)))
        stream.words(1)
    assert np.round(sizes).tolist() == expected
    assert len(set(expected)) > 5


# Noise


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_shop_without_photos_uploads_noise_of_the_right_size(make_plan: MakePlan, momentum: float) -> None:
    plan = make_plan({"local_steps": 2, "momentum": momentum, "learning_rate": 0.7, "expected_batch": 13.0})
    empty = trainer(plan, np.empty((0, FEATURES), np.float32), np.empty(0, np.int64))
    start = start_at(plan)
    updates = np.array([empty.local_update(plan, 0, start) for _ in range(150)])
    one_step = 0.7 / 13.0 * plan.mechanism(2).noise_deviation
    deviation = one_step * np.sqrt((1 + momentum) ** 2 + 1)  # the first step's noise acts in the second, too
    found = float(np.sum((updates / deviation) ** 2))
    law = stats.chi2(updates.size)
    assert law.ppf(ALPHA) < found < law.isf(ALPHA)
    # Each coordinate and each update on its own: no two of them share their noise.
    correlations = np.corrcoef(np.concatenate([updates, np.roll(updates, 1, axis=0)], axis=1).T)
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / np.sqrt(len(updates))


def test_photos_do_not_change_the_noise(make_plan: MakePlan) -> None:
    """With the same randomness the update differs by the photos' own, exact part alone (up to rounding)."""
    plan = make_plan({"sampling_rate": 1.0, "local_steps": 1, "learning_rate": 1.0})
    inputs, labels = arrays()
    start = start_at(plan)

    class Same(AesCtrStream):
        """Hands out the same words for each purpose: they differ in how many are asked for."""

        def words(self, count: int) -> NDArray[np.uint64]:
            return AesCtrStream(bytes([count % 251]) * 32).words(count)

    nobody = trainer(plan, inputs[:0], labels[:0], randomness=Same(bytes(32))).local_update(plan, 0, start)
    everybody = trainer(plan, inputs, labels, randomness=Same(bytes(32))).local_update(plan, 0, start)
    exact = dp_sgd(plan, 0, start, inputs, labels)
    step = plan.mechanism(1).grid.step / plan.training.expected_batch
    assert np.abs(everybody - nobody - exact).max() < 1.01 * step
    assert np.abs(nobody).max() > 10 * step


# What must not show


@pytest.mark.usefixtures("noise_free")
def test_nothing_is_divided_by_the_merchants_own_count(make_plan: MakePlan) -> None:
    plan = make_plan({"sampling_rate": 1.0, "local_steps": 1})
    inputs, labels = arrays()
    start = start_at(plan)
    once = trainer(plan, inputs, labels).local_update(plan, 0, start)
    thrice = trainer(plan, np.tile(inputs, (3, 1)), np.tile(labels, 3)).local_update(plan, 0, start)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-12)
    assert not trainer(plan, inputs[:0], labels[:0]).local_update(plan, 0, start).any()


@pytest.mark.parametrize("hostile", [np.nan, np.inf, 3e38])
def test_a_photo_that_is_not_finite_is_no_photo(make_plan: MakePlan, hostile: float) -> None:
    plan = make_plan({"sampling_rate": 1.0, "local_steps": 3})
    inputs, labels = arrays()
    worse = np.insert(inputs, 7, np.float32(hostile), axis=0)
    start = start_at(plan)
    update = trainer(plan, worse, np.insert(labels, 7, 1)).local_update(plan, 0, start)
    assert np.isfinite(update).all()
    if hostile != 3e38:  # finite, though its logits are not
        assert np.array_equal(update, trainer(plan, inputs, labels).local_update(plan, 0, start))


@pytest.mark.usefixtures("noise_free")
@pytest.mark.parametrize("fault", ["shape", "float64"])
def test_gradients_that_cannot_be_had_are_zero(
    make_plan: MakePlan, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    plan = make_plan({"sampling_rate": 1.0})
    inputs, labels = arrays()
    if fault == "shape":
        inputs = inputs[:, :5]
    broken = trainer(plan, inputs.astype(np.float64) if fault == "float64" else inputs, labels)
    assert not broken.local_update(plan, 0, start_at(plan)).any()
    assert "noise alone" in caplog.text, "the owner finds it in the log"


def test_a_failed_step_is_noise_of_the_usual_size(make_plan: MakePlan) -> None:
    plan = make_plan({"sampling_rate": 1.0, "local_steps": 1, "learning_rate": 1.0, "expected_batch": 1.0})
    inputs, labels = arrays()
    broken = trainer(plan, inputs[:, :5], labels)
    updates = np.array([broken.local_update(plan, 0, start_at(plan)) for _ in range(60)])
    law = stats.chi2(updates.size)
    found = float(np.sum((updates / plan.mechanism(1).noise_deviation) ** 2))
    assert law.ppf(ALPHA) < found < law.isf(ALPHA)


@pytest.mark.usefixtures("noise_free")
def test_after_a_failed_step_the_next_one_works(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between forward and backward must leave nothing behind on the model."""
    plan = still_plan(make_plan, local_steps=2)
    inputs, labels = pictures()
    start = models.initial_vector(plan.recipe, CLASSES, seed=1)
    faults = [RuntimeError("out of memory")]
    real = F.cross_entropy

    def fails_once(*arguments: Any, **options: Any) -> Any:
        loss = real(*arguments, **options)
        if faults:
            raise faults.pop()
        return loss

    monkeypatch.setattr("hanse_client.gradients.F.cross_entropy", fails_once)
    update = trainer(plan, inputs, labels).local_update(plan, 0, start)
    monkeypatch.undo()
    monkeypatch.setattr(Mechanism, "release", lambda self, fine, randomness: fine * self.grid.fine_unit)
    one_step = still_plan(make_plan, local_steps=1)
    expected = trainer(one_step, inputs, labels).local_update(one_step, 0, start)
    assert not faults
    np.testing.assert_allclose(update, expected, atol=1e-12)


@pytest.mark.usefixtures("noise_free")
@pytest.mark.parametrize("limit", [49, 50, 51])
def test_no_sample_is_too_large_to_be_summed(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """What is left out because there is too much of it would depend on a single photo."""
    plan = make_plan({"sampling_rate": 1.0})
    inputs, labels = arrays(50)
    whole = trainer(plan, inputs, labels).local_update(plan, 0, start_at(plan))
    monkeypatch.setattr("hanse_client.head_gradients.MAX_SAMPLE", limit)
    monkeypatch.setattr("hanse_client.exact_sums.MAX_SAMPLE", limit)
    assert np.array_equal(trainer(plan, inputs, labels).local_update(plan, 0, start_at(plan)), whole)
    assert whole.any()


def test_what_grows_with_the_catalog_is_made_before_the_charge(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan()
    one = trainer(plan, *arrays())
    assert one.accepts(plan)
    made: list[int] = []
    monkeypatch.setattr("hanse_client.exact_sums.HeadSum.__init__", lambda *_: made.append(1))
    one.local_update(plan, 0, start_at(plan))
    assert not made

    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("hanse_client.exact_sums.HeadSum.__init__", fails)
    assert not trainer(plan, *arrays()).accepts(plan)
    assert "cannot be prepared" in caplog.text


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_weights_that_diverge_do_not_raise(make_plan: MakePlan) -> None:
    plan = make_plan({"local_steps": 60, "learning_rate": 1e9})
    plan = make_plan(plan.training.model_dump(), recipe=with_model(plan, l2=1.0))
    inputs, labels = arrays()
    update = trainer(plan, inputs, labels).local_update(plan, 0, start_at(plan))
    assert not np.isfinite(update).all(), "else this test shows nothing"
    assert plan.encode(update).shape == (DIMENSION,)


# Repeating


def cnn_plan(make_plan: MakePlan, **training: Any) -> Plan:
    # ε is huge: what is looked at here is whether it learns.
    quiet = {"noise_multiplier": 0.2, "sampling_rate": 0.5, "expected_batch": 20.0, "local_steps": 4}
    return make_plan(
        quiet | {"learning_rate": 0.5, "momentum": 0.5} | training,
        recipe=CNN,
        dimension=CNN.dimension(CLASSES),
    )


def still_plan(make_plan: MakePlan, **training: Any) -> Plan:
    """A CNN without augmentation and dropout, all of whose photos are in every sample."""
    recipe = CNN.model_copy(update={"augmentation": None, "model": SmallCnn(width=4)})
    plan = cnn_plan(make_plan, sampling_rate=1.0, **training)
    return plan.model_copy(update={"recipe": recipe})


def pictures(count: int = 40) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes are colours."""
    rng = np.random.default_rng(4)
    labels = rng.integers(CLASSES, size=count)
    images = np.where(np.eye(CLASSES)[labels][:, :, None, None] > 0, 0.5, -0.5) * np.ones((1, 1, 8, 8))
    return (images + rng.normal(scale=0.2, size=images.shape)).astype(np.float32), labels


def loss_of(recipe: Recipe, vector: Update, inputs: Any, labels: Any) -> float:
    module = models.build(recipe, CLASSES).eval()
    models.load_vector(module, vector.astype(np.float32))
    with torch.no_grad():
        return float(F.cross_entropy(module(torch.from_numpy(inputs)), torch.from_numpy(labels)))


def test_a_net_with_augmentation_and_dropout_learns_and_repeats_to_the_bit(make_plan: MakePlan) -> None:
    plan = cnn_plan(make_plan)
    inputs, labels = pictures()
    reached = []
    for _ in range(2):
        torch.rand(3)  # the global generator's state is no part of it
        one = trainer(plan, inputs, labels, key=8)
        vector = models.initial_vector(CNN, CLASSES, seed=1)
        for round_ in range(3):
            vector = (vector + one.local_update(plan, round_, vector)).astype(np.float32)
        reached.append(vector)
    assert reached[0].tobytes() == reached[1].tobytes()
    before = loss_of(CNN, models.initial_vector(CNN, CLASSES, seed=1), inputs, labels)
    assert loss_of(CNN, reached[0], inputs, labels) < 0.7 * before


@pytest.mark.usefixtures("noise_free")
def test_dropout_and_augmentation_take_part(make_plan: MakePlan) -> None:
    """Without noise and with every photo in every sample, two steps from one model differ by them alone."""
    plan = cnn_plan(make_plan, sampling_rate=1.0, local_steps=1)
    inputs, labels = pictures(20)
    start = models.initial_vector(CNN, CLASSES, seed=1)
    for update in ({"augmentation": None}, {"model": SmallCnn(width=4)}):
        only_one = plan.model_copy(update={"recipe": CNN.model_copy(update=update)})
        again = trainer(only_one, inputs, labels)
        assert not np.array_equal(
            again.local_update(only_one, 0, start), again.local_update(only_one, 0, start)
        )
    still = still_plan(make_plan, local_steps=1)
    again = trainer(still, inputs, labels)
    assert np.array_equal(again.local_update(still, 0, start), again.local_update(still, 0, start))


def test_equal_seeds_give_equal_bits_and_others_do_not(make_plan: MakePlan) -> None:
    plan = make_plan()
    inputs, labels = arrays()
    start = start_at(plan)
    first, second, other = (
        trainer(plan, inputs, labels, key).local_update(plan, 0, start) for key in (1, 1, 2)
    )
    assert first.tobytes() == second.tobytes()
    assert not np.array_equal(first, other)


def test_global_generators_are_left_as_they_were(make_plan: MakePlan) -> None:
    plan = cnn_plan(make_plan)
    inputs, labels = pictures(20)
    one, start = trainer(plan, inputs, labels), models.initial_vector(CNN, CLASSES, seed=1)
    state = torch.get_rng_state()
    one.local_update(plan, 0, start)
    assert torch.equal(torch.get_rng_state(), state)


# Devices


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"device: found cuda.*choose auto or cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cpu") == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("noise_free")
def test_cuda_trains_as_the_cpu_does(make_plan: MakePlan) -> None:
    plan = make_plan({"sampling_rate": 1.0, "local_steps": 3, "momentum": 0.5})
    inputs, labels = arrays()
    start = start_at(plan)
    on_cpu, on_cuda = (
        trainer(plan, inputs, labels, device=d).local_update(plan, 0, start) for d in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_cuda, on_cpu, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_net_learns_on_cuda(make_plan: MakePlan) -> None:
    plan = cnn_plan(make_plan)
    inputs, labels = pictures()
    one = trainer(plan, inputs, labels, device="cuda")
    vector = start = models.initial_vector(CNN, CLASSES, seed=1)
    for round_ in range(3):
        vector = (vector + one.local_update(plan, round_, vector)).astype(np.float32)
    assert loss_of(CNN, vector, inputs, labels) < 0.7 * loss_of(CNN, start, inputs, labels)


def test_a_sample_is_summed_alike_in_small_parts_and_in_large(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = still_plan(make_plan)
    inputs, labels = pictures()
    start = models.initial_vector(plan.recipe, CLASSES, seed=1)
    whole = trainer(plan, inputs, labels).local_update(plan, 0, start)
    monkeypatch.setattr("hanse_client.exact_sums.CHUNK", 16)
    assert np.array_equal(trainer(plan, inputs, labels).local_update(plan, 0, start), whole)
