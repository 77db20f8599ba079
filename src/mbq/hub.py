"""Models on the Hub as folders of one commit, so that what is checked is what is loaded, and what runs is known."""

from __future__ import annotations

import errno
import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from mbq.errors import MBQError

NAME = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"  # "owner/model", perhaps with a revision
LICENSES = ["LICENSE*", "LICENCE*", "NOTICE*"]
# No pickle is even downloaded.
SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "recipe.yaml", "README.md", *LICENSES]


def hub_folder(name: str, weights: bool) -> Path:
    """Where the files of "owner/model" or "owner/model@revision" lie in the Hub's cache: the folder of one commit.

    weights  whether safetensors are wanted, too

    Raises MBQError where ``name`` is no such name, and where the Hub does not give it.
    """
    from mbq.checkpoint.safety import weight_files  # torch, which an upload does not need

    if not re.fullmatch(NAME, name):
        raise MBQError(f"There is no folder {name}; give the folder of a Hugging Face model, or its name on the Hub.")
    try:
        folder = _settings(name)
        if weights:
            snapshot_download(name.partition("@")[0], revision=folder.name, allow_patterns=weight_files(folder))
    except (OSError, ValueError, HTTPError) as error:  # which all of the Hub's errors are
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise MBQError(f"{name} is neither a folder here nor a model that the Hub gives; check the name.") from error
    return folder


@cache  # one commit for the whole process, whatever happens on the Hub meanwhile
def _settings(name: str) -> Path:
    repository, _, revision = name.partition("@")
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=SETTINGS))
