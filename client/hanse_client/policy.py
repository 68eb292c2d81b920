"""The policy: what a merchant's owner allows, held against a plan before any photo is touched.

    policy = Policy(league="textiles", epsilon=3.0)
    policy.check(plan, taxonomy)                   # raises PlanRefused with every reason
    print("\n".join(policy.explain(plan)))

The merchant believes no ε that anyone else computed: it follows here from the plan's own numbers. `epsilon`
and `delta` are also the ledger's budget, for all plans together; this module looks at one plan alone.

References:
[1] Dwork, Roth 2014, "The Algorithmic Foundations of Differential Privacy", Lemma 3.17.
[2] Kasiviswanathan, Smith 2014, "On the 'Semantics' of Differential Privacy: A Bayesian Formulation".
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hanse_client.charges import Budget
from hanse_common.config import Section
from hanse_common.errors import PlanRefused
from hanse_common.plan import Plan
from hanse_common.privacy.accounting import STEPS_MAX
from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name

SUSPICION = 0.01
"""The prior probability in the example that `explain` gives."""

_SHOWN_CLASSES = 8


class Policy(Section):
    """The section `policy` of `hanse-client.yaml`.

    Attributes:
        league: the name of the league whose plans are taken.
        epsilon: the most privacy, ε, that one photo may ever pay, for all plans together. Lower is safer:
            at 1 a suspicion of 1 % can grow to 2.7 %, at 3 to 17 %, at 8 to 97 %.
        delta: the most δ, the chance that this bound fails, for all plans together. Each plan takes its own δ
            out of it. Keep it below one in the number of photos.
        minimum_cohort: how many merchants, this one included, must be in every sum that is unmasked.
        corrupt_merchants: how many members of the league you reckon with that are in league with the operator.
            A plan must hold against that many, in all the league's directory, or more.
        modes: the ways of training that are allowed. In `local` the noise that protects the photos is added
            on this machine in full, so that no one else need be trusted for it.
        max_rounds: the most rounds one plan may have, repeats included: a bound on traffic, not on privacy.
        max_steps: the most training steps one plan may take in all its rounds: a bound on work, not on
            privacy.
    """

    league: Name
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=1e-2)] = 1e-5
    minimum_cohort: Annotated[int, Field(ge=3, le=MAX_ROSTER)] = 3
    corrupt_merchants: Annotated[int, Field(ge=1, le=MAX_ROSTER)] = 1
    modes: Annotated[tuple[Literal["local"], ...], Field(min_length=1)] = ("local",)
    max_rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    max_steps: Annotated[int, Field(ge=1, le=STEPS_MAX)] = 20_000

    @property
    def budget(self) -> Budget:
        """The ledger's budget."""
        return Budget(self.epsilon, self.delta)

    def check(self, plan: Plan, taxonomy: Taxonomy) -> None:
        """Return if the policy allows `plan` in a shop that uses `taxonomy`.

        Raises `PlanRefused` with every reason, a line each.
        """
        reasons = self.reasons(plan, taxonomy)
        if reasons:
            raise PlanRefused("\n".join(reasons))

    def reasons(self, plan: Plan, taxonomy: Taxonomy) -> list[str]:
        """Return every reason to refuse `plan`, in plain words; none if it is allowed.

        The ε of a plan that takes too many steps is not computed: that is work, too.
        """
        reasons = [*self._against_choices(plan), *_against_classes(plan, taxonomy)]
        steps = plan.training.total_steps
        if steps > self.max_steps:
            return [
                *reasons,
                f"steps: found {steps} in all, your policy allows {self.max_steps} (max_steps).",
            ]
        return [*reasons, *self._against_numbers(plan)]

    def explain(self, plan: Plan) -> list[str]:
        """Return sentences that tell a shop's owner what `plan` would do, and what its ε means."""
        return [*_explain_work(plan), *self._explain_cost(plan)]

    def _explain_cost(self, plan: Plan) -> Iterator[str]:
        try:
            epsilon = plan.epsilon()
        except ValueError:
            epsilon = math.inf
        if math.isinf(epsilon):
            yield "Its noise promises nothing about a photo: no finite ε can be computed."
            return
        yield (
            f"The whole plan costs each photo ε = {_upward(epsilon, 3)} at δ = {plan.delta:g}. You allow "
            f"ε = {self.epsilon:g} and δ = {self.delta:g} for this and all other plans together."
        )
        bound = _upward(100 * posterior_bound(epsilon, SUSPICION), 2)
        yield (
            f"What this means: someone who knew everything else and suspected with {100 * SUSPICION:g} % "
            f"that a given photo is in your catalog could raise this to at most {bound} %, however clever "
            f"the method, apart from a failure with a chance of about 1 in {1 / plan.delta:,.0f}."
        )
        yield (
            "This is said of one photo in one catalog. Several photos of one product, or one picture that "
            "several merchants use, are protected less. What is true of your shop as a whole, such as the "
            "kinds of products it sells, is not covered."
        )

    def _against_choices(self, plan: Plan) -> Iterator[str]:
        training = plan.training
        if plan.league != self.league:
            yield f"league: found {plan.league!r}, your policy allows {self.league!r}."
        if training.mode not in self.modes:
            yield f"mode: found {training.mode!r}, your policy allows {', '.join(self.modes)}."
        rounds = training.rounds + training.repeats
        if rounds > self.max_rounds:
            yield f"rounds: found {rounds} with repeats, your policy allows at most {self.max_rounds}."
        if plan.cohort.min_merchants < self.minimum_cohort:
            yield (
                f"cohort: rounds may count with {plan.cohort.min_merchants} merchants, your policy needs "
                f"{self.minimum_cohort} (minimum_cohort)."
            )

        if plan.cohort.max_corrupt < self.corrupt_merchants:
            yield (
                f"cohort: masking holds against {plan.cohort.max_corrupt} corrupt merchants, your policy reckons with "
                f"{self.corrupt_merchants} (corrupt_merchants)."
            )

    def _against_numbers(self, plan: Plan) -> Iterator[str]:
        if plan.delta > self.delta:
            yield f"δ: found {plan.delta:g}, your policy allows {self.delta:g} in all (delta)."
        if plan.training.expected_batch < 1:
            yield (
                f"expected_batch: found {plan.training.expected_batch:g} photos a step, expected at least 1; "
                "sums divided by less are noise alone."
            )
        try:
            _ = plan.ring.step
        except ValueError as error:
            yield f"update_bound: updates of this plan cannot be added up. {error}"
        try:
            epsilon = plan.epsilon()
        except ValueError as error:
            yield f"noise: no ε can be computed for this plan. {error}"
            return
        if math.isinf(epsilon):
            yield "ε: the noise is too weak for any promise (no finite ε)."
        elif epsilon > self.epsilon:
            yield (
                f"ε: the whole plan costs {_upward(epsilon, 3)}, your policy allows {self.epsilon:g} in all "
                "(epsilon)."
            )


