"""Images in tables of Hugging Face's datasets library: on its hub, saved by it, or in parquet.

All of them end up as Arrow files, in the library's cache or where they were saved, in which the
bytes of each encoded image lie in one piece. They are listed by file, first byte and size, like the
members of tars, so that any image is read and decoded as if it were a file, in any order and by
workers that know no tables. huggingface.co/docs/datasets describes the library.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from moco_dist.config.recipe import DataConfig
from moco_dist.data import class_names, image_folder, image_index, tar_shards
from moco_dist.data.folder_walk import holds
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.parts import part_of, require_one
from moco_dist.data.tar_members import Member
from moco_dist.errors import (
    ConfigError,
    DataError,
    MissingError,
    UnavailableError,
    UserError,
    machine_error,
    shown,
)

# Kinds of files that are read, by their endings.
KINDS = {".parquet": "parquet", ".arrow": "arrow"}
# Names of columns with a class, where no type says so or several do.
LABELS = ("label", "labels", "class", "classes", "cls", "category", "target")
# A name on the hub, and one of its configurations.
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/:]+)?")


class Cell(NamedTuple):
    """An image of a table: its bytes in an Arrow file, or the path of its own file."""

    offset: int
    size: int
    path: str


def local(root: str) -> Path | None:
    """Return the file or folder that data.root is, None for a name on the hub."""
    path = Path(os.path.expanduser(root))
    if path.exists():
        return path
    if NAME.fullmatch(root) and not root.startswith("."):
        return None
    raise MissingError(
        f"data.root={shown(root)}: no such file or folder; give a folder saved by save_to_disk, "
        "parquet or arrow files, or a name on the Hugging Face hub such as uoft-cs/cifar10"
    )


def splits(root: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the `datasets.Dataset` of each split, and warnings; what is on the hub is downloaded.

    Raises MissingError, ConfigError, DataError or UnavailableError.
    """
    path, said = local(root), tuple[str, ...]()
    try:
        import datasets as library
    except ImportError as error:
        raise MissingError(
            f"data.name=huggingface needs the datasets library ({shown(error)}); "
            "pip install 'moco_dist[huggingface]'"
        ) from error
    try:
        if path is None:
            name, _, config = root.partition(":")
            found = library.load_dataset(name, config or None)
        elif path.is_dir() and any(
            (path / f).is_file() for f in ("dataset_dict.json", "state.json")
        ):
            found = library.load_from_disk(str(path), keep_in_memory=False)
        else:
            kind, files, said = _files(path)
            found = library.load_dataset(kind, data_files=files)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of its own kinds, and of other libraries
        raise _refused(root, path, error) from error
    return found if isinstance(found, dict) else {str(found.split or "train"): found}, said


def _files(path: Path) -> tuple[str, dict[str, list[str]], tuple[str, ...]]:
    """Return the kind of a file or folder of files, the files of each split, and warnings."""
    endings = [
        end for end in KINDS if path.suffix == end or (path.is_dir() and holds(path, (end,)))
    ]
    if not endings:
        raise MissingError(
            f"data.root={shown(path)}: has no parquet or arrow files, and was not saved by "
            "save_to_disk; give data.name=folder for a folder of images"
        )
    kind = KINDS[endings[0]]
    if path.is_file():
        return kind, {"train": [glob.escape(str(path))]}, ()
    train, tests, said = tar_shards.parts(path, endings[0])
    files = {"train": train}
    for part in tests:
        name = part_of(part.names[0], anywhere=True) or part_of(part.folder.name)
        files.setdefault("validation" if name == "validation" else "test", part)
    listed = {k: [glob.escape(str(p.folder / n)) for n in p.names] for k, p in files.items()}
    return kind, listed, said


