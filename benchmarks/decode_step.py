"""One decode step of 7B vision-language models on this GPU, in bf16 and from packed weights.

python -m benchmarks.decode_step --output benchmarks/results/decode_step.json

The models are LLaVA-OneVision-7B (llava-hf/llava-onevision-qwen2-7b-ov-hf) and Qwen2-VL-7B-Instruct, built from their
published configurations with random weights: transformers' own code, batch 1, a static cache of 1,024 positions. The
step is the one that ``generate`` makes, with the arguments that it gives. The quantized model has the modules of
``mbq.load`` (W3A16 or W4A16, groups of 128, fused qkv and gate_up); lm_head stays in 16 bits.

Both are measured with transformers' attention as it ships ("sdpa") and with mbq's ("mbq"). The speed-up of a quantized
model with mbq's attention is given over bf16 as it ships, and over bf16 that has mbq's attention too.

Times are microseconds a step: CUDA graph replays back to back, the median of several runs of them. "eager" records
transformers' code as it is, "compiled" what torch.compile makes of it. "Without linears" is the same quantized model
whose linears, lm_head too, launch nothing and give memory as it comes. ``generate`` is timed from end to end, prompt
included: 128 tokens after 896, so that the last fills the cache; "plain" is a dynamic cache, no graph, 32 tokens.

Everything is checked before it is timed: the linears of the first block against float32, attention against float64,
graphs and compiled code against the plain step with sdpa. What fails is printed and left out of the results, and the
rest goes on; so is what torch.compile would not finish within ``--seconds``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mbq.architecture import bind
from mbq.checkpoint.compressed_tensors import quantization_config, replace_linears
from mbq.fuse import FusedLinear, use_kernel
from mbq.generation import DecodeStep
from mbq.kernels import KERNELS
from mbq.kernels.attention import attend, attention, use_attention
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import dequantize
from mbq.scheme import scheme_named

POSITIONS = 1024
NEW_TOKENS = 128
PLAIN_TOKENS = 32  # the slow way gets fewer
COMPILE_SECONDS = 35  # expected of the first; then the longest so far
STD = 0.02  # of random weights, as the configurations say

BACKBONE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": STD,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": None,
}


def llava_onevision() -> Any:
    """LLaVA-OneVision-7B: its class and configuration."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text = Qwen2Config(**{**BACKBONE, "vocab_size": 152128, "rope_parameters": rope})
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    sides = range(384, 2305, 384)
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=151646,
        video_token_index=151647,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration, config


