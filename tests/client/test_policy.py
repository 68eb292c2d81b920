"""The policy against plans good, bad and absurd; its figures against dp-accounting and Bayes' rule."""

import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_client.charges import Budget
from hanse_client.explanation import posterior_bound
from hanse_client.policy import Policy
from hanse_common.config import load
from hanse_common.errors import ConfigError, PlanRefused
from hanse_common.modes import (
    DistributedTraining,
    EvaluationTraining,
    LocalTraining,
    MeanTraining,
    MerchantLevelTraining,
    TrendsTraining,
)
from hanse_common.plan import Cohort, Plan
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy

TAXONOMY = Taxonomy(classes=("Bag", "Coat", "Dress"))
POLICY = Policy(league="textiles", epsilon=2.0, minimum_cohort=5, corrupt_merchants=2, upload_slot=0.5)


def training(**changes) -> LocalTraining:
    values = {
        "rounds": 10,
        "local_steps": 4,
        "sampling_rate": 0.1,
        "expected_batch": 500.0,
        "clipping_norm": 0.5,
        "noise_multiplier": 4.0,
        "learning_rate": 1.0,
        "update_bound": 4.0,
    }
    return LocalTraining(**{**values, **changes})


def shared(unit="photo", **changes) -> DistributedTraining:
    values = {"rounds": 40, "sampling_rate": 0.1, "expected_batch": 500.0, "clipping_norm": 0.5}
    return DistributedTraining(**{**values, "noise_multiplier": 4.0, "unit": unit, **changes})


def merchants(**changes) -> MerchantLevelTraining:
    values = {"rounds": 40, "local_steps": 5, "local_rate": 0.1, "learning_rate": 1.0, "sampling_rate": 0.1}
    return MerchantLevelTraining(
        **{**values, "expected_batch": 2.0, "clipping_norm": 0.5, "noise_multiplier": 4.0, **changes}
    )


def plan(**changes) -> Plan:
    values = {
        "league": "textiles",
        "serial": bytes(16),
        "recipe": Recipe(
            preprocessing=Preprocessing(size=28, channels=1),
            backbone=Scattering(projection=Projection(dimensions=100)),
            model=Linear(),
        ),
        "taxonomy": TAXONOMY,
        "dimension": 303,
        "training": training(),
        "cohort": Cohort(min_merchants=5, max_merchants=6, max_corrupt=2),
        "delta": 1e-5,
    }
    return Plan(**{**values, **changes})


def test_a_good_plan_passes():
    POLICY.check(plan(), TAXONOMY)
    assert POLICY.reasons(plan(), TAXONOMY) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"league": "shoes"}, "league: found 'shoes', your policy allows 'textiles'"),
        (
            {"cohort": Cohort(min_merchants=4, max_merchants=5, max_corrupt=2)},
            "cohort: rounds may count with 4 merchants",
        ),
        ({"cohort": Cohort(min_merchants=6, max_merchants=9, max_corrupt=1)}, "against 1 corrupt merchants"),
        (
            {"cohort": Cohort(min_merchants=5, max_merchants=6, max_corrupt=2, upload_slot=0.2)},
            "cohort: uploads leave at multiples of 0.2 s, your policy needs 0.5 s or more, .*tells nothing",
        ),
        ({"training": training(unit="product")}, "unit: its ε is said of one product, your policy"),
        ({"delta": 1.1e-5}, "δ: found 1.1e-05, your policy allows 1e-05"),
        ({"training": training(noise_multiplier=1.0)}, "ε: the whole plan costs"),
        ({"training": training(repeats=500)}, "ε: the whole plan costs"),
        ({"training": training(repeats=991, noise_multiplier=100.0)}, "rounds: found 1001 with repeats"),
        ({"training": training(noise_multiplier=0.01)}, "expected 4 ≤ sigma|noise is too weak"),
        ({"training": training(noise_multiplier=0.2, local_steps=2000)}, "the noise is too weak"),
        ({"training": training(noise_multiplier=9999.0)}, "noise: no ε can be computed"),
        ({"delta": 1e-11}, "noise: no ε can be computed for this plan. Expected 1e-10 ≤ delta"),
        ({"training": training(rounds=500, local_steps=41)}, "steps: found 20500 in all, your policy"),
        (
            {"training": training(rounds=1001, noise_multiplier=100.0)},
            "rounds: found 1001 with repeats, your",
        ),
        ({"training": training(expected_batch=0.5)}, "expected_batch: found 0.5 photos a step"),
        (
            {"training": training(update_bound=5e-324)},
            "update_bound: updates of this plan cannot be added up",
        ),
        ({"training": shared(expected_batch=1e8)}, "expected_batch: updates of this plan cannot be added up"),
        ({"dimension": 304}, "dimension: found 304, but the recipe has 303"),
        (
            {"taxonomy": Taxonomy(classes=("Bag", "Hat", "Dress"))},
            r"classes: found other ones than yours \(not yours: Hat; missing: Coat\)",
        ),
        ({"taxonomy": Taxonomy(classes=("Bag", "Dress", "Coat"))}, "another order"),
    ],
)
def test_each_reason_alone_is_enough_and_is_named(changes, reason):
    with pytest.raises(PlanRefused) as caught:
        POLICY.check(plan(**changes), TAXONOMY)
    (line,) = str(caught.value).split("\n")
    assert re.search(reason, line, re.IGNORECASE), line


