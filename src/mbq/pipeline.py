"""The whole of it: load, bind, calibrate, sensitivity, equalize, quantize, pack, write."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from mbq import ranks
from mbq.architecture import Binding, bind, check_known
from mbq.blocks import Inputs, capture, device_of
from mbq.calibration import CalibrationBatch, calibration_batches, sample_rows
from mbq.checkpoint.compressed_tensors import float_activations
from mbq.checkpoint.folder import check_new, check_space
from mbq.checkpoint.state import RunState, files_hash, kept_by_rank_0, run_state
from mbq.cost import cost_of, speed, weight_bytes
from mbq.errors import MBQError, MBQWarning
from mbq.experts import left_whole
from mbq.finished import FinishedBlocks, linear_of
from mbq.importance import importance
from mbq.loading import check_finite, load_model, load_processor, model_folder, read_config, torch_device
from mbq.measurements import measurements
from mbq.methods import METHODS, Method, SearchOptions
from mbq.output import QUANTIZED, Measured, Product, write_folder
from mbq.placement import Plan, make_plan, place
from mbq.progress import Progress, silent
from mbq.qlinear import QuantLinear
from mbq.recipe import Recipe, package_versions
from mbq.room import room, storing_folder
from mbq.rows import Row, check_images, data_hash, read_rows
from mbq.scheme import SCHEMES, Scheme
from mbq.search import GroupSearch, check_distorted, equalize_model, unreached
from mbq.sensitivity import Sensitivity, measure
from mbq.storage import give_back
from mbq.vision_tower import smooth_vision_tower, tower_linears

log = logging.getLogger(__name__)

# Options that change no number, or that the hash of the data stands for.
NO_NUMBERS = ("data", "images", "text", "offload", "activations", "offload_folder", "max_shard_size")

MOST_NAMED = 40  # experts in a warning; search.json names them all


@dataclass(frozen=True)
class QuantizationResult:
    """What ``quantize`` made.

    model        the quantized model, its weights packed as they are written; it generates, by the plain torch kernel
    processor    the model's processor
    recipe       every option
    folder       what was written, or None
    sensitivity  gradients a block, or None where the method needs none
    search       a row a group: the chosen alpha and the loss at every alpha
    seconds      of each step, by its name
    bytes_before, bytes_after  of the model's parameters, float and quantized

    ``unreached`` are the experts of mixtures that no calibration token reached, by their numbers, a block.

    Under torchrun every rank gets one, but only rank 0's has the model: it alone packs and writes.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    recipe: Recipe
    folder: Path | None
    sensitivity: Sensitivity | None = field(repr=False)
    search: list[GroupSearch] = field(repr=False)
    seconds: dict[str, float]
    bytes_before: int
    bytes_after: int

    @property
    def unreached(self) -> dict[int, list[int]]:
        return unreached(self.search)

    def __str__(self) -> str:
        made = f"{self.recipe.numbers.name} by {self.recipe.method} in {sum(self.seconds.values()):.1f} s"
        sizes = f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB"
        lines = [f"{made}: {sizes}."]
        if self.folder:
            lines += [f"Wrote {self.folder}", float_activations(self.recipe.numbers)]
        return "\n".join(line for line in lines if line)


@ranks.joined()
def quantize(
    model: str | Path | nn.Module,
    processor: Any = None,
    *,
    scheme: str = "W3A16",
    method: str = "mbq",
    data: str | Path | list[Row] | None = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[Plan], None] | None = None,
    report: bool = True,
    **options: Any,
) -> QuantizationResult:
    """Quantize a vision-language model, and write it to the new folder ``output`` if one is given.

    model    a folder, a hub id, or a loaded model with its ``processor``; a loaded model is copied, not changed
    data     calibration rows: a file or folder that ``read_rows`` reads, or its rows; the method "rtn" needs none
    resume   go on with an unfinished run of the same ``output`` and options, block by block, if there is one
    announce  is called with where everything will be and about how long it takes, before anything is computed
    report   write report.html into the folder, a page about what it holds
    options  the other fields of ``Recipe``

    Under torchrun the ranks share the samples of one quantization; each calls this with the same arguments.

    Raises MBQError for whatever the caller can mend; ``output`` then does not exist.
    """
    rows = data if isinstance(data, list) else None
    recipe = Recipe.of(scheme=scheme, method=method, data=None if rows else data, images=images, **options)
    product = replace(QUANTIZED, write=partial(write_folder, report=report))
    return make(product, model, processor, recipe, rows, output, resume, progress, announce)


