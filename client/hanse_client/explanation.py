"""What a plan would do, and what its ε means, in sentences for a shop's owner.

    print("\n".join(explain(plan, epsilon=3.0, delta=1e-5)))

References:
[1] Dwork, Roth 2014, "The Algorithmic Foundations of Differential Privacy", Lemma 3.17.
[2] Kasiviswanathan, Smith 2014, "On the 'Semantics' of Differential Privacy: A Bayesian Formulation".
"""

import math
from collections.abc import Iterator

from hanse_common.counting import most_of_a_class
from hanse_common.modes import (
    EvaluationTraining,
    MeanTraining,
    MerchantLevelTraining,
    Training,
    TrendsTraining,
)
from hanse_common.plan import Plan, noise_shares

SUSPICION = 0.01
"""The prior probability in the example that is given."""

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


def explain(plan: Plan, epsilon: float, delta: float) -> list[str]:
    """Return sentences on `plan`, for an owner who allows `epsilon` and `delta` for all plans together."""
    return [*_work(plan), *_cost(plan, epsilon, delta)]


def about(training: Training) -> str:
    """Return what ε is said of: a plan of mode `trends` reads no photo of the catalog."""
    return "query" if isinstance(training, TrendsTraining) else training.unit


def posterior_bound(epsilon: float, prior: float) -> float:
    """Return the most that a suspicion of probability `prior` can become under ε: pe^ε / (1 − p + pe^ε).

    Bayes' rule with a likelihood ratio of at most e^ε, for someone who knows all other photos. Under (ε, δ)
    the distributions are within total variation δ / (1 + e^ε) of ones with that ratio [1, 2].
    """
    odds = prior / (1 - prior) * math.exp(min(epsilon, 700.0))
    return odds / (1 + odds)


def upward(value: float, digits: int) -> str:
    """Return `value` > 0 in decimals, rounded up to `digits` significant ones: never less than it is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{digits}g}"


def _work(plan: Plan) -> Iterator[str]:
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
    yield f"Your photos stay on this machine. {_step(training)}"
    yield (
        f"After a round {plan.dimension} numbers ({_bytes(4 * plan.dimension)}) leave this machine. "
        f"{_noise(plan)}"
    )
    cohort = plan.cohort
    yield (
        f"They leave masked: the operator sees the sum over at least {cohort.min_merchants} merchants and nothing of "
        f"yours alone, unless more than {cohort.max_corrupt} of the league's members are in league with the operator."
    )
    yield f"Its recipe, which says what your machine computes of each photo, is {plan.recipe.digest().hex()[:16]}."


def _step(training: Training) -> str:
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


def _noise(plan: Plan) -> str:
    hidden = _HIDDEN[about(plan.training)]
    if noise_shares(plan.training, plan.cohort) == 1:
        return f"The noise that hides {hidden} is added to them before they leave."
    return (
        f"A share of the noise that hides {hidden} is added to them before they leave; all of it is in the sum over "
        "the merchants alone."
    )


def _trust(plan: Plan) -> str:
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


def _cost(plan: Plan, allowed_epsilon: float, allowed_delta: float) -> Iterator[str]:
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
        f"ε = {allowed_epsilon:g} and δ = {allowed_delta:g} for this and all other plans together."
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
    yield _trust(plan)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
