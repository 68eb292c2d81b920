"""The demo: five shops with folders of real product photos train one recognizer, in one process.

Each shop is what a merchant has: a folder of photos, a `hanse-client.yaml`, a state folder with its ledger. The
demo reads them as `hanse-client` does. It begins with empty ledgers each time, which no real shop may do.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from rich.table import Table

from hanse_client.config import ClientConfig
from hanse_client.shop import Shop
from hanse_client.training import resolve_device
from hanse_common import signing
from hanse_common.config import load
from hanse_common.vision.recognizer import WHITENING_FILE, Recognizer
from hanse_simulations import datasets, partition, run
from hanse_simulations.console import bar, console
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import deal, make_test_examples, require_classes, whitened
from hanse_simulations.simulation import Member, operator_key

HOLDOUT_FRACTION = 0.1
EPSILON_BUDGET = 3.0


def demo(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Run the demo in `folder` and return its figures."""
    started = time.perf_counter()
    console.print("[bold]A league of five shops. Nobody shows a photo.[/bold]\n")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result"
    put_aside(result)
    result.mkdir()
    if experiment.whiten is not None:
        console.print(
            f"The operator fits a public whitening to {experiment.whiten.photos} unlabelled public photos."
        )
        experiment = whitened(experiment, result / WHITENING_FILE)
    configs = write_shops(experiment, folder / "shops")
    forget_ledgers(configs)

    console.print("Each shop looks through its own photos and embeds them, once, on its own disk.")
    members = {name: open_shop(name, config, experiment) for name, config in configs.items()}
    console.print("The operator embeds public test photos, which belong to no shop.")
    with bar("test photos", experiment.data.test_photos) as shown:
        test = make_test_examples(
            experiment,
            folder / "test-embeddings.sqlite",
            result / WHITENING_FILE,
            resolve_device("auto"),
            shown.update,
        )

    console.print(
        "They train one recognizer. What leaves a shop is clipped, noisy, and charged to its ledger."
    )
    figures = run.train_and_write(experiment, members, test, result, started)
    photo, name = write_try_photo(experiment, folder / "photo-to-try.png")
    tell_result(figures, configs, result, photo, name)
    return figures


def write_shops(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write each shop's photos (once) and configuration; return the configurations by shop."""
    taxonomy = experiment.plan.taxonomy
    require_classes(taxonomy)
    source = datasets.fashion_mnist(experiment.data.folder)
    dealt = deal(experiment.data, experiment.seed, source.train_labels)
    key = signing.public_bytes(operator_key(experiment))
    configs = {}
    with bar("writing photos", len(dealt)) as shown:
        for number, (name, indices) in enumerate(dealt.items(), start=1):
            shop = folder / name
            marker = shop / "photos-are-complete"
            stamp = f"{experiment.data.model_dump_json(exclude={'folder'})} {experiment.seed}"
            if not marker.exists() or marker.read_text() != stamp:
                partition.write_shop(
                    shop / "photos", source.train_images, source.train_labels, indices, taxonomy.classes
                )
                marker.write_text(stamp)
            configs[name] = shop / "hanse-client.yaml"
            configs[name].write_text(yaml.safe_dump(client_config(experiment, key), sort_keys=False))
            shown.update(number, text=f"{len(indices)} photos for {name}")
    return configs


def client_config(experiment: Experiment, operator_key: bytes) -> dict[str, Any]:
    """Return what a shop of the demo has in its `hanse-client.yaml`."""
    plan = experiment.plan
    return {
        "photos": "photos",
        "state": "state",
        "holdout_fraction": HOLDOUT_FRACTION,
        "recognizer": "../../result/recognizer",
        "whitening": f"../../result/{WHITENING_FILE}",
        "league": {
            "operator_key": operator_key.hex(),
            "taxonomy": {"classes": list(plan.taxonomy.classes)},
        },
        "policy": {
            "league": plan.league,
            "epsilon": EPSILON_BUDGET,
            "delta": plan.privacy.delta,
            "minimum_cohort": plan.cohort.min_merchants,
        },
    }


def forget_ledgers(configs: Mapping[str, Path]) -> None:
    """Remove the ledgers of the last demo; photos and embeddings stay."""
    for config in configs.values():
        for path in (config.parent / "state").glob("ledger.sqlite*"):
            path.unlink()


def put_aside(result: Path) -> None:
    """Rename the last demo's result, if there is one, to the next free `result-NNN`."""
    if result.exists():
        numbers = (result.with_name(f"{result.name}-{number:03}") for number in range(1, 100_000))
        result.rename(next(name for name in numbers if not name.exists()))


def open_shop(name: str, config: Path, experiment: Experiment) -> Member:
    """Read a shop's photos as `hanse-client` does, embed them, and return it as a member of the league."""
    shop = Shop(load(ClientConfig, config))
    with bar(f"{name:7}", experiment.data.photos_per_merchant) as shown:
        catalog = shop.catalog()
        examples, problems = shop.examples(catalog, experiment.plan.recipe, shown.update)
    for problem in problems:
        run.tell(name, problem)
    participant = shop.participant(experiment.plan.recipe, examples, partial(run.tell, name))
    return Member(participant, shop.ledger())


def write_try_photo(experiment: Experiment, path: Path) -> tuple[Path, str]:
    """Write one public test photo that no shop has, and return it with its class."""
    source = datasets.fashion_mnist(experiment.data.folder)
    index = int(np.flatnonzero(source.test_labels == datasets.CLASSES.index("Ankle boot"))[0])
    Image.fromarray(source.test_images[index]).save(path)
    return path, datasets.CLASSES[int(source.test_labels[index])]


def tell_result(
    figures: Mapping[str, Any], configs: Mapping[str, Path], result: Path, photo: Path, name: str
) -> None:
    """Print accuracy, each shop's ε, where the pictures are, and how to classify a photo."""
    console.print(
        f"\n[bold]Accuracy {100 * figures['accuracy']:.1f} %[/bold] on photos no shop has ever seen."
    )
    table = Table("shop", "ε spent", "of", box=None, pad_edge=False)
    for shop, epsilon in figures["epsilon"].items():
        table.add_row(shop, f"{epsilon:.2f}", f"{EPSILON_BUDGET:g}")
    console.print(table)
    console.print(
        f"ε is what anyone can learn about one photo, at δ = {figures['delta']:g}: smaller is safer.\n"
    )
    console.print("Pictures: " + ", ".join(str(path) for path in sorted(result.glob("*.png"))))
    probabilities = Recognizer.load(result / "recognizer").predict([Image.open(photo)])[0]
    console.print(f"{photo} ({name}) is recognized with {100 * probabilities.max():.0f} % as: ", end="")
    console.print(datasets.CLASSES[int(probabilities.argmax())])
    config = next(iter(configs.values()))
    console.print("\nTry it, with this photo or your own:")
    console.print(f"  .venv/bin/hanse-client classify -r {result / 'recognizer'} {photo}", soft_wrap=True)
    console.print(f"  .venv/bin/hanse-client ledger -c {config}", soft_wrap=True)
    console.print(f"({figures['seconds']:.0f} s)")