ALL_UNITS = {
    "photo": [training(), shared()],
    "product": [training(unit="product"), shared("product")],
    "merchant": [merchants()],
}


@pytest.mark.parametrize("asked", ALL_UNITS)
@pytest.mark.parametrize("given", ALL_UNITS)
def test_a_plan_of_another_unit_is_refused_the_smaller_and_the_larger(asked, given):
    policy = POLICY.model_copy(update={"unit": asked})
    for each in ALL_UNITS[given]:
        reasons = policy.reasons(plan(training=each), TAXONOMY)
        expected = f"unit: its ε is said of one {given}, your policy keeps account of one {asked}; "
        expected += "the two do not add up."
        assert reasons == ([expected] if given != asked else [])


def test_the_batch_is_told_in_the_plans_unit():
    policy = POLICY.model_copy(update={"unit": "product"})
    (reason,) = policy.reasons(plan(training=shared("product", expected_batch=0.5)), TAXONOMY)
    assert reason.startswith("expected_batch: found 0.5 products a step")


def test_max_steps_counts_all_that_this_machine_computes():
    """In mode merchant-level 45 rounds are 45 steps for ε, and 225 for the machine."""
    asked = plan(training=merchants(repeats=5))
    policy = POLICY.model_copy(update={"unit": "merchant", "max_steps": 225})
    assert policy.reasons(asked, TAXONOMY) == []
    less = policy.model_copy(update={"max_steps": 224})
    assert less.reasons(asked, TAXONOMY) == ["steps: found 225 in all, your policy allows 224 (max_steps)."]


def test_a_policy_may_ask_for_a_slot():
    for slot, asked, fine in ((0.0, 0.0, True), (0.0, 0.1, False), (2.0, 2.0, True), (2.0, 2.1, False)):
        cohort = Cohort(min_merchants=5, max_merchants=6, max_corrupt=2, upload_slot=slot)
        policy = POLICY.model_copy(update={"upload_slot": asked})
        assert (policy.reasons(plan(cohort=cohort), TAXONOMY) == []) == fine
    assert Policy(league="textiles", epsilon=2.0).upload_slot == 0


def test_modes_that_are_not_allowed_are_refused():
    for each in (shared(), merchants()):
        only_local = POLICY.model_copy(update={"modes": ("local",), "unit": each.unit})
        (reason,) = only_local.reasons(plan(training=each), TAXONOMY)
        assert reason == f"mode: found '{each.mode}', your policy allows local."
    assert POLICY.model_copy(update={"modes": ("local",)}).reasons(plan(), TAXONOMY) == []


def test_the_budget_carries_how_it_is_added_up_and_of_what():
    assert POLICY.budget == Budget(2.0, 1e-5, "sum", "photo")
    assert POLICY.model_copy(update={"unit": "product"}).budget == Budget(2.0, 1e-5, "sum", "product")
    assert POLICY.model_copy(update={"accounting": "rdp-18"}).budget == Budget(2.0, 1e-5, "rdp-18")


def test_all_reasons_are_given_at_once():
    bad = plan(
        league="shoes",
        cohort=Cohort(min_merchants=3, max_merchants=5),
        delta=1e-4,
        training=training(noise_multiplier=1.0, rounds=1001, expected_batch=0.1),
        dimension=5,
    )
    with pytest.raises(PlanRefused) as caught:
        POLICY.check(bad, Taxonomy(classes=("A", "B", "C")))
    names = [line.partition(":")[0] for line in str(caught.value).split("\n")]
    assert names == [
        "league",
        "rounds",
        "cohort",
        "cohort",
        "classes",
        "dimension",
        "δ",
        "expected_batch",
        "ε",
    ]


