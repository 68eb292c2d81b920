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
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from hanse_client.charges import Budget
from hanse_common.config import Section
from hanse_common.counting import most_of_a_class
from hanse_common.errors import PlanRefused
from hanse_common.modes import (
    EvaluationTraining,
    MeanTraining,
    MerchantLevelTraining,
    Training,
    TrendsTraining,
    Unit,
)
from hanse_common.plan import Plan, noise_shares
from hanse_common.privacy import filters
from hanse_common.privacy.accounting import STEPS_MAX
from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name

Mode = Literal["local", "distributed", "merchant-level", "mean", "evaluation", "trends"]

Identity = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RecipeDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]

LONGEST_SLOT = 600.0
"""The longest slot that an upload is held back for, in seconds."""

SUSPICION = 0.01
"""The prior probability in the example that `explain` gives."""

_HIDDEN = {
    "photo": "your photos",
    "product": "your products",
    "merchant": "what is this shop's",
    "query": "your shoppers' queries",
}

_PAYS = {
    "photo": "each photo",
    "product": "each product, with all its photos,",
    "merchant": "this shop, with all its photos,",
    "query": "each photo that a shopper searched by",
}

_SUSPECTED = {
    "photo": "a given photo is in your catalog",
    "product": "a given product, with all its photos, is in your catalog",
    "merchant": "this shop's catalog, as a whole, is trained on at all",
    "query": "somebody searched your shop by a given photo",
}

_ELSEWHERE = "What is true of your shop as a whole, such as the kinds of products it sells, is not covered."

_SAID_OF = {
    "photo": "This is said of one photo in one catalog. Several photos of one product, or one picture that several "
    f"merchants use, are protected less. It says little about a product or a shop as a whole. {_ELSEWHERE}",
    "product": "This is said of one product in one catalog. Its photos are those with one sku in your CSV file; a "
    "photo without a sku is a product of its own. It says little about one photo of a product that has others: that "
    f"is protected less. So is a product that several merchants show. {_ELSEWHERE}",
    "merchant": "This is said of all that your shop has, and whether you trained at all. It says little about one "
    "photo or one product of a shop that trains either way: that is protected less. So are shops that belong together, "
    "or show the same pictures.",
    "query": "This is said of one photo that a shopper searched by. A shopper who searched a hundred times is covered "
    f"a hundred times less. {_ELSEWHERE}",
}

_SHOWN_CLASSES = 8


