"""Uploads an exported folder to the Hugging Face hub: one commit, after a plan that can be read.

The token is that of `hf auth login` or HF_TOKEN; only huggingface_hub reads it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from moco_dist.errors import (
    ConfigError,
    DeniedError,
    OutputError,
    UnavailableError,
    UserError,
    shown,
)

# Every file that an exporter writes: one that is on the hub and in no new export is an older one's.
OURS = {
    *("README.md", "moco_dist.json", "config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.onnx", "model.pth.tar", "backbone.pkl"),
}


@dataclass(frozen=True)
class Repository:
    """A repository of models on the hub as it was found, before anything is sent."""

    api: HfApi
    # OWNER/NAME.
    name: str
    # Whether it is private, or will be.
    private: bool
    # The commit at its head; None if the repository is yet to be created.
    head: str | None
    files: frozenset[str]

    def plan(self, folder: Path) -> str:
        """Return what `push` would do, one line for each file."""
        kind = "private" if self.private else "public"
        lines = [f"{self.api.endpoint}/{self.name}: {kind}, {'there' if self.head else 'new'}"]
        for file in sorted(folder.iterdir()):
            verb = "replaces" if file.name in self.files else "adds"
            lines.append(f"  {verb} {file.name} ({file.stat().st_size:,} bytes)")
        lines += [f"  removes {name}" for name in self.outdated(folder)]
        if kept := sorted(self.files - OURS - {".gitattributes"}):
            lines.append(f"  keeps {', '.join(map(shown, kept))}")
        return "\n".join(lines)

    def outdated(self, folder: Path) -> list[str]:
        """Return the files of an older export that a new one doesn't have."""
        return sorted((self.files & OURS) - {file.name for file in folder.iterdir()})

    def push(self, folder: Path) -> str:
        """Upload a folder in one commit and check that it has arrived; return where it is.

        Raises DeniedError, UnavailableError or OutputError; no file is on the hub then.
        """
        head = self.head
        with _sentences(self.name):
            if not sys.stderr.isatty():  # the sentence would begin in the middle of a line
                disable_progress_bars()
            if head is None:
                self.api.create_repo(self.name, private=self.private)
        made = "" if head else f"{self.name} was created and is empty; "
        with _sentences(self.name, f"no file was sent; {made}"):
            if head is None:
                head = self.api.model_info(self.name).sha
            operations = [
                *(CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())),
                *(CommitOperationDelete(name) for name in self.outdated(folder)),
            ]
            # Refused if somebody else has committed since the plan was made.
            commit = self.api.create_commit(
                self.name,
                operations,
                commit_message="Encoder exported by moco_dist",
                parent_commit=head,
            )
        with _sentences(self.name, "the files were sent, but could not be checked; "):
            info = self.api.model_info(self.name, revision=commit.oid, files_metadata=True)
        there = {file.rfilename: file.size for file in info.siblings or []}
        lost = [f.name for f in folder.iterdir() if there.get(f.name) != f.stat().st_size]
        if lost:  # a .gitignore on the hub leaves files out without a word
            raise OutputError(
                f"--push {self.name}: {', '.join(lost)} did not arrive in {commit.commit_url}; "
                "remove a .gitignore that names them there, and repeat the command"
            )
        return str(commit.commit_url)


def find(name: str, public: bool) -> Repository:
    """Return the repository NAME or OWNER/NAME of whoever is logged in, new or not.

    A new one will be private unless `public`. Raises ConfigError for a name that can't be one or a
    private repository that is to be public, DeniedError and UnavailableError.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {shown(name)} can't name a repository: give NAME or OWNER/NAME of letters, "
            "digits, '-', '_' and '.', at most 96 each, without '--', '..' and '.git' at the end"
        ) from error
    api = HfApi(library_name="moco_dist")
    with _sentences(name):
        login = api.whoami()
        full = name if "/" in name else f"{login['name']}/{name}"
        try:
            info = api.model_info(full)
        except RepositoryNotFoundError:
            owner, owners = full.partition("/")[0], [login["name"]]
            owners += [each["name"] for each in login.get("orgs", ())]
            if owner not in owners:
                raise DeniedError(
                    f"--push {full}: this login can't create it under {owner}; give a name under "
                    + " or ".join(owners)
                ) from None
            return Repository(api, full, not public, None, frozenset())
    files = frozenset(file.rfilename for file in info.siblings or [])
    if public and info.private:
        raise ConfigError(
            f"--public: {full} is private already; leave out --public, or change it at "
            f"{api.endpoint}/{full}/settings"
        )
    if files - {".gitattributes", "README.md"} and "moco_dist.json" not in files:
        raise OutputError(
            f"--push {full}: it holds {len(files)} files and is no export of ours; give another "
            "name"
        )
    return Repository(api, full, bool(info.private), info.sha, files)


@contextmanager
def _sentences(name: str, state: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError; `state` says what has happened so far."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's, about its internals
            yield
    # An upload raises RuntimeError from its cause, and an invalid answer or card is a ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _sentence(f"--push {name}", state, error) from error


def _sentence(what: str, state: str, error: BaseException) -> UserError:
    response = getattr(error, "response", None)
    if response is None and isinstance(error, RuntimeError) and error.__cause__:
        return _sentence(what, state, error.__cause__)
    status = getattr(response, "status_code", 0)
    said = getattr(error, "server_message", None) or error
    said = shown(" ".join(str(said).split()) or type(error).__name__)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        who = "nobody is logged in to the hub" if not status else "the hub does not know this login"
        return DeniedError(f"{what}: {state}{who}; run hf auth login, or set HF_TOKEN")
    if status == 403:
        fix = "use a token that may write, and a name that belongs to you or your organization"
        return DeniedError(f"{what}: {state}this login may not write there ({said}); {fix}")
    if isinstance(error, OfflineModeIsEnabled):
        return UnavailableError(f"{what}: {state}HF_HUB_OFFLINE is set; unset it to upload")
    if status in (409, 412):
        return UnavailableError(f"{what}: {state}somebody else changed it ({said}); try again")
    if status >= 500 or status == 429 or (not status and isinstance(error, HTTPError | OSError)):
        return UnavailableError(f"{what}: {state}the hub can't be reached ({said}); try again")
    refused = f"the hub refused it ({status or type(error).__name__}: {said})"
    return OutputError(f"{what}: {state}{refused}; correct that, and repeat the command")
