"""The training that a daemon runs: its signed plan, how far it got, and the recognizer at its end.

    training = Training.open(config, resume=False)
    model = training.run(transport, on_round=print)
    training.publish(model)                          # state/recognizer

torch is loaded when a training starts, not before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hanse_common import wire
from hanse_common.errors import ConfigError, SignatureInvalid, WireError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.plan import MeanTraining, Plan, SignedPlan
from hanse_common.signing import load_public
from hanse_server.config import Optimization, ServerConfig, Service
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.store import Store
from hanse_server.transport import Transport


@dataclass(frozen=True)
class Training:
    """One signed plan and the folder that holds what became of it."""

    signed_plan: SignedPlan
    plan: Plan
    optimization: Optimization
    service: Service
    store: Store

    @classmethod
    def open(cls, config: ServerConfig, service: Service) -> "Training":
        """Return the training that `service` names, however far it got.

        Raises `ConfigError` when a file is missing or damaged or the state folder holds another plan's training,
        `SignatureInvalid` when the operator did not sign the plan, `RecognizerError` when the whitening is not
        the plan's.
        """
        signed_plan = _read_plan(service.plan)
        key = load_public(config.signing_key.with_name(config.signing_key.name + ".pub"))
        try:
            plan = signed_plan.open(key)
        except SignatureInvalid:
            raise SignatureInvalid(
                f"{service.plan}: not signed with the key {config.signing_key}.pub, so every merchant would "
                "decline it. Sign it again: hanse-server sign."
            ) from None
        create(config.optimization.optimizer)
        _check_files(plan, service)
        store = Store(service.state)
        store.save_plan(signed_plan)
        return cls(signed_plan, plan, config.optimization, service, store)

    def rounds_done(self) -> int:
        """Return how many rounds the checkpoint holds. Raises `ConfigError` when it is damaged."""
        checkpoint = self.store.load(self.plan.digest, self.plan.dimension)
        return checkpoint.rounds_done if checkpoint else 0

    def run(
        self,
        transport: Transport,
        directory: Callable[[], LeagueDirectory],
        on_round: Callable[[RoundReport], None],
    ) -> NDArray[np.float32]:
        """Run the rounds that are left, if any, and return the published model, shape (d,), float32.

        `directory` returns the league's directory as of now, asked at each set-up.

        Raises as `league.train` does.
        """
        from hanse_common.vision import model as models  # torch takes seconds to load

        # The start is public: all zeros, or what the plan's own digest draws.
        seed = int.from_bytes(self.plan.digest[:8], "big") >> 1
        if isinstance(self.plan.training, MeanTraining):
            initial = np.zeros(self.plan.dimension, dtype=np.float32)
        else:
            initial = models.initial_vector(self.plan.recipe, len(self.plan.taxonomy.classes), seed)
        rounds = MaskedRounds(
            transport,
            self.signed_plan,
            self.plan,
            directory,
            self.store.next_attempt,
            setup_rounds=self.service.blocks.rounds,
            attempts=self.optimization.attempts,
        )
        return train(
            rounds=rounds,
            signed_plan=self.signed_plan,
            plan=self.plan,
            optimizer=create(self.optimization.optimizer),
            store=self.store,
            initial=initial,
            tail_average=self.optimization.tail_average,
            decay=self.optimization.decay,
            on_round=on_round,
        )

    def publish(self, model: NDArray[np.float32]) -> Path:
        """Write the recognizer of `model`, shape (d,), to state/recognizer and return that folder.

        Its ε and δ are those of the plan and of its centre together. After a plan of mode `mean` it is the file
        state/centre.safetensors.
        """
        from hanse_common.vision.centring import Centre, load_centre
        from hanse_common.vision.recognizer import CENTRE_FILE, Recognizer

        if isinstance(self.plan.training, MeanTraining):
            path = self.service.state / CENTRE_FILE
            centre = Centre(model, self.plan.epsilon(), self.plan.delta)
            write_atomically(path, centre.to_bytes(), PUBLIC)
            return path
        before = load_centre(self.plan.recipe, self.service.centre)
        folder = self.service.state / "recognizer"
        Recognizer.create(
            self.plan.recipe,
            self.plan.taxonomy,
            model,
            created=datetime.now(UTC),
            epsilon=self.plan.epsilon() + (before.epsilon if before else 0.0),
            delta=self.plan.delta + (before.delta if before else 0.0),
            plan_digest=self.plan.digest,
            whitening=self.service.whitening,
            centre=self.service.centre,
        ).save(folder)
        return folder


def _check_files(plan: Plan, service: Service) -> None:
    """Raise `RecognizerError` unless the local files are those that the plan's recipe names.

    Without them nothing could be published, which is better known before merchants pay.
    """
    from hanse_common.vision.backbones import load_whitening
    from hanse_common.vision.centring import load_centre

    load_whitening(plan.recipe, service.whitening)
    load_centre(plan.recipe, service.centre)


def _read_plan(path: Path) -> SignedPlan:
    data = read_bounded(
        path, wire.MAX_DOCUMENT_BYTES, "a signed plan; make it with hanse-server sign", ConfigError
    )
    try:
        return wire.decode(SignedPlan, data)
    except WireError as error:
        raise WireError(f"{path}: not a plan file. {error} Sign it again: hanse-server sign.") from None
