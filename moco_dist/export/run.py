"""Write the encoder of a pretraining for another library, proved to be the same there.

  python -m moco_dist.export runs/cifar10 --to timm [--output DIR] [--encoder query|key]

The first argument is a run (its newest checkpoint), a checkpoint folder, another export, a state
dict of a torchvision ResNet, or a checkpoint of the original MoCo scripts (.pth.tar), lightly or
solo-learn (.ckpt). The targets of --to are

  torchvision   model.safetensors for torchvision.models, of the published width
  timm          model.safetensors and config.json for timm.create_model, the published width
  huggingface   a folder for transformers.ResNetModel; ImageNet stem
  detectron2    backbone.pkl for MODEL.WEIGHTS; ImageNet stem
  moco          model.pth.tar as the original MoCo scripts write it, with queue and both encoders
  onnx          model.onnx, images to features, any number at a time; any encoder

Each folder has a README.md: what the encoder is, how it was trained and measured, and the lines
that load it. The lines are run, and the features compared, before anything is kept.
`moco_dist.load_encoder(PATH)` reads the same files in Python.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import warnings
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from moco_dist.data import shapes
from moco_dist.encoders import load
from moco_dist.encoders.load import DESCRIPTION, Found
from moco_dist.errors import ConfigError, DataError, OutputError, UserError, output_errors, shown
from moco_dist.export import card as export_card
from moco_dist.export.targets import TARGETS, run_lines, same
from moco_dist.method import views

# Drawn images on which the library's model must give the encoder's features.
IMAGES = 8


def export(
    path: Path, target: str, output: Path | None = None, which: Literal["query", "key"] = "query"
) -> Path:
    """Write the encoder of `path` for `target`; return the folder, which is whole or not there.

    Raises ConfigError for an architecture that the library has no place for, MissingError where
    the library is not installed, OutputError for a folder that is taken or can't be written.
    """
    if target == "moco" and which == "key":
        raise ConfigError("--to moco holds the query and the key encoder; leave out --encoder key")
    found = load.find(path, which)
    expected = _expected(found)
    folder = output or _place(found, target if which == "query" else f"{target}-key")
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise OutputError(f"{folder}: exists and is no export of ours; give another --output DIR")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(folder):
        temporary.mkdir(parents=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the library, about its own inside
                lines = TARGETS[target](found, temporary)
                # Without lines the exporter has proved it itself, as the library is not at hand.
                for images, features in expected if lines else ():
                    same(run_lines(lines, temporary, images), features, target)
            described = export_card.description(found, which, target)
            (temporary / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
            card = export_card.text(found, which, target, lines, folder)
            (temporary / "README.md").write_text(card)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _expected(found: Found) -> list[tuple[Tensor, Tensor]]:
    """Return batches of drawn images, many and one, and the encoder's features of them."""
    pixels, _ = shapes.draw(IMAGES, max(found.fed.size, 16), seed=0)
    # Drawn in RGB; channels beyond these repeat them.
    pixels = pixels[:, torch.arange(found.architecture.channels) % 3]
    batches = [views.center(pixels[:count], found.fed) for count in (IMAGES, 1)]
    with torch.no_grad():
        expected = [(images, found.backbone(images)) for images in batches]
    if not all(features.isfinite().all() for _, features in expected):
        raise DataError(
            f"{found.place}: the encoder's features are not finite, as they can be after very few "
            "steps; export a later checkpoint"
        )
    return expected


def _place(found: Found, name: str) -> Path:
    run, path = export_card.run_directory(found.checkpoint), found.checkpoint.path
    return run / "export" / name if run else path.with_name(f"{path.name.split('.')[0]}-{name}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def main(arguments: list[str]) -> int:
    """Export what the arguments ask for; return the exit state."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--encoder", choices=("query", "key"), default="query")
    asked = parser.parse_args(arguments)
    output = asked.output.expanduser() if asked.output else None
    folder = export(asked.source.expanduser(), asked.to, output, asked.encoder)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(f"{shown(folder)}: {files}")
    return 0


def run(arguments: list[str]) -> int:
    """Return the exit state of the command, with a sentence for what went wrong."""
    try:
        return main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
