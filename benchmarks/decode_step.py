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
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.decode_models import FAMILIES, NoHead, Nothing, build, quantized
from benchmarks.decode_timing import (
    POSITIONS,
    Step,
    alone,
    attempt,
    check_attention,
    check_linears,
    compiled,
    kernels_of,
    say,
)
from mbq.generation import DecodeStep
from mbq.kernels import KERNELS
from mbq.kernels.attention import use_attention
from mbq.qlinear import QuantLinear

COMPILE_SECONDS = 35  # expected of the first; then the longest so far


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