def _refused(root: str, path: Path | None, error: Exception) -> UserError:
    """Return the error of a set that the library can't load."""
    if limit := machine_error(error):
        return limit
    why, given = shown(" ".join(str(error).split())), f"data.root={shown(root)}"
    if path is not None:
        return DataError(
            f"{given}: the datasets library can't read it ({why}); save it again, by save_to_disk "
            "or to_parquet"
        )
    if isinstance(error, FileNotFoundError):  # DatasetNotFoundError is one
        return MissingError(
            f"{given}: neither a file or folder here nor a data set on the hub ({why}); check the "
            "name, and log in with `hf auth login` if it is private or gated"
        )
    if isinstance(error, ConnectionError) or "connect" in why.lower():
        offline = "offline" in why.lower()
        fix = "unset HF_HUB_OFFLINE" if offline else "check the network"
        unreachable = UnavailableError(
            f"{given}: not a file or folder here, not in the cache of the datasets library, and "
            f"the hub can't be reached ({why}); {fix}, or download it on a machine with a network"
        )
        unreachable.again = not offline
        return unreachable
    if isinstance(error, ValueError) and "config" in why.lower():
        return ConfigError(f"{given}: {why}; give one as data.root={root.partition(':')[0]}:CONFIG")
    return DataError(
        f"{given}: the datasets library can't load it ({why}); check the name, or give files"
    )


def images(table: Any, config: DataConfig, classes: tuple[str, ...] | None = None) -> ImageIndex:
    """Return the images of a `datasets.Dataset`, in the order of its rows, with their classes.

    With `classes`, which are those of the training images, images of others have no class. Raises
    ConfigError for columns that are not there or not clear, and DataError for files that can't be
    listed.
    """
    files = tuple(each["filename"] for each in table.cache_files)
    column, label = _image_column(table, config), _label_column(table, config)
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files])) if files else Path()
    members, labels = list[Member](), list[Any]()
    outside = list[str]()
    for number, file in enumerate(files):
        for cells, found in _batches(Path(file), column, label):
            for cell in cells:
                name = f"row {len(members)}"
                name += f" ({PurePath(cell.path).name})" if cell.path else ""
                members.append(Member(number, name, cell.offset, cell.size))
                outside += [os.path.abspath(cell.path)] if cell.size < 0 else []
            labels += found
    if not members or len(members) != len(table):
        raise DataError(
            f"data.root={shown(config.root)}: has {len(members):,} of {len(table):,} rows in its "
            "files; save it again by save_to_disk"
        )
    own = tuple(getattr(table.features[label], "names", ())) if label else ()
    if len(own) > 1:
        labels = [own[int(x)] if x and 0 <= int(x) < len(own) else None for x in labels]
        named = class_names.among(labels, classes or own)
    else:
        named = class_names.numbered(labels, classes)
    if outside:
        index = _of_files(config, outside, len(members), named)
    else:
        tars = tuple(os.path.relpath(file, root) for file in files)
        index = image_index.of_members(root, members, named, tars)
    return replace(index, rows=not outside)


def _of_files(
    config: DataConfig, paths: list[str], count: int, named: class_names.Numbered
) -> ImageIndex:
    """Return the images of a table that has their paths and not their bytes."""
    if len(paths) < count:
        raise DataError(
            f"data.root={shown(config.root)}: {len(paths):,} of {count:,} images are paths of "
            "other files and the rest are not; save it again by save_to_disk, which takes all in"
        )
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    states = image_folder.states(paths)
    members = [Member(0, os.path.relpath(p, root), 0, states[p].st_size) for p in paths]
    return image_index.of_members(Path(root), members, named)


def _batches(file: Path, column: str, label: str) -> Iterator[tuple[list[Cell], list[str | None]]]:
    """Yield the images and labels of each batch of rows of an Arrow file."""
    import pyarrow

    try:
        content = pyarrow.memory_map(str(file)).read_buffer()
        for batch in filter(len, pyarrow.ipc.open_stream(content)):
            cells = batch.column(column)
            paths: list[str | None] = [None] * len(batch)
            if pyarrow.types.is_struct(cells.type):
                if "path" in {field.name for field in cells.type}:
                    paths = cells.field("path").to_pylist()
                cells = cells.field("bytes")
            yield _cells(file, content, cells, paths), _labels(batch, label)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(
            f"{shown(file, 4096)}: not a readable arrow file ({shown(error)}); save it again, or "
            "clean the cache of the datasets library"
        ) from error


