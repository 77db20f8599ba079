"""The mathematics of equalization against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mbq.equalization import (
    ALPHAS,
    TokenRoles,
    best_candidate,
    candidates,
    check_norm,
    drawn,
    fixed_weights,
    fold,
    gradient_weights,
    mae_weights,
    mse_weights,
    rounds,
    shared_mean,
    smoothquant_vector,
    token_loss,
    uniform_weights,
    value_rows,
)
from mbq.errors import MBQError
from mbq.qtensor import fake_quantize
from mbq.scheme import WeightScheme


def roles(pattern: str) -> TokenRoles:
    """v: vision, l: language, t: text without a role, p: padding."""
    return TokenRoles(
        vision=torch.tensor([kind == "v" for kind in pattern]),
        language=torch.tensor([kind == "l" for kind in pattern]),
        counted=torch.tensor([kind != "p" for kind in pattern]),
    )


ROLES = roles("tvvvvtllltpp")


def test_candidates_are_twenty_powers_clamped_and_centred():
    mean_abs = torch.tensor([0.0, 1e-6, 0.3, 2.0, 50.0])
    found = candidates(mean_abs)
    assert len(found) == 20
    for step in range(20):
        alpha = step * 0.05
        powers = [max(value**alpha, 1e-4) for value in mean_abs.tolist()]
        middle = math.sqrt(max(powers) * min(powers))
        expected = torch.tensor([power / middle for power in powers])
        torch.testing.assert_close(found[step], expected, rtol=1e-5, atol=0)
    assert torch.equal(found[0], torch.ones(5))


@pytest.mark.parametrize("power", [1, 2])
def test_token_loss_is_the_weighted_sum_of_mean_errors(power):
    torch.manual_seed(0)
    target, output, weights = torch.randn(7, 5), torch.randn(7, 5), torch.rand(7)
    expected = 0.0
    for token in range(7):
        error = sum(abs(target[token, c].item() - output[token, c].item()) ** power for c in range(5)) / 5
        expected += weights[token].item() * error
    assert token_loss(target, output, weights, power).item() == pytest.approx(expected, rel=1e-6)


def test_released_objectives_are_what_their_formulas_say():
    torch.manual_seed(0)
    error = torch.rand(12, dtype=torch.float64)
    vision, language = error[ROLES.vision], error[ROLES.language]
    mae = (language.sum() + 0.3 * vision.sum()) / 7
    mse = language.mean() + 0.3 * vision.mean()
    assert (mae_weights(ROLES, 0.3) @ error).item() == pytest.approx(mae.item())
    assert (mse_weights(ROLES, 0.3) @ error).item() == pytest.approx(mse.item())
    assert (uniform_weights(ROLES) @ error).item() == pytest.approx(error[:10].mean().item())


def test_prompt_separators_and_padding_weigh_nothing_in_mbq():
    for weights in (mae_weights(ROLES, 0.3), mse_weights(ROLES, 0.3), gradient_weights(ROLES, 2, 1)):
        assert not weights[~(ROLES.vision | ROLES.language)].any()


def test_ratio_one_is_awq_on_vision_and_language_tokens():
    both = TokenRoles(ROLES.vision, ROLES.language, counted=ROLES.vision | ROLES.language)
    torch.testing.assert_close(mae_weights(ROLES, 1.0), uniform_weights(both))


def test_fixed_factor_is_mbq_with_that_ratio_up_to_a_constant():
    torch.testing.assert_close(fixed_weights(ROLES, 0.1) / 7, mae_weights(ROLES, 0.1))


def test_the_papers_objective_is_released_mae_without_a_floor_up_to_a_constant():
    paper = gradient_weights(ROLES, language=2.1e-7, vision=1.7e-8)
    torch.testing.assert_close(paper / (2.1e-7 * 7), mae_weights(ROLES, 1.7e-8 / 2.1e-7))


def test_the_first_of_equal_candidates_wins_and_one_that_is_not_finite_never_does():
    values = torch.tensor([math.nan, 3.0, -math.inf, 2.0, 2.0] + [5.0] * 15)
    choice = best_candidate(torch.rand(4), lambda vectors, count: values, "block 1, down", [(20, None)])
    assert choice.alpha == ALPHAS[3]
    assert choice.losses[3:5] == (2.0, 2.0)
    with pytest.raises(MBQError, match="block 1, down"):
        best_candidate(torch.rand(4), lambda vectors, count: torch.full((20,), math.nan), "block 1, down", [(20, None)])


def test_a_race_compares_the_best_quarter_again_on_four_times_the_tokens():
    """The first round errs about the best two; the second puts candidate 7 right, and the third sees two only."""
    first = torch.arange(20.0) + 10
    seen = []

    def losses(vectors, count):
        seen.append((len(vectors), count))
        return {100: first, 400: torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), 900: torch.tensor([1.5, 1.0])}[count]

    choice = best_candidate(torch.rand(4) + 1, losses, "block 0, qkv", rounds(100, 900))
    assert seen == [(20, 100), (5, 400), (2, 900)]
    assert choice.alpha == ALPHAS[4]
    assert choice.losses == (5.0, 4.0, 3.0, 1.5, 1.0, *first[5:].tolist())
    assert rounds(512, 80_000) == [(20, 512), (5, 2048), (2, 8192)]
    assert rounds(512, 600) == [(20, 512), (5, 600)]
    assert rounds(512, 512) == rounds(None, 512) == [(20, 512)]


@pytest.mark.parametrize("count", [1, 7, 64, 199, 200, 500])
def test_drawn_units_stand_for_all(count):
    """As many as asked for, each weighing what it stands for: the mean of many shifted draws is the full sum."""
    torch.manual_seed(0)
    weights = torch.rand(300, dtype=torch.float64) ** 6
    weights[::3] = 0
    values = torch.rand(300, dtype=torch.float64)
    found = drawn(weights, count)
    assert not found[weights == 0].any()
    assert abs(int((found > 0).sum()) - min(count, 200)) <= 1
    if count >= 200:
        assert torch.equal(found, weights)
    orders = [torch.randperm(300) for _ in range(400)]
    sums = torch.stack([values[order] @ drawn(weights[order], count) for order in orders])
    standard_error = sums.std() / len(orders) ** 0.5
    assert abs(sums.mean() - values @ weights) <= 4 * standard_error + 1e-9


def test_smoothquant_is_its_equation():
    max_abs = torch.tensor([4.0, 0.0, 9.0])
    weights = [torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[-4.0, 1.0, 0.25], [0.0, 0.0, 0.0]])]
    expected = [4**0.25 / 4**0.75, 1e-5**0.25 / 2**0.75, 9**0.25 / 0.5**0.75]
    torch.testing.assert_close(smoothquant_vector(max_abs, weights, 0.25), torch.tensor(expected))


@pytest.mark.parametrize("bias", [True, False])
def test_fold_into_a_layer_norm_keeps_the_function(bias):
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(8, bias=bias), nn.Linear(8, 5), nn.Linear(8, 3)
    nn.init.normal_(norm.weight)
    x, vector = torch.randn(11, 8), torch.rand(8) * 10 + 0.1
    before = first(norm(x)), second(norm(x))
    read = norm(x)
    fold(vector, torch.arange(8), list(norm.parameters()), [first.weight, second.weight])
    torch.testing.assert_close(norm(x), read / vector)
    torch.testing.assert_close((first(norm(x)), second(norm(x))), before, rtol=1e-4, atol=1e-5)


def test_value_rows_of_grouped_and_fused_heads():
    grouped = value_rows(rows=4, channels=8, head_dim=2, fused=False)  # 2 kv heads, each read by 2 query heads
    assert grouped.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    fused = value_rows(rows=16, channels=8, head_dim=2, fused=True)  # a kv head: 2 queries, key, value
    assert fused.tolist() == [6, 7, 6, 7, 14, 15, 14, 15]
    assert value_rows(rows=24, channels=8, head_dim=2, fused=True).tolist() == [4, 5, 10, 11, 16, 17, 22, 23]
    assert value_rows(rows=6, channels=8, head_dim=2, fused=False) is None
    assert value_rows(rows=4, channels=8, head_dim=0, fused=False) is None


def test_shared_mean_is_equal_where_the_row_is():
    sources = torch.tensor([6, 7, 6, 7, 2])
    torch.testing.assert_close(
        shared_mean(torch.tensor([1.0, 2.0, 3.0, 6.0, 9.0]), sources), torch.tensor([2.0, 4.0, 2.0, 4.0, 9.0])
    )


class OnePlusNorm(nn.Module):
    """Gemma's: the weight is stored less 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.float())


