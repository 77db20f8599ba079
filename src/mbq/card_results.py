"""What a model card says of measurements: that there are none yet, and how to make them; or what a run found."""

from __future__ import annotations

from pathlib import Path

HEADING = "## Results"


def unmeasured(folder_name: str, base_model: str) -> str:
    """The section of a model that nobody has evaluated, with the commands that evaluate it and fill the section."""
    run, baseline = (f"runs/{Path(name).name}" for name in (folder_name, base_model.partition("@")[0]))
    return f"""{HEADING}

Not measured yet. The first command asks this model and the one that it was made from the same questions (`--tasks` or
`--data` says which), the second writes here what it found:

    mbq evaluate {folder_name} --baseline {base_model} --output runs
    mbq card {folder_name} --results {run} --baseline {baseline}
"""
