"""Answers are found in whatever a chat template writes and however a tokenizer cuts it, or else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import InternVLProcessor, PreTrainedTokenizerFast

from mbq.calibration import NO_LABEL, calibration_batches
from mbq.errors import MBQError
from tests.chats import one, row, said, vision_ids
from tests.tiny import ALL_FAMILY_NAMES, CORPUS, tiny

TEMPLATES = {
    # Spaces around the answer that are not its own, and no end of turn.
    "llava 1.5": ("USER: {q} ASSISTANT: {a} ", "A red circle."),
    # The answer is trimmed, and its end of turn stands right after it.
    "trimmed": ("<|im_start|>u\n{q}<|im_end|>\n<|im_start|>a\n{a}<|im_end|>\n", "A red circle.<|im_end|>"),
}


def with_template(kind: str) -> Any:
    _, processor = tiny("internvl")
    frame, _ = TEMPLATES[kind]
    head, middle = frame.split("{q}")
    middle, tail = middle.split("{a}")
    strip = "|trim" if kind == "trimmed" else ""
    processor.chat_template = (
        "{%- for m in messages %}{%- if m['role'] == 'user' %}{{- HEAD }}{%- for c in m['content'] %}"
        "{%- if c['type'] == 'image' %}{{- '<IMG_CONTEXT>' }}{%- else %}{{- c['text'] }}{%- endif %}{%- endfor %}"
        "{{- MIDDLE }}{%- else %}{{- m['content'][0]['text']STRIP }}{{- TAIL }}{%- endif %}{%- endfor %}"
    ).replace("STRIP", strip)
    for name, text in (("HEAD", head), ("MIDDLE", middle), ("TAIL", tail)):
        processor.chat_template = processor.chat_template.replace(name, "'" + text.replace("\n", "\\n") + "'")
    return processor


@pytest.mark.parametrize("kind", TEMPLATES)
def test_other_templates(kind: str) -> None:
    processor = with_template(kind)
    batch = one(
        row([0, 1, "What? A red circle."], "A red circle. " if kind == "trimmed" else "A red circle."), processor
    )
    assert said(processor, batch).strip() == TEMPLATES[kind][1]
    assert int(batch.vision.sum()) == 8  # pictures side by side, with nothing written between them


def test_generation_blocks_change_nothing() -> None:
    """Templates may mark what the assistant says; some mark a line break before it, and leave the end of turn out."""
    _, processor = tiny("internvl")
    said_plain = one(row([0, "What?"], "A star."), processor)
    marked = (
        "{%- if m['role'] == 'assistant' %}{%- generation %}{{- '\\n' + c['text'] }}{%- endgeneration %}{%- else %}"
    )
    processor.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m['role'] }}{%- for c in m['content'] %}"
        + marked
        + "{{- '\\n<IMG_CONTEXT>' if c['type'] == 'image' else '\\n' + c['text'] }}{%- endif %}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
    )
    batch = one(row([0, "What?"], "A star."), processor)
    assert said(processor, batch) == "A star.<|im_end|>"
    assert torch.equal(batch.labels[batch.labels != NO_LABEL], said_plain.labels[said_plain.labels != NO_LABEL])


def test_a_template_that_drops_earlier_answers_is_refused() -> None:
    _, processor = tiny("qwen2_vl")
    processor.chat_template = "{% for c in messages[-1]['content'] %}{{ c['text'] }}{% endfor %}"
    with pytest.raises(MBQError, match=r"line 1: the answer of message 2 cannot be told apart"):
        one(row("What?", "A star.", "Sure?", "Yes."), processor)


def test_a_template_that_refuses_the_row_is_a_sentence() -> None:
    _, processor = tiny("qwen2_vl")
    processor.chat_template = "{{ raise_exception('no system message\n please') }}"
    with pytest.raises(
        MBQError, match=r"line 1: the model's chat template refuses the row \(no system message please\)"
    ):
        one(row("What?", "A star."), processor)


class Slow:
    """A tokenizer without character offsets, like the original one of InternVL2."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.tokenizer(text, **options)


class SlowProcessor:
    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, Slow(processor.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **options: Any) -> Any:
        return self.processor(**options)


@pytest.mark.parametrize("family", ALL_FAMILY_NAMES)
def test_a_tokenizer_without_offsets_gives_the_same_labels_or_refuses(family: str) -> None:
    _, processor = tiny(family)
    asked = row([0, "What?"], "A star.", "And?", "Yes")
    if family == "llava_onevision":  # "assistant A star." joins the space before the answer with its first letter
        with pytest.raises(MBQError, match="use a fast tokenizer"):
            one(asked, SlowProcessor(processor))
    else:
        assert torch.equal(one(asked, SlowProcessor(processor)).labels, one(asked, processor).labels)


def sentencepiece_processor() -> Any:
    """Words with the space before them ("▁red"), and a beginning-of-text token that the tokenizer adds."""
    special = ["<unk>", "<s>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=dict(zip(names, special[3:], strict=True)),
    )
    _, other = tiny("internvl")
    return InternVLProcessor(other.image_processor, tokenizer, other.video_processor, image_seq_length=4)


@pytest.mark.parametrize("start", ["", "<s>"], ids=["the tokenizer begins the text", "the template begins the text"])
def test_a_tokenizer_of_words_with_their_spaces(start: str) -> None:
    processor = sentencepiece_processor()
    processor.chat_template = start + (
        "{%- for m in messages %}{{- 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{%- for c in m['content'] %}"
        "{{- '<IMG_CONTEXT> ' if c['type'] == 'image' else c['text'] }}{%- endfor %}"
        "{{- ' ' if m['role'] == 'user' else '</s>' }}{%- endfor %}"
    )
    batches = calibration_batches(
        [row(["What is it?", 0, "red?"], "A red circle.", "Sure?", "yes"), row("How many?", "three")],
        processor,
        vision_ids(processor),
        num_samples=2,
        batch_size=2,
        seed=2,
    )
    ids, labels = batches[0].inputs["input_ids"], batches[0].labels
    assert sorted(said(processor, batches[0], index).replace("▁", "").replace(" ", "") for index in (0, 1)) == [
        "Aredcircle.</s>yes</s>",
        "three</s>",
    ]
    tokens = processor.tokenizer.convert_ids_to_tokens(labels[labels != NO_LABEL])
    assert "▁A" in tokens  # the space that stands before the answer is part of its first token
    assert [sequence.count(1) for sequence in ids.tolist()] == [1, 1]
    # The padding is </s>, too, and has no role.
    assert (labels[batches[0].inputs["attention_mask"] == 0] == NO_LABEL).all()
    assert (batches[0].inputs["attention_mask"] == 0).any()
