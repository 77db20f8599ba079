"""Which tiles ``mbq/kernels/int8.py`` should hold, found on this GPU: ``python -m benchmarks.prefill --tune``."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict
from queue import Empty
from typing import Any

import torch

from benchmarks.prefill import LAYER, QUANTIZED, SHAPES, copies_of, each, random_weight, with_words, wrong
from mbq.kernels import int8
from mbq.kernels.int8 import Tiles
from mbq.kernels.packed import PackedWeight
from mbq.scheme import SCHEMES

COMPILERS = 28  # processes that compile at once

# What --tune tries, for 4-bit and for 8-bit weights.
CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "W4A8": (
        Tiles(128, 128, 128, stages=4, programs=2),
        Tiles(128, 128, 128, stages=3, programs=2),
        Tiles(128, 128, 128, stages=4, programs=2, group=32),
        Tiles(64, 128, 128, stages=4, programs=3),
        Tiles(64, 128, 128, stages=6, programs=2),
        Tiles(64, 64, 128, stages=4, programs=4),
        Tiles(128, 64, 128, stages=4, programs=3),
        Tiles(32, 128, 128, stages=5, programs=3),
        Tiles(128, 128, 256, warps=8, stages=4),
        Tiles(128, 256, 256, warps=8, stages=3),
    ),
    "W8A8": (
        Tiles(128, 128, 128, stages=3, programs=2, weight_first=False),
        Tiles(128, 128, 128, stages=3, programs=2),
        Tiles(64, 128, 128, stages=4, programs=2),
        Tiles(64, 128, 128, stages=3, programs=3),
        Tiles(64, 64, 128, stages=4, programs=4),
        Tiles(128, 64, 128, stages=3, programs=3),
        Tiles(32, 128, 128, stages=4, programs=3),
        Tiles(128, 256, 128, warps=8, stages=4, weight_first=False),
        Tiles(128, 256, 128, warps=8, stages=4),
        Tiles(256, 128, 128, warps=8, stages=4),
    ),
}


def compiled_and_checked(name: str, tiles: Tiles, dtype: torch.dtype) -> str | None:
    """None if ``tiles`` compile and are exact, whole and shared; else what is wrong. Fills Triton's cache on disk."""
    outputs, inputs = 2 * tiles.outputs + 16, 3584
    q, weight = random_weight(SCHEMES[name], (outputs, inputs), dtype)
    count = int8.multiprocessors(torch.device("cuda", 0))
    for processors in (1, count):
        int8.multiprocessors = lambda device, n=processors: n  # type: ignore[assignment]
        for rows in (tiles.rows + 8, 4 * tiles.rows):
            x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
            y = torch.full((rows, outputs), torch.nan, dtype=dtype, device="cuda")
            int8.products(x, weight, None, y, tiles)
            bad = wrong(y, x, q)
            if bad:
                return f"{bad} products are wrong with {rows} rows on {processors} multiprocessors"
    return None


def _worker(name: str, tiles: Tiles, dtype: torch.dtype, queue: Any) -> None:
    try:
        queue.put(compiled_and_checked(name, tiles, dtype))
    except Exception as error:
        queue.put(f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}")


