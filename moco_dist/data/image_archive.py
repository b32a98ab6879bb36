"""A tar or zip file of images, unpacked once on each machine."""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import shutil
import socket
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from moco_dist.data import tar_members
from moco_dist.errors import DataError, OutputError, shown

logger = logging.getLogger(__name__)

# What reading a damaged archive raises, besides an OSError without a number.
DAMAGES = (
    *(tarfile.TarError, zipfile.BadZipFile, RuntimeError),
    *(EOFError, zlib.error, lzma.LZMAError),
)
# Bytes of an archive up to which its names are listed in a moment.
MOST_LISTED = 2**31


def is_archive(path: Path) -> bool:
    """Return whether a file's content is a tar (compressed or not) or a zip."""
    try:
        return tarfile.is_tarfile(path) or zipfile.is_zipfile(path)
    except (*DAMAGES, OSError):
        return True  # compressed and damaged, which `unpack` reports


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack a tar into `folder`; TarError for an entry that would leave it."""
    if hasattr(tarfile, "data_filter"):
        return tar.extractall(folder, filter="data")
    # Before Python 3.11.4 tarfile has no filters, so links are refused.
    for entry in tar:
        place = Path(os.path.normpath(folder / entry.name))
        if not place.is_relative_to(folder) or not (entry.isfile() or entry.isdir()):
            raise tarfile.TarError(f"{entry.name} leaves the folder, or is neither file nor folder")
        (place if entry.isdir() else place.parent).mkdir(parents=True, exist_ok=True)
        if (content := tar.extractfile(entry)) is not None:
            with content, place.open("xb") as file:
                shutil.copyfileobj(content, file)


def _finish(archive: Path, tar: tarfile.TarFile) -> None:
    """Raise what `tar_members.require_end` does, and what a compressed file's checksum shows."""
    assert tar.fileobj, "an open tar"
    for sentence in tar_members.require_end(archive, cast(IO[bytes], tar.fileobj), tar.offset):
        logger.warning(sentence)


def _entries(unzipped: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the entries of a zip, with the separators of folders that some Windows tools leave."""
    entries = unzipped.infolist()
    for entry in entries:
        if entry.create_system == 0:
            entry.filename = entry.filename.replace("\\", "/")
    return entries


def outline(archive: Path, folder: Path) -> bool:
    """Write the names of the files of an archive, as empty files; False if it is too large.

    Raises DataError for a damaged archive.
    """
    if archive.stat().st_size > MOST_LISTED:
        return False
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                names = [entry.name for entry in tar if entry.isfile()]
                _finish(archive, tar)
        else:
            with zipfile.ZipFile(archive) as unzipped:
                names = [entry.filename for entry in _entries(unzipped) if not entry.is_dir()]
    except (*DAMAGES, OSError) as error:
        raise _damaged(archive, error) from error
    for name in names:
        file = Path(os.path.normpath(folder / name.lstrip("/")))
        with suppress(OSError):  # a name that is too long, or also that of a folder
            if file.is_relative_to(folder):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    return True


def place(archive: Path, cache: Path) -> Path:
    """Return the folder below `cache` for the content of `archive` as it is now."""
    stat = archive.stat()
    identity = f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return cache / f"unpacked_{hashlib.sha256(identity.encode()).hexdigest()[:32]}"


def unpack(archive: Path, cache: Path) -> Path:
    """Return the folder below `cache` with the content of `archive`, unpacking it if necessary.

    Raises DataError for an archive that is damaged or has an entry other than files, folders and
    links within it, and OutputError if it can't be written.
    """
    folder = place(archive, cache)
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                _extract(tar, part)
                _finish(archive, tar)
        else:
            with zipfile.ZipFile(archive) as unzipped:
                for entry in _entries(unzipped):
                    unzipped.extract(entry, part)  # which leaves out drives, roots and ".."
        try:
            part.rename(folder)  # completely or not at all
        except OSError:
            if not folder.is_dir():  # or else another machine that shares the cache was faster
                raise
    except DAMAGES as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if error.errno is None:  # of gzip or bzip2
            raise _damaged(archive, error) from error
        raise OutputError(
            f"{shown(cache)}: {shown(archive)} can't be unpacked there "
            f"({shown(error.strerror or error)}); free it, or choose data.cache=FOLDER"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _damaged(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"data.root={shown(archive)}: can't be unpacked ({shown(error)}); make the archive "
        "again, from within its folder, or give data.root=FOLDER"
    )
