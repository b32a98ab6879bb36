"""The images and labels in a tar of WebDataset's layout, and what of it is left out and why.

The name of a member is cut at the first dot of its base name: what stands before it is the key of a
sample, the rest is the suffix, so 0001.seg.png is the file "seg.png" of sample 0001. Of the images
of a sample, that with a bare suffix (0001.jpg) is read. Where none has one, each is read by itself:
photo.left.jpg and photo.right.jpg, or names with dots in them. github.com/webdataset/webdataset
describes the layout; the rule of keys is its `base_plus_ext`.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from moco_dist.data.folder_walk import ignored
from moco_dist.data.image_file import EXTENSIONS, UNREAD
from moco_dist.errors import DataError, shown

# Endings of the files with a sample's class.
LABELS = (".cls", ".json")
# Keys of a sample's class in its .json, in order of preference.
JSON_KEYS = ("cls", "label", "class")
# Files that are longer hold no label.
MAX_LABEL_BYTES = 2**20
# Zeros after the end mark that tar adds to fill a record, with plenty to spare.
MOST_ZEROS = 2**20
# Suffixes of several parts that a warning shows.
SHOWN = 3


class Member(NamedTuple):
    """An image in a tar: the number of the tar, its name there, its first byte and its size."""

    tar: int
    name: str
    offset: int
    size: int


class Name(NamedTuple):
    """The name of a member by WebDataset's rule: key.stem.ending, mostly with an empty stem."""

    key: str
    stem: str
    # In lower case, with its dot.
    ending: str


@dataclass
class Notes:
    """What was left out of some tars, or read in a way that may surprise."""

    # For each reason, how many members and the first of them.
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    # Suffixes of several parts, and how many images have each.
    suffixes: dict[str, int] = field(default_factory=dict)
    # Sentences about whole tars.
    tars: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, path: Path, name: str) -> None:
        """Count a member that is left out."""
        count, first = self.left_out.get(reason, (0, f"{shown(path, 4096)}: {shown(name)}"))
        self.left_out[reason] = count + 1, first

    def sentences(self, root: Path) -> tuple[str, ...]:
        """Return what there is to say about the tars of a folder."""
        said = [
            f"{shown(root)}: left out {count:,} {reason}; the first is {first}"
            for reason, (count, first) in self.left_out.items()
        ]
        if self.suffixes:
            shares = [f"{count:,} {shown(s)}" for s, count in self.suffixes.items()][:SHOWN]
            more = ", ..." if len(self.suffixes) > SHOWN else ""
            said.append(
                f"{shown(root)}: {sum(self.suffixes.values()):,} images have a suffix of several "
                f"parts, since WebDataset cuts a name at its first dot ({', '.join(shares)}{more});"
                " each of them is read, with the label of the same name or of its sample"
            )
        return (*said, *self.tars)


def split(name: str) -> Name:
    """Return key, stem and ending of a member's name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, suffix = file.partition(".")
    stem, dot, ending = suffix.rpartition(".")
    return Name(folder + slash + key, stem, f".{ending}".lower() if suffix or dot else "")


class _Samples:
    """The samples of a tar while it is read: members of one key, wherever they stand.

    A key that comes again after others, with a suffix that it has already, begins a new sample, as
    in the library, which takes neighbours for a sample.
    """

    def __init__(self) -> None:
        self.images: list[tuple[int, Name, Member]] = []
        # Of each sample, labels by stem.
        self.labels: list[dict[str, str]] = []
        self._newest: dict[str, int] = {}
        self._seen: set[tuple[int, str, str]] = set()
        self._last = -1

    def place(self, name: Name) -> tuple[int, bool]:
        """Return the number of a member's sample, and whether that has such a member already."""
        sample = self._newest.get(name.key)
        known = sample is not None and (sample, name.stem, name.ending) in self._seen
        if sample is None or (known and sample != self._last):
            sample = self._newest[name.key] = len(self.labels)
            self.labels.append({})
        again = (sample, name.stem, name.ending) in self._seen
        self._seen.add((sample, name.stem, name.ending))
        self._last = sample
        return sample, again

    @property
    def repeated(self) -> int:
        """How many samples have the key of another."""
        return len(self.labels) - len(self._newest)