def test_limits_are_inclusive():
    epsilon = plan().epsilon()
    Policy(
        league="textiles", epsilon=epsilon, delta=1e-5, minimum_cohort=5, corrupt_merchants=2, max_rounds=10
    ).check(plan(), TAXONOMY)
    just_under = Policy(league="textiles", epsilon=math.nextafter(epsilon, 0))
    with pytest.raises(PlanRefused, match="ε: the whole plan costs"):
        just_under.check(plan(), TAXONOMY)


@pytest.mark.parametrize("repeats", [0, 5])
def test_epsilon_is_that_of_all_steps_by_dp_accounting(repeats):
    one_step = privacy_loss_distribution.from_gaussian_mechanism(4.0, sampling_prob=0.1)
    expected = one_step.self_compose((10 + repeats) * 4).get_epsilon_for_delta(1e-5)
    assert plan(training=training(repeats=repeats)).epsilon() == pytest.approx(expected, rel=2e-3)


def test_the_bound_on_a_suspicion_is_bayes_rule():
    for prior in (0.01, 0.5):
        assert posterior_bound(0.0, prior) == pytest.approx(prior)
        p, ratio = Fraction(prior), Fraction(math.exp(3.0))
        assert posterior_bound(3.0, prior) == pytest.approx(float(p * ratio / (p * ratio + 1 - p)))
    assert posterior_bound(1e6, 0.01) == 1.0


def test_the_explanation_says_what_an_owner_must_know():
    text = "\n".join(POLICY.explain(plan(training=training(repeats=2))))
    for part in (
        "textiles",
        "3 classes (Bag, Coat, Dress) in 10 rounds, and to repeat at most 2",
        "4 training steps",
        "10 % of the photos",
        "303 numbers (1.2 kB)",
        "at least 5 merchants",
        "You allow ε = 2 and δ = 1e-05",
        "suspected with 1 %",
        "1 in 100,000",
    ):
        assert part in text
    assert "repeat" not in "\n".join(POLICY.explain(plan()))


@pytest.mark.parametrize("unit", ALL_UNITS)
def test_the_explanation_speaks_of_what_the_promise_is_about(unit):
    parts = {
        "photo": (
            "costs each photo ε",
            "that a given photo is in",
            "Several photos of one product",
            "says little about a product or a shop",
        ),
        "product": (
            "costs each product, with all its photos, ε",
            "that a given product, with all its photos, is in",
            "photos are those with one sku in your CSV file; a photo without a sku is a product of its own",
            "says little about one photo of a product that has others: that is protected less",
        ),
        "merchant": (
            "costs this shop, with all its photos, ε",
            "that this shop's catalog, as a whole, is trained on at all",
            "said of all that your shop has, and whether you trained at all",
            "says little about one photo or one product of a shop that trains either way: that is protected less",
        ),
    }
    for each in ALL_UNITS[unit]:
        text = "\n".join(POLICY.explain(plan(training=each)))
        for other, known in parts.items():
            assert all((part in text) == (other == unit) for part in known)
        assert ("kinds of products it sells, is not covered" in text) == (unit != "merchant")
        assert not re.search("covers|covered,|both of", text), "no unit stands for another"


@pytest.mark.parametrize("each", [training(), shared(), merchants()], ids=lambda each: each.mode)
def test_the_explanation_says_on_whom_the_promise_rests(each):
    asked = plan(training=each, cohort=Cohort(min_merchants=7, max_merchants=9, max_corrupt=3))
    text = " ".join(POLICY.explain(asked))
    alone = each.mode == "local"
    assert ("rests on nobody but this machine" in text) == alone
    assert ("The noise that hides your photos is added" in text) == alone
    for part in (
        "rests on others, too",
        "at most 3 of the league's members conspire with the operator",
        "at least 4 shares in every sum are known to none of them",
        "A share of the noise that hides",
        "allow mode local alone (modes)",
    ):
        assert (part in text) == (not alone), part


@pytest.mark.parametrize("unit", ["photo", "product"])
def test_the_explanation_says_when_there_is_no_training(unit):
    mean = MeanTraining(expected_batch=500.0, noise_multiplier=20.0, unit=unit)
    text = " ".join(POLICY.explain(plan(training=mean)))
    assert f"is no training: it adds up the features of all your {unit}s once" in text
    assert "training step" not in text and "rests on others, too" in text


