"""Fused layers give what the separate ones give, in whatever order they are called, eager and compiled."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mbq
from mbq.errors import MBQError
from mbq.fuse import SHARED_INPUT, FusedLinear, LinearSlice, concatenate, fuse, use_kernel
from mbq.kernels import KERNELS, reference
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.qlinear import QuantLinear
from mbq.qtensor import quantize
from mbq.scheme import SCHEMES, Scheme, scheme_named
from tests import tiny

WIDTHS = (37, 8, 21)  # 3-bit zero points of a part end within a word
NAMES = ("q_proj", "k_proj", "v_proj")


class Counting:
    """The reference kernel under another name, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    supports = staticmethod(reference.supports)
    prepare = staticmethod(reference.prepare)

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return reference.linear(x, weight, bias)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    kernel = Counting()
    monkeypatch.setitem(KERNELS, "counting", kernel)
    return kernel


def layer(outputs: int, scheme: Scheme, bias: bool = False, inputs: int = 256) -> QuantLinear:
    weight = torch.randn(outputs, inputs) * 0.05
    return QuantLinear.from_qtensor(quantize(weight, scheme.weights), scheme, torch.randn(outputs) if bias else None)


class Attention(nn.Module):
    """The linears of an attention, called as transformers' code calls them."""

    def __init__(self, schemes: tuple[Scheme, ...], biases: tuple[bool, ...] = (True, False, True)) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        for name, width, scheme, bias in zip(NAMES, WIDTHS, schemes, biases, strict=True):
            self.self_attn.add_module(name, layer(width, scheme, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.self_attn
        return torch.cat([a.q_proj(x), a.k_proj(x), a.v_proj(x)], dim=-1)


def attention(scheme: str = "W3A16") -> Attention:
    torch.manual_seed(0)
    return Attention((SCHEMES[scheme],) * 3)


def pair(scheme: str = "W3A16") -> tuple[nn.Module, nn.Module, FusedLinear]:
    """The inside of an attention, the same fused, and its fused layer."""
    separate = attention(scheme)
    fused = copy.deepcopy(separate)
    use_kernel(fused, "counting")
    slices = [fused.self_attn.get_submodule(name) for name in NAMES]
    assert all(isinstance(each, LinearSlice) for each in slices)
    return separate.self_attn, fused.self_attn, slices[0].fused


@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False)])
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), scheme_named("W3A16", 32)], ids=lambda scheme: scheme.name)
def test_concatenation_loses_nothing(scheme: Scheme, biases: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    parts = [layer(width, scheme, bias) for width, bias in zip(WIDTHS, biases, strict=True)]
    fused = concatenate(parts)
    found, expected = unpack_weight(fused.packed), [unpack_weight(part.packed) for part in parts]
    assert torch.equal(found.codes, torch.cat([each.codes for each in expected]))
    assert torch.equal(found.scale, torch.cat([each.scale for each in expected]))
    if found.zero_point is not None:
        assert torch.equal(found.zero_point, torch.cat([each.zero_point for each in expected]))
    x = torch.randn(3, 256)
    torch.testing.assert_close(fused(x), torch.cat([part(x) for part in parts], dim=-1), rtol=1e-5, atol=1e-5)
    assert (fused.bias is None) == (not any(biases))


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
def test_one_call_for_all(scheme: str, counting: Counting) -> None:
    separate, fused, _ = pair(scheme)
    for rows in (1, 5):
        x = torch.randn(2, rows, 256)
        counting.calls = 0
        for name in NAMES:
            y = fused.get_submodule(name)(x)
            assert y.shape[:-1] == x.shape[:-1]
            torch.testing.assert_close(y, separate.get_submodule(name)(x), rtol=1e-5, atol=1e-5)
        assert counting.calls == 1


ORDERS = ["qkv", "vqk", "kvq", "q", "qq", "qkqv", "kkvvqq", "qqkkvv", "qkvqkv"]


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_calls(order: str, counting: Counting) -> None:
    separate, fused, _ = pair()
    x, z = torch.randn(2, 256), torch.randn(2, 256)
    for given in (x, z, x):
        for letter in order:
            name = f"{letter}_proj"
            expected = separate.get_submodule(name)(given)
            torch.testing.assert_close(fused.get_submodule(name)(given), expected, rtol=1e-5, atol=1e-5)


def test_other_inputs_in_between(counting: Counting) -> None:
    separate, fused, _ = pair()
    x, z = torch.randn(2, 256), torch.randn(2, 256)
    for name, given in zip(("q_proj", "k_proj", "k_proj", "v_proj", "q_proj"), (x, z, x, x.clone(), z), strict=True):
        torch.testing.assert_close(
            fused.get_submodule(name)(given), separate.get_submodule(name)(given), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("second", NAMES)
def test_new_numbers_in_the_same_tensor(second: str, counting: Counting) -> None:
    separate, fused, _ = pair()
    x = torch.randn(2, 256)
    fused.q_proj(x)
    x.copy_(torch.randn(2, 256))
    torch.testing.assert_close(fused.get_submodule(second)(x), separate.get_submodule(second)(x), rtol=1e-5, atol=1e-5)


def test_the_same_slice_twice_is_computed_anew_in_inference_mode(counting: Counting) -> None:
    """Tensors of inference mode do not tell that they were written to."""
    separate, fused, _ = pair()
    with torch.inference_mode():
        x = torch.randn(2, 256)
        fused.q_proj(x)
        x.copy_(torch.randn(2, 256))
        torch.testing.assert_close(fused.q_proj(x), separate.q_proj(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_when_all_slices_are_taken(counting: Counting) -> None:
    _, fused, layer = pair()
    x = torch.randn(2, 256)
    seen = weakref.ref(x)
    for name in NAMES:
        fused.get_submodule(name)(x)
    assert layer.kept.entry is None
    del x
    gc.collect()
    assert seen() is None


def test_a_model_keeps_one_output_at_most(counting: Counting) -> None:
    model = nn.ModuleList([attention(), attention()])
    use_kernel(model, "counting")
    kept = {id(module.kept) for module in model.modules() if isinstance(module, FusedLinear)}
    assert len(kept) == 1
    x = torch.randn(2, 256)
    expected = model[0](x)
    model[1].self_attn.q_proj(x)  # left behind
    torch.testing.assert_close(model[0](x), expected)
    assert next(module for module in model.modules() if isinstance(module, FusedLinear)).kept.entry is None


def test_compiled_without_a_break(counting: Counting) -> None:
    _, fused, layer = pair()
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.append(sum("mbq.linear" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def both(x: torch.Tensor) -> torch.Tensor:
        z = x + 1
        y = [fused.get_submodule(name)(x) for name in NAMES]
        return torch.cat([*y, *(fused.get_submodule(name)(z) for name in reversed(NAMES))], dim=-1)

    torch.compiler.reset()
    run = torch.compile(both, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 256)
            torch.testing.assert_close(run(x), both(x), rtol=1e-5, atol=1e-5)
            assert layer.kept.entry is None
    assert calls == [2]  # one product for each x, and no second compilation
    with torch.no_grad():  # what a slice taken alone left behind does not confuse the compiled code
        x = torch.randn(2, 256)
        fused.k_proj(x)
        torch.testing.assert_close(run(x), both(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["W4A16", "W3A8"])
def test_other_schemes_are_not_fused(other: str, counting: Counting) -> None:
    model = Attention((SCHEMES["W3A16"], SCHEMES["W3A16"], SCHEMES[other]))
    use_kernel(model, "counting")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    model = Attention((SCHEMES["W3A16"], SCHEMES["W3A16"], scheme_named("W3A16", 64)))
    fuse(model, "counting")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_a_group_with_a_float_linear_is_not_fused(counting: Counting) -> None:
    model = attention()
    model.self_attn.v_proj = nn.Linear(256, 21)
    use_kernel(model, "counting")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    assert model.self_attn.q_proj.kernel == "counting"


def test_the_plain_kernel_is_not_fused() -> None:
    model = attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_kernel(model, "reference")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_groups_are_those_of_the_families() -> None:
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") in SHARED_INPUT
    assert ("mlp.gate_proj", "mlp.up_proj") in SHARED_INPUT
    assert ("feed_forward.w1", "feed_forward.w3") in SHARED_INPUT
    assert ("attention.q_proj", "attention.k_proj", "attention.v_proj") in SHARED_INPUT


def test_repr_tells_the_slice(counting: Counting) -> None:
    _, fused, layer = pair()
    assert "outputs 37 to 45" in repr(fused.k_proj)
    assert (fused.k_proj.in_features, fused.k_proj.out_features) == (256, 8)
    assert layer.layer.out_features == sum(WIDTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Callable[[str, str], Path]:
    """A family's tiny model, quantized by rounding, tower and all; made once."""
    root = tmp_path_factory.mktemp("fused")

    def make(family: str, scheme: str = "W3A16") -> Path:
        path = root / f"{family}-{scheme}"
        if not path.exists():
            tiny.save(family, root / family)
            options: dict[str, Any] = {"data": calibration, "images": calibration.parent / "images"}
            options |= {"vision_tower": "W8A8", "num_calibration_samples": 4}
            options = {} if family == "internvl2_internlm2" else options
            mbq.quantize(root / family, scheme=scheme, method="rtn", output=path, trust_remote_code=True, **options)
        return path

    return make


@pytest.mark.parametrize("family", tiny.ALL_FAMILY_NAMES)
def test_a_loaded_model_is_fused_and_says_the_same(
    family: str, folder: Callable[..., Path], counting: Counting
) -> None:
    path = folder(family)
    plain = mbq.load(path, dtype="float32", kernel="reference", trust_remote_code=True)
    fused = mbq.load(path, dtype="float32", kernel="counting", trust_remote_code=True)
    processor = mbq.load_processor(path, trust_remote_code=True)
    blocks = [name for name, module in fused.named_modules() if isinstance(module, LinearSlice)]
    language = [name for name in blocks if "vision" not in name and "visual" not in name]
    assert len(language) == (4 if family == "internvl2_internlm2" else 10)  # w1, w3; q, k, v, gate, up; of two blocks
    given = tiny.inputs(processor)
    with torch.no_grad():
        expected = plain(**given).logits
        counting.calls = 0
        found = fused(**given).logits
    linears = sum(isinstance(module, QuantLinear) for module in fused.modules())
    assert counting.calls == linears < sum(isinstance(module, QuantLinear) for module in plain.modules())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    texts = [model.generate(**given, max_new_tokens=6, do_sample=False).tolist() for model in (plain, fused)]
    assert texts[0] == texts[1]


def test_a_fused_model_does_not_save(folder: Callable[..., Path], counting: Counting, tmp_path: Path) -> None:
    model = mbq.load(folder("qwen2_vl"), kernel="counting")
    with pytest.raises(MBQError, match=r"layers are fused .* load it anew with kernel='reference'\.$"):
        model.save_pretrained(tmp_path)
    mbq.load(folder("qwen2_vl"), kernel="reference").save_pretrained(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "reference"])
def test_fused_layers_in_a_cuda_graph(kernel: str, scheme: str) -> None:
    """Eager, recorded, and compiled and recorded; the graph reads what is written to x later."""
    separate = attention(scheme).to("cuda", torch.float16)
    place = (SCHEMES[scheme], (37, 256), torch.device("cuda", 0), torch.float16)
    reason = KERNELS[kernel].supports(*place)
    if reason is not None:
        pytest.skip(reason)
    fused = copy.deepcopy(separate)
    use_kernel(fused, kernel)
    assert isinstance(fused.self_attn.q_proj, LinearSlice)
    torch.compiler.reset()
    for run in (fused, torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=False)):
        for rows in (1, 5, 40):
            x = torch.randn(1, rows, 256, dtype=torch.float16, device="cuda")
            with torch.no_grad():
                for _ in range(2):
                    run(x)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = run(x)
                for _ in range(2):
                    x.copy_(torch.randn_like(x))
                    graph.replay()
                    torch.testing.assert_close(y, separate(x), rtol=1e-2, atol=1e-2)
