"""What a run takes, in bytes and in operations, counted from shapes: of a loaded model or of one without weights."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mbq.architecture import Binding, BlockKind, LinearGroup
from mbq.equalization import rounds
from mbq.group import _TOKENS_AT_ONCE, token_wise
from mbq.methods import METHODS
from mbq.recipe import Recipe

# Of the speed of one square matrix product: what the products of a run reach, with all that is done in between.
# Measured on the demo's model, float32 on one CPU core: 0.5 to 0.6.
EFFICIENCY = 0.5
SECONDS_OF_TRIAL = 0.2

Lengths = Sequence[tuple[int, int]]  # of each calibration batch: samples, and tokens of the longest


@dataclass(frozen=True)
class Cost:
    """Bytes, and multiplications and additions (two for each weight and token).

    weights      of the float model
    apart        of all but its blocks, and of the largest block
    packed       of the quantized checkpoint
    working      what one step makes on the device at most, beside weights and what is stored: on the safe side
    inputs       the inputs of all blocks, their gradients and calls: stored for the sensitivity
    traces       one block's hidden states and what its groups see, stored for the search
    copies       of the tokens that a search evaluates, in memory wherever the traces are
    sensitivity, search   operations
    """

    weights: int
    apart: int
    packed: int
    working: int
    inputs: int
    traces: int
    copies: int
    sensitivity: int
    search: int


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers; tied ones once."""
    return sum(each.nbytes for each in {id(each): each for each in (*module.parameters(), *module.buffers())}.values())


def cost_of(binding: Binding, lengths: Lengths, recipe: Recipe, packed: int) -> Cost:
    """For these calibration batches; ``packed`` are the bytes of the quantized checkpoint."""
    shapes, method = Shapes(binding), METHODS[recipe.method]
    weights, blocks = weight_bytes(binding.model), [weight_bytes(block) for block in binding.blocks]
    searches = method.equalize is not None
    return Cost(
        weights=weights,
        apart=weights - sum(blocks) + max(blocks),
        packed=packed,
        working=working_bytes(shapes, lengths, recipe),
        inputs=input_bytes(shapes, lengths) if method.weighs else 0,
        traces=trace_bytes(shapes, lengths, recipe) * (2 if recipe.distorted_input else 1) if searches else 0,
        copies=copied_bytes(shapes, lengths, recipe) if searches else 0,
        sensitivity=sensitivity_operations(shapes, lengths) if method.weighs else 0,
        search=search_operations(shapes, lengths, recipe) if searches else 0,
    )


class Shapes:
    """Widths of a model whose blocks are alike; those of another kind (convolutions) count as attentions.

    itemsize   bytes of a number
    blocks     how many
    groups     of a block
    sizes      [out, in] of each linear of a block, by its path
    experts    path of a block's experts, None without a mixture; share: the part of them that a token goes to
    hidden     channels of the hidden states
    intermediate  channels of the MLP, of a mixture's experts that one token goes to together
    attention  channels that o_proj reads: heads times their width
    head_dim   of one head
    head       [out, in] of the linear that makes logits: none has more outputs
    eager      whether attention is transformers' plain code, which makes all scores
    """

    def __init__(self, binding: Binding) -> None:
        usual, first = _usual(binding)
        weights = {path: binding.module(first, path).get_parameter("weight") for path in usual.linears()}
        self.sizes = {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}
        self.itemsize = weights[usual.attn_output].itemsize
        self.blocks, self.groups = len(binding.blocks), usual.groups
        self.hidden, self.attention = self.sizes[usual.attn_output]
        holder: Any = binding.module(first, usual.attn_output.rpartition(".")[0])
        self.head_dim = int(getattr(holder, "head_dim", self.attention))
        config: Any = getattr(holder, "config", binding.model.config)
        self.eager = getattr(config, "_attn_implementation", "eager") == "eager"
        down = [group for group in usual.groups if group.routed is not None]
        chosen = min(config.num_experts_per_tok, len(down)) if down else 1
        self.experts = down[0].routed[0] if down and down[0].routed else None
        self.share = chosen / len(down) if down else 1.0
        self.intermediate = chosen * self.sizes[down[0].linears[0] if down else usual.mlp_output][1]
        kept = [binding.model.get_submodule(name).get_parameter("weight").shape for name in binding.kept]
        self.head = max(((shape[0], shape[1]) for shape in kept), key=lambda shape: shape[0])

    def inside(self, module: str) -> int:
        """Weights of the linears in a module of a block, "" for all of them; one linear is a module too."""
        return sum(out * width for _, out, width in self._inside(module))

    def used(self, module: str) -> float:
        """Those that a token is multiplied by: of a mixture, its share."""
        return sum(
            out * width * (self.share if self.experts and path.startswith(f"{self.experts}.") else 1)
            for path, out, width in self._inside(module)
        )

    def _inside(self, module: str) -> Iterator[tuple[str, int, int]]:
        for path, (out, width) in self.sizes.items():
            if not module or f"{path}.".startswith(f"{module}."):
                yield path, out, width

    def searched(self, recipe: Recipe) -> list[LinearGroup]:
        """Without o_proj where v_proj has fewer rows and nothing asks for the fold."""
        return [
            group
            for group in self.groups
            if recipe.gqa_fold or group.name != "o" or self.sizes[group.prev][0] == self.sizes[group.linears[0]][1]
        ]

    def share_of(self, group: LinearGroup) -> float:
        """The part of the tokens that the group sees: of an expert's, what is sent there on average."""
        return 1.0 if group.routed is None else self.share