def evaluation(**changes) -> EvaluationTraining:
    fields = {"rounds": 5, "expected_batch": 500.0, "noise_multiplier": 20.0}
    return EvaluationTraining(**(fields | changes))


@pytest.mark.parametrize("unit", ["photo", "product"])
def test_the_explanation_says_that_an_evaluation_looks_at_the_holdout(unit):
    text = " ".join(POLICY.explain(plan(training=evaluation(unit=unit))))
    assert "asks to find out how well its recognizer does, one of 3 classes" in text
    assert f"tries one of the server's recognizers on all the {unit}s that you hold out" in text
    assert "training step" not in text and "rests on others, too" in text
    some = " ".join(POLICY.explain(plan(training=evaluation(unit=unit, sampling_rate=0.25))))
    assert f"on a secret random choice of about 25 % of the {unit}s that you hold out" in some


def test_an_evaluation_is_allowed_unless_the_owner_takes_it_out():
    asked = plan(training=evaluation())
    asked = asked.model_copy(update={"dimension": asked.expected_dimension})
    assert POLICY.reasons(asked, asked.taxonomy) == []
    narrower = POLICY.model_copy(update={"modes": ("distributed", "mean")})
    (reason,) = narrower.reasons(asked, asked.taxonomy)
    assert reason == "mode: found 'evaluation', your policy allows distributed, mean."
    wrong = asked.model_copy(update={"dimension": asked.model_dimension})
    assert "dimension" in POLICY.reasons(wrong, asked.taxonomy)[0]


def test_what_shoppers_search_for_is_counted_where_the_owner_says_so_alone():
    asked = plan(
        training=TrendsTraining(first_day="2026-02-23", days=28, expected_batch=500.0, noise_multiplier=20.0),
        dimension=3,
    )
    (reason,) = POLICY.reasons(asked, asked.taxonomy)
    assert reason.startswith("mode: found 'trends', your policy allows local,")
    allowed = POLICY.model_copy(update={"modes": ("trends",)})
    assert allowed.reasons(asked, asked.taxonomy) == []
    shorter = allowed.model_copy(update={"trends_days": 27})
    assert shorter.reasons(asked, asked.taxonomy) == [
        "days: it asks about 28 days, your policy keeps counts of 27 (trends_days)."
    ]
    text = " ".join(allowed.explain(asked))
    for part in (
        "asks to count what shoppers search for, by a recognizer of 3 classes",
        "it counts the photos that your shoppers searched by, by class, on 28 days from 2026-02-23 on",
        "costs each photo that a shopper searched by ε =",
        "Of one class at most 1,000 of your shop's queries are counted.",
        "suspected with 1 % that somebody searched your shop by a given photo could",
        "A shopper who searched a hundred times is covered a hundred times less",
        "that hides your shoppers' queries is added",
    ):
        assert part in text, part
    assert "catalog" not in text


@pytest.mark.parametrize("unit", ["product", "merchant"])
def test_trends_with_a_ledger_of_another_unit_are_refused_before_any_query_is_kept(unit, tmp_path):
    file = tmp_path / "policy.yaml"
    text = f"league: textiles\nepsilon: 2\nunit: {unit}\n"
    file.write_text(text + "modes: [local, trends]\n")
    with pytest.raises(ConfigError, match=f"found trends with unit {unit}, expected unit photo") as caught:
        load(Policy, file)
    assert "Take trends out of modes" in str(caught.value)
    file.write_text(text)
    policy = load(Policy, file)
    asked = plan(
        training=TrendsTraining(first_day="2026-02-23", days=7, expected_batch=500.0, noise_multiplier=20.0),
        dimension=3,
    )
    (reason,) = [each for each in policy.reasons(asked, asked.taxonomy) if each.startswith("unit")]
    assert reason == (
        "unit: it is paid for query by query, from a ledger whose unit is photo; yours keeps account of one "
        f"{unit}, so this shop can't take part."
    )


def test_the_explanation_says_that_a_shop_may_sit_a_round_out():
    text = " ".join(POLICY.explain(plan(training=merchants(sampling_rate=0.25))))
    assert "trains with a chance of 25 %, by a secret coin, and else sends noise alone" in text


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(1.0, 100.0))
def test_what_an_owner_reads_is_never_less_than_what_it_costs(noise):
    asked = plan(training=training(noise_multiplier=noise))
    text = "\n".join(POLICY.explain(asked))
    shown_epsilon = float(re.search(r"costs each photo ε = (\S+) at", text)[1])
    shown_percent = float(re.search(r"to at most (\S+) %", text)[1])
    epsilon = asked.epsilon()
    assert epsilon <= shown_epsilon * (1 + 1e-9) and shown_epsilon <= 1.02 * epsilon
    percent = 100 * posterior_bound(epsilon, 0.01)
    assert percent <= shown_percent * (1 + 1e-9) and shown_percent <= 1.11 * percent


