"""mbq's weight-only kernels, cuBLAS, only reading, and other people's kernels, on this GPU and in one process.

python -m benchmarks.kernels --output benchmarks/results/kernels/h200.json --marlin marlin.so

Every contender is checked against the dense product before it is timed (mbq.bench says how); a peer that is missing,
wrong or broken is reported and the rest goes on. The file is written anew after each, so an early end costs only what
was still to come. docs/kernels.md is made of it by ``python -m benchmarks.kernels_page``.

To record a design step, name it and say beforehand what it should reach:

python -m benchmarks.kernels --schemes W3A16 --rows 1 --dtypes float16 --peers --output \\
    benchmarks/results/kernels/steps/02-wide-loads.json --step "16-byte loads" --predicted 1100

Peers: torch's int4 product is there; GemLite and Humming are ``pip install gemlite humming-kernels``. Marlin has no
wheel; its kernel is in AutoGPTQ's source, from which a library without torch is built (change sm_90 to your GPU's).
CUDA 13's assembler drops the policy of its weight loads, and the kernel traps (IST-DASLab/marlin, issue 44), so sed
takes the policy out:

    pip download --no-deps --no-binary=:all: --no-build-isolation auto-gptq==0.7.1   # or any copy of the file below
    tar xzf auto_gptq-0.7.1.tar.gz && cd auto_gptq-0.7.1/autogptq_extension/marlin && touch marlin_cuda_kernel.cuh
    sed -i '/createpolicy/d; /\\.reg \\.b64 p/d; s/\\.L2::cache_hint \\(.*\\), p;/ \\1;/' marlin_cuda_kernel.cu
    cat > build.cu <<'END'
    #include "marlin_cuda_kernel.cu"
    extern "C" int marlin(const void* x, const void* words, void* y, void* scale, int rows, int outputs, int inputs,
                          void* locks, int device, cudaStream_t stream) {
      return marlin_cuda(x, words, y, scale, rows, outputs, inputs, locks, 128, device, stream);
    }
    END
    nvcc -O3 -std=c++17 --expt-relaxed-constexpr -shared -Xcompiler -fPIC \\
        -gencode=arch=compute_90,code=sm_90 build.cu -o marlin.so
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels_peers import Peer, peers
from mbq.bench import QWEN2_7B, Bench, dtype_named, ours, random_weight
from mbq.bench_report import Failure, Report, duration
from mbq.errors import MBQError
from mbq.output import write_json
from mbq.scheme import scheme_named

PEERS = [peer.name for peer in peers(Path("marlin.so"))]


def chosen(args: argparse.Namespace) -> list[tuple[Peer, str, str]]:
    """(peer, scheme, dtype) of what is asked for and each can do."""
    return [
        (peer, scheme, dtype)
        for peer in peers(args.marlin)
        if peer.name in args.peers
        for dtype in args.dtypes
        if dtype in peer.dtypes
        for scheme in args.schemes
        if scheme in peer.schemes and rows_of(peer, args.rows)
    ]


def warm(args: argparse.Namespace, run: Bench) -> list[tuple[Peer, str, str]]:
    """Compile, all at once, what is going to run; the peers that are here and did not fail."""
    here = []
    if "Marlin" in args.peers and args.marlin is None:
        run.report.failures.append(Failure("Marlin", "W4A16", "float16", "no --marlin was given"))
    for peer, scheme, dtype in chosen(args):
        why = peer.missing()
        if why is None:
            here.append((peer, scheme, dtype))
        else:
            run.report.failures.append(Failure(peer.name, scheme, dtype, why))
    with ThreadPoolExecutor() as pool:
        jobs: list[tuple[Any, Future[None]]] = [
            (
                job,
                pool.submit(job[0].warm, run.report.decoder, job[0].scheme(job[1]), job[2], rows_of(job[0], args.rows)),
            )
            for job in here
            if job[0].warm is not None
        ]
        for dtype in args.dtypes:
            for scheme in args.schemes:
                warm_own(args, run, scheme, dtype)
        for job, future in jobs:
            error = future.exception()
            if error is not None:  # it may still work: then it compiles when it is first called
                print(
                    f"{job[0].name} {job[1]} {job[2]}: not compiled ahead ({type(error).__name__}: {error})", flush=True
                )
    torch.cuda.synchronize()
    return here


def warm_own(args: argparse.Namespace, run: Bench, scheme: str, dtype: str) -> None:
    """mbq's kernels take their width as an argument: a narrow weight compiles them all."""
    target, named = dtype_named(dtype), scheme_named(scheme)
    try:
        contender = ours(args.kernel, run.report.decoder, named, target, run.device)
        shape = run.report.decoder.shapes["o"]
        prepared = contender.prepare(random_weight(named, shape, target, run.device))
        for count in args.rows:
            contender.multiply(torch.zeros(count, shape[1], dtype=target, device=run.device), prepared)
    except Exception as error:  # it is reported when it is measured
        print(f"{args.kernel} {scheme} {dtype}: {type(error).__name__}: {error}", flush=True)


