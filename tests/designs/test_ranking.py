"""Margins, windows, robustness and Pareto ranks of designs, and the files that Stage 3 reads."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from hydrogel_gym import RewardConfig, compute_reward, load_cohort, load_polymers
from hydrogel_gym.designs import sampling
from hydrogel_gym.designs.ranking import (
    ERROR_FRAC,
    PERTURBATIONS,
    pareto_rank,
    robustness,
    safety_margins,
    window_distance,
)
from hydrogel_gym.designs.schema import FORMULATION_COLUMNS, RANKED_SCHEMA, columns_of
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.fields import Design, Outcomes, formulation_at
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train import generate_candidates, ppo_hybrid, rank_designs


def outcomes(**columns: list[float]) -> Outcomes:
    count = len(next(iter(columns.values())))
    return Outcomes(*(torch.tensor(columns.get(f, [0.0] * count)) for f in Outcomes._fields))


def random_designs(count: int, seed: int) -> Design:
    rng = torch.Generator().manual_seed(seed)
    return Design(
        torch.randint(24, (count,), generator=rng),
        formulation_at(torch.rand(4, count, generator=rng)),
        torch.randint(4, (count,), generator=rng),
    )


def test_a_margin_is_negative_where_the_reward_takes_the_penalty():
    designs, model = random_designs(500, 0), MechanisticModel()
    patients = load_cohort().features.float()[:500]
    predicted, config = model(patients, *designs), RewardConfig()
    margins = safety_margins(predicted, config)
    free = RewardConfig(toxicity_penalty=0.0, integrity_penalty=0.0, fibrosis_penalty=0.0)
    lost = compute_reward(predicted, config=free) - compute_reward(predicted, config=config)
    sizes = dict(toxicity=2.0, integrity=1.0, fibrosis=0.5)
    expected = sum((margins[f"{name}_margin"] < 0.0) * size for name, size in sizes.items())
    torch.testing.assert_close(lost, expected.float())
    assert expected.unique().numel() > 2


def test_distance_is_a_share_of_the_range_to_the_nearest_edge_and_negative_outside():
    designs, polymers = random_designs(3000, 1), load_polymers()
    distance = window_distance(designs, polymers)
    inside = torch.ones(3000, dtype=torch.bool)
    for i, name in enumerate(("youngs_modulus_kpa", "half_life_days", "conductivity_s_per_m")):
        low, high = getattr(polymers, name)[designs.polymer_id].unbind(-1)
        inside &= (designs.formulation[:, i] >= low) & (designs.formulation[:, i] <= high)
    assert ((distance >= 0.0) == inside).all()
    feasibility = MechanisticModel().feasibility(designs.polymer_id, designs.formulation)
    assert (feasibility[inside] == 1.0).all()
    assert 0 < inside.sum() < 3000
    (low, _), (slow, fast) = polymers.youngs_modulus_kpa[0], polymers.half_life_days[0]
    middle = torch.tensor([[low + 0.25, (slow + fast) / 2, 0.0, 3.0]]).repeat(2, 1)
    middle[1, 2] = 0.1
    distance = window_distance(Design(torch.zeros(2).long(), middle, torch.zeros(2)), polymers)
    # The window of one value is met by the first, so that it does not count.
    assert polymers.conductivity_s_per_m[0].tolist() == [0.0, 0.0]
    assert distance.tolist() == pytest.approx([0.25 / 25.0, -0.1])


def test_robustness_is_worst_and_mean_of_every_combination_of_errors(toy_model):
    # The toy model's toxicity is the conductivity, its integrity a fifth of the thickness.
    formulation = torch.tensor([[15.0, 60.0, 0.1, 4.5], [15.0, 60.0, 0.145, 4.1]])
    design = Design(torch.tensor([3, 3]), formulation, torch.tensor([1, 1]))
    patient = torch.zeros(2, 11)
    patient[:, 9] = 0.25
    config = RewardConfig()
    worst, mean = robustness(patient, design, toy_model, config)
    requested = compute_reward(toy_model(patient, *design), config=config)
    torch.testing.assert_close(worst, requested - torch.tensor([0.0, 3.0]))
    # The second breaks each limit in a third of the cases.
    torch.testing.assert_close(mean, requested - torch.tensor([0.0, 1.0]))
    assert PERTURBATIONS.shape == PERTURBATIONS.unique(dim=0).shape == (81, 4)
    assert PERTURBATIONS.abs().max() * ERROR_FRAC == pytest.approx(0.05)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_pareto_ranks_peel_fronts_one_by_one(rows):
    names = ("delta_ef_pct", "stress_reduction_pct", "toxicity_risk", "fibrosis_risk")
    columns = {n: [float(r[i]) for r in rows] for i, n in enumerate(names)}
    found = pareto_rank(outcomes(**columns)).tolist()

    def dominates(a, b):
        better = [a[0] - b[0], a[1] - b[1], b[2] - a[2], b[3] - a[3]]
        return min(better) >= 0 and max(better) > 0

    left, level = list(range(len(rows))), 0
    while left:
        level += 1
        front = [i for i in left if not any(dominates(rows[j], rows[i]) for j in left)]
        assert [found[i] for i in front] == [level] * len(front)
        left = [i for i in left if i not in front]


@pytest.fixture(scope="module")
def ranked(finished_run, tmp_path_factory):
    """A run directory with the ranked designs of two patients."""
    run = shutil.copytree(finished_run[0].output_dir, tmp_path_factory.mktemp("ranked") / "run")
    settings = dict(policy=run, patient=("P0002", "P0001"), top_k=15)
    settings |= dict(num_candidates=4000, top_only=True)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", 2048)
        folder = generate_candidates.run(generate_candidates.Args(**settings))
    torch.set_num_threads(threads)
    rank_designs.rank(rank_designs.Args(folder))
    return run, folder


def test_ranked_designs_are_those_kept_the_best_of_each_patient_first(ranked):
    _, folder = ranked
    table = pd.read_parquet(folder / "ranked_designs.parquet")
    assert table.columns.tolist() == list(columns_of(RANKED_SCHEMA))
    assert table["patient_id"].tolist() == ["P0001"] * 15 + ["P0002"] * 15
    for _, rows in table.groupby("patient_id"):
        assert rows["rank"].tolist() == list(range(1, 16))
        assert rows["reward"].is_monotonic_decreasing
        assert (rows["reward_worst_5pct"] <= rows["reward"] + 1e-5).all()
        assert (rows["reward_worst_5pct"] <= rows["reward_mean_5pct"] + 1e-5).all()
        assert rows["pareto_rank"].min() == 1
    assert table.notna().all(axis=None)
    metadata = pq.read_schema(folder / "ranked_designs.parquet").metadata
    assert metadata[b"hydrogel_gym"] == RANKED_SCHEMA.encode()
    assert json.loads(metadata[b"columns"]) == {
        name: column.description for name, column in columns_of(RANKED_SCHEMA).items()
    }
    csv = pd.read_csv(folder / "ranked_designs.csv")
    assert (csv["stiffness_kPa"] == table["stiffness_kPa"].astype(float).round(2)).all()
    assert csv["polymer_name"].tolist() == table["polymer_name"].tolist()


def test_all_of_stage_2_is_one_file_of_plain_types(ranked):
    run, folder = ranked
    saved = torch.load(folder / "stage2_complete.pt", weights_only=True)
    source = "policy_state_dict optimizer_state_dict training_config final_metrics"
    assert set(source.split()) | {"per_patient_designs"} <= set(saved)
    agent, _ = load_policy(run / "stage2_policy.pt", ppo_hybrid.Agent, "cpu")
    agent.load_state_dict(saved["policy_state_dict"])
    assert saved["final_metrics"] == json.loads((run / "summary.json").read_text())
    assert saved["training_config"]["num_iterations"] == 6
    designs = saved["per_patient_designs"]
    assert {patient: len(rows) for patient, rows in designs.items()} == {"P0001": 15, "P0002": 15}
    first, best = pd.read_csv(folder / "ranked_designs.csv").loc[15], designs["P0002"][0]
    assert best["polymer_name"] == first["polymer_name"]
    assert best["formulation"] == pytest.approx(first[list(FORMULATION_COLUMNS)].tolist())


def test_designs_of_another_policy_and_folders_without_any_are_one_line(ranked, tmp_path, capsys):
    run, folder = ranked
    other = torch.load(run / "stage2_policy.pt", weights_only=True)
    next(iter(other["policy_state_dict"].values())).add_(1.0)
    torch.save(other, tmp_path / "stage2_policy.pt")
    (tmp_path / "empty").mkdir()
    for designs, policy, message in (
        (folder, tmp_path, "is of another policy, cohort or reward model (policy: "),
        (tmp_path / "nowhere", run, f"error: {tmp_path / 'nowhere'}: "),
        (tmp_path / "empty", run, f"error: {tmp_path / 'empty'}: "),
    ):
        assert rank_designs.main([str(designs), "--policy", str(policy)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
