"""The designs that a page shows, those next to them, and how they are packed into it."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hydrogel_gym import Outcomes, RewardConfig, compute_reward, load_reward_model
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Design
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.report.analysis import SLICE_POINTS, design_patients, slices_of
from hydrogel_gym.report.patient_view import patient_columns, patient_data
from hydrogel_gym.report.plots import tertile_map
from hydrogel_gym.report.sections import formulation_section, safety_section
from hydrogel_gym.train import ppo_hybrid

ALONG = SLICE_POINTS * len(FORMULATION_FIELDS)


def design_of(patients):
    return Design(*(torch.tensor(getattr(patients, name)) for name in Design._fields))


def test_designs_and_regret_are_those_of_the_run(finished_run, patients):
    _, summary = finished_run
    assert patients.reward.mean() == pytest.approx(summary["train_deterministic_reward"], rel=1e-5)
    assert patients.regret.mean() == pytest.approx(summary["train_regret"], rel=1e-4)
    assert patients.regret.min() >= 0.0
    for shown, is_known in ((patients, True), (patients._replace(best=None), False)):
        assert ("best" in patient_data(shown)["columns"]) == is_known
        assert ("regret" in [heading for heading, *_ in patient_columns(shown)]) == is_known


def test_slice_through_the_chosen_polymer_and_coverage_is_the_design_itself(patients):
    everyone = np.arange(len(patients.reward))
    broken = np.stack(list(patients.margins.values())) < 0
    for columns in (patients.polymer_id, NUM_POLYMERS + patients.coverage):
        chosen = everyone, ALONG + columns
        np.testing.assert_allclose(patients.slices.reward[chosen], patients.reward, atol=1e-4)
        np.testing.assert_array_equal(patients.slices.is_unsafe[chosen], broken.any(0))
    assert patients.slices.reward.shape[1] == ALONG + NUM_POLYMERS + len(COVERAGES)
    # However many patients are taken at once.
    model, features = load_reward_model("mechanistic"), patients.cohort.features.float()
    params = SimpleNamespace(patients=features, reward_config=RewardConfig())
    problem = SimpleNamespace(params=params, reward_model=model)
    slices = slices_of(problem, design_of(patients)._asdict(), at_once=7)
    np.testing.assert_allclose(slices.reward, patients.slices.reward, atol=1e-5)
    np.testing.assert_array_equal(slices.is_unsafe, patients.slices.is_unsafe)


def test_slice_along_a_parameter_is_the_reward_of_designs_that_differ_in_it(patients):
    model, point = load_reward_model("mechanistic"), 7
    for i, field in enumerate(FORMULATION_FIELDS):
        design = design_of(patients)
        share = point / (SLICE_POINTS - 1)
        design.formulation[:, i] = field.low + share * (field.high - field.low)
        expected = compute_reward(model(patients.cohort.features.float(), *design))
        found = patients.slices.reward[:, i * SLICE_POINTS + point]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_page_carries_the_slices_to_the_hundredth_and_huge_ones_in_sixteen_bits(patients):
    def rewards_of(data):
        rows = np.frombuffer(base64.b64decode(data["slices"]), "<i2").reshape(shape)
        return rows, rows * data["step"]

    shape, data = patients.slices.reward.shape, patient_data(patients)
    assert data["step"] == 0.01
    np.testing.assert_allclose(rewards_of(data)[1], patients.slices.reward, atol=0.0051)
    bits = np.frombuffer(base64.b64decode(data["unsafe"]), "u1").reshape(shape[0], -1)
    unsafe = np.unpackbits(bits, axis=1)[:, : shape[1]]
    np.testing.assert_array_equal(unsafe, patients.slices.is_unsafe)

    huge = patients.slices.reward * 100.0
    huge[0, 0] = np.nan
    data = patient_data(patients._replace(slices=patients.slices._replace(reward=huge)))
    rows, rewards = rewards_of(data)
    assert rows[0, 0] == -32768
    np.testing.assert_allclose(rewards[1:], huge[1:], atol=0.51 * data["step"])


def test_margins_are_distances_to_the_limits_on_the_safe_side(patients):
    outcomes = {
        "toxicity_risk": np.float32([0.10, 0.15, 0.25]),
        "structural_integrity": np.float32([0.90, 0.80, 0.75]),
        "fibrosis_risk": np.float32([0.20, 0.21, 0.0]),
    }
    margins = patients._replace(predicted=patients.predicted | outcomes).margins
    expected = [[0.05, 0.0, -0.10], [0.10, 0.0, -0.05], [0.0, -0.01, 0.20]]
    assert list(margins) == ["toxicity", "integrity", "fibrosis"]
    for found, margin in zip(margins.values(), expected, strict=True):
        np.testing.assert_allclose(found, margin, atol=1e-6)
        # At a limit, none is broken, whatever the limit is rounded to.
        np.testing.assert_array_equal(found < 0, np.array(margin) < 0)


def test_figures_count_every_patient_once(patients):
    (heat,) = tertile_map(np.arange(9.0), np.array([0] * 4 + [1] * 5), "axis").data
    assert heat.y == ("GelMA_3pct", "GelMA_5pct")
    np.testing.assert_allclose(heat.z, [[100, 100 / 3, 0], [0, 200 / 3, 100]])
    mixed = patients._replace(polymer_id=np.arange(12) // 5)
    for plot in formulation_section(mixed).plots:
        assert [sum(trace.y) for trace in plot.figure.data] == [5, 5, 2]


def test_model_of_the_user_is_found_by_the_id_of_the_environment_and_kept_in_float64(
    small_run, tmp_path, register_design, read_run, without_pictures
):
    def risky(patient, polymer_id, formulation, coverage):
        gain = formulation[..., 3] + 0.0 * (polymer_id + coverage + patient[..., 0])
        one = torch.ones_like(gain)
        return Outcomes(gain, 0 * one, 0 * one, one, one, 0 * one)

    env_id = register_design("Risky-v0", risky)
    args = small_run(tmp_path / "mine", env_id=env_id, precision="fp64", num_iterations=1)
    ppo_hybrid.train(args)
    patients = design_patients(read_run(args.output_dir))
    assert {values.dtype for values in patients.predicted.values()} == {np.dtype("float64")}
    assert patients.slices.is_unsafe.all()
    np.testing.assert_allclose(patients.margins["toxicity"], -0.85, atol=1e-6)
    text = safety_section(patients).texts[0]
    assert text == "100.00 % of the designs break a safety limit."