def _in_process(name: str, tiles: Tiles, dtype: torch.dtype, seconds: float) -> str | None:
    """``compiled_and_checked`` in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_worker, args=(name, tiles, dtype, queue), daemon=True)
    process.start()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                return queue.get(timeout=1)
            except Empty:
                if not process.is_alive() and queue.empty():
                    return f"crashed with status {process.exitcode}"
        return f"hung for {seconds:.0f} s"
    finally:
        process.kill()


def tune(args: argparse.Namespace, dtype: torch.dtype, save: Callable[[Any], None]) -> list[dict[str, Any]]:
    """A row a scheme, shape and number of rows: microseconds of the linear for every candidate, best first.

    What is found so far is saved after every shape: a candidate that hangs takes nothing else with it.
    """
    jobs = [(name, tiles) for name in QUANTIZED for tiles in CANDIDATES[name]]
    begun, processors = time.monotonic(), int8.multiprocessors(torch.device("cuda", 0))
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        reasons = list(pool.map(lambda job: _in_process(*job, dtype, args.patience), jobs))
    print(f"{len(jobs)} candidates compiled and checked in {time.monotonic() - begun:.0f} s", flush=True)
    for (name, tiles), reason in zip(jobs, reasons, strict=True):
        if reason is not None:
            print(f"left out: {name} {tiles}: {reason}", flush=True)
    good = [job for job, reason in zip(jobs, reasons, strict=True) if reason is None]
    found: list[dict[str, Any]] = []
    best_sum: dict[tuple[str, int], float] = {}
    for name in QUANTIZED:
        for shape_name, shape in SHAPES.items():
            _, weight = random_weight(SCHEMES[name], shape, dtype)
            weights = [with_words(weight, words) for words in copies_of(weight.words)]
            for rows in args.rows:
                times = []
                for tiles in (tiles for other, tiles in good if other == name):
                    try:
                        took = tiles_time(weights, tiles, rows, dtype)
                    except Exception as error:
                        print(f"{name} {shape_name} {rows} {tiles}: {str(error).splitlines()[0][:150]}", flush=True)
                        continue
                    times.append((took, tiles))
                times.sort(key=lambda pair: pair[0])
                if not times:
                    continue
                operations = 2 * rows * shape[0] * shape[1]
                took, tiles = times[0]
                print(f"{name} {shape_name} M={rows}: {took:.1f} us, {operations / took / 1e6:.0f} TOPS", flush=True)
                for other, its in times[:3]:
                    print(f"    {other:8.1f}  {_short(its)}", flush=True)
                _, whole, shared = int8.plan(rows, *shape, tiles, processors)
                if shared:
                    int8.SPLIT_GAIN, usual = 2**31, int8.SPLIT_GAIN
                    alone = tiles_time(weights, tiles, rows, dtype)
                    int8.SPLIT_GAIN = usual
                    print(f"    {alone:8.1f}  the best if it does not share {shared} of its {whole + shared} tiles")
                if shape_name in LAYER:
                    best_sum[name, rows] = best_sum.get((name, rows), 0) + times[0][0]
                row = {"scheme": name, "shape": shape_name, "rows": rows}
                found.append({**row, "times": [{"microseconds": took, **asdict(tiles)} for took, tiles in times]})
            del weight, weights
            save(found)
    for (name, rows), total in best_sum.items():
        print(f"{name} M={rows}: a layer with the best of each shape {total:.0f} us; with one for all four:")
        _print_single_choice(found, name, rows)
    return found


def _print_single_choice(found: list[dict[str, Any]], name: str, rows: int) -> None:
    """The candidates by the layer's sum, for a table that knows the rows only."""
    sums: dict[str, list[float]] = {}
    for row in found:
        if (row["scheme"], row["rows"]) == (name, rows) and row["shape"] in LAYER:
            for each in row["times"]:
                tiles = Tiles(**{key: value for key, value in each.items() if key != "microseconds"})
                sums.setdefault(_short(tiles), []).append(each["microseconds"])
    complete = sorted((sum(times), tiles) for tiles, times in sums.items() if len(times) == len(LAYER))
    for total, tiles in complete[:4]:
        print(f"    {total:8.1f}  {tiles}")


def _short(tiles: Tiles) -> str:
    kind = f"{tiles.programs} a multiprocessor"
    first = "w" if tiles.weight_first else "x"
    return (
        f"{tiles.rows}x{tiles.outputs}x{tiles.depth} {tiles.warps} warps {tiles.stages} stages, {kind}, "
        f"{first} first, group {tiles.group}"
    )


def tiles_time(weights: list[PackedWeight], tiles: Tiles, rows: int, dtype: torch.dtype) -> float:
    """The whole linear, quantization included."""
    x = torch.randn(rows, weights[0].shape[1], dtype=dtype, device="cuda")
    y = torch.empty(rows, weights[0].shape[0], dtype=dtype, device="cuda")
    return each([lambda w=w: int8.products(x, w, None, y, tiles) for w in weights])  # type: ignore[misc]
