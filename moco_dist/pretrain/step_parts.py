"""The step of one of several processes as CUDA graphs, cut where the processes exchange something.

Collectives stay outside of the graphs: NCCL's watchdog sees them, and what the processes agree on
is known before weights change, as in an eager step. A step launches some ten graphs and waits once.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from moco_dist.distributed import comms
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.plan import Step
from moco_dist.pretrain.device_clock import DeviceClock
from moco_dist.pretrain.finite import flat
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.mechanisms import Hooks
from moco_dist.pretrain.trainer import Trainer

# By how much the gradient of the first step by parts may differ from the eager one, relative to it.
_ALLOWED = 0.02


class OtherGradients(Exception):
    """The parts of a step have other gradients than the eager step; nothing has changed."""


class _Found(Exception):
    """A step's gradients are known, and the step ends."""


class _Gradients(Hooks):
    """Ends an eager step when its gradients are known, as if it had never begun."""

    def __init__(self, hooks: RunHooks) -> None:
        self.begin, self.gather, self.hooks = hooks.begin, hooks.gather, hooks  # type: ignore[method-assign]

    def before_update(self, made: list[Tensor], losses: Tensor) -> None:
        parameters = self.hooks.parameters
        self.joined = torch.cat([flat(p.grad) for p in parameters if p.grad is not None])
        self.hooks.discard()
        raise _Found