def read(path: Path, number: int, labelled: bool, notes: Notes) -> list[tuple[Member, str | None]]:
    """Return the images of a tar, in order, each with the label in its sample, if there is one.

    What is left out is added to `notes`.

    Raises DataError for a tar that is damaged or incomplete, and for a label that can't be read.
    """
    samples = _Samples()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = os.path.getsize(path)
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                name = split(member.name)
                # Hidden files, and those of systems, are no part of a set.
                if member.isdir() or any(map(ignored, member.name.removeprefix("./").split("/"))):
                    continue
                if member.offset_data + member.size > end and member.isreg():
                    raise tarfile.ReadError(f"it ends within {shown(member.name)}")
                sample, again = samples.place(name)
                if name.ending in EXTENSIONS:
                    if again or not member.isreg():
                        reason = "images with the name of the one before them in their tar"
                        reason = reason if again else "images that are only links to other members"
                        notes.leave_out(reason, path, member.name)
                        continue
                    place = Member(number, member.name, member.offset_data, member.size)
                    samples.images.append((sample, name, place))
                elif name.ending in UNREAD:
                    notes.leave_out(f"{name.ending} images, which are not read", path, member.name)
                elif labelled and name.ending in LABELS and member.size < MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    label = _label(name.ending, content.read() if content else b"", path, member)
                    known = samples.labels[sample]
                    if label is not None and (name.ending == ".cls" or name.stem not in known):
                        known[name.stem] = label
            notes.tars += require_end(path, file, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{shown(path, 4096)}: not a readable tar ({shown(error)}); data.name=shards needs "
            "complete tar files that are not compressed"
        ) from error
    if samples.repeated:
        notes.tars.append(
            f"{shown(path, 4096)}: {samples.repeated:,} samples have the key of another one, and "
            "are read as samples of their own; make sure that they are not the same images"
        )
    return [
        (member, _label_of(name, samples.labels[sample]))
        for sample, name, member in _chosen(samples, path, notes)
    ]


def require_end(path: Path, file: IO[bytes], offset: int) -> list[str]:
    """Return a sentence if many zeros stand from `offset` on, where tarfile took a tar for ended.

    Raises ReadError unless zeros, and nothing else, stand there: tarfile takes a damaged header,
    and a missing one, for the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark, so it was not copied or written whole")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {offset:,} is damaged")
    while rest := file.read(2**20):
        if any(rest):
            raise tarfile.ReadError(
                f"it goes on after its end mark at byte {offset:,}, as tars that are joined do"
            )
    if (zeros := file.tell() - offset) <= MOST_ZEROS:
        return []
    said = f"{shown(path, 4096)}: {zeros:,} bytes of zeros stand at its end"
    return [f"{said}; make sure that it was copied whole"]


def _chosen(samples: _Samples, path: Path, notes: Notes) -> list[tuple[int, Name, Member]]:
    """Return the images that are read: one of each sample, or of each stem if all have stems."""
    bare = {sample for sample, name, _ in samples.images if not name.stem}
    chosen: list[tuple[int, Name, Member]] = []
    taken: set[tuple[int, str]] = set()
    for sample, name, member in samples.images:
        suffix = f".{name.stem}{name.ending}"
        if name.stem and sample in bare:
            what = f"files {shown(suffix)} of samples with an image of their own"
            notes.leave_out(what, path, member.name)
        elif (sample, name.stem) in taken:
            notes.leave_out("second images of a sample", path, member.name)
        else:
            taken.add((sample, name.stem))
            chosen.append((sample, name, member))
            if name.stem:
                notes.suffixes[suffix] = notes.suffixes.get(suffix, 0) + 1
    return chosen


def _label_of(name: Name, known: dict[str, str]) -> str | None:
    """Return the label of the same name, of the sample, or the only one there is."""
    stems = (name.stem, "", *(known if len(known) == 1 else ()))
    return next((known[stem] for stem in stems if stem in known), None)


def _label(ending: str, content: bytes, path: Path, member: tarfile.TarInfo) -> str | None:
    try:
        text = content.decode().strip()
        if ending == ".cls":
            return text or None
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(path, 4096)}: {shown(member.name)} is no label ({shown(error)}); make the tar "
            "again, or give data.labels=none"
        ) from error
    fields = found if isinstance(found, dict) else {}
    label = next((fields[key] for key in JSON_KEYS if key in fields), None)
    return str(label) if isinstance(label, int | str) else None
