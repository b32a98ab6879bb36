"""The run as TensorBoard shows it: event files in runs/NAME/tensorboard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL import Image


class TensorBoardRun:
    """A service for a feed (see `feed.py`), whose thread calls its methods.

    Each launch writes the whole history from metrics.jsonl, and purges what earlier ones wrote.
    """

    name = "TensorBoard"
    resends = True

    def __init__(self, accelerator: Accelerator, directory: Path) -> None:
        self.accelerator, self.directory = accelerator, directory
        self._tracker: Any = None

    def begin(self) -> int:
        """Start new event files; return the first step to log."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise RuntimeError(f"{error}; pip install 'moco_dist[tensorboard]'") from error
        folder = self.directory / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        # purge_step makes an open TensorBoard forget the old files, which it has in memory.
        self._tracker = TensorBoardTracker(folder.name, self.directory, purge_step=0)
        self._tracker.start()
        self.accelerator.trackers.append(self._tracker)
        return 0

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        """Log the metrics after `step` steps, with the pictures of that step."""
        self._tracker.log(dict(metrics), step=step)
        for path in sorted((self.directory / "media" / f"step_{step:08d}").glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            name = f"media/{path.stem}"
            self._tracker.writer.add_image(name, pixels, step, dataformats="HWC")

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Do nothing: TensorBoard can't show single figures or files."""

    def finish(self, status: int) -> None:
        """Write what is left and close the files."""
        self._tracker.finish()

    def leave(self) -> None:
        """Do nothing."""