class Policy(Section):
    """The section `policy` of `hanse-client.yaml`.

    Attributes:
        league: the name of the league whose plans are taken.
        epsilon: the most privacy, ε, that one photo (or `unit`) may ever pay, for all plans together. Lower is
            safer: at 1 a suspicion of 1 % can grow to 2.7 %, at 3 to 17 %, at 8 to 97 %.
        monthly_epsilon: the most ε that plans which begin in one calendar month (UTC) may cost together, or rounds that
            are paid in it: a pace, to have some left later. None sets none.
        delta: the most δ, the chance that this bound fails, for all plans together. Each plan takes its own δ
            out of it. Keep it below one in the number of photos.
        monthly_delta: the same for δ as `monthly_epsilon` for ε.
        unit: what a plan's ε must be said of, as the ledger keeps account of that alone: one `photo`, one
            `product` with all its photos, or `merchant`, all that this shop has, and whether it trained at all.
            An ε of one says little about another, and the two do not add up. A product's photos are those
            with one sku in the CSV file; a photo without is a product of its own. It is fixed when the ledger is made.
        accounting: how plans add up, a filter of `hanse_common.privacy.filters`. `sum` sets each plan's whole ε
            aside when it starts; `rdp-ALPHA`, such as rdp-16, counts the steps taken, and has room for more when
            plans are many and small. It is fixed when the ledger is made.
        minimum_cohort: how many merchants, this one included, must be in every sum that is unmasked.
        corrupt_merchants: how many members of the league you reckon with that are in league with the operator.
            A plan must hold against that many, in all the league's directory, or more.
        verified: members whose identity the owner has checked in person: their names, and their public identities.
        minimum_verified: how many of these must be in every sum that is unmasked.
        recipes: the digests, or at least their first 16 digits, of the only recipes that are embedded and trained.
            None allows all. Each new one is work for this machine.
        approval: `manual` keeps a plan waiting until the owner approves it with hanse-client approve.
        updates: `manual` keeps a released recognizer waiting until the owner takes it with hanse-client update.
        report: what the operator may be told beyond the protocol: `epsilon`, what was spent in all after each block.
        modes: the ways of training that are allowed. In `local` the noise that protects the photos is added
            on this machine in full, so that no one else need be trusted for it. In the others each merchant adds
            a share, and ε holds while no more members conspire with the operator than the plan reckons with.
            Only where `trends` is among them, which by default it isn't, is it counted what shoppers search for;
            `unit` must be photo then, as the ledger pays for queries, too, one by one.
        trends_days: how many days these counts are kept, and so the longest time that a plan may ask about.
        max_rounds: the most rounds one plan may have, repeats included: a bound on traffic, not on privacy.
        max_steps: the most training steps this machine may compute under one plan, repeats included: a bound on
            work, not on privacy.
        upload_slot: the least `cohort.upload_slot` that a plan must have, in seconds: an upload leaves at a whole
            multiple of the plan's slot, so that its time tells nothing. 0 asks for none.
    """

    league: Name
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    monthly_epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1e-2)] = 1e-5
    monthly_delta: Annotated[float, Field(gt=0, lt=1e-2)] | None = None
    unit: Unit = "photo"
    accounting: str = filters.SUM.name
    minimum_cohort: Annotated[int, Field(ge=3, le=MAX_ROSTER)] = 3
    corrupt_merchants: Annotated[int, Field(ge=1, le=MAX_ROSTER)] = 1
    verified: Annotated[dict[Name, Identity], Field(max_length=MAX_ROSTER)] = Field(default_factory=dict)
    minimum_verified: Annotated[int, Field(ge=0, le=MAX_ROSTER)] = 0
    recipes: Annotated[tuple[RecipeDigest, ...], Field(min_length=1, max_length=32)] | None = None
    approval: Literal["automatic", "manual"] = "automatic"
    updates: Literal["automatic", "manual"] = "automatic"
    report: tuple[Literal["epsilon"], ...] = ()
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = (
        "local",
        "distributed",
        "merchant-level",
        "mean",
        "evaluation",
    )
    trends_days: Annotated[int, Field(ge=1, le=366)] = 35
    max_rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    max_steps: Annotated[int, Field(ge=1, le=STEPS_MAX)] = 20_000
    upload_slot: Annotated[float, Field(ge=0, le=86_400)] = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.minimum_verified > len(self.verified):
            raise ValueError(
                f"minimum_verified: found {self.minimum_verified}, expected at most {len(self.verified)}, as many as "
                "there are under verified"
            )
        return self

    @model_validator(mode="after")
    def _pays_for_queries(self) -> Self:
        if "trends" in self.modes and self.unit != "photo":
            raise ValueError(
                f"modes: found trends with unit {self.unit}, expected unit photo: a query is paid for as one photo is, "
                "and a ledger keeps account of one unit. Take trends out of modes; a shop that has no ledger yet may "
                "set unit to photo instead"
            )
        return self

    @field_validator("accounting")
    @classmethod
    def _known(cls, name: str) -> str:
        return filters.parse(name).name

    @property
    def budget(self) -> Budget:
        """The ledger's budget."""
        return Budget(
            self.epsilon, self.delta, self.accounting, self.unit, self.monthly_epsilon, self.monthly_delta
        )

    @property
    def trusted(self) -> frozenset[bytes]:
        """The public identities, 32 bytes each, that the owner has verified in person."""
        return frozenset(bytes.fromhex(identity) for identity in self.verified.values())

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
        steps = plan.training.work
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
        unit = about(plan.training)
        yield (
            f"The whole plan costs {_PAYS[unit]} ε = {upward(epsilon, 3)} at δ = {plan.delta:g}. You allow "
            f"ε = {self.epsilon:g} and δ = {self.delta:g} for this and all other plans together."
        )
        bound = upward(100 * posterior_bound(epsilon, SUSPICION), 2)
        yield (
            f"What this means: someone who knew everything else and suspected with {100 * SUSPICION:g} % "
            f"that {_SUSPECTED[unit]} could raise this to at most {bound} %, however clever "
            f"the method, apart from a failure with a chance of about 1 in {1 / plan.delta:,.0f}."
        )
        yield _SAID_OF[unit]
        if isinstance(plan.training, TrendsTraining):
            yield f"Of one class at most {most_of_a_class(plan):,} of your shop's queries are counted."
        yield _explain_trust(plan)

    def _against_choices(self, plan: Plan) -> Iterator[str]:
        training = plan.training
        if plan.league != self.league:
            yield f"league: found {plan.league!r}, your policy allows {self.league!r}."
        if training.mode not in self.modes:
            yield f"mode: found {training.mode!r}, your policy allows {', '.join(self.modes)}."
        if isinstance(training, TrendsTraining) and training.days > self.trends_days:
            yield (
                f"days: it asks about {training.days} days, your policy keeps counts of {self.trends_days} "
                "(trends_days)."
            )
        if isinstance(training, TrendsTraining) and self.unit != "photo":
            yield (
                f"unit: it is paid for query by query, from a ledger whose unit is photo; yours keeps account of one "
                f"{self.unit}, so this shop can't take part."
            )
        elif training.unit != self.unit:
            yield (
                f"unit: its ε is said of one {training.unit}, your policy keeps account of one {self.unit}; the two do "
                "not add up."
            )
        recipe = plan.recipe.digest().hex()
        if self.recipes is not None and not any(recipe.startswith(allowed) for allowed in self.recipes):
            yield f"recipe: found {recipe}, your policy allows others alone (recipes)."
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
        if plan.cohort.upload_slot > LONGEST_SLOT:
            yield f"cohort: uploads wait for slots of {plan.cohort.upload_slot:g} s, expected at most {LONGEST_SLOT:g}."
        if plan.cohort.upload_slot < self.upload_slot:
            yield (
                f"cohort: uploads leave at multiples of {plan.cohort.upload_slot:g} s, your policy needs "
                f"{self.upload_slot:g} s or more, so that their time tells nothing (upload_slot)."
            )

    def _against_numbers(self, plan: Plan) -> Iterator[str]:
        if plan.delta > self.delta:
            yield f"δ: found {plan.delta:g}, your policy allows {self.delta:g} in all (delta)."
        elif self.monthly_delta is not None and plan.delta > self.monthly_delta:
            yield f"δ: found {plan.delta:g}, your policy allows {self.monthly_delta:g} a month (monthly_delta)."
        if plan.training.expected_batch < 1:
            yield (
                f"expected_batch: found {plan.training.expected_batch:g} {plan.training.unit}s a step, expected at "
                "least 1; sums divided by less are noise alone."
            )
        try:
            plan.require_room()
        except ValueError as error:
            field = "update_bound" if plan.training.mode == "local" else "expected_batch"
            yield f"{field}: updates of this plan cannot be added up. {error}"
        try:
            epsilon = plan.epsilon()
        except ValueError as error:
            yield f"noise: no ε can be computed for this plan. {error}"
            return
        if math.isinf(epsilon):
            yield "ε: the noise is too weak for any promise (no finite ε)."
        elif self.monthly_epsilon is not None and epsilon > self.monthly_epsilon:
            yield (
                f"ε: the whole plan costs {upward(epsilon, 3)}, your policy allows {self.monthly_epsilon:g} a month "
                "(monthly_epsilon)."
            )
        elif epsilon > self.epsilon:
            yield (
                f"ε: the whole plan costs {upward(epsilon, 3)}, your policy allows {self.epsilon:g} in all "
                "(epsilon)."
            )


