"""The demo: five shops with folders of real product photos train one recognizer.

Each shop is what a merchant has: a folder of photos, a `hanse-client.yaml`, a state folder with its ledger. One
server and a daemon for each shop then run as processes of their own (`daemons`), or all of it in this process. It
begins with empty ledgers each time, which no real shop may do.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from hanse_client.config import ClientConfig
from hanse_client.examples import resolve_device
from hanse_client.shop import Shop
from hanse_common import signing
from hanse_common.config import load
from hanse_common.vision.recognizer import WHITENING_FILE, Recognizer
from hanse_simulations import daemons, datasets, run
from hanse_simulations.console import bar, console
from hanse_simulations.experiment import Experiment
from hanse_simulations.invented import client_settings, write_config, write_photo, write_photos
from hanse_simulations.shops import deal, make_test_examples, require_classes, whitened
from hanse_simulations.simulation import League, Member, identity_key, operator_key, simulated_charter


@run.one_thread()
def demo(experiment: Experiment, folder: Path, *, in_process: bool) -> dict[str, Any]:
    """Run the demo in `folder` and return its figures."""
    started = time.perf_counter()
    run.load_extensions(experiment)
    count = experiment.data.merchants
    console.print(f"[bold]A league of {count} shops. Nobody shows a photo.[/bold]\n")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result"
    put_aside(result)
    result.mkdir()
    if experiment.whiten is not None:
        photos = experiment.whiten.photos
        with console.status("fitting"):
            console.print(f"The operator fits a public whitening to {photos} unlabelled public photos.")
            experiment = whitened(experiment, result / WHITENING_FILE)
    configs = write_shops(experiment, folder / "shops")
    forget_ledgers(configs)

    console.print("The operator embeds public test photos, which belong to no shop.")
    with bar("test photos", experiment.data.test_photos) as shown:
        test = make_test_examples(
            experiment,
            folder / "test-embeddings.sqlite",
            result / WHITENING_FILE,
            resolve_device("auto"),
            shown.update,
        )

    if in_process:
        console.print("Each shop looks through its own photos and embeds them, once, on its own disk.")
        members = {name: open_shop(name, config, experiment) for name, config in configs.items()}
        console.print("They train one recognizer. What leaves a shop is noisy, masked and paid for.")
        figures = run.train_and_write(
            experiment, League.assemble(experiment, members, result), test, result, started
        )
    else:
        shops = {name: config.parent for name, config in configs.items()}
        signed_plan = daemons.make_server(experiment, folder / "server", shops, os.urandom(16))
        console.print(
            "A server and a daemon for each shop start, each a process of its own, TLS between them."
        )
        console.print("Each shop looks through its own photos and embeds them, once, on its own disk.")
        console.print("Then they train one recognizer. What leaves a shop is noisy, masked and paid for.")
        figures = daemons.train(experiment, signed_plan, configs, test, folder, started)
    photo, name = write_try_photo(experiment, folder / "photo-to-try.png")
    tell_result(figures, configs, budget(experiment), result, photo, name)
    return figures


def write_shops(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write each shop's photos (once) and configuration; return the configurations by shop."""
    taxonomy = experiment.plan.taxonomy
    require_classes(taxonomy)
    source = datasets.fashion_mnist(experiment.data.folder)
    dealt = deal(experiment.data, experiment.seed, source.train_labels)
    stamp = f"{experiment.data.model_dump_json(exclude={'folder'})} {experiment.seed}"
    configs = {}
    with bar("writing photos", len(dealt)) as shown:
        for number, (name, indices) in enumerate(dealt.items(), start=1):
            write_photos(folder / name, source, indices, stamp)
            configs[name] = write_config(folder / name, client_config(experiment))
            shown.update(number, text=f"{len(indices)} photos for {name}")
    return configs


def client_config(experiment: Experiment) -> dict[str, Any]:
    """Return what a shop of the demo has in its `hanse-client.yaml`."""
    plan = experiment.plan
    settings = client_settings(
        plan,
        epsilon=budget(experiment),
        delta=plan.privacy.delta,
        operator_key=signing.public_bytes(operator_key(experiment)),
        charter=simulated_charter(experiment).read().digest,
    )
    result = "../../result"
    return settings | {"recognizer": f"{result}/recognizer", "whitening": f"{result}/{WHITENING_FILE}"}


def budget(experiment: Experiment) -> float:
    """Return the ε that each shop's owner allows: the plan's, rounded up."""
    return float(math.ceil(experiment.plan.privacy.epsilon))


def forget_ledgers(configs: Mapping[str, Path]) -> None:
    """Remove the ledgers and marks of the last demo; photos and embeddings stay."""
    for config in configs.values():
        for kind in ("ledger", "markers"):
            for path in (config.parent / "state").glob(f"{kind}.sqlite*"):
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
    write_identity(config.parent / "state", experiment, name)
    participant = shop.participant(experiment.plan.recipe, examples, partial(run.tell, name))
    return Member(participant.handle, shop.ledger())


def write_identity(state: Path, experiment: Experiment, name: str) -> None:
    """Give a shop of the in-process league its simulated identity; one that it has is replaced."""
    path = state / "identity.key"
    for old in state.glob("identity.key*"):
        old.unlink()
    signing.write_key(path, identity_key(experiment, name))


def write_try_photo(experiment: Experiment, path: Path) -> tuple[Path, str]:
    """Write one public test photo that no shop has, and return it with its class."""
    name = "Ankle boot"
    write_photo(datasets.fashion_mnist(experiment.data.folder), datasets.CLASSES.index(name), path)
    return path, name


def tell_result(
    figures: Mapping[str, Any],
    configs: Mapping[str, Path],
    allowed: float,
    result: Path,
    photo: Path,
    name: str,
) -> None:
    """Print accuracy, each shop's ε, where the pictures are, and how to classify a photo."""
    accuracy = f"{100 * figures['accuracy']:.1f} %"
    console.print(f"\n[bold]Accuracy {accuracy}[/bold] on public photos that no shop has.\n")
    table = Table("shop", "ε spent", "of", box=None, pad_edge=False)
    for shop, epsilon in figures["epsilon"].items():
        table.add_row(shop, f"{epsilon:.2f}", f"{allowed:g}")
    console.print(table)
    console.print(
        f"\nε bounds what anyone can learn about one photo, at δ = {figures['delta']:g}: smaller is safer."
    )
    console.print("\nPictures of the result:")
    for picture in sorted(result.glob("*.png")):
        console.print(f"  {picture}", soft_wrap=True, markup=False)
    with Image.open(photo) as image:
        probabilities = Recognizer.load(result / "recognizer").predict([image])[0]
    best = int(probabilities.argmax())
    console.print(f"\n{photo} shows: {name}", soft_wrap=True, markup=False)
    console.print(f"The recognizer says: {datasets.CLASSES[best]}, {100 * probabilities[best]:.0f} % sure")
    command = Path(sys.argv[0]).with_name("hanse-client")  # beside this one, be it on the PATH or not
    console.print("\nTry it, with this photo or your own, and look at what a shop has paid:")
    for line in (
        f"{command} classify -r {result / 'recognizer'} {photo}",
        f"{command} ledger -c {next(iter(configs.values()))}",
    ):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print(f"\nDone in {figures['seconds']:.0f} s.")
