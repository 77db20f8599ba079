"""The model's chat template, which is a program of whoever made the folder: run with bounds on time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbq.errors import MBQError
from mbq.limits import memory_limit, time_limit

SECONDS = 10  # templates take milliseconds
MEMORY = 2**29


def render(processor: Any, chat: Sequence[dict[str, Any]], where: str, add_generation_prompt: bool = False) -> str:
    """``chat`` as text by the processor's chat template.

    transformers runs templates in a sandbox of jinja2: no files, no Python objects but the chat's own. What loops or
    grows without end there is stopped here.

    where  the conversation's place for messages to the user: "calib.jsonl, line 7"

    Raises MBQError for a template that is stopped, and for one that fails.
    """
    mend = "the folder's template is broken or hostile, so take the model from another place"
    slow = f"{where}: the chat template does not end within {SECONDS} seconds; {mend}."
    large = f"{where}: the chat template takes more than {MEMORY >> 20} MiB; {mend}."
    try:
        with memory_limit(MEMORY, large), time_limit(SECONDS, slow):
            return processor.apply_chat_template(
                list(chat), add_generation_prompt=add_generation_prompt, tokenize=False
            )
    except MBQError:
        raise
    except Exception as error:  # a program fails in as many ways as there are
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MBQError(f"{where}: the model's chat template refuses the row ({reason}); mend it or drop it.") from error
