"""The classes of the images of a folder, from a CSV file with a row for each of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath

from moco_dist.config.recipe import DataConfig
from moco_dist.data import class_names
from moco_dist.data.image_index import ImageIndex
from moco_dist.errors import ConfigError, DataError, MissingError, counted, shown

# Names of the columns, in lower case.
FILES = ("file", "filename", "file_name", "image", "image_id", "img", "path", "id", "name")
# Those of them that may also be something else.
VAGUE = ("id", "image_id", "name")
LABELS = ("label", "labels", "class", "classes", "cls", "category", "target", "y")


class LabelTable:
    """The rows of a table: file names and labels, None where there is none."""

    def __init__(self, config: DataConfig, given: Path) -> None:
        """Read data.labels, which lies where it says or below the folder `given`.

        Raises MissingError, ConfigError or DataError.
        """
        self.given, places = given, (Path(config.labels).expanduser(), given / config.labels)
        found = [place for place in places if place.is_file()]
        if not found:
            raise MissingError(
                f"data.labels={shown(config.labels)}: no such file, here or in "
                f"{shown(given)}; give a CSV file with the columns file and label"
            )
        self.path = found[0]
        self.labels: dict[str, str | None] = {}
        # The image of each row that some image has, and the first row without one.
        self._taken: dict[str, str] = {}
        # The file of a row where another column names it, and what there is to say of columns.
        self._files: dict[str, str] = {}
        self._said: list[str] = []
        for line, name, label, file in _rows(self.path, config, self._said):
            key = os.path.normpath(name.replace("\\", "/"))
            key = os.path.relpath(key, given) if os.path.isabs(key) else key
            if self.labels.setdefault(key, label) != label:
                raise DataError(
                    f"{shown(self.path)}: line {line} gives {shown(name)} the label "
                    f"'{shown(label)}', and another line gives it '{shown(self.labels[key])}'; "
                    "keep one of them"
                )
            if file != name:
                self._files[key] = PurePath(file.replace("\\", "/")).stem
        if not self.labels:
            raise DataError(f"{shown(self.path)}: has no rows; give a file and a label in each")

    def on(self, images: ImageIndex, classes: tuple[str, ...] | None) -> ImageIndex:
        """Return images with the labels of their rows, or with -1 where they have none.

        A row names an image by its path in the folder of the set or of its part, or by its name
        alone, with or without its suffix. With `classes`, labels of others are unknown.
        """
        part = os.path.relpath(images.root, self.given)
        found = [self._label(part, name) for name in images.all_labels()]
        self._check_files(images, found)
        labels = [None if key is None else self.labels[key] for key in found]
        if not any(key is not None for key in found) and classes is None:
            raise DataError(
                f"{shown(self.path)}: none of its {len(self.labels):,} rows (the first names "
                f"{shown(next(iter(self.labels)))}) is about one of the {len(images):,} images "
                f"(the first is {shown(images.label(0), 4096)}); write file names as in the folder"
            )
        said, bare = images.warnings, [n for n, label in enumerate(labels) if label is None]
        if bare:
            said += (
                f"{shown(self.path)}: {len(bare):,} of {len(images):,} images in "
                f"{shown(images.root)} have no label there, and no class; the first is "
                f"{shown(images.label(bare[0]), 4096)}",
            )
        named = class_names.numbered(labels, classes)
        labelled = replace(images, labels=images.labels.new_tensor(named.labels), warnings=said)
        return replace(labelled, classes=named.classes, unknown=named.unknown)

    def unused(self) -> tuple[str, ...]:
        """Return a sentence about rows that no image has, if there are any."""
        rest = [key for key in self.labels if key not in self._taken]
        if not rest:
            return tuple(self._said)
        return (
            *self._said,
            f"{shown(self.path)}: {len(rest):,} of {len(self.labels):,} rows name no image that is "
            f"read; the first is {shown(rest[0], 4096)}",
        )

    def _check_files(self, images: ImageIndex, keys: list[str | None]) -> None:
        """Raise ConfigError if a row with an image's key names the file of another image."""
        stems = [PurePath(name).stem for name in images.all_labels()]
        known = set(stems)
        for stem, key in zip(stems, keys, strict=True):
            other = self._files.get(key or "", stem)
            if other != stem and other in known:
                raise ConfigError(
                    f"{shown(self.path)}: its row {shown(key)} is about {shown(stem)} by one "
                    f"column and about {shown(other)} by another; choose the column of the files "
                    "by data.image_column"
                )

    def _label(self, part: str, name: str) -> str | None:
        """Return the key of the row of an image; DataError if it is that of another image too."""
        whole = os.path.normpath(os.path.join(part, name))
        paths = (PurePath(whole), PurePath(name), PurePath(name).name)
        wanted = [str(each) for path in paths for each in (path, PurePath(path).with_suffix(""))]
        key = next((each for each in wanted if each in self.labels), None)
        if key is not None and (other := self._taken.setdefault(key, whole)) != whole:
            raise DataError(
                f"{shown(self.path)}: its row {shown(key)} is about two images, {shown(other)} and "
                f"{shown(whole)}; write the paths of the files below {shown(self.given)}"
            )
        return key


