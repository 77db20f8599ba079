"""docs/sensitivity.md: what it shows is what is stored, and its intervals are those of a ratio of means."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sensitivity, sensitivity_page
from benchmarks.results import ROOT, weights_hash
from benchmarks.sensitivity_means import MODELS, Means, interval


def test_the_page_of_sensitivity_shows_what_is_stored() -> None:
    """And what is stored of the models in models/ was measured on their weights."""
    found = sensitivity.stored()
    assert list(found) == list(MODELS)
    assert (ROOT / "docs" / "sensitivity.md").read_text(encoding="utf-8") == sensitivity_page.page(found)
    kept = [name for name in found if (ROOT / "models" / name).is_dir()]
    assert {"llava_clip", "llava_dinov2"} < set(kept)
    assert {name: found[name][0]["weights"] for name in kept} == {
        name: weights_hash(ROOT / "models" / name) for name in kept
    }


def test_writing_it_measures_nothing_and_draws_the_pictures(tmp_path: Path) -> None:
    sensitivity.main(["--write", "--output", str(tmp_path)])
    text = (tmp_path / "sensitivity.md").read_text(encoding="utf-8")
    assert text == (ROOT / "docs" / "sensitivity.md").read_text(encoding="utf-8")
    for family in ("internvl", "llava_onevision", "qwen2_vl"):
        assert (tmp_path / f"sensitivity-{family}.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)][:4]  # LLaVA-OneVision's
    language, vision, ratio = (float(cell.split()[0]) for cell in rows[0][1:4])
    assert ratio == pytest.approx(language / vision, rel=0.02)
    assert rows[-1][3] == "no vision gradient", "nothing attends to the last block's vision tokens"


def test_ratios_are_of_means_and_their_intervals_of_samples() -> None:
    """Where every sample has the same gradients nothing varies; where they differ the interval is about the ratio's."""
    generator = np.random.default_rng(0)
    vision = generator.gamma(4.0, size=(400, 2, 2))
    language = 5 * generator.gamma(4.0, size=(400, 2, 2))
    vision[:, 1] = 0  # the last block's
    ratios = Means(vision, language).ratios()
    assert ratios.shape[1:] == (1, 2)
    np.testing.assert_allclose(ratios[0, 0], language[:, 0].mean(0) / vision[:, 0].mean(0))
    found = interval(ratios[:, 0, 0])
    error = found.estimate * np.sqrt(2 / 4 / 400)  # by the delta method; a gamma's relative deviation is 1 / sqrt(4)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    same = Means(np.ones((5, 2, 2)), np.full((5, 2, 2), 3.0))
    np.testing.assert_allclose(same.mean_ratios(), 3.0)
    np.testing.assert_allclose(same.median_ratios(), 3.0)
