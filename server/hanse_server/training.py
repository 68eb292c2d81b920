"""The training that a daemon runs: its signed plans, how far it got, and the recognizer at its end.

    training = Training.open(config, service)
    model = training.run(rounds, on_round=print)
    version = training.publish(model)                # a candidate in the registry

torch is loaded when a training starts, not before.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hanse_common import messages, wire
from hanse_common.errors import ConfigError, RecognizerError, SignatureInvalid, WireError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.modes import EvaluationTraining, MeanTraining, TrendsTraining
from hanse_common.plan import Plan, SignedPlan
from hanse_common.signing import load_public
from hanse_server.config import ServerConfig, Service
from hanse_server.league import RoundReport, Rounds, train
from hanse_server.optimizers import create
from hanse_server.storage import Beginning, Progress, State, Version

if TYPE_CHECKING:  # it brings torch
    from hanse_common.vision.recognizer import Card, Recognizer


@dataclass(frozen=True)
class Training:
    """One signed plan, the evaluation's plan beside it, and the state that holds what became of them."""

    config: ServerConfig
    service: Service
    state: State
    progress: Progress
    evaluation: Progress | None

    @classmethod
    def open(cls, config: ServerConfig, service: Service) -> "Training":
        """Return the training that `service` names, however far it got.

        Raises `ConfigError` when a file is missing or damaged, `SignatureInvalid` when the operator did not sign a
        plan, `RecognizerError` when the whitening is not the plan's, `StorageError` when the state can't be used.
        """
        signed_plan, plan = _read_plan(service.plan, config)
        if isinstance(plan.training, EvaluationTraining):
            raise ConfigError(f"{service.plan}: found an evaluation plan; name it under service.evaluation.")
        create(config.optimization.optimizer)
        _check_files(plan, service)
        evaluation = None
        if service.evaluation is not None:
            evaluation = _read_plan(service.evaluation, config)
            _require_same_models(service.evaluation, evaluation[1], plan)
        state = State.open(service.state, service.storage)
        return cls(
            config,
            service,
            state,
            state.progress(signed_plan, plan),
            None if evaluation is None else state.progress(*evaluation),
        )

    @property
    def plan(self) -> Plan:
        """The training's plan."""
        return self.progress.plan

    def run(
        self,
        rounds: Rounds,
        on_round: Callable[[RoundReport], None],
        enough: Callable[[int, NDArray[np.float32]], bool] = lambda done, published: False,
    ) -> NDArray[np.float32]:
        """Run the rounds that are left, if any, and return the model to publish, shape (d,), float32.

        Raises as `league.train` does, and `RecognizerError` when it can't go on from the recognizer named.
        """
        settings = self.config.optimization
        total = self.plan.training.rounds
        return train(
            rounds=rounds,
            progress=self.progress,
            optimizer=create(settings.optimizer),
            initial=self.progress.start_from(self._beginning).model,
            tail_average=settings.tail_average,
            factor=lambda round_: settings.schedule.factor(round_, total),
            enough=enough,
            on_round=on_round,
        )

    def publish(self, model: NDArray[np.float32], metrics: dict[str, float | None]) -> Version:
        """Keep the recognizer of `model`, shape (d,), as a candidate version, once, and return that.

        Its ε and δ are those of this training, as `_cost` has them, and of the trainings that it went on from. The
        files are in state/recognizer, too, and nothing else is, whatever a crash left there. Raises `RecognizerError`.
        """
        versions, folder = self.state.versions, self.service.state / "recognizer"
        beside = folder.with_name("recognizer.new")
        shutil.rmtree(beside, ignore_errors=True)  # a crash may have left it
        version = versions.of_plan(self.plan.digest)
        if version is None:
            version = self._keep(self._recognizer(model, metrics), beside, model)
        else:
            versions.export(version.digest, beside)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        except OSError as error:
            raise RecognizerError(f"{folder}: cannot be replaced ({error.strerror}).") from None
        return version

    def _keep(self, recognizer: "Recognizer", folder: Path, model: NDArray[np.float32]) -> Version:
        """Write a recognizer to the new folder `folder` and keep that as a version."""
        recognizer.save(folder)
        parent = recognizer.card.parent_digest
        return self.state.versions.add(folder, self.plan.digest, parent, model_digest(model))

    def _recognizer(self, model: NDArray[np.float32], metrics: dict[str, float | None]) -> "Recognizer":
        from hanse_common.vision.recognizer import Recognizer

        epsilon, delta = self._cost()
        parent = self._parent()
        inheritance = parent.descend(epsilon=epsilon, delta=delta) if parent else None
        return Recognizer.create(
            self.plan.recipe,
            self.plan.taxonomy,
            model,
            created=datetime.now(UTC),
            metrics=metrics,
            epsilon=inheritance.epsilon if inheritance else epsilon,
            delta=inheritance.delta if inheritance else delta,
            plan_digest=self.plan.digest,
            parent_digest=parent.digest() if parent else None,
            lineage=inheritance.lineage if inheritance else (),
            whitening=self.service.whitening,
            centre=self.service.centre,
        )

    def publish_centre(self, mean: NDArray[np.float32]) -> Path:
        """Write the centre that a plan of mode `mean` came to, shape (d,), to state/centre.safetensors; return that."""
        from hanse_common.vision.centring import Centre
        from hanse_common.vision.recognizer import CENTRE_FILE

        path = self.service.state / CENTRE_FILE
        write_atomically(path, Centre(mean, self.plan.epsilon(), self.plan.delta).to_bytes(), PUBLIC)
        return path

    def _cost(self) -> tuple[float, float]:
        """Return ε and δ of the unit that paid most: for the whole plan, its centre, and the evaluations beside it.

        When to stop, and the card's own figures, follow from the photos that are held out. A photo is on one of the two
        sides; a product has photos on both.
        """
        from hanse_common.vision.centring import load_centre

        centre = load_centre(self.plan.recipe, self.service.centre)
        epsilon = self.plan.epsilon() + (centre.epsilon if centre else 0.0)
        delta = self.plan.delta + (centre.delta if centre else 0.0)
        if self.evaluation is None or not self.evaluation.begun():
            return epsilon, delta
        tried = self.evaluation.plan
        if self.plan.training.unit == "photo":
            return max(epsilon, tried.epsilon()), max(delta, tried.delta)
        return epsilon + tried.epsilon(), delta + tried.delta

    def _beginning(self) -> Beginning:
        """Return where the training starts: all zeros, what the plan's own digest draws, or another recognizer."""
        from hanse_common.vision import model as models
        from hanse_server.beginning import graft

        if isinstance(self.plan.training, MeanTraining | TrendsTraining):
            return Beginning(np.zeros(self.plan.dimension, dtype=np.float32))
        if self.config.start is not None:
            return graft(self.config.start, self.plan, self.service, self.state.versions)
        seed = int.from_bytes(self.plan.digest[:8], "big") >> 1
        return Beginning(models.initial_vector(self.plan.recipe, len(self.plan.taxonomy.classes), seed))

    def _parent(self) -> "Card | None":
        from hanse_common.vision.recognizer import Card

        card = self.progress.start_from(self._beginning).card
        return None if card is None else Card.model_validate_json(card)


