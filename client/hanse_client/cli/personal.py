"""What is the shop's own: `personalize`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say
from hanse_client.config import ClientConfig
from hanse_client.personal import head as heads
from hanse_client.personal import metric as metrics
from hanse_client.releases import recognizer_folder
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError

if TYPE_CHECKING:
    from hanse_client.personal.head import Judgement
    from hanse_client.personal.learning import Learned
    from hanse_client.personal.metric import MetricRecord
    from hanse_client.personal.metric_learning import LearnedMetric

_NAMED = 8
"""The most labels with too few photos that are named."""


def personalize(
    recognizer: Annotated[
        Path | None,
        typer.Option(
            "--recognizer",
            "-r",
            help="Folder of the recognizer to build on, if not your configuration's.",
            metavar="FOLDER",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove what was learned; the league's recognizer serves alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Learn a head and a search metric of your own, from your labels, your corrections and your products.

    Your labels may be finer than the league's classes. What is learned stays on this machine, so nothing is sent and
    nothing is charged. It is used only where it does better: the head on photos that you hold out, the metric on
    photos that search was asked with, which are your corrections, and on your products' own photos. Else the league's
    recognizer serves as before. Run it again when you have labelled or corrected more, and after a league update that
    changes the embedding.

    Exit codes: 0 learned, used or not; 14 there is no labelled photo; 15 the recognizer cannot be used.
    """
    settings = load(ClientConfig, config)
    if forget:
        removed = {
            "head": heads.forget(settings.personal_path),
            "metric": metrics.forget(settings.personal_path),
        }
        if as_json:
            typer.echo(json.dumps({"forgotten": removed}))
        elif any(removed.values()):
            say("Forgotten. The league's recognizer serves alone now; your corrections are kept.")
        else:
            say("There was nothing to forget.")
        return
    folder = recognizer or recognizer_folder(settings)
    if folder is None:
        raise ConfigError(
            f"{config}: recognizer: missing, and the league has released none yet; name its folder there, or with "
            "--recognizer."
        )
    head, metric = _learn(settings, folder)
    if as_json:
        typer.echo(json.dumps(_json(head, metric), allow_nan=False))
    else:
        _print_head(head)
        say("")
        _print_metric(metric)
        for problem in head.problems:
            say(f"Left out: {problem}")


def _learn(settings: ClientConfig, folder: Path) -> "tuple[Learned, LearnedMetric]":
    """Learn both and save them, each in its predecessor's place; where nothing can be learned, that goes."""
    from hanse_client.gallery.gallery import Gallery
    from hanse_client.personal.corrections import Corrections
    from hanse_client.personal.learning import learn
    from hanse_client.personal.metric_learning import learn_metric
    from hanse_client.shop import Shop
    from hanse_common.vision.recognizer import Recognizer

    league = Recognizer.load(folder, backbone_weights=settings.backbone_weights)
    shop = Shop(settings)
    with (
        Corrections(settings.corrections_path) as corrections,
        Gallery.open(settings.gallery_path) as gallery,
        out.status("looking at photos and learning"),
    ):
        head = learn(shop, league, corrections)
        metric = learn_metric(shop, league, gallery, corrections)
    if head.head is None:
        heads.forget(settings.personal_path)
    else:
        head.head.save(settings.personal_path)
    if metric.metric is None:
        metrics.forget(settings.personal_path)
    else:
        metric.metric.save(settings.personal_path)
    return head, metric


