"""BLIP-2's processor in the way of all others: pictures stand in the chat, and a chat template writes them.

Transformers' own puts the tokens of a picture before whatever text it gets, has no chat template, and takes one picture
a text, no more and no less, as the model does.
"""

from __future__ import annotations

from typing import Any

import transformers

IMAGE_TOKEN = "<image>"

# The form of BLIP-2's questions (arXiv 2301.12597, section 4.2), the picture before them.
CHAT_TEMPLATE = r"""{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set before = 'Question: ' %}{%- set after = '' %}
{%- elif message['role'] == 'assistant' %}{%- set before = ' Answer: ' %}{%- set after = eos_token %}
{%- else %}{%- set before = '' %}{%- set after = ' ' %}{%- endif %}
{%- if message['content'] is string %}
{{- before + message['content'] + after }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}{{- '<image>' }}{%- endfor %}
{{- before }}
{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}
{{- after }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' Answer:' }}{%- endif %}"""


class Blip2Processor(transformers.Blip2Processor):
    """Named like the original, because folders say which class reads them."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """As the original's, but for texts that begin with one ``<image>``. Raises ValueError for others."""
        texts = [text] if isinstance(text, str) else list(text)
        if any(each.count(IMAGE_TOKEN) != 1 or not each.startswith(IMAGE_TOKEN) for each in texts):
            raise ValueError("BLIP-2 takes one picture, which comes first")
        return super().__call__(images, [each.removeprefix(IMAGE_TOKEN) for each in texts], **options)


class _Token(str):
    """A token as a text, which is an AddedToken to transformers' own code."""

    @property
    def content(self) -> str:
        return str(self)


def adapt(processor: transformers.Blip2Processor) -> None:
    """Make ``processor`` one of this module's, in place."""
    processor.__class__ = Blip2Processor
    processor.image_token = _Token(IMAGE_TOKEN)
    processor.chat_template = processor.chat_template or CHAT_TEMPLATE
