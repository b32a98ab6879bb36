"""What a run does between the lines of a step: agree, watch for bad numbers, measure, save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from moco_dist.distributed import agreement, comms, peers
from moco_dist.errors import UserError
from moco_dist.method.plan import Step
from moco_dist.method.schedule import due
from moco_dist.pretrain import figures, finite
from moco_dist.pretrain.mechanisms import Hooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs.session import Session


class RunHooks(Hooks):
    """Make a step happen as a whole on all processes, or not at all.

    Without a `session`, as in a benchmark, nobody asks the step to stop and nothing is saved.
    """

    def __init__(self, trainer: Trainer, session: Session | None = None) -> None:
        self.trainer, self.session = trainer, session
        self.parameters = [p for p in trainer.moco.query_encoder.parameters() if p.requires_grad]
        # Whether this process wants a checkpoint after the next step, and what all agreed on.
        self.wants_save = False
        self.agreed = agreement.Agreement(stop=0, save=False)
        # Figures of the last step; those of its health only in the steps in which they are due.
        self.gradient_norm = torch.zeros(())
        self.health: dict[str, float] = {}

    def begin(self, step: int, rows: Step) -> None:
        """Note where this process is; keep the statistics that a forward pass changes.

        Raises UserError if this process has another number of rows than the rest: a gather of
        unequal messages would kill the other processes.
        """
        peers.me.mark(step, "encoding keys")
        size, processes = self.trainer.config.batch_size, comms.world_size()
        sizes = {len(rows.samples), *(len(mine) * processes for mine in rows.key_rows)}
        if others := sizes - {size}:
            raise UserError(
                f"process {comms.rank()} is at a batch of {max(others)} in step {step} and "
                f"batch_size={size}; nothing was changed by it: start all processes with the same "
                "command, files and versions"
            )
        self.step, self.rows = step, rows
        self.trainer.undo.keep()
        asked = self.session.request() if self.session else 0
        self.note: Tensor | None = agreement.note(
            step, rows.samples, asked, self.wants_save, alone=processes == 1
        )

    def gather(self, keys: Tensor) -> Callable[[], Tensor]:
        """Begin to gather keys; the first gather of a step also brings the notes of all."""
        if self.note is None:
            return super().gather(keys)
        both, self.note = comms.all_gather_with_note(keys, self.note), None
        peers.me.mark(self.step, "encoding queries")

        def whole() -> Tensor:
            gathered, self.notes = both()
            return gathered

        return whole

    def pause(self, doing: str) -> None:
        """Raise StoppedError on all processes if one of them was asked to stop."""
        if self.session:
            self.session.pause(doing)

    def before_update(self, made: list[Tensor], losses: Tensor) -> None:
        """Raise, with the state as it was before the step, what is to end the run.

        That is PeerError if the processes are not at the same step, StoppedError if one of them was
        asked to stop, and NumbersError for what is not finite. Vectors and gradients are the same
        on all processes, and a loss that is not finite gives gradients that are not: either all
        processes raise, or none does. Otherwise return once a save in the background has copied the
        state that this step is about to change.
        """
        self.gradient_norm, norm = finite.norms(self.parameters, *made)
        # A sum is not finite if one of its terms isn't.
        good = (self.gradient_norm + norm).isfinite()
        # The only place where a step waits for the device.
        try:
            self.agreed = agreement.agree(self.notes)
            if self.agreed.stop and self.session:
                self.session.stop_for(self.agreed.stop)
        except BaseException:
            self.discard()
            raise
        if not good:
            self.discard()
            suspects = torch.cat(made), losses, self.gradient_norm
            finite.refuse(self.trainer, self.step, self.rows, *suspects)
        if self.session:
            self.session.saver.copied()

    def discard(self) -> None:
        self.trainer.undo.restore()
        self.trainer.optimizer.zero_grad()

    @record_function("tracking")
    def before_enqueue(self, queries: Tensor, positives: list[Tensor]) -> None:
        """Measure how queries and positives lie on the sphere, in steps in which that is due."""
        every, number = self.trainer.config.tracking.health_every_steps, self.step + 1
        if due(every, number, always=number == 1):
            self.health = figures.health(self.trainer.moco, queries, positives, self.rows.samples)
        else:
            self.health = {}
