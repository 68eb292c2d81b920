"""The command `hanse-sim`."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hanse_common import commands
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically

app = commands.new_app(
    "The researcher's side of Hanse: the same protocol code in one process, seeded, from YAML experiments."
)


def _in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that can't be made before the work rather than after it."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first.")
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write the figures to this file.", metavar="FILE", callback=_in_a_folder
    ),
]


@app.command()
def demo(
    as_json: JsonOption = None,
    folder: Annotated[Path, typer.Option(help="Where the shops and the result go.")] = Path("demo"),
    experiment: Annotated[Path, typer.Option(help="The league's experiment.", metavar="FILE")] = Path(
        "simulations/experiments/demo.yaml"
    ),
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Without network and daemons: all of it in one process.")
    ] = False,
) -> None:
    """Five shops with folders of real product photos train one recognizer; then classify a photo with it."""
    from hanse_simulations.demo import demo as run_demo
    from hanse_simulations.experiment import Experiment

    figures = run_demo(load(Experiment, experiment), folder, in_process=in_process)
    _write_json(as_json, figures)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment, YAML.", metavar="FILE")],
    as_json: JsonOption = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the experiment's own seed.", min=0)] = None,
    results: Annotated[Path, typer.Option(help="Folder of results.", metavar="FOLDER")] = Path("results"),
    resume: Annotated[
        Path | None, typer.Option(help="Go on in this result folder instead of a new one.", metavar="FOLDER")
    ] = None,
    engine: Annotated[
        Literal["local", "flower", "central", "pooled"],
        typer.Option(
            help="All in this process; or Flower's own engine on Ray, without secure aggregation; or, as a "
            "yardstick, one trusted curator with all photos; or that, with the noise of a league's shares."
        ),
    ] = "local",
) -> None:
    """Run an experiment. Its folder then holds figures, plots, ledgers, the recognizer and the exact config."""
    from hanse_simulations.experiment import Experiment
    from hanse_simulations.results import new_folder
    from hanse_simulations.run import load_extensions
    from hanse_simulations.run import run as run_experiment

    settings = load(Experiment, experiment)
    if engine == "flower":
        from hanse_simulations import flower_engine

        flower_engine.require(settings)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    if resume is not None and not (resume / "experiment.yaml").exists():
        raise ConfigError(f"{resume}: found no experiment.yaml, expected the folder of an earlier run.")
    load_extensions(settings)  # whatever is wrong with the experiment shows before a folder is made for it
    folder = resume or new_folder(results, settings.name)
    if settings.sweep is not None:
        from hanse_simulations.sweep import run_frontiers

        _write_json(as_json, run_frontiers([(settings, engine)], folder, results / "embeddings.sqlite"))
        return
    figures = run_experiment(settings, folder, results / "embeddings.sqlite", engine)
    out.print(
        f"accuracy {100 * figures['accuracy']:.2f} %, ε at most {figures['epsilon_max']:.3f} "
        f"at δ = {figures['delta']:g}, {figures['seconds']:.0f} s; everything is in {folder}"
    )
    _write_json(as_json, figures)


@app.command()
def frontier(
    experiments: Annotated[
        list[Path], typer.Argument(help="Experiments with a sweep, YAML.", metavar="FILE...")
    ],
    central: Annotated[
        list[Path] | None,
        typer.Option(help="Also run this one as one trusted curator would.", metavar="FILE"),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where results go, and where an earlier call left them.", metavar="FOLDER")
    ] = Path("results/frontier"),
    as_json: JsonOption = None,
) -> None:
    """Accuracy against ε of several experiments in one figure. Stopped, it goes on where it was."""
    from hanse_simulations.experiment import Experiment
    from hanse_simulations.run import Engine, load_extensions
    from hanse_simulations.sweep import run_frontiers

    wanted: list[tuple[Experiment, Engine]] = [(load(Experiment, path), "local") for path in experiments]
    wanted += [(load(Experiment, path), "central") for path in central or ()]
    for settings, _ in wanted:
        load_extensions(settings)
    _write_json(as_json, run_frontiers(wanted, folder, folder / "embeddings.sqlite"))


@app.command()
def robustness(
    study: Annotated[Path, typer.Argument(help="The study of attacks, YAML.", metavar="FILE")] = Path(
        "simulations/experiments/robustness.yaml"
    ),
    folder: Annotated[
        Path, typer.Option(help="Where results go, and where an earlier call left them.", metavar="FOLDER")
    ] = Path("results/robustness"),
    as_json: JsonOption = None,
) -> None:
    """What merchants that attack cost in accuracy, and what is stopped: a table and a figure."""
    from dataclasses import asdict

    from hanse_simulations.robustness import Study, run_study, table

    wanted = load(Study, study)
    folder.mkdir(parents=True, exist_ok=True)
    rows = run_study(wanted, folder, folder / "embeddings.sqlite")
    out.print(table(rows), soft_wrap=True)
    _write_json(as_json, {"rows": [asdict(row) for row in rows]})


@app.command()
def recognition(
    study: Annotated[Path, typer.Argument(help="The study of options, YAML.", metavar="FILE")] = Path(
        "simulations/studies/recognition.yaml"
    ),
    grocery: Annotated[
        Path | None,
        typer.Option(
            help="The Grocery Store Dataset's folder; without it what needs it is left out.", metavar="FOLDER"
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where results go, and where an earlier call left them.", metavar="FOLDER")
    ] = Path("results/recognition"),
    as_json: JsonOption = None,
) -> None:
    """What options against imbalance, occlusion, clutter, light and viewpoint do on real photos: a table."""
    from hanse_simulations.robust_recognition import Study, run_study, table
    from hanse_simulations.run import one_thread

    wanted = load(Study, study)
    with one_thread():
        figures = run_study(wanted, grocery, folder, lambda text: commands.err.print(text, markup=False))
    out.print(table(wanted, figures), soft_wrap=True, markup=False)
    _write_json(as_json, figures)


@app.command()
def search(
    quick: Annotated[
        bool, typer.Option("--quick", help="Another backbone and few photos: seconds, and other figures.")
    ] = False,
    grocery: Annotated[
        Path | None,
        typer.Option(help="The Grocery Store Dataset's folder dataset, to measure it too.", metavar="FOLDER"),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where photos' features are kept for the next time.", metavar="FOLDER")
    ] = Path("results/search"),
    as_json: JsonOption = None,
) -> None:
    """How well products that nobody learned from are found, in one shop and across shops: a table."""
    from hanse_simulations.datasets import default_folder
    from hanse_simulations.search_quality import run_study, table
    from hanse_simulations.search_trials import Study

    figures = run_study(Study.quick() if quick else Study(), folder, default_folder(), grocery)
    out.print(table(figures), soft_wrap=True, markup=False)
    _write_json(as_json, figures)


@app.command()
def shops(
    folder: Annotated[Path, typer.Argument(help="A new folder for them.", metavar="FOLDER")],
    keys: Annotated[
        Path, typer.Option(help="The folder that hanse-server keys made, with merchants.", metavar="FOLDER")
    ] = Path("keys"),
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The operator's configuration.", metavar="FILE")
    ] = Path("hanse-server.yaml"),
    server: Annotated[
        str | None,
        typer.Option(help="Where their nodes connect; else as configured.", metavar="HOST:PORT"),
    ] = None,
    photos: Annotated[int, typer.Option(help="Of each.", min=10, max=60_000)] = 1000,
) -> None:
    """Write invented shops, to try a league out: photos and a configuration for each merchant with keys."""
    from hanse_server.config import ServerConfig
    from hanse_simulations.invented import PHOTOS_TO_TRY, write_shops

    configs = write_shops(load(ServerConfig, config), keys, folder, photos, server)
    out.print(f"Wrote {len(configs)} shops. Each takes part with its own daemon:", markup=False)
    for path in configs.values():
        out.print(f"  hanse-client run --config {path}", markup=False)
    out.print(f"A photo of each class that no shop has is in {folder / PHOTOS_TO_TRY}.", markup=False)


@app.command()
def forecast(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="An operator's configuration.", metavar="FILE")
    ] = Path("hanse-server.yaml"),
    proxy: Annotated[
        Path | None,
        typer.Option(
            help="A folder of public photos, one sub-folder a class, instead of Fashion-MNIST.",
            metavar="FOLDER",
        ),
    ] = None,
    merchants: Annotated[
        int | None, typer.Option(help="How many; else as many as the plan takes at most.", min=2, max=300)
    ] = None,
    photos: Annotated[
        int | None, typer.Option(help="Of each merchant; else what the plan reckons with.", min=1, max=60_000)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the photos, and one seed.")] = False,
    as_json: JsonOption = None,
) -> None:
    """How accurate an operator's plan would be on public photos, and what a merchant's machine has to do for it.

    It is what hanse-server rehearse shows last.
    """
    from hanse_server.config import ServerConfig
    from hanse_simulations.forecast import compose
    from hanse_simulations.forecast import forecast as run_forecast

    composed = compose(load(ServerConfig, config), proxy, merchants, photos, quick)
    for note in composed.notes:
        out.print(note, markup=False)
    figures = run_forecast(composed, lambda found: _write_json(as_json, found))
    shown = ", ".join(f"{100 * accuracy:.1f} %" for accuracy in figures["accuracies"])
    out.print(f"accuracy {shown} on {figures['test_photos']} photos that no merchant has", markup=False)


@app.command()
def new_algorithm(
    path: Annotated[
        Path, typer.Argument(help="The Python file to write.", metavar="FILE", callback=_in_a_folder)
    ],
) -> None:
    """Write a documented template of a server optimizer: one file, yours to change."""
    from hanse_simulations import template

    if path.exists():
        raise ConfigError(f"{path}: there is a file already; name another.")
    shutil.copyfile(str(template.__file__), path)
    out.print(f"Wrote {path}. Its first lines say how an experiment uses it.")


@app.command()
def audit(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials: seconds, and looser bounds.")] = False,
    as_json: JsonOption = None,
) -> None:
    """Attack the mechanism and a training: what is measured of ε must stay below what is claimed."""
    from hanse_simulations import auditing

    figures = auditing.run(quick)
    auditing.show(figures)
    _write_json(as_json, figures)
    if not auditing.passed(figures):
        raise typer.Exit(auditing.FAILED)


bench = commands.new_app("Benchmarks: ratios against a named peer or floor, measured in one run.")
app.add_typer(bench, name="bench")


@bench.command()
def gradients(
    quick: Annotated[bool, typer.Option("--quick", help="Repeat less: seconds, and rougher.")] = False,
    as_json: JsonOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.", metavar="DEVICE")] = "cpu",
) -> None:
    """Exact sums of clipped gradients, beside plain training and beside Opacus' own optimizer step."""
    from hanse_simulations.benchmarks.gradients import run as run_benchmark

    _write_json(as_json, run_benchmark(quick, device))


