"""What runs on this machine, and why the rest does not: ``mbq doctor``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from mbq.kernels import KERNELS, compiled
from mbq.scheme import SCHEMES

PACKAGES = ("mbq", "torch", "transformers", "compressed-tensors", "triton", "cuda-bindings")
SHAPE = (3584, 3584)  # a linear of a 7B model, for kernels that ask


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def kernel_reasons(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, str | None]]:
    """kernel -> scheme -> None where it runs on ``device``, else why not."""
    return {
        name: {scheme.name: kernel.supports(scheme, SHAPE, device, dtype) for scheme in SCHEMES.values()}
        for name, kernel in KERNELS.items()
    }


def kernel_table(device: torch.device, reasons: dict[str, dict[str, str | None]]) -> Table:
    """A row a kernel, in the order in which "auto" asks them, a column a scheme; "yes", or the number of the reason."""
    numbers: dict[str, int] = {}
    named = "CPU" if device.type == "cpu" else f"{device}, {torch.cuda.get_device_name(device)}"
    table = Table(title=f"Kernels on {named}", title_justify="left")
    table.add_column("kernel")
    for scheme in SCHEMES:
        table.add_column(scheme)
    for name, row in reasons.items():
        cells = ["yes" if why is None else f"({numbers.setdefault(why, len(numbers) + 1)})" for why in row.values()]
        table.add_row(name, *cells)
    table.caption = "\n".join(f"({number}) {why}" for why, number in numbers.items())
    table.caption_justify = "left"
    return table


def doctor(console: Console) -> None:
    """Print versions, devices, and a table of kernels a device."""
    console.print(f"Python {platform.python_version()} on {platform.platform()}", highlight=False)
    console.print(", ".join(f"{name} {_version(name)}" for name in PACKAGES), highlight=False)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        console.print(f"No GPU: torch is {built} and sees none.", highlight=False)
    console.print(f"Compiled kernels are kept in {compiled.cache_folder()}.", highlight=False, soft_wrap=True)
    for device in devices():
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        console.print(kernel_table(device, kernel_reasons(device, dtype)))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
