"""The part of docs/engines.md that ``make test-engines`` measures, from what it stored: nothing is run here.

python -m benchmarks.engines_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results_page import markdown

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
BEGIN = "## Run by make test-engines\n"
FAMILIES = ("internvl", "llava_onevision", "qwen2_vl")
SCHEMES = ("W8A8", "W4A16", "W4A16_SYM", "W4A8", "W3A16")

HEAD = """
Written by `make test-engines`, which fails where the folders are not run as said here. Versions: {versions}.
Its tests took {seconds} s.

An engine's error is that of its logits for the first token of {questions} answers, relative to their norm, from those
of the folder's rounded weights computed in float32 (at W8A8 with rounded activations); beside it the same from the
float model's logits. "Linears" is the largest error of a linear of the first block on equal inputs. "Answers" are equal
to those of greedy decoding in float32; one that is not has a token whose lead is less than twice the largest error of a
logit.
"""

AMX = """
On a CPU with AMX vLLM by default rounds what every 4-bit layer reads to 8 bits, W4A16 too. InternVL at W4A16 then has
linears off by {products:.2%} and logits by {logits:.1%}. `VLLM_CPU_INT4_W4A8=0` in its environment, with which the
table was measured, turns it off.
"""

HTTP = """
`vllm serve internvl-W4A16` on the loopback interface, with vLLM's defaults, was asked about a picture over HTTP:
"{question}" It answered "{answer}", which is right.
"""

ALONE = """
transformers alone, in the version above and by the plain call, has logits off by at most {worst}.
That is of 8 questions a folder.
"""


def page() -> str:
    """The part of docs/engines.md that begins with ``BEGIN``."""
    report = json.loads(STORED.read_text(encoding="utf-8"))
    folders = report["folders"]
    head = HEAD.format(
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        seconds=report["seconds"],
        questions=next(each["questions"] for each in folders.values() if "questions" in each),
    )
    parts = [BEGIN, head.lstrip(), table(folders)]
    if "amx" in report:
        parts.append(AMX.format(**report["amx"]).rstrip())
    parts.append(HTTP.format(**report["http"]).rstrip())
    errors: dict[str, list[float]] = {}
    for name, error in report["transformers"].items():
        errors.setdefault(name.rpartition("-")[2], []).append(error)
    worst = ", ".join(f"{max(errors[scheme]):.1%} at {scheme}" for scheme in SCHEMES if scheme in errors)
    parts.append(ALONE.format(worst=worst).rstrip())
    return "\n".join(parts) + "\n"


def table(folders: dict[str, dict[str, Any]]) -> str:
    """A row a folder that was run, and one for each that vLLM refused."""
    rows = []
    for family in FAMILIES:
        for scheme in SCHEMES:
            found = folders[f"{family}-{scheme}"]
            if "refused" in found:
                rows.append([family, scheme, f"refused: {found['refused']}", "", "", "", ""])
                continue
            answers = f"{found['equal']} of {found['questions']}"
            errors = f"{found['logits']:.1%}", f"{found['to float']:.1%}", f"{found['products']:.2%}"
            rows.append([family, scheme, f"`{found['kernel']}`", *errors, answers])
    header = ["model", "scheme", "vLLM's kernel", "error of logits", "from the float model", "linears", "answers"]
    return markdown(header, rows)


def main() -> None:
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    PAGE.write_text(before + page(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