class Graphs:
    """The graphs of a step, and what is called between them."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], Any]] = []

    @contextmanager
    def capture(self, trainer: Trainer, clock: DeviceClock) -> Iterator[None]:
        """Capture what the block puts on the GPU, in which the trainer goes by `clock`.

        Nothing is computed, and the trainer is left as it was, also if the block fails.
        """
        step, host, contrast = trainer.step, trainer.clock, trainer.contrast
        trainer.source.stay()
        torch.cuda.synchronize(trainer.device)
        gc.collect()
        # Graphs have their own memory pool; the allocator would keep what eager steps used besides.
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream(trainer.device)
        self._pool = torch.cuda.graph_pool_handle()
        try:
            trainer.clock = clock
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                self._open()
                try:
                    yield
                except BaseException:
                    with suppress(RuntimeError):
                        self._graph.capture_end()
                    raise
                self._close()
        finally:
            trainer.step, trainer.clock, trainer.contrast = step, host, contrast
            for norm in batch_norms(trainer.moco):  # it may have failed between micro-batches
                norm.next_group = 0
            trainer.optimizer.zero_grad()
            vars(trainer.optimizer).pop("found_inf", None)
            torch.cuda.current_stream(trainer.device).wait_stream(stream)

    def cut(self, act: Callable[[], Any]) -> None:
        """End a graph, after which each step calls `act`, and begin the next one."""
        self._close()
        self.acts.append(act)
        self._open()

    def replay(self) -> None:
        """Do again what was captured, and call what is called in between."""
        for act in self.acts:
            act()

    def _open(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _close(self) -> None:
        self._graph.capture_end()
        self.acts.append(self._graph.replay)


class Parts(Hooks):
    """A step's graphs, and what is done between them. Called to take a step as `train_step` does.

    As the hooks of the step that is captured, it ends a graph where `hooks` are to be called, and
    begins the next one. To make it is a collective: its first step is compared with an eager one.
    """

    def __init__(self, trainer: Trainer, hooks: RunHooks, clock: DeviceClock) -> None:
        self.trainer, self.hooks, self.clock = trainer, hooks, clock
        self.graphs = Graphs()
        # The weights as other leaves of autograd: those of DistributedDataParallel are of another
        # stream, and it would sum their gradients.
        self.leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in trainer.moco.query_encoder.named_parameters()
            if parameter.requires_grad
        }
        eager = _Gradients(hooks)
        with suppress(_Found):
            trainer.train_step(eager)
        self.expected: Tensor | None = eager.joined
        # With three processes or more the layout of a message decides in which order numbers are
        # added. That of DistributedDataParallel gives the bits of the eager steps before a capture,
        # which a run that resumes takes where another one repeats graphs.
        buckets = trainer.query.reducer._get_zeros_like_grad_buckets()
        self.buckets: list[list[Tensor]] = [bucket.parameters() for bucket in buckets]
        del buckets

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        """Take a step; its loss and logits stay as they are until the next one.

        Raises what `train_step` raises, and OtherGradients in the first step.
        """
        trainer = self.trainer
        trainer.source.begin(trainer.step)
        self.clock.set()
        self.graphs.replay()
        trainer.optimizer.zero_grad()
        trainer.step += 1
        trainer.moco.remembered += self.made
        return self.loss, self.logits

    def capture(self) -> None:
        """Capture the trainer's step, which changes nothing; RuntimeError if it can't be."""
        with self.graphs.capture(self.trainer, self.clock):
            self.trainer.contrast = self.trainer.mechanism(self.encode)
            loss, self.logits = self.trainer.train_step(self)
            self.loss = loss.clone()

    def encode(self, views: Tensor) -> Tensor:
        """Return the queries of views, float (rows, dim)."""
        encoder = self.trainer.moco.query_encoder
        queries: Tensor = functional_call(encoder, self.leaves, views)
        return queries

    def begin(self, step: int, rows: Step) -> None:
        self.graphs.cut(lambda: self.hooks.begin(self.trainer.step, rows))

    def gather(self, keys: Tensor) -> Callable[[], Tensor]:
        whole = keys.new_empty(comms.world_size() * len(keys), *keys.shape[1:])
        begun: list[Callable[[], Tensor]] = []
        self.graphs.cut(lambda: begun.append(self.hooks.gather(keys)))

        @cache
        def gathered() -> Tensor:
            self.graphs.cut(lambda: whole.copy_(begun.pop()()))
            return whole

        return gathered

    def before_update(self, made: list[Tensor], losses: Tensor) -> None:
        self.made = sum(map(len, made))
        pairs = zip(self.hooks.parameters, self.leaves.values(), strict=True)
        used: dict[Tensor, Tensor] = {p: leaf.grad for p, leaf in pairs if leaf.grad is not None}
        buckets = [[flat(used[p]) for p in bucket if p in used] for bucket in self.buckets]
        messages = list(map(self._message, buckets))

        def add_up() -> None:
            for message in messages:
                comms.add_up(message)

        self.graphs.cut(add_up)
        for gradients, message in zip(buckets, messages, strict=True):
            sizes = [len(each) for each in gradients]
            torch._foreach_copy_(gradients, list(message.split(sizes)))

        def attach() -> None:
            for parameter, gradient in used.items():
                parameter.grad = gradient

        def check() -> None:
            if self.expected is not None:
                self._compare(torch.cat([flat(gradient) for gradient in used.values()]))
            attach()
            self.hooks.before_update(made, losses)

        self.graphs.cut(check)
        attach()  # for the optimizer's step

    def before_enqueue(self, queries: Tensor, positives: list[Tensor]) -> None:
        self.graphs.cut(lambda: self.hooks.before_enqueue(queries, positives))

    def _message(self, gradients: list[Tensor]) -> Tensor:
        """Return the share of a mean over the processes as DistributedDataParallel sends it."""
        joined = torch.cat(gradients)
        if self.trainer.config.runtime.gradients == "bf16":
            return joined.bfloat16() / comms.world_size()
        return joined * (1 / comms.world_size())

    def _compare(self, joined: Tensor) -> None:
        """Raise OtherGradients, on all processes, unless these are those of the eager step."""
        assert self.expected is not None
        apart = (joined - self.expected).norm() / self.expected.norm()
        self.expected = None
        if not apart <= _ALLOWED:
            self.hooks.discard()
            raise OtherGradients(f"its gradients are {float(apart):.1%} off the eager ones")