def _explain_work(plan: Plan) -> Iterator[str]:
    training, classes = plan.training, plan.taxonomy.classes
    shown = ", ".join(classes[:_SHOWN_CLASSES]) + (", …" if len(classes) > _SHOWN_CLASSES else "")
    repeats = f", and to repeat at most {training.repeats} that fail" if training.repeats else ""
    yield (
        f"The league {plan.league} asks to train a recognizer of {len(classes)} classes ({shown}) in "
        f"{training.rounds} rounds{repeats}."
    )
    count = training.local_steps
    steps = "one training step here, on" if count == 1 else f"{count} training steps here, each on"
    yield (
        f"Your photos stay on this machine. A round takes {steps} a secret random choice of about "
        f"{100 * training.sampling_rate:.3g} % of the photos."
    )
    yield (
        f"After a round {plan.dimension} numbers ({_bytes(4 * plan.dimension)}) leave this machine. The "
        "noise that hides your photos is added to them before they leave."
    )
    cohort = plan.cohort
    yield (
        f"They leave masked: the operator sees the sum over at least {cohort.min_merchants} merchants and nothing of "
        f"yours alone, unless more than {cohort.max_corrupt} of the league's members are in league with the operator."
    )


def posterior_bound(epsilon: float, prior: float) -> float:
    """Return the most that a suspicion of probability `prior` can become under ε: pe^ε / (1 − p + pe^ε).

    Bayes' rule with a likelihood ratio of at most e^ε, for someone who knows all other photos. Under (ε, δ)
    the distributions are within total variation δ / (1 + e^ε) of ones with that ratio [1, 2].
    """
    odds = prior / (1 - prior) * math.exp(min(epsilon, 700.0))
    return odds / (1 + odds)


def _against_classes(plan: Plan, taxonomy: Taxonomy) -> Iterator[str]:
    found, expected = plan.taxonomy.classes, taxonomy.classes
    if found != expected:
        more = [name for name in found if name not in expected]
        less = [name for name in expected if name not in found]
        parts = [f"not yours: {', '.join(more)}"] * bool(more) + [f"missing: {', '.join(less)}"] * bool(less)
        yield f"classes: found other ones than yours ({'; '.join(parts) or 'another order'})."
    dimension = plan.recipe.dimension(len(found))
    if plan.dimension != dimension:
        yield f"dimension: found {plan.dimension}, but the recipe trains {dimension} numbers."


def _upward(value: float, digits: int) -> str:
    """Return `value` > 0 in decimals, rounded up to `digits` significant ones: never less than it is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{digits}g}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
