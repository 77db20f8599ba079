"""``mbq doctor`` says of every kernel and scheme whether it runs here, or why not."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from mbq import doctor
from mbq.kernels import KERNELS, choose
from mbq.scheme import SCHEMES


def test_every_kernel_and_scheme_has_an_answer_that_loading_agrees_with() -> None:
    cpu = torch.device("cpu")
    reasons = doctor.kernel_reasons(cpu, torch.float32)
    assert reasons.keys() == KERNELS.keys()
    for scheme in SCHEMES.values():
        taken = choose("auto", scheme, doctor.SHAPE, cpu, torch.float32)
        assert taken == "reference"  # Triton may run, but in its interpreter
        assert reasons[taken][scheme.name] is None
    assert reasons["cuda"]["W3A16"] == "it needs an NVIDIA GPU, and the weight is on cpu"
    assert not any(reasons["reference"].values())


def test_the_page_names_versions_kernels_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])
    console = Console(width=120, record=True)
    doctor.doctor(console)
    text = console.export_text()
    assert f"torch {torch.__version__.split('+')[0]}" in text
    for name in KERNELS:
        assert name in text
    assert "(1) it needs an NVIDIA GPU" in text
