"""A decode step, checked and timed: as a CUDA graph, in ``generate``, kernel by kernel."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mbq.kernels.attention import attend, attention
from mbq.qlinear import QuantLinear

POSITIONS = 1024
NEW_TOKENS = 128
PLAIN_TOKENS = 32  # the slow way gets fewer


@torch.no_grad()
def check_linears(pairs: list[tuple[QuantLinear, torch.Tensor]]) -> float:
    """The largest error of a layer's outputs in units of their spread, for few and many rows of x.

    Raises AssertionError where it is too large.
    """
    worst = 0.0
    for layer, weight in pairs:
        for rows in (1, 5, 12, 40):
            x = torch.randn(rows, layer.in_features, dtype=layer.weight_scale.dtype, device=weight.device)
            expected = F.linear(x.float(), weight, None if layer.bias is None else layer.bias.float())
            error = ((layer(x).float() - expected).abs().max() / expected.std()).item()
            worst = max(worst, error)
            if not error < 0.05:
                raise AssertionError(f"{layer} is off by {error:.3g} of its outputs' spread at {rows} rows")
    return worst


class Step:
    """The decode step of ``model`` that ``generate`` makes last with a cache of ``positions``."""

    def __init__(self, model: Any, positions: int = POSITIONS) -> None:
        self.model, self.positions = model, positions
        self.cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=positions)
        self.prompt = torch.randint(10, 1000, (1, positions - 1), device=model.device)
        self.arguments: dict[str, Any] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            if given["input_ids"].shape[1] == 1:
                self.arguments = dict(given)

        hook = model.register_forward_pre_hook(keep, with_kwargs=True)
        model.generate(self.prompt, past_key_values=self.cache, max_new_tokens=2, do_sample=False, disable_compile=True)
        hook.remove()
        self.filled = [(layer.keys.clone(), layer.values.clone()) for layer in self.cache.layers]
        self.restore()
        with torch.no_grad():
            self.expected = model(**self.arguments).logits.float().clone()
        if not torch.isfinite(self.expected).all():
            raise AssertionError("the logits are not finite")

    def back_to(self, length: int) -> None:
        """The cache holds ``length`` positions."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def restore(self) -> None:
        """The cache as the prompt left it: timing writes the last token to many positions, which changes logits."""
        for layer, (keys, values) in zip(self.cache.layers, self.filled, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        self.back_to(self.positions - 1)

    @torch.no_grad()
    def microseconds(self, call: Callable[..., Any], rounds: int, check: bool = True) -> tuple[float, Any]:
        """A step of ``call`` as a CUDA graph, and the graph. Raises where its logits are not the plain step's."""
        for _ in range(2):
            self.back_to(self.positions - 1)
            call(**self.arguments)
        self.back_to(self.positions - 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = call(**self.arguments).logits
        if check:
            self.restore()
            graph.replay()
            difference = ((logits.float() - self.expected).square().mean().sqrt() / self.expected.std()).item()
            say(f"    logits differ from the plain step's by {difference:.2g} of their spread")
            if not difference < 0.2:  # bf16 rounds other intermediates in compiled code
                raise AssertionError("the logits of the graph are not those of the plain step")
        return self.replayed(graph, rounds), graph

    def replayed(self, graph: Any, rounds: int, replays: int = 20) -> float:
        """Microseconds of a replay, ``replays`` of them back to back; the median of ``rounds``."""
        return median_of_rounds(graph, rounds, replays, lambda: self.back_to(self.positions - replays - 1))

    def generate(self, step: Any | None) -> dict[str, float]:
        """Seconds and tokens a second of ``generate`` with this static cache and ``step``; None: the plain way."""
        new = PLAIN_TOKENS if step is None else NEW_TOKENS
        prompt = self.prompt[:, : self.positions - new]
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
        if step is not None:
            self.model.get_compiled_call = lambda config: step
            options["past_key_values"] = self.cache
        seconds = []
        try:
            for _ in range(1 if step is None else 2):  # a recorded step is recorded in the first
                self.cache.reset()
                torch.cuda.synchronize()
                start = time.perf_counter()
                tokens = self.model.generate(prompt, **options)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                assert tokens.shape[1] == self.positions
        finally:
            vars(self.model).pop("get_compiled_call", None)
        return {"seconds": seconds[-1], "tokens_a_second": new / seconds[-1], "first_seconds": seconds[0]}


def median_of_rounds(graph: Any, rounds: int, replays: int, before: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(rounds):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)  # 2 ms in which the replays queue up
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / replays)
    return statistics.median(times)


@torch.no_grad()
def alone(call: Callable[[], Any], rounds: int) -> float:
    """Microseconds of ``call`` as a CUDA graph of its own."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_of_rounds(graph, rounds, 20)


def kernels_of(step: Step, graph: Any, top: int = 14) -> list[dict[str, Any]]:
    """The kernels of one replay by total time: name, count, microseconds in all."""
    step.back_to(step.positions - 1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        graph.replay()
        torch.cuda.synchronize()
    rows = [
        {"name": event.key[:80], "count": event.count, "microseconds": event.self_device_time_total}
        for event in profiled.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])[:top]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.perf_counter()


@contextmanager
def attempt(what: str, found: dict[str, Any]) -> Iterator[None]:
    """Say what fails and go on."""
    try:
        yield
    except Exception as error:
        say(f"    FAILED: {what}: {type(error).__name__}: {str(error).strip()[:300]}")
        found.setdefault("failed", {})[what] = traceback.format_exc()[-1500:]


def compiled(model: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(model.__call__, fullgraph=True, dynamic=False)


@torch.no_grad()
def check_attention(step: Step, rounds: int) -> dict[str, float]:
    """Of mbq's attention over the step's caches, the error in units of the outputs' spread; microseconds of all layers
    with each attention. Raises AssertionError where it is wrong.
    """
    step.restore()
    module = next(each for each in step.model.get_decoder().modules() if hasattr(each, "num_key_value_groups"))
    keys, values = step.cache.layers[0].keys, step.cache.layers[0].values
    batch, kv_heads, positions, dim = keys.shape
    groups, scale = module.num_key_value_groups, dim**-0.5
    query = torch.randn(batch, kv_heads * groups, 1, dim, dtype=keys.dtype, device=keys.device)
    at = torch.arange(positions, device=keys.device)
    worst = 0.0
    for length in (1, positions // 3, positions - 1, positions):
        mask = (at < length).expand(batch, 1, 1, positions)
        found = attention(query, keys, values, mask, scale).double()
        seen_keys, seen_values = (x[:, :, :length].double().repeat_interleave(groups, 1) for x in (keys, values))
        weights = (query.double() @ seen_keys.mT * scale).softmax(-1)
        wanted = (weights @ seen_values).transpose(1, 2)
        worst = max(worst, ((found - wanted).abs().max() / wanted.std()).item())
    if not worst < 0.05:
        raise AssertionError(f"attention is off by {worst:.3g} of its outputs' spread")
    times = {}
    for name, function in (("sdpa", sdpa_attention_forward), ("mbq", attend)):

        def layers(function: Any = function) -> None:
            for layer in step.cache.layers:
                function(module, query, layer.keys, layer.values, mask, scaling=scale)

        times[name] = alone(layers, rounds)
    return {"error": worst, **times}
