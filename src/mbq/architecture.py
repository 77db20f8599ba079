"""An architecture is data: where the blocks are, which linears share an input, and what comes before them.

``bind`` ties one to a loaded model and checks that every name exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mbq.errors import MBQError
from mbq.experts import split_experts

EACH = ".*."  # in a path: of every expert


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same input. Names are paths inside the block ("self_attn.q_proj").

    name     "qkv", "o", "gate_up" or "down", in convolutions "in" or "out": the key in search.json
    prev     what is folded into: the norm, or the linear whose output rows are this group's input channels; "" where
             there is neither, and the group is quantized as it is
    linears  the linears that read the input; those that the architecture keeps are folded, but not quantized
    inspect  the module whose output the search compares (arXiv 2412.19509); "" is the block
    part     "attn" or "mlp": whose sensitivity weighs the loss
    section  where prev makes several times as many rows as the group has channels, one after the other (GLM's
             gate_up_proj: the gate's, then up's), the number of those that are the group's channels times something
    routed   the experts' path in the block, and the number of the one whose tokens alone the group reads
    mixture  some of its linears are those of experts, each of which reads the tokens that the router sends there
    tokens   its linears read a row a token; those of a cross-attention's keys and values read the picture's states

    "mlp.experts.*.up_proj" stands for that linear of every expert of a mixture, and a group whose ``prev`` has a star
    for one group an expert, "down.0" and so on. ``BlockKind.of`` writes them out, and sets the last two fields.
    """

    name: str
    prev: str
    linears: tuple[str, ...]
    inspect: str
    part: str
    section: int | None = None
    routed: tuple[str, int] | None = None
    mixture: bool = False
    tokens: bool = True


@dataclass(frozen=True)
class BlockKind:
    """What a decoder block holds, as names; the fields are those of ``Architecture``."""

    groups: tuple[LinearGroup, ...]
    attn_output: str
    mlp_output: str

    def linears(self) -> tuple[str, ...]:
        """Paths inside a block of every linear that a group names."""
        return tuple(path for group in self.groups for path in group.linears)

    def paths(self) -> tuple[str, ...]:
        """Every path that is named."""
        named = [path for group in self.groups for path in (group.prev, group.inspect, *group.linears)]
        return tuple(dict.fromkeys([*named, self.attn_output, self.mlp_output]))

    def of(self, block: nn.Module) -> BlockKind:
        """The same with the experts of ``block`` by their numbers, where it has a mixture."""
        if not any(EACH in path for path in self.linears()):
            return self
        groups = [made for group in self.groups for made in _by_expert(group, block)]
        return replace(self, groups=tuple(groups))


@dataclass(frozen=True)
class Architecture:
    """One model class as names; ``bind`` checks that every one of them exists.

    model_class     class name of the model, as in config.json's ``architectures``
    models          what is published with it, for tables
    blocks          path of the ModuleList of decoder blocks, from the model
    groups          the groups of a block, in the order of the forward pass
    attn_output     path in a block of the linear whose output carries the attention sensitivity (o_proj)
    mlp_output      the same for the MLP (down_proj)
    vision_tower    path of the vision tower, from the model
    projector       path of the projector, or None where it is inside the tower
    kept            what stays 16-bit although it holds linears (tower, projector, lm_head), as compressed-tensors'
                    ``ignore``: exact names, or "re:" expressions that match module names and checkpoint names alike
    vision_tokens   attributes of the config (or the model) that hold the ids of vision tokens ("image_token_id"); none
                    where pictures are no tokens, but read by blocks with cross-attention, which text alone leaves out
    fused_qkv       the group "qkv" is one fused linear with interleaved rows (InternLM2's wqkv)
    norm_offset     what the blocks' norms add to their weight before they multiply by it (Gemma: 1)
    others          further kinds of blocks in the same list (LFM2's convolutions)
    packs           the decoder needs no more than embeddings, positions and a mask, so that `mbq evaluate` may pack
                    questions about one picture; not where the model adds to hidden states, or lets pictures see ahead
    """

    model_class: str
    models: str
    blocks: str
    groups: tuple[LinearGroup, ...]
    attn_output: str
    mlp_output: str
    vision_tower: str
    projector: str | None
    kept: tuple[str, ...]
    vision_tokens: tuple[str, ...]
    fused_qkv: bool = False
    norm_offset: float = 0.0
    others: tuple[BlockKind, ...] = ()
    packs: bool = False

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The kinds of blocks, the one that the fields of the architecture describe first."""
        return (BlockKind(self.groups, self.attn_output, self.mlp_output), *self.others)


@dataclass(frozen=True)
class Binding:
    """A model and the architecture that describes it; every name in here exists.

    kinds           of each block
    vision_tokens   ids of the image and video tokens; none where pictures are no tokens
    names           full paths of the linears that are quantized, block by block
    kept            full paths of the linears that stay 16-bit
    """

    architecture: Architecture
    model: nn.Module
    blocks: nn.ModuleList
    kinds: tuple[BlockKind, ...]
    vision_tokens: frozenset[int]
    names: tuple[str, ...]
    kept: tuple[str, ...]

    def module(self, block: int, path: str) -> nn.Module:
        """The module at ``path`` of a block; "" is the block itself."""
        return self.blocks[block].get_submodule(path)

    def name(self, block: int, path: str) -> str:
        """The full path, from the model, of ``path`` in a block."""
        return f"{self.architecture.blocks}.{block}.{path}"

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.vision_tower)

    def linears(self, ignore: Sequence[str] = ()) -> list[str]:
        """The linears to quantize without those that ``ignore`` (see ``matches``) names.

        A pattern may name a linear that is kept anyway (lm_head); MBQError for one that matches no linear at all.
        """
        everything = self.names + self.kept
        for pattern in ignore:
            if not any(matches(name, pattern) for name in everything):
                raise MBQError(
                    f"--ignore {pattern} matches no linear of the model; give a name such as {self.names[0]}, "
                    f"the end of one, or a regular expression such as re:.*{self.names[-1].rsplit('.', 1)[-1]}."
                )
        return [name for name in self.names if not any(matches(name, pattern) for pattern in ignore)]

    def ignore(self, ignore: Sequence[str] = ()) -> list[str]:
        """What compressed-tensors' ``ignore`` has to say: the architecture's own patterns, then the user's.

        A plain name becomes an expression for the end of a name, since checkpoint names and module names begin
        differently (transformers matches one, vLLM the other).
        """
        own = list(self.architecture.kept)
        users = [p if p.startswith("re:") or p in own else f"re:(.*\\.)?{re.escape(p)}$" for p in ignore]
        return own + [pattern for pattern in users if pattern not in own]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means the linear at this full path: "re:" and an expression, or the end of the name."""
    if not pattern.startswith("re:"):
        return name == pattern or name.endswith("." + pattern)
    try:
        return re.match(pattern[3:], name) is not None
    except re.error as error:
        raise MBQError(f"{pattern} is not a regular expression ({error}); mend it.") from error