def test_a_norm_that_does_not_multiply_by_its_weight_is_refused():
    check_norm(nn.RMSNorm(8), "norm")
    check_norm(nn.LayerNorm(8), "norm")
    check_norm(OnePlusNorm(8), "norm", offset=1.0)
    for norm in (OnePlusNorm(8), nn.LayerNorm(8, elementwise_affine=False)):
        with pytest.raises(MBQError, match=r"layers\.0\.norm .* does not multiply by its weight"):
            check_norm(norm, "layers.0.norm")
    for norm in (nn.RMSNorm(8), nn.LayerNorm(8)):
        with pytest.raises(MBQError, match=r"layers\.0\.norm .* does not multiply by 1 plus its weight"):
            check_norm(norm, "layers.0.norm", offset=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_into_a_norm_that_adds_one_keeps_the_function(dtype):
    """In bfloat16 too, where 1 + w of a small sum is coarse: the linear gets what the sum was really divided by."""
    torch.manual_seed(0)
    norm, linear = OnePlusNorm(64).to(dtype), nn.Linear(64, 5, bias=False)  # the linear is not what is rounded here
    nn.init.normal_(norm.weight, std=0.5)
    with torch.no_grad():
        norm.weight[3], norm.weight[4] = -1, 0.5
    x, vector = torch.randn(11, 64), torch.logspace(-1.5, 1.5, 64)
    vector[4] = 1e4  # 1.5 / 1e4 - 1 is -1 in bfloat16: that channel stays as it is
    read, weight = norm(x), linear.weight.clone()
    before = linear(read)
    fold(vector, torch.arange(64), list(norm.parameters()), [linear.weight], offset=1.0)
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-4, atol=1e-4)
    assert norm.weight[3] == -1
    kept = 4 if dtype == torch.bfloat16 else 3
    assert torch.equal(linear.weight[:, kept], weight[:, kept])
    others = [channel for channel in range(64) if channel not in (3, 4)]
    torch.testing.assert_close(norm(x)[:, others], (read / vector)[:, others], rtol=0.1, atol=1e-6)


def test_when_language_is_sensitive_mbq_protects_it_better_than_awq():
    """The paper's mechanism. Many vision tokens speak on some channels, few language tokens on others."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    vision, language = torch.randn(400, 32), torch.randn(40, 32)
    vision[:, :8] *= 30
    language[:, 8:16] *= 10
    x = torch.cat([vision, language])
    kinds = roles("v" * 400 + "l" * 40)
    target, scheme = x @ weight.T, WeightScheme(3, symmetric=False, group_size=None)

    def output(vector):
        return x @ (fake_quantize(weight * vector, scheme) / vector).T

    def chosen(weights):
        def losses(vectors, _):
            return torch.stack([token_loss(target, output(vector), weights, 1) for vector in vectors])

        return best_candidate(x.abs().mean(0), losses, "toy", [(20, None)])

    def error(choice, mask):
        return (target - output(choice.equalization))[mask].abs().mean()

    awq, mbq = chosen(uniform_weights(kinds)), chosen(mae_weights(kinds, 0.01))
    assert error(mbq, kinds.language) < error(awq, kinds.language)
    assert error(mbq, kinds.vision) > error(awq, kinds.vision)  # the price, on tokens that the loss hardly feels
