"""CUDA graphs of a trainer's step, cut where something else is called in each step."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from moco_dist.method.batch_norm import batch_norms
from moco_dist.pretrain.device_clock import DeviceClock
from moco_dist.pretrain.trainer import Trainer


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
