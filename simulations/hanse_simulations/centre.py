"""An experiment's private mean: a plan of its own, run first, whose result the training's recipe names.

    experiment, shops = with_centre(experiment, shops, folder, central=False)

Merchants pay for both plans from one ledger. The experiment's `plan.privacy` is for both together.
"""

from pathlib import Path

import torch

from hanse_client.examples import Examples
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.modes import MeanSchedule, MerchantLevelSchedule
from hanse_common.vision.centring import Centre
from hanse_common.vision.recognizer import CENTRE_FILE
from hanse_server.config import PrivacyTarget
from hanse_simulations.central import CentralLeague
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import Shops
from hanse_simulations.simulation import League, Tell, seeded_members


def with_centre(
    experiment: Experiment, shops: Shops, folder: Path, tell: Tell, *, central: bool
) -> tuple[Experiment, Shops]:
    """Return the experiment that is left, and the shops as its recipe sees them, once the centre is in `folder`.

    Both are as they were when the experiment has no section `centring`. A centre that is there already is taken.
    Raises as `league.train` does.
    """
    if experiment.centring is None:
        return experiment, shops
    path = folder / CENTRE_FILE
    if not path.exists():
        first = _mean_experiment(experiment)
        league: CentralLeague | League
        if central:
            league = CentralLeague.assemble(first, shops.merchants, folder / "mean")
        else:
            members = seeded_members(first, shops.merchants, folder, tell, experiment.plan.privacy)
            league = League.assemble(first, members, folder / "mean")
        mean, plan = league.train(lambda report: None), league.plan
        write_atomically(path, Centre(mean, plan.epsilon(), plan.delta).to_bytes())
    centre = Centre.read(path, experiment.plan.recipe.feature_dimension)
    settings, centring = experiment.plan, experiment.centring
    left = PrivacyTarget(
        epsilon=settings.privacy.epsilon - centring.epsilon, delta=settings.privacy.delta - centring.delta
    )
    recipe = settings.recipe.model_copy(update={"centre": centre.digest})
    rest = settings.model_copy(update={"recipe": recipe, "privacy": left})
    norm = settings.recipe.backbone.norm if settings.recipe.backbone else 1.0
    seen = {name: _seen_from(centre, shop, norm) for name, shop in shops.merchants.items()}
    return experiment.model_copy(update={"plan": rest}), Shops(seen, _seen_from(centre, shops.test, norm))


def _mean_experiment(experiment: Experiment) -> Experiment:
    """Return the experiment whose plan is the mean's. How many photos there are, about, is the experiment's number."""
    plan, centring = experiment.plan, experiment.centring
    if centring is None:
        raise ValueError("expected an experiment with a section centring")
    photos = experiment.data.merchants * experiment.data.photos_per_merchant
    if isinstance(plan.training, MerchantLevelSchedule):
        raise ConfigError(
            "centring: found plan.training.mode merchant-level, whose unit no mean is learnt for; leave it out."
        )
    unit = plan.training.unit
    mean = plan.model_copy(
        update={
            "training": MeanSchedule(expected_batch=photos, unit=unit, repeats=plan.training.repeats),
            "privacy": PrivacyTarget(epsilon=centring.epsilon, delta=centring.delta),
        }
    )
    return experiment.model_copy(update={"plan": mean, "name": f"{experiment.name}-mean"})


def _seen_from(centre: Centre, shop: Examples, norm: float) -> Examples:
    moved = torch.from_numpy(centre.apply(shop.inputs.cpu().numpy(), norm)).to(shop.inputs.device)
    holdout = None if shop.holdout is None else _seen_from(centre, shop.holdout, norm)
    return Examples(moved, shop.labels, shop.products, holdout)
