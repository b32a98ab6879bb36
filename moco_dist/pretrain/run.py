"""Pretrain an image encoder without labels by MoCo v1 to v3, SimCLR or a memory bank."""

from __future__ import annotations

from pathlib import Path

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.data import datasets, run_lists
from moco_dist.distributed import comms, faults, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.encoders import load
from moco_dist.errors import DataError, NumbersError, StoppedError
from moco_dist.method import encoder
from moco_dist.pretrain import alarms
from moco_dist.pretrain.banner import announce, summarize
from moco_dist.pretrain.loop import loop, owes, save
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import saving, session
from moco_dist.runs.session import Session
from moco_dist.tracking import start


def run(config: PretrainConfig, stop: StopRequests | None = None) -> None:
    """Pretrain from where the run directory stands to the end, or to a request to stop."""
    opened = session.start(config, stop)
    trainer = build(config, opened)
    total = min(trainer.total_steps, config.stop_at_step or trainer.total_steps)
    splits = trainer.splits
    can_classify = bool(splits.train.classes) and len(splits.validation) > 0
    announce(trainer, opened, can_classify)
    done = trainer.step == trainer.total_steps
    if trainer.step >= total and (opened.finished or not owes(trainer, total, can_classify)):
        start.nothing_left(opened, trainer.step, total)
        if done and not opened.finished:
            # The launch before this one ended between its last two files.
            session.finish(opened, {})
        return
    jump = session.begin(opened, trainer.schedule)
    peers.from_main(lambda: datasets.note_left_out(opened.directory, splits))
    with start.tracker(opened, total, "pretrain") as tracker, faults.agreeing():
        watch = None
        if comms.is_main():
            path = opened.directory / "metrics.jsonl"
            watch = alarms.Watch(config, len(splits.train), path, *tracker.sinks[:2])
            tracker.sinks.append(watch.sink)
            if jump:
                watch.note(trainer.step, alarms.OTHER_LENGTH, jump)
        try:
            results = loop(trainer, opened, total, tracker, can_classify)
            if done := trainer.step == trainer.total_steps:
                tracker.conclude(results, write_encoder(trainer, opened.directory))
        except (StoppedError, NumbersError, DataError) as error:
            if isinstance(error, DataError) and not error.shared:
                raise
            if watch and isinstance(error, NumbersError):
                watch.ended(trainer.step, error)
            # All processes are here, with the state after a whole step.
            run_lists.share(opened.directory, splits.train, splits.test)
            if trainer.step:
                save(trainer, opened, wait=True)
            place = f"saved after step {trainer.step:,} of {trainer.total_steps:,}"
            session.end_early(opened, error, place if trainer.step else "nothing to save")
    if done:
        session.finish(opened, results)
    summarize(trainer, opened, results)


def build(config: PretrainConfig, opened: Session) -> Trainer:
    """Return the trainer of a run as its newest checkpoint has it, or as a run begins."""
    saved = opened.resumed
    peers.together(lambda: encoder.check(config.encoder, config.views.size))
    begun = run_lists.Begun(opened.directory, saved.piece("data") if saved else None)
    splits = datasets.load(config.data, config.encoder.channels, begun)
    trainer = Trainer(config, opened.accelerator, splits, opened.resumed)
    if config.init_from and not opened.resumed:
        run, path = opened.directory, Path(config.init_from).expanduser()
        peers.from_main(lambda: load.note_start(run, path, *trainer.initial))
    return trainer


def write_encoder(trainer: Trainer, directory: Path) -> Path | None:
    """Write the encoder alone, if it is to be uploaded; return its folder."""
    if not trainer.config.tracking.upload_encoder:
        return None
    state, config = trainer.moco.state_dict(), to_dict(trainer.config)
    return peers.from_main(lambda: saving.write_encoder(directory, trainer.step, state, config))