def _explain_work(plan: Plan) -> Iterator[str]:
    training, classes = plan.training, plan.taxonomy.classes
    shown = ", ".join(classes[:_SHOWN_CLASSES]) + (", …" if len(classes) > _SHOWN_CLASSES else "")
    repeats = f", and to repeat at most {training.repeats} that fail" if training.repeats else ""
    asks = "train a recognizer"
    if isinstance(training, EvaluationTraining):
        asks = "find out how well its recognizer does, one"
    if isinstance(training, TrendsTraining):
        asks = "count what shoppers search for, by a recognizer"
    yield (
        f"The league {plan.league} asks to {asks} of {len(classes)} classes ({shown}) in "
        f"{training.rounds} rounds{repeats}."
    )
    yield f"Your photos stay on this machine. {_explain_step(training)}"
    yield (
        f"After a round {plan.dimension} numbers ({_bytes(4 * plan.dimension)}) leave this machine. "
        f"{_explain_noise(plan)}"
    )
    cohort = plan.cohort
    yield (
        f"They leave masked: the operator sees the sum over at least {cohort.min_merchants} merchants and nothing of "
        f"yours alone, unless more than {cohort.max_corrupt} of the league's members are in league with the operator."
    )
    yield f"Its recipe, which says what your machine computes of each photo, is {plan.recipe.digest().hex()[:16]}."