def model_digest(model: NDArray[np.float32]) -> bytes:
    """Return the SHA-256 of a model as it is sent to merchants, 32 bytes."""
    return hashlib.sha256(messages.model_to_bytes(model)).digest()


def _check_files(plan: Plan, service: Service) -> None:
    """Raise `RecognizerError` unless the local files are those that the plan's recipe names.

    Without them nothing could be published, which is better known before merchants pay.
    """
    from hanse_common.vision.backbones import load_whitening
    from hanse_common.vision.centring import load_centre

    load_whitening(plan.recipe, service.whitening)
    load_centre(plan.recipe, service.centre)


def _require_same_models(path: Path, evaluation: Plan, plan: Plan) -> None:
    if not isinstance(evaluation.training, EvaluationTraining):
        raise ConfigError(
            f"{path}: found a plan of mode {evaluation.training.mode}, expected mode evaluation."
        )
    if plan.training.unit != "merchant" and evaluation.training.unit != plan.training.unit:
        raise ConfigError(
            f"{path}: its unit is {evaluation.training.unit}, the training's is {plan.training.unit}, and a merchant's "
            "ledger keeps one; sign both again: hanse-server sign."
        )
    for field in ("league", "recipe", "taxonomy"):
        if getattr(evaluation, field) != getattr(plan, field):
            raise ConfigError(
                f"{path}: its {field} is not that of the training's plan; sign both again: hanse-server sign."
            )


def _read_plan(path: Path, config: ServerConfig) -> tuple[SignedPlan, Plan]:
    data = read_bounded(
        path, wire.MAX_DOCUMENT_BYTES, "a signed plan; make it with hanse-server sign", ConfigError
    )
    key = load_public(config.signing_key.with_name(config.signing_key.name + ".pub"))
    try:
        signed_plan = wire.decode(SignedPlan, data)
        return signed_plan, signed_plan.open(key)
    except WireError as error:
        raise WireError(f"{path}: not a plan file. {error} Sign it again: hanse-server sign.") from None
    except SignatureInvalid:
        raise SignatureInvalid(
            f"{path}: not signed with the key {config.signing_key}.pub, so every merchant would decline it. Sign it "
            "again: hanse-server sign."
        ) from None
