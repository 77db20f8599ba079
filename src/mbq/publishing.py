"""A written folder as a repository on the Hub. Not ``push.py``: it would replace the function ``mbq.push``.

The token comes from where huggingface_hub looks for it (HF_TOKEN, then what ``hf auth login`` stored), and goes nowhere
but to the Hub.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from mbq import __version__
from mbq.checkpoint.folder import write_file
from mbq.errors import MBQError
from mbq.hub import NAME, SETTINGS

RECORD = "recipe.yaml"  # what every folder of mbq quantize and mbq export holds
BELONGS = (*SETTINGS, "report.html", "*.safetensors", "*.gguf")
# Of an earlier model in the repository: transformers would take a single file before the new one's shards.
REPLACED = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
SIGN_IN = "run hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Pushed:
    """What ``push`` did.

    address   of the repository
    commit    that holds the files
    files     that were uploaded, or were there already
    left_out  names in the folder that are no part of a model
    """

    address: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"Uploaded {len(self.files)} files to {self.address} (commit {self.commit[:12]})."]
        if self.left_out:
            lines.append(f"Left out, as no part of a model: {', '.join(self.left_out)}.")
        return "\n".join(lines)


def check_push(repository: str, private: bool = False) -> None:
    """Raise MBQError unless the user's token may write to ``repository``: before hours of work, not after.

    A token of fine grain does not tell whether it may make a repository that does not exist yet; only the upload does.
    """
    name, _ = parts(repository)
    try:
        _check(_api(), name, private)
    except _Failed as failed:
        raise MBQError(f"Nothing can be uploaded to {repository}: {failed}.") from failed.__cause__


def push(folder: str | Path, repository: str, private: bool = False) -> Pushed:
    """Upload a folder that mbq wrote, its model's files and no others.

    repository  "owner/name", or "owner/name@branch"; made where it does not exist
    private     whether a new repository is; one that exists must be

    Where the card says how to load the model, it then says so by the repository's name, in ``folder`` too.

    Raises MBQError for a folder that mbq did not write, for a repository that the token may not write to, and where the
    upload fails; what was uploaded by then need not be uploaded again.
    """
    folder = Path(folder)
    name, branch = parts(repository)
    files, left_out = model_files(folder)
    api = _api()
    again = shlex.join(["mbq", "push", str(folder), repository, *(["--private"] if private else [])])
    try:
        _check(api, name, private)
        if branch is None:  # the repository's name loads its main branch
            _name_in_card(folder / "README.md", name)
        commit = _upload(api, folder, files, name, branch, private)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted; {folder} is complete, and its upload goes on with: {again}") from None
    except _Failed as failed:
        raise MBQError(
            f"{folder} is complete, but was not uploaded to {repository}: {failed}; upload it again with: {again}"
        ) from failed.__cause__
    address = f"{api.endpoint}/{name}" + (f"/tree/{branch}" if branch else "")
    return Pushed(address, commit, files, left_out)


def _check(api: HfApi, name: str, private: bool) -> None:
    owner = name.partition("/")[0]
    with _reasons():
        user = api.whoami()
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise _Failed(f"the token may only read; {SIGN_IN} that may write")
    places = _namespaces(user)
    if owner.lower() not in (place.lower() for place in places):
        raise _Failed(f"the token's user may not write to {owner}, but to {' and '.join(places)}; choose another OWNER")
    try:
        with _reasons():
            public = api.repo_info(name).private is False
            api.auth_check(name, write=True)
    except _Failed as failed:
        if isinstance(failed.__cause__, RepositoryNotFoundError):
            return  # it will be made
        raise
    if private and public:
        raise _Failed(f"{name} exists and is public; leave --private out, or choose another name")


def _namespaces(user: Mapping[str, Any]) -> list[str]:
    """Where the user may have repositories: under their own name, and in organizations where they do more than read."""
    members = [org for org in user.get("orgs") or () if org.get("roleInOrg") not in ("read", "no_access")]
    return [place["name"] for place in (user, *members) if place.get("name")]


def _upload(api: HfApi, folder: Path, files: Sequence[str], name: str, branch: str | None, private: bool) -> str:
    """The commit that then holds ``files``."""
    with _reasons():
        api.create_repo(name, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=f"Upload a model made by mbq {__version__}",
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns=REPLACED if any(file.endswith(".safetensors") for file in files) else None,
        )
    return commit.oid


def parts(repository: str) -> tuple[str, str | None]:
    """The name and the branch of "owner/name" or "owner/name@branch". Raises MBQError for anything else."""
    name, _, branch = repository.partition("@")
    if not re.fullmatch(NAME, repository):
        raise MBQError(f"{repository!r} is no repository; give OWNER/NAME, or OWNER/NAME@BRANCH.")
    return name, branch or None


def model_files(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names in ``folder`` that belong to a model of mbq's, and the others.

    Raises MBQError where mbq did not write the folder, and for links, which may lead anywhere.
    """
    if not folder.is_dir():
        raise MBQError(f"There is no folder {folder}; give one that mbq quantize or mbq export wrote.")
    if not (folder / RECORD).is_file() or not (folder / "README.md").is_file():
        raise MBQError(f"{folder} was not written by mbq (it lacks {RECORD} or README.md); hf upload takes any folder.")
    entries = sorted(folder.iterdir())
    files = [each for each in entries if any(fnmatch(each.name, pattern) for pattern in BELONGS)]
    files = [each for each in files if not each.name.startswith(".") and not each.is_dir()]
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise MBQError(f"{file} is a link, or no file; put a copy in its place.")
    names = tuple(file.name for file in files)
    return names, tuple(entry.name for entry in entries if entry.name not in names)


def _name_in_card(card: Path, name: str) -> None:
    text = card.read_text(encoding="utf-8")
    loaded = re.search(r'mbq\.load\("([^"\n]+)"', text)
    if loaded is None or loaded[1] == name:
        return
    old = re.escape(loaded[1])
    text = re.sub(f'"{old}"', f'"{name}"', text)
    text = re.sub(rf"^(    (?:mbq generate|vllm serve) ){old}(?=\s)", rf"\g<1>{name}", text, flags=re.MULTILINE)
    write_file(card, text.encode())


def _api() -> HfApi:
    return HfApi(library_name="mbq", library_version=__version__)


class _Failed(Exception):
    """Why a call of the Hub failed, in words that fit behind a colon; its cause is the library's exception."""


@contextmanager
def _reasons() -> Iterator[None]:
    """The library lets pass what its HTTP client, its upload threads and the system raise: any of it ends an upload."""
    try:
        yield
    except Exception as error:
        raise _Failed(_reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token; {SIGN_IN}"
    refused = error
    while not isinstance(refused, HfHubHTTPError | ValueError) and refused.__cause__ is not None:
        refused = refused.__cause__  # what the thread of one file met
    response = getattr(refused, "response", None)
    if response is None:
        said = " ".join(str(refused).split())[:300].rstrip(".")
        return said if isinstance(refused, ValueError) else f"{type(refused).__name__} ({said})"
    status = response.status_code
    said = " ".join((getattr(refused, "server_message", None) or "").split())[:300].rstrip(".")
    answer = f"the Hub answers {status}" + (f" ({said})" if said else "")
    if status == 401:
        return f"{answer}, so it does not know the token; {SIGN_IN}"
    if status == 403:
        return f"{answer}, so the token may not write there; {SIGN_IN} that may"
    return answer