def bind(model: nn.Module) -> Binding:
    """Find the architecture of ``model``: by its class's name, else by the structure of its blocks.

    The experts of a mixture become linears, over the same numbers (``experts.split_experts``); else nothing changes.

    Raises MBQError for a class that is refused, if a known class lacks one of its names (a version that renamed them),
    or if an unknown class has no list of blocks, or more than one, that looks like a known block, with one vision
    tower beside it.
    """
    # Imported here because families.py is made of the classes above.
    from mbq.families import FAMILIES

    check_known(type(model).__name__)
    variants = FAMILIES.get(type(model).__name__)
    if any(EACH in path for variant in variants or () for kind in variant.kinds for path in kind.linears()):
        split_experts(model)
    if variants is None:
        architecture = _match_structure(model)
    else:
        lacking = {variant: _missing(model, variant) for variant in variants}
        fitting = [variant for variant, missing in lacking.items() if not missing]
        if not fitting:
            missing = min(lacking.values(), key=len)
            raise MBQError(
                f"This {type(model).__name__} has no {', '.join(missing)}, where families.py expects them; "
                "install a supported transformers (>= 5.17), or add the variant to families.py."
            )
        architecture = fitting[0]
    return _bind(model, architecture)


def check_known(model_class: str) -> None:
    """Raise MBQError for a class that is known not to be one that mbq quantizes."""
    from mbq.families import REFUSED

    if model_class in REFUSED:
        raise MBQError(
            f"{model_class} has {REFUSED[model_class]}, which mbq does not quantize yet; choose a model of a family "
            "that mbq families prints."
        )


def _bind(model: nn.Module, architecture: Architecture) -> Binding:
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    kinds = tuple(_kind(block, architecture) for block in blocks)
    paths = [f"{architecture.blocks}.{i}.{path}" for i, kind in enumerate(kinds) for path in kind.linears()]
    names = tuple(name for name in paths if not _kept(name, architecture))
    quantized = set(names)
    kept = tuple(name for name in _linear_names(model) if name not in quantized)
    for name in kept:
        if not _kept(name, architecture):
            raise MBQError(
                f"{type(model).__name__} holds the linear {name}, which families.py neither quantizes nor keeps; "
                "add it to a group, or to `kept`."
            )
    return Binding(architecture, model, blocks, kinds, _vision_tokens(model, architecture), names, kept)


def _kept(name: str, architecture: Architecture) -> bool:
    return any(name == pattern or (pattern[:3] == "re:" and matches(name, pattern)) for pattern in architecture.kept)


def _vision_tokens(model: nn.Module, architecture: Architecture) -> frozenset[int]:
    if not architecture.vision_tokens:
        return frozenset()
    holders = (getattr(model, "config", None), model)
    found = (getattr(holder, name, None) for name in architecture.vision_tokens for holder in holders)
    ids = frozenset(value for value in found if isinstance(value, int))
    if not ids:
        raise MBQError(
            f"The config of {type(model).__name__} has none of {', '.join(architecture.vision_tokens)}; "
            "without the id of the image token, vision tokens cannot be told from text."
        )
    return ids


