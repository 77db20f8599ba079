"""A loaded model as lmms-eval calls one, and the plug-in by which ``lmms-eval --model mbq`` finds it.

This module imports lmms-eval, which comes with ``pip install 'mbq[evaluate]'``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string

import mbq
from mbq.chat import render
from mbq.errors import MBQError
from mbq.evaluation.greedy import replies
from mbq.evaluation.likelihood import likelihoods
from mbq.evaluation.questions import prepare
from mbq.evaluation.task_options import generation, stopped
from mbq.images import image_source
from mbq.progress import Progress, silent
from mbq.rows import Row

BATCHES_READ = 8  # of requests, whose pictures are in memory at once and which are sorted by length
LIKELIHOODS_READ = 512

Documents = dict[str, Any]  # task -> split -> documents


class ChatModel(lmms):
    """Tasks that let the model write; a request is a chat, in which pictures stand where the task puts them."""

    is_simple = False

    def __init__(self, model: Any, processor: Any, batch_size: int = 32, progress: Progress = silent) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.batch_size, self.progress = batch_size, progress

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> ChatModel:
        """``--model_args pretrained=DIR,dtype=bfloat16,kernel=auto``: what ``mbq.load`` takes, ``pretrained`` first."""
        given = simple_parse_args_string(arg_string)
        others = additional_config or {}
        folder = given.pop("pretrained", None)
        if folder is None:
            raise MBQError("Name the model's folder: --model_args pretrained=DIR.")
        size = given.pop("batch_size", others.get("batch_size")) or 1
        given.setdefault("device", others.get("device") or "auto")
        processor = mbq.load_processor(folder, bool(given.get("trust_remote_code", False)))
        return cls(mbq.load(folder, **given), processor, int(size) if str(size).isdigit() else 1)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes to each request, batched by the options that tasks ask for."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(self._options(request), sort_keys=True, default=str), []).append(index)
        texts: dict[int, str] = {}
        step = BATCHES_READ * self.batch_size
        for indices in kinds.values():
            options, stops = generation(self._options(requests[indices[0]]))
            for start in range(0, len(indices), step):
                some = indices[start : start + step]
                rows = [self._row(requests[i]) for i in some]
                prompts = [render(self.processor, row.chat, row.where, add_generation_prompt=True) for row in rows]
                found = replies(self.model, self.processor, rows, prompts, options, self.batch_size)
                texts |= {i: stopped(text, stops) for i, text in zip(some, found, strict=True)}
                self.progress("lmms-eval: write", len(texts), len(requests), "")
        return [texts[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise MBQError("lmms-eval's chat interface has no likelihoods; run the task with --force_simple.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise MBQError(f"{requests[0].task_name} asks in several rounds, which mbq does not do; leave the task out.")

    def _options(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2] or {})

    def _row(self, request: Instance) -> Row:
        _, messages_of, _, index, task, split = request.args
        where = f"{task}, document {index}"
        messages = messages_of(self.task_dict[task][split][index])
        return Row([_message(message, where) for message in messages], where, task)


class SimpleModel(ChatModel):
    """Tasks that compare likelihoods of given answers; the pictures stand before the text."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """A pair a request: the mean loss of the answer's tokens, and whether greedy decoding would write them.

        The first is what lmms-eval's own models return and its tasks expect: the least is the best. White space at the
        ends of an answer, which separates it from its question in a plain text, is no part of an answer in a chat.
        The pair is wrapped, because lmms-eval 0.7.3 makes a string of a pair that is not.
        """
        found: list[GenerationResult] = []
        for start in range(0, len(requests), LIKELIHOODS_READ):
            rows = list(self._answered(requests[start : start + LIKELIHOODS_READ]))
            means, greedy = likelihoods(self.model, prepare(rows, self.processor, self.batch_size))
            found += map(GenerationResult, zip(means.tolist(), greedy.tolist(), strict=True))
            self.progress("lmms-eval: likelihoods", len(found), len(requests), "")
        return found

    def _answered(self, requests: Sequence[Instance]) -> Iterator[Row]:
        pictures: dict[Any, Any] = {}
        for request in requests:
            context, answer, *rest = request.args
            if rest:  # else a likelihood without a document: mutual information's
                visuals_of, index, task, split = rest
                document = self.task_dict[task][split][index]
                answer = answer(document) if callable(answer) else answer
                key = (task, split, index)
                if key not in pictures:  # a document's answers share its pictures' tokens
                    pictures[key] = visuals_of(document) or []
                row = _asked(context, pictures[key], f"{task}, document {index}", task)
            else:
                row = _asked(context, [], "a likelihood", request.task_name)
            said = {"role": "assistant", "content": [{"type": "text", "text": str(answer).strip()}]}
            yield Row([*row.messages, said], row.where, row.task)

    def _options(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[1] or {})

    def _row(self, request: Instance) -> Row:
        context, _, visuals_of, index, task, split = request.args
        visuals = visuals_of(self.task_dict[task][split][index]) or []
        return _asked(context, visuals, f"{task}, document {index}", task)


def manifest() -> ModelManifest:
    """The entry point ``lmms_eval.models``: ``lmms-eval --model mbq --model_args pretrained=DIR``."""
    here = f"{__name__}."
    return ModelManifest("mbq", simple_class_path=f"{here}SimpleModel", chat_class_path=f"{here}ChatModel")


def _asked(text: str, visuals: Sequence[Any], where: str, task: str | None) -> Row:
    content = [_picture(visual, where) for visual in visuals]
    return Row([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], where, task)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    readers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "text": lambda part: {"type": "text", "text": part["text"]},
        "image": lambda part: _picture(part["url"], where),
    }
    for part in content:
        if part["type"] not in readers:
            raise MBQError(
                f"{where} shows a {part['type']}; mbq evaluates on pictures and text, so leave the task out."
            )
    return {"role": message["role"], "content": [readers[part["type"]](part) for part in content]}


def _picture(visual: Any, where: str) -> dict[str, Any]:
    if isinstance(visual, dict):  # a video's or a sound's
        raise MBQError(f"{where} shows what is no picture; mbq evaluates on pictures and text, so leave the task out.")
    return {"type": "image", "image": image_source(visual, Path(), where)}