def _cells(file: Path, content: Any, cells: Any, paths: list[str | None]) -> list[Cell]:
    _, ends, data = cells.buffers()
    kind = np.int64 if "large" in str(cells.type) else np.int32
    edges = np.frombuffer(ends, kind)[cells.offset : cells.offset + len(cells) + 1].tolist()
    # Within the file, where the bytes begin.
    start = data.address - content.address if data is not None else 0
    if data is not None and data.size and not 0 <= start <= content.size - data.size:
        raise DataError(
            f"{shown(file, 4096)}: a compressed arrow file, in which no image can be found; save "
            "it again by save_to_disk"
        )
    null = cells.is_null().to_pylist()
    return [
        # An image that is missing has no bytes, which is found when it is decoded.
        Cell(start + first, -1 if none and path else last - first, path or "")
        for first, last, none, path in zip(edges[:-1], edges[1:], null, paths, strict=True)
    ]


def _labels(batch: Any, label: str) -> list[str | None]:
    """Return the labels of a batch as texts, None where there is none."""
    if not label:
        return [None] * len(batch)
    found = (
        None if value in (None, "", -1) else value for value in batch.column(label).to_pylist()
    )
    return [None if value is None else str(value) for value in found]


def _image_column(table: Any, config: DataConfig) -> str:
    """Return the name of the column with the images, by its type or as it is named."""
    import datasets as library
    import pyarrow

    def encoded(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    def of_bytes(kind: Any) -> bool:
        is_struct = pyarrow.types.is_struct(kind)
        return is_struct and any(field.name == "bytes" and encoded(field.type) for field in kind)

    types = {field.name: field.type for field in table.features.arrow_schema}
    declared = [name for name, f in table.features.items() if isinstance(f, library.Image)]
    structs = [name for name, kind in types.items() if of_bytes(kind)]
    found = declared or structs or [name for name, kind in types.items() if encoded(kind)]
    readable = {*structs, *(name for name, kind in types.items() if encoded(kind))}
    return _chosen(config, "image", readable, found, list(types))


def _label_column(table: Any, config: DataConfig) -> str:
    """Return the name of the column with the classes, empty if there is none."""
    import datasets as library
    import pyarrow

    if config.labels == "none":
        return ""
    types = {field.name: field.type for field in table.features.arrow_schema}
    plain = pyarrow.types
    readable = {
        name
        for name, kind in types.items()
        if plain.is_integer(kind) or plain.is_boolean(kind) or "string" in str(kind)
    } & {name for name, kind in types.items() if not plain.is_nested(kind)}
    declared = [
        n for n, feature in table.features.items() if isinstance(feature, library.ClassLabel)
    ]
    usual = [name for name in types if name.lower() in LABELS and name in readable]
    found = [name for name in usual if name in declared] or declared or usual
    if not found and not config.label_column:
        return ""
    return _chosen(config, "label", readable, found, list(types))


def _chosen(
    config: DataConfig, what: str, readable: set[str], found: list[str], every: list[str]
) -> str:
    """Return the column that is named or the only one found, or raise ConfigError."""
    named: str = getattr(config, f"{what}_column")
    given = f"data.root={shown(config.root)}"
    listed = ", ".join(shown(name) for name in every)
    require_one(f"{what}_column", named, "column", config.root, every)
    if named and named not in readable:
        rule = {"image": "encoded images", "label": "one whole number or name for each image"}[what]
        raise ConfigError(
            f"data.{what}_column={shown(named)}: this column of {given} does not hold {rule}; give "
            f"another of {listed}"
        )
    if named or len(found) == 1:
        return named or found[0]
    if not found:
        raise ConfigError(
            f"{given}: no column holds encoded images, of {listed}; save them with the feature "
            f"datasets.Image, or name one by data.{what}_column"
        )
    both = " and ".join(shown(name) for name in found)
    raise ConfigError(
        f"{given}: several columns hold {what}s, {both}; choose by data.{what}_column={found[0]}"
        f"{', or give data.labels=none' if what == 'label' else ''}"
    )
