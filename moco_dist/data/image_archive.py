"""A tar or zip file of images, unpacked once on each machine."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tarfile
import zipfile
import zlib
from pathlib import Path

from moco_dist.errors import DataError, OutputError, shown

logger = logging.getLogger(__name__)


def is_archive(path: Path) -> bool:
    """Return whether a file is a tar (compressed or not) or a zip, by its content."""
    try:
        return tarfile.is_tarfile(path) or zipfile.is_zipfile(path)
    except (EOFError, OSError, zlib.error):
        return True  # compressed and damaged: `unpack` says so


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack what stays within `folder`; TarError for an entry that would leave it."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Before Python 3.11.4 tarfile has no filters: files and folders alone, and no links.
    for entry in tar:
        place = Path(os.path.normpath(folder / entry.name))
        if not place.is_relative_to(folder) or not (entry.isfile() or entry.isdir()):
            raise tarfile.TarError(f"{entry.name} leaves the folder, or is neither file nor folder")
        (place if entry.isdir() else place.parent).mkdir(parents=True, exist_ok=True)
        if (content := tar.extractfile(entry)) is not None:
            with content, place.open("xb") as file:
                shutil.copyfileobj(content, file)


def unpack(archive: Path, cache: Path) -> Path:
    """Return the folder below `cache` that holds the content of `archive`, unpacked if need be.

    An entry that would leave the folder, or is neither file nor folder nor a link within it, ends
    the unpacking. Raises DataError for such an archive or a damaged one, OutputError without space.
    """
    stat = archive.stat()
    told_apart = f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    folder = cache / f"unpacked_{hashlib.sha256(told_apart.encode()).hexdigest()[:32]}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                _extract(tar, part)
        else:
            with zipfile.ZipFile(archive) as unzipped:
                unzipped.extractall(part)  # which leaves out drives, roots and ".."
        try:
            part.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # another machine that shares the cache was faster
                raise
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise DataError(
            f"data.root={shown(archive)}: can't be unpacked ({shown(error)}); make the archive "
            "again, from within its folder, or give data.root=FOLDER"
        ) from error
    except OSError as error:
        raise OutputError(
            f"{shown(cache)}: {shown(archive)} can't be unpacked there "
            f"({shown(error.strerror or error)}); free it, or choose data.cache=FOLDER"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