def _usual(binding: Binding) -> tuple[BlockKind, int]:
    """The kind of most of the blocks that have an attention, and the number of the first such block."""
    attends = [kind for kind in binding.kinds if kind.attn_output == binding.architecture.attn_output]
    usual = Counter(attends).most_common(1)[0][0]
    return usual, binding.kinds.index(usual)


def token_count(lengths: Lengths) -> int:
    return sum(samples * tokens for samples, tokens in lengths)


def longest_batch(lengths: Lengths) -> int:
    return max((samples * tokens for samples, tokens in lengths), default=0)


def compared(lengths: Lengths, recipe: Recipe, share: float = 1.0) -> list[tuple[int, int]]:
    """Candidates and tokens of each round of a search, as if every token weighed something; of a ``share`` of them."""
    return rounds(None if recipe.parity else recipe.search_tokens or None, math.ceil(share * token_count(lengths)))


def evaluated_tokens(lengths: Lengths, recipe: Recipe) -> int:
    """The most tokens on which a round compares its candidates."""
    return max(tokens for _, tokens in compared(lengths, recipe))


def call_bytes(shapes: Shapes, lengths: Lengths) -> int:
    """What a block is called with beside hidden states: positions, their cosines and sines, a mask against padding."""
    rotary = token_count(lengths) * (8 + 2 * shapes.head_dim * shapes.itemsize)
    each = shapes.itemsize if shapes.eager else 1  # a number to add, or whether a token is seen
    return rotary + sum(n * tokens**2 * each for n, tokens in lengths if n > 1 or shapes.eager)


def input_bytes(shapes: Shapes, lengths: Lengths) -> int:
    """The inputs of all blocks, the output of the last, and the gradient passed back: a batch has it twice for once."""
    numbers = (shapes.blocks + 2) * token_count(lengths) + longest_batch(lengths)
    return numbers * shapes.hidden * shapes.itemsize + call_bytes(shapes, lengths)


def trace_bytes(shapes: Shapes, lengths: Lengths, recipe: Recipe) -> int:
    """What goes into the first block, into a block and out of it, and what its groups read and make of the tokens that
    are evaluated: of whole batches, with their calls, in an attention.
    """
    tokens, calls = token_count(lengths), call_bytes(shapes, lengths)
    numbers, kept_calls = 3 * tokens * shapes.hidden, calls
    for group in shapes.searched(recipe) if tokens and METHODS[recipe.method].token_weights is not None else ():
        kept = kept_tokens(lengths, recipe, token_wise(group), shapes.share_of(group))
        numbers += kept * (shapes.sizes[group.linears[0]][1] + shapes.hidden)
        kept_calls += 0 if token_wise(group) else calls * kept // tokens
    return numbers * shapes.itemsize + kept_calls


def kept_tokens(lengths: Lengths, recipe: Recipe, alone: bool, share: float = 1.0) -> int:
    """Of all comparisons of a group together. Where tokens are not treated ``alone``, those of whole batches.

    Experts that get unequal shares keep no more, together, than experts that get the same.
    """
    tokens, each = math.ceil(share * token_count(lengths)), [count for _, count in compared(lengths, recipe, share)]
    if not alone:
        each = [math.ceil(count / tokens * len(lengths)) * longest_batch(lengths) for count in each]
    return min(tokens, sum(each))