def rows_of(peer: Peer, rows: Sequence[int]) -> list[int]:
    return [count for count in rows if count <= peer.rows]


class Record:
    """Prints what is new in the report and writes all of it."""

    def __init__(self, report: Report, output: Path | None, extra: dict[str, Any]) -> None:
        self.report, self.output, self.extra = report, output, extra
        self.times = self.failures = 0
        self.started = time.monotonic()

    def __call__(self) -> None:
        lines: dict[tuple[str, ...], list[str]] = {}
        for each in self.report.times[self.times :]:
            key = (each.scheme, each.dtype, f"M={each.rows}", each.by)
            lines.setdefault(key, []).append(f"{each.shape} {duration(each.microseconds)}")
        for key, parts in lines.items():
            print(f"[{time.monotonic() - self.started:3.0f} s] {' '.join(key)}: {' '.join(parts)}", flush=True)
        for failure in self.report.failures[self.failures :]:
            print(f"{failure.by} {failure.scheme} {failure.dtype}: {failure.why}", flush=True)
        self.times, self.failures = len(self.report.times), len(self.report.failures)
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, self.report.to_json() | self.extra)


def command_of(args: argparse.Namespace) -> str:
    """What to type to measure it again; where files lie is nobody else's business."""
    rows = " ".join(map(str, args.rows))
    parts = [f"--schemes {' '.join(args.schemes)}", f"--rows {rows}", f"--dtypes {' '.join(args.dtypes)}"]
    parts += [f"--kernel {args.kernel}", f"--peers {' '.join(repr(name) for name in args.peers)}".rstrip()]
    parts += [f"--marlin {args.marlin.name}"] if args.marlin else []
    return f"python -m benchmarks.kernels {' '.join(parts)}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--schemes", nargs="+", default=["W3A16", "W4A16"])
    made.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    made.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"])
    made.add_argument("--kernel", default="cuda", help="mbq's: auto, or a kernel that mbq doctor lists")
    made.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    made.add_argument("--marlin", type=Path, help="the library, built as above")
    made.add_argument("--step", help="the design step that this run measures")
    made.add_argument("--predicted", type=float, help="microseconds of the stack that were expected of it")
    made.add_argument("--output", type=Path, help="a JSON file")
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        run = Bench(QWEN2_7B, command_of(args))
    except MBQError as error:
        parser().exit(2, f"{error}\n")
    extra = {"step": args.step, "predicted": args.predicted} if args.step else {}
    record = Record(run.report, args.output, extra)
    here = warm(args, run)
    record()
    print(f"compiled after {time.monotonic() - record.started:.0f} s", flush=True)
    try:
        run.read_ceiling()
    except Exception as error:
        run.report.failures.append(Failure("only reads", "", "", f"{type(error).__name__}: {error}"))
    print(f"{run.report.device} reads {run.report.ceiling or 0:,.0f} GB/s", flush=True)
    for dtype in args.dtypes:
        run.dense(scheme_named(args.schemes[0]), args.rows, dtype_named(dtype))
        record()
        for scheme in args.schemes:
            try:
                run.own(args.kernel, scheme_named(scheme), args.rows, dtype_named(dtype))
            except MBQError as error:
                run.report.failures.append(Failure(args.kernel, scheme, dtype, str(error)))
            record()
    for peer, scheme, dtype in here:
        named, rows = peer.scheme(scheme), rows_of(peer, args.rows)
        try:
            contender = peer.contender(named, dtype, rows)
        except Exception as error:  # it is another project's: whatever it is, the others still run
            run.report.failures.append(Failure(peer.name, scheme, dtype, f"{type(error).__name__}: {error}"))
        else:
            run.contend(contender, named, rows, dtype_named(dtype))
        record()


if __name__ == "__main__":
    main()
