"""What ``mbq bench`` measured, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

STACK = "stack"
CUBLAS, READING = "cuBLAS", "only reads"  # contenders that stand in every table
DENSE = "16 bits"  # cuBLAS's "scheme"
HEADER = ("µs", "GB/s", "ceiling", "read µs", "x cuBLAS")


@dataclass(frozen=True)
class Decoder:
    """name -> (outputs, inputs) of the linears of one layer, those with one input joined, and the number of layers."""

    shapes: dict[str, tuple[int, int]]
    layers: int


@dataclass(frozen=True)
class Time:
    """What one product took.

    by            the contender: a kernel of mbq's, "cuBLAS", "only reads", or a peer
    scheme        "W3A16" and so on; "16 bits" for cuBLAS
    rows          of x; 0 for "only reads", which has no x
    shape         a name of ``Decoder.shapes``, or "stack"
    bytes         of the weights: codes, scales and zeros as the contender keeps them
    error         the relative error against the dense product, of the worst shape; None where nothing is computed
    """

    by: str
    scheme: str
    dtype: str
    rows: int
    shape: str
    microseconds: float
    bytes: int
    error: float | None = None

    @property
    def gigabytes_a_second(self) -> float:
        return self.bytes / self.microseconds / 1e3


@dataclass(frozen=True)
class Failure:
    """A contender that was wrong, failed or does not run here, and why."""

    by: str
    scheme: str
    dtype: str
    why: str


@dataclass
class Report:
    """What a run measured, and on what.

    command   that measured it
    ceiling   read bandwidth in GB/s; None where ``read.cu`` does not run
    """

    device: str
    software: str
    command: str
    decoder: Decoder
    ceiling: float | None = None
    times: list[Time] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        shapes = {name: (shape[0], shape[1]) for name, shape in content["decoder"]["shapes"].items()}
        return cls(
            device=content["device"],
            software=content["software"],
            command=content["command"],
            decoder=Decoder(shapes, content["decoder"]["layers"]),
            ceiling=content["ceiling"],
            times=[Time(**each) for each in content["times"]],
            failures=[Failure(**each) for each in content["failures"]],
        )

    def find(self, by: str, scheme: str, dtype: str, rows: int, shape: str) -> Time | None:
        """The time of that description, if it was measured."""
        wanted = (by, scheme, dtype, rows, shape)
        found = (each for each in self.times if (each.by, each.scheme, each.dtype, each.rows, each.shape) == wanted)
        return next(found, None)


def cells(report: Report, time: Time) -> list[str]:
    """What stands under ``HEADER``; empty where nothing was measured to compare with.

    "ceiling" is the share of the read bandwidth, "read µs" what only reading the bytes takes, "x cuBLAS" how many times
    faster than cuBLAS.
    """
    dense = report.find(CUBLAS, DENSE, time.dtype, time.rows, time.shape)
    reading = report.find(READING, time.scheme, time.dtype, 0, time.shape)
    return [
        duration(time.microseconds),
        f"{time.gigabytes_a_second:,.0f}",
        f"{100 * time.gigabytes_a_second / report.ceiling:.0f} %" if report.ceiling else "",
        duration(reading.microseconds) if reading else "",
        f"{dense.microseconds / time.microseconds:.2f}" if dense else "",
    ]


def duration(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def table(report: Report) -> Table:
    """A row a scheme, number of rows and shape; what failed, and why, is the caption."""
    dtypes = " and ".join(dict.fromkeys(time.dtype for time in report.times))
    ceiling = f"; it reads {report.ceiling:,.0f} GB/s" if report.ceiling else ""
    title = f"{report.device}, {dtypes}{ceiling}"
    # No margins, so that every figure fits 80 columns.
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0, show_edge=False)
    for name in ("scheme", "by", "rows", "shape"):
        made.add_column(name, no_wrap=True)
    for name in HEADER:
        made.add_column(name, justify="right", no_wrap=True)
    for time in sorted((each for each in report.times if each.by != READING), key=lambda each: each.scheme != DENSE):
        made.add_row(
            time.scheme,
            time.by,
            str(time.rows),
            shape_name(report.decoder, time.shape),
            *cells(report, time),
            end_section=time.shape == STACK,
        )
    made.caption = "\n".join(f"{each.by} {each.scheme} {each.dtype}: {each.why}" for each in report.failures)
    made.caption_justify = "left"
    return made


def shape_name(decoder: Decoder, shape: str) -> str:
    """ "qkv 4608x3584"; "28 layers" for the stack."""
    if shape == STACK:
        return f"{decoder.layers} layers"
    outputs, inputs = decoder.shapes[shape]
    return f"{shape} {outputs}x{inputs}"