def copied_bytes(shapes: Shapes, lengths: Lengths, recipe: Recipe) -> int:
    """Inputs and targets of the widest group that is evaluated token by token."""
    widest = max(shapes.hidden, shapes.intermediate) + shapes.hidden
    return evaluated_tokens(lengths, recipe) * widest * shapes.itemsize


def working_bytes(shapes: Shapes, lengths: Lengths, recipe: Recipe) -> int:
    """The largest of three, each an upper bound of what is alive at one time.

    head      logits of a batch, their gradient and their float32 copies at the answers (half of the tokens)
    backward  what autograd keeps of a block: about ten tensors of its width, four of attention's, six of the MLP's
    search    one candidate: float32 copies of the largest weight, all weights of its group, and what the attention
              makes of a batch or the MLP of its tokens, with float32 copies of what is compared and quantized
    """
    if recipe.method == "rtn":
        lengths = ()
    item, hidden, inner = shapes.itemsize, shapes.hidden, shapes.intermediate
    longest = longest_batch(lengths)
    squares = max((samples * tokens**2 for samples, tokens in lengths), default=0)
    scores = squares * (shapes.attention // shapes.head_dim) * (2 * item + 4) if shapes.eager else 0
    head = longest * shapes.head[0] * (3 * item + 5)
    backward = longest * item * (10 * hidden + 4 * shapes.attention + 6 * inner) + 16 * longest * hidden + 2 * scores
    largest = max(out * width for out, width in shapes.sizes.values())
    group = max(sum(shapes.inside(path) for path in each.linears) for each in shapes.groups)
    weights = (12 + 2 * item) * largest + item * group
    quantized = 12 if recipe.numbers.activations is not None else 0
    at_once = min(_TOKENS_AT_ONCE, evaluated_tokens(lengths, recipe))
    mlp = at_once * (item * (4 * inner + 2 * hidden) + 12 * hidden + quantized * inner)
    attention = longest * (item * (8 * shapes.attention + 2 * hidden) + (12 + quantized) * hidden) + scores
    return max(head if METHODS[recipe.method].weighs else 0, backward, weights + max(mlp, attention))


def attention_operations(shapes: Shapes, lengths: Lengths) -> int:
    """Scores and the sum of values, of one block."""
    return sum(4 * samples * tokens**2 * shapes.attention for samples, tokens in lengths)


def sensitivity_operations(shapes: Shapes, lengths: Lengths) -> int:
    """Every block forward, again from its stored input, and backward to activations alone; the head both ways.

    A linear costs the same backward as forward, as no weight has a gradient; the attention's two products cost twice.
    """
    tokens = token_count(lengths)
    block = int(3 * 2 * shapes.used("") * tokens) + 4 * attention_operations(shapes, lengths)
    return shapes.blocks * block + 2 * 2 * shapes.head[0] * shapes.head[1] * tokens


def search_operations(shapes: Shapes, lengths: Lengths, recipe: Recipe) -> int:
    """Every block forward, and the inspected module of each group for every candidate (SmoothQuant has none).

    Blocks with a mixture run up to its experts once more.
    """
    tokens, attention = token_count(lengths), attention_operations(shapes, lengths)
    block = 2 * shapes.used("") * tokens + attention
    if shapes.experts:
        block += 2 * (shapes.used("") - shapes.used(shapes.experts)) * tokens + attention
    for group in shapes.searched(recipe) if recipe.method != "smoothquant" and tokens else ():
        rounded = compared(lengths, recipe, shapes.share_of(group))
        evaluated = sum(number * count for number, count in rounded)
        mixes = group.part == "attn" and group.inspect not in shapes.sizes
        weights = shapes.inside(group.inspect) if group.routed else shapes.used(group.inspect)
        block += 2 * weights * evaluated + (attention * evaluated // tokens if mixes else 0)
    return shapes.blocks * int(block)


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, tried out on the device for a moment."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    done, started = -1, 0.0  # the first product also sets the library up
    while done < 1 or time.perf_counter() - started < SECONDS_OF_TRIAL:
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
        started = started if done else time.perf_counter()
    return done * 2 * size**3 / (time.perf_counter() - started)


def seconds(cost: Cost, operations_a_second: float) -> float:
    """About how long sensitivity and search take.

    Left out are reading, loading, the vision tower, the rounding of weights, moving blocks and activations to the
    device and back, and writing: on a machine whose disk or bus is the bottleneck a run takes longer.
    """
    return (cost.sensitivity + cost.search) / (EFFICIENCY * operations_a_second)