def _print_head(learned: "Learned") -> None:
    rare = list(learned.rare)
    named = ", ".join(rare[:_NAMED]) + (", …" if len(rare) > _NAMED else "")
    if learned.head is None:
        say(
            f"Labels: too few to learn from. It takes two labels with {heads.MIN_PHOTOS} training photos or more"
            + (f"; fewer have {named}." if rare else ".")
            + " The league's recognizer serves alone."
        )
        return
    record = learned.head.record
    said = (
        "1 of them a correction" if learned.corrections == 1 else f"{learned.corrections} of them corrections"
    )
    total = sum(record.photos) + record.judgement.photos
    say(f"Labels: {len(record.labels)} of your own, on {photos(total)}, {said}.")
    if rare:
        say(f"Too few photos ({heads.MIN_PHOTOS} are needed to train on): {named}.")
    judged = record.judgement
    if judged.photos == 0:
        say(
            "No photo of these is held out, so nobody can tell whether your own head is better: it is not used. Raise "
            "holdout_fraction, or add photos."
        )
        return
    say(
        f"Of {photos(judged.photos)} held out, the league's recognizer gets {_of(judged.shared_right, judged)} right "
        f"in your words, your own head {_of(judged.own_right, judged)}."
    )
    say(_conclusion(judged, "your own head"))


def _print_metric(learned: "LearnedMetric") -> None:
    if learned.metric is None:
        say(
            f"Search: {learned.products} products have two different photos or more; it takes "
            f"{metrics.MIN_PRODUCTS} to learn from. Search is by the league's embedding."
        )
        return
    record = learned.metric.record
    judged, asked = record.judgement, record.asked
    say(
        f"Search: of {photos(judged.photos)} of {learned.products} products, {_of(judged.shared_right, judged)} find "
        f"their product first by the league's embedding, {_of(judged.own_right, judged)} with a metric of your own, "
        "learned from other products than theirs."
    )
    if asked.photos:
        say(
            f"Of {photos(asked.photos)} that search was asked with, as you corrected them, "
            f"{_of(asked.shared_right, asked)} find their product first by the league's embedding, "
            f"{_of(asked.own_right, asked)} with your own metric."
        )
    say(metric_conclusion(record))


def metric_conclusion(record: "MetricRecord") -> str:
    judged, asked = record.judgement, record.asked
    used = "is used from now on" if record.serves else "is not used"
    if asked.better:
        return (
            f"So your own metric {used}, judged by {photos(asked.photos)} that search was asked with. "
            f"({_chance(asked)}.)"
        )
    if not judged.better:
        return _conclusion(judged, "your own metric")
    if not record.serves:
        return f"So your own metric {used}: it does no better on photos like those that search is asked with."
    if asked.photos:
        as_good = "better" if asked.differing else "as good"
        return (
            f"So your own metric {used}, judged by your products' own photos, and {as_good} on "
            f"{photos(asked.photos)} that search was asked with. ({_chance(judged)}.)"
        )
    return (
        f"So your own metric {used}, judged by your products' own photos alone. ({_chance(judged)}.) Photos in another "
        "style, such as your customers', may do worse with it: where search was asked with such photos, say on the "
        "page of `serve` which products they show, and run this again."
    )


def _conclusion(judged: "Judgement", name: str) -> str:
    if judged.better:
        return f"So {name} is used from now on. ({_chance(judged)}.)"
    return (
        f"{_chance(judged)}, so {name} is not used."
        if judged.own_right > judged.shared_right
        else f"So {name} is not used."
    )


def _chance(judged: "Judgement") -> str:
    percent = f"{100 * judged.p_value:.0f} %" if judged.p_value >= 0.01 else "under 1 %"
    return f"Chance alone makes such a difference with a probability of {percent}"


def _of(right: int, judged: "Judgement") -> str:
    return f"{right} ({100 * right / judged.photos:.0f} %)"


def _json(head: "Learned", metric: "LearnedMetric") -> dict[str, Any]:
    known = head.head.record if head.head else None
    return {
        "head": {
            "labels": list(known.labels) if known else [],
            "photos": sum(known.photos) if known else 0,
            "corrections": head.corrections,
            "blend": known.blend if known else None,
            "too_few": head.rare,
            "unjudged": head.unjudged,
            "judgement": known.judgement.model_dump() if known else None,
            "used": bool(known and known.judgement.better),
        },
        "metric": {
            "products": metric.products,
            "judgement": metric.metric.record.judgement.model_dump() if metric.metric else None,
            "asked": metric.metric.record.asked.model_dump() if metric.metric else None,
            "used": bool(metric.metric and metric.metric.record.serves),
        },
        "problems": [*head.problems, *metric.problems],
    }