def make(
    product: Product,
    model: str | Path | nn.Module,
    processor: Any,
    recipe: Recipe,
    rows: list[Row] | None,
    output: str | Path | None,
    resume: bool,
    progress: Progress,
    announce: Callable[[Plan], None] | None,
) -> QuantizationResult:
    """Equalize a model and make ``product`` of it, between ranks that are joined; arguments as ``quantize`` has them.

    rows  those that the caller has read; None: what ``recipe`` names
    """
    chosen = _method(recipe.method)
    if output is not None:
        check_new(output)
    storing_folder(recipe.offload_folder, output)
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        rows = _rows(recipe, rows)  # before the model, which takes longer
        hashed = data_hash(_drawn(rows, recipe)) if rows else None
    with _state(model, output, product, recipe, hashed, chosen, resume) as state:
        resumed = state is not None and state.begun
        with _timed(seconds, "load"):
            own, processor, name = _float_model(model, processor, recipe)
            binding = bind(own)
            check_distorted(binding, search_options(recipe))
            targets = target_schemes(binding, recipe)
            size = product.size(binding, processor, recipe)
            if output is not None and ranks.rank() == 0:  # before hours of work, not after
                check_space(output, size)
        before = weight_bytes(own)
        with _timed(seconds, "calibrate"):
            batches = _batches(rows, processor, binding, recipe, progress)
            plan = _plan(binding, batches, recipe, size, isinstance(model, nn.Module), output, state)
            _announce(plan, announce)
            if not isinstance(model, nn.Module):
                place(binding, plan)
            inputs = None
            if chosen.equalize is not None:
                kept = plan.inputs or plan.traces
                inputs = capture(binding, batches[ranks.part(len(batches))], plan.storage(kept))
        sensitivity = None
        if chosen.weighs and not binding.vision_tokens and ranks.rank() == 0:
            warnings.warn(
                f"Pictures are no tokens of {type(own).__name__}, so there is nothing to balance: {chosen.name} weighs "
                "the answers' tokens alone.",
                MBQWarning,
                stacklevel=2,
            )
        if chosen.weighs:
            with _timed(seconds, "sensitivity"):
                sensitivity = _measured(binding, batches, inputs, recipe, plan, progress, state)
            give_back()  # the inputs of all blocks
        packed = targets if product.packs else {}
        finished = FinishedBlocks(binding, packed, chosen, state) if ranks.rank() == 0 else None
        with _timed(seconds, "search"):
            search = _equalize(binding, batches, inputs, chosen, targets, sensitivity, recipe, plan, progress, finished)
        if ranks.rank() == 0:
            _warn_unreached(search)
        after, folder = 0, None
        if finished is not None:
            with _timed(seconds, "quantize"):
                finished.pack_rest(progress)
                extra = None
                if product.measures:
                    keep = plan.storage(plan.traces)
                    extra = importance(binding, batches, chosen, search_options(recipe), sensitivity, keep)
                if plan.blocks:
                    own.to("cpu")  # as a whole again
            after = weight_bytes(own)
        if finished is not None and output is not None:
            with _timed(seconds, "write"):
                took = measurements(seconds, before, after, plan.device, resumed)
                found = Measured(hashed, sensitivity, search, before, after, extra, took)
                folder = product.write(Path(output), binding, processor, recipe, name, found)
        after, folder = ranks.from_first((after, folder))
    made = own if finished is not None else None
    return QuantizationResult(made, processor, recipe, folder, sensitivity, search, seconds, before, after)


@contextmanager
def _state(
    model: Any, output: Any, product: Product, recipe: Recipe, hashed: str | None, method: Method, resume: bool
) -> Iterator[RunState | None]:
    """Where a run that may take hours keeps what is done; None for runs that search nothing or write nothing."""
    if isinstance(model, nn.Module) or output is None or method.equalize is None or recipe.distorted_input:
        if resume:
            raise MBQError(
                "--resume goes on with a search, which this run has not, or not block by block; leave it out."
            )
        yield None
        return
    options = {name: value for name, value in asdict(recipe).items() if name not in NO_NUMBERS}
    files = files_hash(model_folder(model))
    fingerprint = {"product": product.name, **options, **package_versions(), "data": hashed, "model files": files}
    ranks.agree(fingerprint)
    if ranks.rank() > 0:
        with kept_by_rank_0(Path(output)):
            yield None
        return
    with run_state(Path(output), fingerprint, resume) as state:
        yield state


