"""The policy: what a merchant's owner allows, held against a plan before any photo is touched.

    policy = Policy(league="textiles", epsilon=3.0)
    policy.check(plan, taxonomy)                   # raises PlanRefused with every reason
    print("\n".join(policy.explain(plan)))

The merchant believes no ε that anyone else computed: it follows here from the plan's own numbers. `epsilon`
and `delta` are also the ledger's budget, for all plans together; this module looks at one plan alone.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from hanse_client.charges import Budget
from hanse_client.explanation import explain, upward
from hanse_common.config import Section
from hanse_common.errors import PlanRefused
from hanse_common.modes import TrendsTraining, Unit
from hanse_common.plan import Plan
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
        return explain(plan, self.epsilon, self.delta)

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


def _against_classes(plan: Plan, taxonomy: Taxonomy) -> Iterator[str]:
    found, expected = plan.taxonomy.classes, taxonomy.classes
    if found != expected:
        more = [name for name in found if name not in expected]
        less = [name for name in expected if name not in found]
        parts = [f"not yours: {', '.join(more)}"] * bool(more) + [f"missing: {', '.join(less)}"] * bool(less)
        yield f"classes: found other ones than yours ({'; '.join(parts) or 'another order'})."
    if plan.dimension != plan.expected_dimension:
        yield f"dimension: found {plan.dimension}, but the recipe has {plan.expected_dimension} numbers."