def _missing(model: nn.Module, architecture: Architecture) -> list[str]:
    """Names of ``architecture`` that ``model`` does not have."""
    outside = [architecture.blocks, architecture.vision_tower, architecture.projector or ""]
    missing = [path for path in outside if not _has(model, path)]
    if architecture.blocks in missing:
        return missing
    for i, block in enumerate(model.get_submodule(architecture.blocks).children()):
        lacking = _lacking(block, _kind(block, architecture))
        missing += [f"{architecture.blocks}.{i}.{path}" for path in lacking]
    return missing


def _kind(block: nn.Module, architecture: Architecture) -> BlockKind:
    """The kind of block that it is, or is nearest to."""
    return min((kind.of(block) for kind in architecture.kinds), key=lambda kind: len(_lacking(block, kind)))


def _by_expert(group: LinearGroup, block: nn.Module) -> list[LinearGroup]:
    """The group, or one an expert, with numbers for stars; stars stay where the block has no experts there."""
    path = next((path for path in (group.prev, *group.linears) if EACH in path), None)
    if path is None:
        return [group]
    experts = path.partition(EACH)[0]
    numbers = range(len(list(block.get_submodule(experts).children())) if _has(block, experts) else 0)

    def own(path: str, number: int) -> str:
        return path.replace(EACH, f".{number}.")

    if not numbers:
        return [group]
    if EACH not in group.prev:
        linears = (own(path, number) for path in group.linears for number in (numbers if EACH in path else (0,)))
        return [replace(group, linears=tuple(linears), mixture=True)]
    return [
        replace(
            group,
            name=f"{group.name}.{number}",
            prev=own(group.prev, number),
            linears=tuple(own(path, number) for path in group.linears),
            inspect=own(group.inspect, number),
            routed=(experts, number),
        )
        for number in numbers
    ]


def _lacking(block: nn.Module, kind: BlockKind) -> list[str]:
    return [path for path in kind.paths() if not _has(block, path)]


def _match_structure(model: nn.Module) -> Architecture:
    """The architecture of an unknown class whose blocks have exactly the parts of a known block."""
    from mbq.families import FAMILIES, VISION_TOKENS

    known = (variant for variants in FAMILIES.values() for variant in variants if not variant.others)
    layouts = {variant.groups: variant for variant in known}.values()
    found = [(path, layout) for path, blocks in _lists(model) for layout in layouts if _same_parts(blocks, layout)]
    towers = [] if len(found) != 1 else vision_blocks(model, outside=found[0][0])
    if len(found) != 1 or len(towers) != 1:
        linears = dict.fromkeys(", ".join(layout.kinds[0].linears()) for layout in layouts)
        raise MBQError(
            f"{type(model).__name__} is no known family (mbq families prints them), and not clearly like one: looked "
            f"for one list of blocks with {' or '.join(linears)}, found {len(found)}, and one vision tower beside it, "
            f"found {len(towers)}; add it to families.py."
        )
    (path, layout), tower = found[0], towers[0][0]
    size = len(list(model.get_submodule(path).children()))
    quantized = {f"{path}.{i}.{name}" for i in range(size) for name in layout.kinds[0].linears()}
    parts = dict.fromkeys(_part(name, path) for name in _linear_names(model) if name not in quantized)
    return replace(
        layout,
        model_class=type(model).__name__,
        models="",
        blocks=path,
        vision_tower=_part(tower, path),
        projector=None,
        kept=tuple(_pattern(part, quantized) for part in parts),
        vision_tokens=VISION_TOKENS,
        packs=False,
    )


def vision_blocks(model: nn.Module, outside: str) -> list[tuple[str, tuple[LinearGroup, ...]]]:
    """Lists of vision blocks in ``model`` but not under ``outside``: full path, and the groups that fit it."""
    from mbq.families import VISION_GROUPS

    return [
        (path, groups)
        for path, blocks in _lists(model)
        if not f"{path}.".startswith(f"{outside}.")
        for groups in VISION_GROUPS
        if all(_has(block, name) for block in blocks for g in groups for name in (g.prev, *g.linears))
    ]


def _same_parts(blocks: list[nn.Module], layout: Architecture) -> bool:
    """Every block has the layout's modules and no other that holds weights, but norms of single heads."""
    expected = {path for group in layout.groups for path in (group.prev, *group.linears)}
    for block in blocks:
        held = {name for name, module in block.named_modules() if list(module.parameters(recurse=False))}
        if {name for name in held if name.rpartition(".")[2] not in ("q_norm", "k_norm")} != expected:
            return False
    return True


def _part(name: str, blocks: str) -> str:
    """The largest module around ``name`` that does not hold the decoder blocks: "model.vision_tower", "lm_head"."""
    steps = name.split(".")
    prefixes = (".".join(steps[: i + 1]) for i in range(len(steps)))
    return next(prefix for prefix in prefixes if not f"{blocks}.".startswith(f"{prefix}."))


def _pattern(part: str, quantized: set[str]) -> str:
    if part == "lm_head":
        return part
    pattern = f"re:.*{re.escape(part.rpartition('.')[2])}.*"
    return f"re:{re.escape(part)}.*" if any(matches(name, pattern) for name in quantized) else pattern


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every ModuleList that is not empty: its path and its items."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield path, list(module)


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
