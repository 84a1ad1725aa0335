"""Candidates drawn from a policy: what is drawn, what is kept, and what an interruption leaves."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym.designs import load_designs, sampling, store
from hydrogel_gym.designs.grid import design_keys
from hydrogel_gym.designs.schema import FORMULATION_COLUMNS, NUMBERS
from hydrogel_gym.designs.store import MANIFEST
from hydrogel_gym.errors import UsageError
from hydrogel_gym.problem.fields import COVERAGES
from hydrogel_gym.runs import designing
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train import generate_candidates, ppo_hybrid

BLOCK, COUNT = 256, 2500  # ten blocks, the last of which is cut off
OUTCOMES = {name: name for name in ("toxicity_risk", "structural_integrity", "fibrosis_risk")}
OUTCOMES["predicted_delta_EF"] = "delta_ef_pct"
OUTCOMES["predicted_stress_reduction"] = "stress_reduction_pct"


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks, and so parts, of few designs; threads as they were."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", BLOCK)
        patch.setattr(generate_candidates, "BLOCKS_PER_PART", 4)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(finished_run):
    """Directory of the shared run."""
    return finished_run[0].output_dir


def generate(trained, output_dir, **changes):
    settings = dict(patient=("P0003",), num_candidates=COUNT, top_k=20)
    settings |= dict(policy=trained, output_dir=output_dir)
    return generate_candidates.run(generate_candidates.Args(**(settings | changes)))


@pytest.fixture(scope="module")
def designs(trained, tmp_path_factory):
    """Folder of candidates of one patient, for all who look at it."""
    return generate(trained, tmp_path_factory.mktemp("designs") / "designs")


@pytest.fixture
def make(trained, tmp_path):
    """Draws candidates of other settings; returns the folder they are in."""
    return lambda name="designs", **changes: generate(trained, tmp_path / name, **changes)


def drawn(folder, patient_id="P0003") -> pd.DataFrame:
    return load_designs(folder, patient_id, table="candidates")


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_candidate_is_what_the_environment_says_of_it(designs, trained):
    table = drawn(designs)
    assert len(table) == COUNT
    settings = json.loads((trained / "config.json").read_text())
    cohort = hydrogel_gym.load_cohort(settings["cohort"])
    envs = hydrogel_gym.HydrogelVectorEnv(COUNT, cohort=cohort, output="torch")
    envs.reset(options={"patient_id": ["P0003"] * COUNT})
    formulation = torch.tensor(table[list(FORMULATION_COLUMNS)].to_numpy())
    action = {
        "polymer_id": torch.tensor(table["polymer_id"].to_numpy()),
        "formulation": formulation,
        "coverage": torch.tensor([COVERAGES.index(c) for c in table["coverage"]]),
    }
    _, reward, _, _, info = envs.step(action)
    assert not info["final_info"]["formulation_clipped"].any()
    assert table["reward"].to_numpy() == pytest.approx(reward.numpy(), abs=2e-4)
    for column, name in OUTCOMES.items():
        expected = info["final_info"][name].numpy()
        assert table[column].to_numpy() == pytest.approx(expected, abs=1e-4), column
    logit = info["final_info"]["optimal_logit"]
    assert table["optimal_probability"].to_numpy() == pytest.approx(logit.sigmoid(), abs=1e-4)


def test_kept_designs_are_the_best_of_all_and_unlike_each_other(designs):
    table, top = drawn(designs), load_designs(designs, "P0003")
    table = table.sort_values("reward", ascending=False).drop_duplicates(
        ["polymer_id", "coverage", *FORMULATION_COLUMNS]
    )
    assert top["reward"].tolist() == table["reward"].head(20).tolist()
    assert not top.duplicated(["polymer_id", "coverage", *FORMULATION_COLUMNS]).any()
    diverse = load_designs(designs, "P0003", table="diverse")
    best = table.groupby(["polymer_id", "coverage"], observed=True)["reward"].max()
    found = diverse.set_index(["polymer_id", "coverage"])["reward"]
    assert len(found) == len(best)
    assert (found.sort_index() == best.sort_index()).all()


def test_the_best_alone_are_the_same_designs_and_are_shown(designs, make, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    top_only = make(top_only=True, show=True)
    assert not (top_only / "candidates").exists()
    for table in ("top", "diverse"):
        pd.testing.assert_frame_equal(
            load_designs(top_only, table=table), load_designs(designs, table=table)
        )
    best = load_designs(designs)["reward"][0]
    assert f"{best:.3f}" in capsys.readouterr().out
    assert (top_only / "P0003.png").read_bytes().startswith(b"\x89PNG")
    make("all")
    assert "--top-only keeps the best alone" in capsys.readouterr().err  # too little room


def test_only_the_number_of_unlike_designs_limits_what_is_kept(make, capsys):
    folder = make(num_candidates=300, top_k=1000)
    table, top = drawn(folder), load_designs(folder)
    keys = design_keys(table["polymer_id"].to_numpy() * 4, table[list(NUMBERS)].to_numpy().T)
    assert len(table) == 300
    assert 250 < len(set(keys)) <= len(top) <= 300
    assert f"P0003: {len(top)} of 1,000 designs: no more" in capsys.readouterr().err


def test_seeds_and_patients_draw_other_numbers_and_threads_the_same(designs, make, monkeypatch):
    patients = ("P0001", "P0002", "P0003")
    torch.set_num_threads(1)
    alone = make("alone", patient=patients)
    pd.testing.assert_frame_equal(drawn(alone), drawn(designs))
    torch.set_num_threads(3)
    draws = [drawn(designs), drawn(alone, "P0002"), drawn(make("other", seed=2))]
    draws = [tuple(map(tuple, each[list(FORMULATION_COLUMNS)].to_numpy())) for each in draws]
    for one, other in itertools.combinations(draws, 2):
        assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.01
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    there = set()
    for rank, own in enumerate((("P0001", "P0003"), ("P0002",))):
        monkeypatch.setenv("RANK", str(rank))
        shared = make("shared", patient=patients)
        there |= set(own)
        assert {path.name for path in (shared / "top").iterdir()} == there
    assert files(shared) == files(alone)


def test_an_interrupted_run_goes_on_to_the_same_files(
    trained, designs, make, tmp_path, monkeypatch, capsys
):
    cut = tmp_path / "cut"
    command = ["--policy", str(trained), "--output-dir", str(cut), "--patient", "P0003"]
    command += ["--num-candidates", str(COUNT), "--top-k", "20"]
    write, turns, written = store.write_atomically, [], []

    def full_disk(path, content):
        if path.name == MANIFEST:
            return write(path, content)
        turns.append(path)  # first, since two threads write
        if turns.index(path) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", full_disk)
        assert generate_candidates.main(command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: [Errno 28] No space left on device")
    assert "0 of 1 patients were completed" in line
    assert "the same command goes on with P0003" in line
    assert 0 < len(drawn(cut)) < COUNT  # two of three parts; which, two writers decide
    before = {path: path.stat().st_mtime_ns for path in written}
    make("cut")
    assert files(cut) == files(designs)
    assert {path: path.stat().st_mtime_ns for path in written} == before  # not written again


def test_ctrl_c_is_one_line_that_says_where_to_go_on(trained, tmp_path, capsys, monkeypatch):
    complete = generate_candidates.generate

    def generate(stream, *args, **settings):
        if stream.patient_id == "P0002":
            raise KeyboardInterrupt
        complete(stream, *args, **settings)

    monkeypatch.setattr(generate_candidates, "generate", generate)
    command = ["--policy", str(trained), "--output-dir", str(tmp_path), "--num-candidates", "500"]
    assert generate_candidates.main([*command, "--patient", "P0001", "P0002", "P0003"]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("interrupted; 1 of 3 patients were completed and ")
    assert line.endswith("the same command goes on with P0002")


def test_folder_that_is_complete_or_of_something_else_is_left_as_it_was(
    trained, designs, tmp_path, monkeypatch
):
    before = files(designs)
    monkeypatch.setattr(generate_candidates, "generate", None)  # would fail if it were called
    generate(trained, designs)
    with pytest.raises(UsageError, match="contains designs of another run .seed: 1 there, now 2."):
        generate(trained, designs, seed=2)
    assert files(designs) == before
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UsageError, match="it has files but no manifest.json"):
        generate(trained, tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"all of it"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@torch.no_grad()
def test_draws_follow_policy_temperature_and_exploration(trained, temperature):
    agent, _ = load_policy(trained / "stage2_policy.pt", ppo_hybrid.Agent, "cpu")
    args = generate_candidates.Args(temperature=temperature, explore=0.25)
    torch.manual_seed(0)
    obs = agent.obs_mean + 2.0 * agent.obs_std
    # An untrained head is too even for a test of shares.
    agent.polymer_head.out.weight.mul_(200.0)
    agent.coverage_head.out.weight.mul_(50.0)
    sampler = generate_candidates.policy_sampler(agent, obs, torch.zeros(11), args)
    count = 200_000
    uniform, normal = torch.rand(count), torch.randn(count, 4)
    cell, formulation = sampling.draw(
        sampler, uniform, normal, squash=torch.tanh, temperature=temperature
    )

    polymers = torch.arange(24)
    hidden = agent.head_inputs(obs.expand(24, -1))
    polymer = (agent.polymer_head(hidden[0])[0] / temperature).softmax(-1)
    coverage = (agent.coverage_head(hidden[2], polymers) / temperature).softmax(-1)
    expected = 0.75 * (polymer[:, None] * coverage).flatten() + 0.25 / 96
    found = torch.bincount(cell, minlength=96) / count
    error = 5.0 * (expected / count).sqrt()
    assert ((found - expected).abs() <= error).all()
    assert expected.max() > 3.0 / 96

    p = int(expected.view(24, 4).sum(1).argmax())
    chosen = formulation[cell // 4 == p]
    inner = agent.formulation_distribution(hidden[1], polymers, polymers * 0)
    scale = inner.log_std[p].exp() * math.sqrt(temperature)
    share = 0.25 / 24 / float(expected.view(24, 4).sum(1)[p])  # of these, drawn evenly
    low, high = agent.formulation_low, agent.formulation_high
    for quantile in (0.2, 0.5, 0.9):
        normal = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1))
        point = (torch.tanh(inner.mean[p] + scale * normal) + 1) / 2
        below = (chosen <= low + point * (high - low)).float().mean(0)
        assert below == pytest.approx(((1 - share) * quantile + share * point), abs=0.012)


def test_an_outcome_that_is_not_finite_ends_the_run_with_the_patient(make, monkeypatch):
    make_envs = designing.make_envs

    def with_a_hole(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        model = envs.unwrapped.problem.reward_model

        def broken(patient, polymer_id, formulation, coverage):
            outcomes = model(patient, polymer_id, formulation, coverage)
            logit = torch.where(polymer_id == 7, torch.inf, outcomes.optimal_logit)
            return outcomes._replace(optimal_logit=logit)

        envs.unwrapped.problem.reward_model = broken
        return envs

    monkeypatch.setattr(designing, "make_envs", with_a_hole)
    with pytest.raises(FloatingPointError, match="patient 'P0003' and the design polymer_id=7"):
        make()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patient", "P003"], "has no patient 'P003'; nearest: P0"),
        (["--explore", "1.5"], "--explore is 1.5; allowed: 0 to 1"),
        (["--temperature", "0"], "--temperature is 0.0; allowed: above 0"),
        (["--num-candidates", "0"], "--num-candidates is 0; allowed: 1 or more"),
        (["--top-k", "999999999999"], "--top-k is 999999999999; allowed: 1 to 1,000,000"),
        (["--seed", "-3"], "--seed is -3; allowed: 0 or more"),
        (["--policy", "no/such/run"], "there is no no/such/run"),
        (["--policy", "{tmp}/other.pt"], "Other"),
        (["--output-dir", "{tmp}/other.pt"], "/other.pt cannot be written to: File exists"),
        (["--output-dir", "{tmp}/loop"], "/loop"),
        (["--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, capsys, flags, message):
    saved = torch.load(trained / "stage2_policy.pt", weights_only=True)
    saved["training_config"]["env_id"] = "Other-v0"
    torch.save(saved, tmp_path / "other.pt")
    (tmp_path / "loop").symlink_to("loop")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    command = ["--policy", str(trained), "--output-dir", str(tmp_path / "designs"), *flags]
    assert generate_candidates.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "designs").exists()


@pytest.mark.slow
def test_the_compiled_graph_draws_the_same_designs(designs, make):
    plain, compiled = drawn(designs), drawn(make(compile="on"))
    same = (plain[list(FORMULATION_COLUMNS)] - compiled[list(FORMULATION_COLUMNS)]).abs().max()
    assert (same.to_numpy() <= np.array([0.0101, 0.101, 0.00101, 0.0101])).all()
    assert plain["polymer_id"].equals(compiled["polymer_id"])
    assert plain["reward"].to_numpy() == pytest.approx(compiled["reward"].to_numpy(), abs=2.01)