def qwen2_vl() -> Any:
    """Qwen2-VL-7B-Instruct: its class and configuration."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**BACKBONE, "vocab_size": 152064, "rope_parameters": rope}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration, config


FAMILIES: dict[str, Callable[[], Any]] = {"llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl}


class Nothing:
    """A kernel that launches nothing; its output is memory as it comes."""

    @staticmethod
    def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class NoHead(nn.Module):
    """In the place of lm_head: its shape, and no product."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.words = torch.zeros(1, dtype=torch.int32, device=head.weight.device)
        self.scale = torch.ones(1, dtype=head.weight.dtype, device=head.weight.device)
        self.shape = (head.out_features, head.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = PackedWeight(self.words, self.scale, None, self.shape, scheme_named("W3A16"))
        return linear(x, weight, None, "nothing")


def build(family: str) -> Any:
    """The bf16 model with random weights, which never stops early."""
    model_class, config = FAMILIES[family]()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantized(model: Any, bits: int, kernel: str) -> tuple[Any, list[tuple[QuantLinear, torch.Tensor]]]:
    """``model`` with random packed weights in the modules of ``mbq.load``.

    Also the first block's layers that run, each with the float32 weight [out, in] that it stands for.
    """
    names = replace_linears(
        model, quantization_config(scheme_named(f"W{bits}A16"), list(bind(model).architecture.kept))
    )
    step = STD / (2 * (4**bits - 1) / 12) ** 0.5  # the difference of two random codes has this many units of spread
    first: dict[str, torch.Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        for words in (layer.weight_packed, layer.weight_zero_point):
            words.copy_(torch.randint(-(2**31), 2**31, words.shape, dtype=torch.int32, device=words.device))
        layer.weight_scale.copy_(torch.empty_like(layer.weight_scale, dtype=torch.float32).uniform_(0.5, 1.5) * step)
        layer.weight_shape.copy_(torch.tensor([layer.out_features, layer.in_features]))
        if layer.bias is not None:
            layer.bias.normal_(std=STD)
        if ".layers.0." in name:
            first[name] = dequantize(unpack_weight(layer.packed)).float()
    use_kernel(model, kernel)
    pairs, seen = [], set()
    for name in first:
        module = model.get_submodule(name)
        if isinstance(module, QuantLinear):
            pairs.append((module, first[name]))
        elif module.fused not in seen:
            seen.add(module.fused)
            assert isinstance(module.fused, FusedLinear)
            parts = [each for each in first if getattr(model.get_submodule(each), "fused", None) is module.fused]
            pairs.append((module.fused.layer, torch.cat([first[each] for each in parts])))
    return model, pairs


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


class Clock:
    """Which compilations a family has time for."""

    def __init__(self, seconds: float) -> None:
        self.end, self.longest = time.perf_counter() + seconds, float(COMPILE_SECONDS)
        self.compiled = False

    def allows(self) -> bool:
        return time.perf_counter() + self.longest < self.end

    def took(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds) if self.compiled else seconds
        self.compiled = True


def set_attention(model: Any, name: str) -> None:
    model.set_attn_implementation("sdpa")
    if name == "mbq" and not use_attention(model):
        raise AssertionError("mbq's attention does not run here")


def measure(
    step: Step, which: str, row: dict[str, Any], args: argparse.Namespace, clock: Clock, check: bool = True
) -> None:
    """Eager and compiled steps, their kernels, and generate, with one attention, into ``row[which]``."""
    say(f"  attention: {which}")
    model, found = step.model, row.setdefault(which, {})
    ways: dict[str, Any] = {}
    with attempt("attention", found):
        set_attention(model, which)
    if "failed" in found:
        return
    with attempt("eager", found):
        found["eager"], _ = step.microseconds(model, args.rounds, check)
        say(f"    eager {found['eager']:.0f} us")
        ways["recorded"] = model
    if args.compile and clock.allows():
        start = time.perf_counter()
        with attempt("compiled", found):
            call = compiled(model)
            found["compiled"], graph = step.microseconds(call, args.rounds, check)
            found["compile_seconds"] = time.perf_counter() - start
            say(f"    compiled {found['compiled']:.0f} us, after {found['compile_seconds']:.0f} s")
            ways["compiled"] = call
            with attempt("kernels", found):
                found["kernels"] = kernels_of(step, graph)
                for kernel in found["kernels"]:
                    say(f"      {kernel['microseconds']:7.1f} us {kernel['count']:4d} x {kernel['name'][:64]}")
        clock.took(time.perf_counter() - start)
    elif args.compile:
        say("    compiled: skipped, the time of this family is up")
    if not check:
        return
    found["generate"] = {}
    calls = {"plain": None, **ways} if which == "sdpa" else ways
    for name, call in calls.items():
        # What the step compiled is what generate calls; compiling anew would take half a minute unseen.
        with attempt(f"generate {name}", found), torch._dynamo.config.patch(error_on_recompile=True):
            found["generate"][name] = timed = step.generate(call and DecodeStep(call))
            say(f"    generate, {name}: {timed['tokens_a_second']:.0f} tokens/s")


def measure_family(family: str, args: argparse.Namespace, report: dict[str, Any]) -> None:
    found: dict[str, Any] = report["families"].setdefault(family, {})
    clock = Clock(args.seconds)
    variants = ["bf16", *(f"W{bits}A16" for bits in args.bits)]
    for variant in variants:
        say(f"{family} {variant}")
        row = found.setdefault(variant, {})
        model: Any = None
        step: Any = None
        with attempt("build", row):
            model = build(family)
            if variant != "bf16":
                model, pairs = quantized(model, int(variant[1]), args.kernel)
                row["error"] = check_linears(pairs)
                say(f"    linears are right within {row['error']:.2g} of their outputs' spread")
                del pairs
            step = Step(model)
            row["gigabytes"] = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) / 1e9
        if step is not None and variant == "bf16":
            with attempt("lm_head alone", row):
                x = torch.randn(1, 1, model.lm_head.in_features, dtype=torch.bfloat16, device="cuda")
                found["lm_head"] = alone(lambda head=model.lm_head, x=x: head(x), args.rounds)
                say(f"    lm_head alone {found['lm_head']:.0f} us")
            with attempt("attention", row):
                found["attention"] = check_attention(step, args.rounds)
                say("    attention of all layers: " + ", ".join(f"{k} {v:.3g}" for k, v in found["attention"].items()))
        if step is not None:
            # In the order of what is most wanted, should time run out.
            for which in ("sdpa", "mbq") if variant == "bf16" else ("mbq", "sdpa"):
                measure(step, which, row, args, clock)
                write(report, args.output)
        if step is not None and variant == variants[1]:
            say(f"{family} without linears")
            bare = found.setdefault("without_linears", {})
            KERNELS["nothing"] = Nothing  # type: ignore[assignment]
            with attempt("without linears", bare):
                for layer in model.modules():
                    if isinstance(layer, QuantLinear):
                        layer.kernel = "nothing"
                model.lm_head = NoHead(model.lm_head)
                measure(step, "mbq", bare, args, clock, check=False)
        write(report, args.output)
        model = step = None
        gc.collect()
        torch.cuda.empty_cache()
    for variant in variants[1:]:
        compare(family, variant, found)
    write(report, args.output)


def compare(family: str, variant: str, found: dict[str, Any]) -> None:
    """Bf16's time over the quantized model's with mbq's attention, into ``found[variant]["ratios"]``: over bf16 as it
    ships, which is the claim, and over bf16 with mbq's attention.
    """
    ratios = found[variant]["ratios"] = {}
    for way in ("eager", "compiled"):
        ours = found[variant].get("mbq", {}).get(way)
        for which, what in (("sdpa", "as it ships"), ("mbq", "with mbq's attention")):
            other = found["bf16"].get(which, {}).get(way)
            if ours and other:
                ratios.setdefault(way, {})[f"over_bf16_{which}"] = other / ours
                say(f"{family} {variant}: {way} {other / ours:.2f} x faster than bf16 {what}")


def write(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--kernel", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=110, help="A family's; what would not be compiled in them is skipped."
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    run(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "positions": POSITIONS,
        "command": "python -m benchmarks.decode_step"
        + (f" --bits {' '.join(map(str, args.bits))}" if args.bits != [3, 4] else ""),
        "families": {},
    }
    for family in args.families:
        measure_family(family, args, report)
    return report


if __name__ == "__main__":
    main()