def _rows(
    path: Path, config: DataConfig, said: list[str]
) -> Iterator[tuple[int, str, str | None, str]]:
    """Yield the number of each line, the image, the label, None if it is empty, and the file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            separator = max("\t;,", key=first.count)
            lines = csv.reader(file, delimiter=separator, strict=True)
            columns: tuple[int, int, int] | None = None
            for row in lines:
                if not any(cell.strip() for cell in row):
                    continue
                if columns is None:
                    columns, is_header = _columns(path, [c.strip() for c in row], config, said)
                    if is_header:
                        continue
                if len(row) <= max(columns):
                    raise DataError(
                        f"{shown(path)}: line {lines.line_num} has "
                        f"{counted(len(row), 'column')} and needs {max(columns) + 1}; "
                        "give a file and a label in each line"
                    )
                name, label, also = (row[number].strip() for number in columns)
                yield lines.line_num, name, label or None, also
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{shown(path)}: can't be read ({shown(error)}); save it as CSV in UTF-8, with the "
            "columns file and label"
        ) from error


def _columns(
    path: Path, first: list[str], config: DataConfig, said: list[str]
) -> tuple[tuple[int, int, int], bool]:
    """Return the numbers of the columns of images, labels and files, and whether a line names them.

    The images' column is that of the files too, unless it may be something else. Adds to `said`.
    """
    images, labels = (
        [number for number, name in enumerate(first) if name.lower() in usual]
        for usual in (FILES, LABELS)
    )
    places = list[int | None]()
    for key, named, found in (
        ("image", config.image_column, images),
        ("label", config.label_column, labels),
    ):
        if named and named not in first:
            raise ConfigError(
                f"data.{key}_column={shown(named)}: no such column in {shown(path)}, whose first "
                f"line is {shown(', '.join(first))}; give one of these"
            )
        places.append(first.index(named) if named else next(iter(found), None))
    image, label = places
    if image is None and label is None:
        return (0, 1, 0), False
    if len(first) == 2:
        image = 1 - (label or 0) if image is None else image
        label = 1 - image if label is None else label
    if image is None or label is None or image == label:
        key = "image" if image is None else "label"
        raise ConfigError(
            f"{shown(path)}: which of its columns {shown(', '.join(first))} is the {key}'s is not "
            f"clear; choose by data.{key}_column"
        )
    if others := [shown(first[n]) for n in labels if n != label and not config.label_column]:
        said.append(
            f"{shown(path)}: the labels are those of the column {shown(first[label])}, not of "
            f"{', '.join(others)}; data.label_column chooses"
        )
    vague = first[image].lower() in VAGUE and not config.image_column
    file = next((n for n in images if vague and first[n].lower() not in VAGUE), image)
    return (image, label, file), True