@bench.command("dp-step")
def dp_step(
    quick: Annotated[bool, typer.Option("--quick", help="Repeat less: rougher.")] = False,
    as_json: JsonOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX.", metavar="DEVICE")] = "cpu",
) -> None:
    """What privacy costs: one training step with it over one without, beside Opacus; with peak memory and ε."""
    from hanse_simulations.benchmarks import dp_step as benchmark

    figures = benchmark.run(quick, device=device)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command("edge")
def edge_(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer recipes and repetitions: rougher.")] = False,
    as_json: JsonOption = None,
) -> None:
    """A recognizer's ONNX files, float32 and 8-bit: size, time for a photo over torch's, agreement with it."""
    from hanse_simulations.benchmarks import edge as benchmark

    figures = benchmark.run(quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command("round")
def round_(
    quick: Annotated[bool, typer.Option("--quick", help="Repeat less: seconds, and rougher.")] = False,
    as_json: JsonOption = None,
    merchants: Annotated[int, typer.Option(help="How many merchants.", min=2, max=50)] = 10,
) -> None:
    """Messages of a round over real listeners: Flower's beside the stream's, CPU of the server and time."""
    from hanse_simulations.benchmarks import round as benchmark

    figures = benchmark.run(merchants, quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command()
def secagg(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller leagues and updates.")] = False,
    as_json: JsonOption = None,
) -> None:
    """Masking and unmasking, beside Flower's SecAgg+ and beside the keystream alone."""
    from hanse_simulations.benchmarks import secagg as benchmark

    figures = benchmark.run(quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command()
def aggregation(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller uploads.")] = False,
    as_json: JsonOption = None,
) -> None:
    """The server's sum of masked uploads, beside bare addition and Flower's aggregation: time and memory."""
    from hanse_simulations.benchmarks import aggregation as benchmark

    figures = benchmark.run(quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command()
def scale(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer merchants and numbers.")] = False,
    as_json: JsonOption = None,
) -> None:
    """The server's CPU a message, memory and time of a round against merchants and model, with light clients."""
    from hanse_simulations.benchmarks import scale as benchmark

    figures = benchmark.run(quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


@bench.command()
def serve(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer photos and products: seconds, and rougher.")
    ] = False,
    as_json: JsonOption = None,
) -> None:
    """Serving photos beside the backbone's own forward pass, and search by size of the gallery, on one core."""
    from hanse_simulations.benchmarks import serve as benchmark

    figures = benchmark.run(quick)
    benchmark.show(figures)
    _write_json(as_json, figures)


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(path, json.dumps(figures, indent=2).encode() + b"\n")


def main() -> None:
    """Run `hanse-sim`."""
    commands.run(app)
