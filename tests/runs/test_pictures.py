"""Pictures of a run directory."""

from __future__ import annotations

from hydrogel_gym.runs import pictures


def test_learning_curve_has_divergence_and_clipping_below_with_median_and_largest(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda path, figure: drawn.append(figure))
    rows = [
        dict(global_step=step, approx_kl=kl, clipfrac=10 * kl)
        | dict.fromkeys(("mean_reward", "train_deterministic_reward"), 1.0)
        | {"holdout_deterministic_reward": 2.0}
        for step, kl in ((100, 0.01), (200, 0.05), (300, 0.02))
    ]
    pictures.draw_learning_curve(tmp_path / "curve.png", rows)
    _, below = drawn[0].axes
    divergence, clipped, usual = below.lines
    assert list(divergence.get_ydata()) == [0.01, 0.05, 0.02]
    assert divergence.get_label().endswith("(median 0.02, largest 0.05)")
    assert clipped.get_label() == "share of ratios clipped (median 0.20, largest 0.50)"
    assert usual.get_ydata()[0] == pictures.USUAL_KL