def _explain_step(training: Training) -> str:
    share = f"{100 * training.sampling_rate:.3g} %"
    if isinstance(training, MerchantLevelTraining):
        return (
            f"In a round this shop trains with a chance of {share}, by a secret coin, and else sends noise alone; "
            "nobody can tell which."
        )
    if isinstance(training, MeanTraining):
        return f"The round is no training: it adds up the features of all your {training.unit}s once, for later plans."
    if isinstance(training, TrendsTraining):
        return (
            f"The round is no training: it counts the photos that your shoppers searched by, by class, on "
            f"{training.days} days from {training.first_day} on."
        )
    if isinstance(training, EvaluationTraining):
        tried = f"all the {training.unit}s"
        if training.sampling_rate < 1:
            tried = f"a secret random choice of about {share} of the {training.unit}s"
        return (
            f"A round is no training: it tries one of the server's recognizers on {tried} that you hold out, and "
            "counts what it took them for and how sure it was."
        )
    most = "at most" if training.class_rates else "about"
    what = f"a secret random choice of {most} {share} of the {training.unit}s"
    if training.steps_per_round == 1:
        return f"A round takes one training step here, on {what}."
    return f"A round takes {training.steps_per_round} training steps here, each on {what}."


def about(training: Training) -> str:
    """Return what ε is said of: a plan of mode `trends` reads no photo of the catalog."""
    return "query" if isinstance(training, TrendsTraining) else training.unit


def _explain_noise(plan: Plan) -> str:
    hidden = _HIDDEN[about(plan.training)]
    if noise_shares(plan.training, plan.cohort) == 1:
        return f"The noise that hides {hidden} is added to them before they leave."
    return (
        f"A share of the noise that hides {hidden} is added to them before they leave; all of it is in the sum over "
        "the merchants alone."
    )


def _explain_trust(plan: Plan) -> str:
    shares, corrupt = noise_shares(plan.training, plan.cohort), plan.cohort.max_corrupt
    if shares == 1:
        return (
            "This promise rests on nobody but this machine, which adds all the noise itself: it holds whatever the "
            "operator and the other merchants do."
        )
    return (
        "This promise rests on others, too: what leaves this machine has a share of the noise only, and the masks hide "
        "it until it is added to what other merchants send. It holds while at most "
        f"{corrupt} of the league's members conspire with the operator, so that at least {shares} shares in every sum "
        "are known to none of them. If you do not want to rely on that, allow mode local alone (modes)."
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
    if plan.dimension != plan.expected_dimension:
        yield f"dimension: found {plan.dimension}, but the recipe has {plan.expected_dimension} numbers."


def upward(value: float, digits: int) -> str:
    """Return `value` > 0 in decimals, rounded up to `digits` significant ones: never less than it is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{digits}g}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
