"""Export the encoder of a pretraining to another library, and check that its features are the same.

  python -m moco_dist.export runs/cifar10 --to timm [--output DIR] [--encoder query|key]

The first argument is a run (its newest checkpoint), a checkpoint folder, another export, a folder
that timm or transformers saved, or a file with a state dict from a library or training script.
--backbone timm/NAME names the timm model in a file that does not. The targets of --to are:

  torchvision   model.safetensors for torchvision.models; published width only
  timm          model.safetensors and config.json for timm.create_model; published width only
  huggingface   a folder for transformers.ResNetModel; ImageNet stem only
  detectron2    backbone.pkl for MODEL.WEIGHTS; ImageNet stem only
  moco          model.pth.tar like the original MoCo scripts, with queue and both encoders
  onnx          model.onnx, from any number of images to features; any encoder

Each folder gets a README.md: what the encoder is, how it was trained and measured, and the code
that loads it. Nothing is kept unless this code runs and gives the same features.
`moco_dist.load_encoder(PATH)` reads the same files in Python.

  --push NAME   list what would be uploaded to NAME or OWNER/NAME on the Hugging Face hub
  --yes         upload it, in one commit
  --public      let a new repository be public; it is private otherwise

Log in with `hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NoReturn

import torch
from torch import Tensor

from moco_dist.data import shapes
from moco_dist.encoders import load
from moco_dist.encoders.load import DESCRIPTION, Found
from moco_dist.errors import (
    ConfigError,
    DataError,
    OutputError,
    UserError,
    escape_output,
    output_errors,
    shown,
)
from moco_dist.export import hub
from moco_dist.export.card import description, named, run_directory, text
from moco_dist.export.targets import HALVES, TARGETS, refuse, run_lines, same
from moco_dist.method import views

# Drawn images whose features are compared.
IMAGES = 8


def export(
    path: Path,
    target: str,
    output: Path | None = None,
    which: Literal["query", "key"] = "query",
    backbone: str = "",
    loaded_from: str = "",
) -> Path:
    """Write the encoder of `path` for `target`, completely or not at all; return the folder.

    `backbone` names the architecture of a state dict of a timm model, and `loaded_from` the
    name on the hub that the card loads.

    Raises ConfigError if the library can't hold the architecture, MissingError if it is not
    installed, and OutputError if the folder is taken or can't be written.
    """
    if target == "moco" and which == "key":
        raise ConfigError("--to moco holds the query and the key encoder; leave out --encoder key")
    found = load.find(path, which, backbone)
    whole = found.architecture.vectors == 1 or target == "onnx"
    refuse(found, target, whole, HALVES, "onnx")
    expected = _expected(found)
    folder = output
    if folder is None:
        name = target if which == "query" else f"{target}-key"
        run, source = run_directory(found.checkpoint), found.checkpoint.path
        sibling = source.with_name(f"{named(source)}-{name}")
        folder = run / "export" / name if run else sibling
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise OutputError(f"{folder}: exists and is no export of ours; give another --output DIR")
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            made = Path(place, folder.name)
            made.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library's, about its internals
                lines = TARGETS[target](found, made)
                # Without lines the exporter has compared the features without the library.
                for images, features in expected if lines else ():
                    same(run_lines(lines, made, images), features, target)
            described = description(found, which, target)
            (made / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
            card = text(found, which, target, lines, loaded_from or folder)
            (made / "README.md").write_bytes(card.encode(errors="backslashreplace"))
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
    return folder


def _expected(found: Found) -> list[tuple[Tensor, Tensor]]:
    """Return two batches of drawn images, of many and of one, and the encoder's features."""
    pixels, _ = shapes.draw(IMAGES, max(found.fed.size, 16), seed=0)
    # The images are RGB; further channels repeat these.
    pixels = pixels[:, torch.arange(found.architecture.channels) % 3]
    batches = [views.center(pixels[:count], found.fed) for count in (IMAGES, 1)]
    with torch.no_grad():
        expected = [(images, found.backbone(images)) for images in batches]
    if not all(features.isfinite().all() for _, features in expected):
        raise DataError(
            f"{found.place}: the encoder's features are not finite, which can happen after very "
            "few steps; export a later checkpoint"
        )
    return expected


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def run(arguments: list[str]) -> int:
    """Run the command, print a sentence if it fails, and return the exit status."""
    escape_output()
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--backbone", default="")
    parser.add_argument("--encoder", choices=("query", "key"), default="query")
    parser.add_argument("--push", default="", metavar="NAME")
    for option in ("--yes", "--public"):
        parser.add_argument(option, action="store_true")
    try:
        asked = parser.parse_args(arguments)
        output = asked.output.expanduser() if asked.output else None
        source = asked.source.expanduser()
        if (asked.yes or asked.public) and not asked.push:
            raise ConfigError("--yes and --public are for an upload; give --push NAME with them")
        there = hub.find(asked.push, asked.public) if asked.push else None
        name = there.name if there else ""
        folder = export(source, asked.to, output, asked.encoder, asked.backbone, name)
        files = ", ".join(sorted(file.name for file in folder.iterdir()))
        print(f"{shown(folder)}: {files}")
        if there:
            print(there.plan(folder))
            nothing = "nothing was sent; repeat the command with --yes to upload this in one commit"
            print(f"uploaded: {there.push(folder)}" if asked.yes else nothing)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