@pytest.mark.parametrize(("epsilon", "percent"), [(1, "2.7"), (3, "17"), (8, "97")])
def test_the_examples_in_the_policys_text_are_right(epsilon, percent):
    assert f"{100 * posterior_bound(epsilon, 0.01):.2g}" == percent
    assert re.search(rf"at {epsilon} (a suspicion of 1 % can grow )?to {percent} %", Policy.__doc__)


def test_a_plan_without_a_finite_epsilon_is_explained_as_such():
    for hopeless in ({"noise_multiplier": 0.2, "local_steps": 10_000}, {"noise_multiplier": 9999.0}):
        assert "no finite ε" in POLICY.explain(plan(training=training(**hopeless)))[-1]


extreme = st.sampled_from([5e-324, 1e-300, 1e-30, 1e-5, 0.3, 1.0, 7.5, 1e4, 1e9])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_plan_that_can_be_written_breaks_the_check(data):
    """Whatever an operator signs is answered by yes or by a refusal, soon."""
    draw = data.draw
    absurd = plan(
        dimension=draw(st.sampled_from([1, 303, 10**6, 1 << 26])),
        delta=draw(st.sampled_from([5e-324, 1e-12, 1e-10, 1e-5, 9e-4])),
        cohort=Cohort(min_merchants=3, max_merchants=draw(st.sampled_from([3, 300]))),
        training=training(
            rounds=draw(st.sampled_from([1, 50])),
            repeats=draw(st.sampled_from([0, 50])),
            local_steps=draw(st.sampled_from([1, 10_000])),
            sampling_rate=min(1.0, draw(extreme)),
            clipping_norm=draw(extreme),
            noise_multiplier=min(1e4, draw(extreme)),
            expected_batch=draw(extreme),
            update_bound=draw(extreme),
        ),
    )
    try:
        POLICY.check(absurd, TAXONOMY)
    except PlanRefused as refusal:
        assert str(refusal)
    assert POLICY.explain(absurd)


def test_a_policy_is_read_from_yaml_with_few_keys(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("league: textiles\nepsilon: 3\n")
    assert load(Policy, path) == Policy(league="textiles", epsilon=3.0)
    path.write_text(
        "league: textiles\nepsilon: 2.0\ndelta: 1e-6\nminimum_cohort: 4\nmodes: [local]\nmax_rounds: 7\n"
    )
    assert load(Policy, path).max_rounds == 7
    path.write_text("epsilon: -1\nminimum_cohort: 1\nmodes: [trusting]\n")
    with pytest.raises(ConfigError) as caught:
        load(Policy, path)
    for part in ("league: missing", "epsilon: found -1", "minimum_cohort: found 1", "'trusting'"):
        assert part in str(caught.value)


def test_a_filter_that_there_is_not_is_named_with_those_there_are(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("league: textiles\nepsilon: 3\naccounting: rdp-1\nunit: shelf\n")
    with pytest.raises(ConfigError) as caught:
        load(Policy, path)
    unit, accounting = sorted(str(caught.value).splitlines(), key=lambda line: "accounting" in line)
    assert "unit: found 'shelf'" in unit and "'photo', 'product', 'merchant'" in unit
    assert "accounting: found 'rdp-1' (a string), expected sum, or rdp-ALPHA" in accounting


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": ()},
        {"delta": 0.1},
        {"epsilon": math.inf},
        {"epsilon": 0.0},
        {"unit": "shelf"},
        {"upload_slot": -1.0},
        {"upload_slot": math.nan},
        {"accounting": "max"},
    ],
)
def test_a_policy_that_makes_no_sense_cannot_be_made(wrong):
    with pytest.raises(ValidationError):
        Policy(**{"league": "textiles", "epsilon": 1.0, **wrong})


def test_a_policy_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        POLICY.epsilon = 100.0


def test_nobody_waits_half_a_day_for_a_slot(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(cohort=Cohort(min_merchants=3, max_merchants=5, upload_slot=601, upload_deadline=2000))
    (reason,) = [reason for reason in POLICY.reasons(plan, plan.taxonomy) if "slots" in reason]
    assert "expected at most 600" in reason