@ranks.joined()
def measure_sensitivity(
    model: str | Path | nn.Module,
    processor: Any = None,
    *,
    data: str | Path | list[Row] | None = None,
    images: str | Path | None = None,
    progress: Progress = silent,
    announce: Callable[[Plan], None] | None = None,
    **options: Any,
) -> Sensitivity:
    """The mean absolute gradient of each block, for vision and language tokens; the model is left as it was.

    Under torchrun the ranks share the samples, and all of them return it.
    """
    rows = data if isinstance(data, list) else None
    recipe = Recipe.of(data=None if rows else data, images=images, **options)
    if not (rows or data):
        raise MBQError("The gradients are those of answers about images; give rows with --data.")
    rows = _rows(recipe, rows)
    own, processor, _ = _float_model(model, processor, recipe, keep=True)
    with left_whole(own) if isinstance(model, nn.Module) else nullcontext():
        binding = bind(own)
        batches = _batches(rows, processor, binding, recipe, progress)
        plan = _plan(binding, batches, recipe, 0, isinstance(model, nn.Module), searches=False)
        _announce(plan, announce)
        if not isinstance(model, nn.Module):
            place(binding, plan)
        return _measured(binding, batches, None, recipe, plan, progress, None)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise MBQError(f"Unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def _rows(recipe: Recipe, rows: list[Row] | None) -> list[Row]:
    """All rows, of which those that will be drawn have their pictures."""
    if not recipe.needs_data:
        return []
    if rows is None:
        if recipe.data is None:
            raise MBQError(
                f"{recipe.method} calibrates on image-text pairs; give them with --data, or choose --method rtn."
            )
        rows = read_rows(recipe.data, recipe.images)
    check_images(_drawn(rows, recipe))
    return rows


def _drawn(rows: list[Row], recipe: Recipe) -> list[Row]:
    """The rows that ``calibration_batches`` will draw: a file may hold a million, and only these are looked at."""
    return sample_rows(rows, recipe.num_calibration_samples, recipe.seed, recipe.formatting)


def _float_model(model: Any, processor: Any, recipe: Recipe, keep: bool = False) -> tuple[Any, Any, str]:
    """The model to work on, its processor and its name. ``keep`` promises to leave a loaded model as it is."""
    if not isinstance(model, nn.Module):
        trust = recipe.trust_remote_code
        for name in read_config(model).get("architectures") or ():
            check_known(name)  # before its weights are read
        processor = processor or load_processor(model, trust)
        return load_model(model, "cpu", recipe.dtype, trust), processor, str(model)
    if processor is None:
        raise MBQError("A loaded model comes with its processor; give quantize(model, processor, ...).")
    name = getattr(model, "name_or_path", "") or type(model).__name__
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise MBQError(f"{name} is quantized already; give the float model that it was made from.")
    check_finite(model)
    return model if keep else copy.deepcopy(model), processor, name


def _plan(
    binding: Binding,
    batches: list[CalibrationBatch],
    recipe: Recipe,
    packed: int,
    loaded: bool,
    output: str | Path | None = None,
    state: RunState | None = None,
    searches: bool = True,
) -> Plan:
    """Where everything will be. A model that was given ``loaded`` stays where it is."""
    device = device_of(binding.model) if loaded else torch_device(ranks.own_device(recipe.device))
    own = batches[ranks.part(len(batches))] if batches else []
    lengths = [(batch.labels.shape[0], batch.labels.shape[1]) for batch in own]
    cost = cost_of(binding, lengths, recipe, packed)
    if loaded:
        cost = replace(cost, weights=0)
    if not searches:
        cost = replace(cost, traces=0, copies=0, search=0)
    if state is not None and state.sensitivity is not None:
        cost = replace(cost, inputs=0, sensitivity=0)
    free = room(device, storing_folder(recipe.offload_folder, output))
    free = replace(free, cpu=free.cpu // ranks.neighbours(), disk=free.disk // ranks.neighbours())
    if output is not None:  # finished blocks, and then the folder
        free = replace(free, disk=free.disk - 2 * packed)
    plan = make_plan(
        cost,
        free,
        device,
        offload="none" if loaded else recipe.offload,
        activations=recipe.activations,
        samples=recipe.num_calibration_samples,
        speed=speed(device, next(binding.blocks.parameters()).dtype) if cost.sensitivity + cost.search else None,
    )
    for line in str(plan).splitlines():
        log.info("%s", line)
    return plan


def _warn_unreached(search: list[GroupSearch]) -> None:
    """Say which experts were rounded to nearest because nothing is known of what they read."""
    blocks = unreached(search)
    count = sum(map(len, blocks.values()))
    if count <= MOST_NAMED:
        named = "; ".join(f"block {block}: {', '.join(map(str, numbers))}" for block, numbers in blocks.items())
    else:
        named = ", ".join(f"{len(numbers)} in block {block}" for block, numbers in blocks.items())
    if blocks:
        warnings.warn(
            f"No calibration token reached {count} of the experts ({named}), whose down_proj is rounded to nearest and "
            "not equalized; give more --num-calibration-samples for a search.",
            MBQWarning,
            stacklevel=2,
        )


def _announce(plan: Plan, announce: Callable[[Plan], None] | None) -> None:
    if announce is not None and ranks.rank() == 0:
        announce(plan)


def target_schemes(binding: Binding, recipe: Recipe) -> dict[str, Scheme]:
    """The linears to quantize and their schemes: those of the blocks, and of the vision tower's where asked for.

    Raises MBQError for a linear whose width is no multiple of the group size.
    """
    targets = dict.fromkeys(binding.linears(recipe.ignore), recipe.numbers)
    if not targets:
        raise MBQError("--ignore leaves no linear to quantize; give patterns that match fewer.")
    size = recipe.numbers.weights.group_size
    for name in targets if size else ():
        width = linear_of(binding.model, name).in_features
        if width % cast(int, size):
            raise MBQError(
                f"{name} reads {width} channels, no multiple of the group size {size}; choose a --group-size that "
                f"divides it, or keep it in 16 bits with --ignore {name}."
            )
    if recipe.vision_tower is not None:
        targets |= dict.fromkeys(tower_linears(binding, recipe.ignore), SCHEMES[recipe.vision_tower])
    return targets


def _batches(
    rows: list[Row], processor: Any, binding: Binding, recipe: Recipe, progress: Progress
) -> list[CalibrationBatch]:
    if not rows:
        return []

    def done(count: int) -> None:
        progress("calibrate", count, recipe.num_calibration_samples, "")

    return calibration_batches(
        rows,
        processor,
        set(binding.vision_tokens),
        num_samples=recipe.num_calibration_samples,
        max_length=recipe.max_seq_length,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        formatting=recipe.formatting,
        text=recipe.text,
        end_of_turn=not recipe.parity,
        progress=done,
    )


def _measured(
    binding: Binding,
    batches: list[CalibrationBatch],
    inputs: Inputs | None,
    recipe: Recipe,
    plan: Plan,
    progress: Progress,
    state: RunState | None,
) -> Sensitivity:
    def done(count: int) -> None:
        progress("sensitivity", count, len(binding.blocks), "")

    known = ranks.from_first(None if state is None else state.sensitivity)
    if known is not None:
        return Sensitivity.from_json(known)
    storage = plan.storage(plan.inputs)
    measured = measure(binding, batches, parity=recipe.parity, storage=storage, inputs=inputs, progress=done)
    if state is not None:
        state.keep_sensitivity(measured.to_json())
    return measured


def _equalize(
    binding: Binding,
    batches: list[CalibrationBatch],
    inputs: Inputs | None,
    method: Method,
    targets: Collection[str],
    sensitivity: Sensitivity | None,
    recipe: Recipe,
    plan: Plan,
    progress: Progress,
    finished: FinishedBlocks | None,
) -> list[GroupSearch]:
    """Fold the method's vectors into the blocks and SmoothQuant's into the tower; the float function stays."""
    options = search_options(recipe)
    scheme = recipe.numbers
    search = equalize_model(
        binding,
        batches,
        method,
        scheme,
        options,
        sensitivity=sensitivity,
        targets=targets,
        storage=plan.storage(plan.traces),
        inputs=inputs,
        finished=finished,
        progress=progress,
    )
    if recipe.vision_tower is not None and finished is not None:  # one pass of the tower, not worth sharing
        smooth_vision_tower(binding, batches, recipe.ignore, recipe.smooth_alpha)
    return search


def search_options(recipe: Recipe) -> SearchOptions:
    """Those of a recipe's options that the search reads."""
    return SearchOptions(
        norm=recipe.norm,
        objective=recipe.objective,
        vision_weight=recipe.vision_weight,
        smooth_alpha=recipe.smooth_alpha,
        floor=recipe.floor,
        gqa_fold=recipe.gqa_fold,
        distorted_input=recipe.distorted_input,
        parity=recipe.parity,
        tokens=None if recipe.parity else recipe.search_tokens or None,
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    log.info("%s", step)
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started
    log.info("%s took %.1f s", step, seconds[step])
