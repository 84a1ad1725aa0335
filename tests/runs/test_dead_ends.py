"""Requests and machines on which a run once ended in a traceback, or not at all."""

from __future__ import annotations

import socket

import pytest
import torch

from hydrogel_gym import Cohort, load_cohort, load_reward_model
from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.ensemble import Stage1Error, read_stage1, save_stage1
from hydrogel_gym.oracle import best_designs, cache, search
from hydrogel_gym.runs import RunOptions, directory, ranks, tracking

CPU = torch.device("cpu")
SHIPPED = load_cohort("holdout")
ONE = Cohort(SHIPPED.patient_ids[:1], SHIPPED.features[:1], SHIPPED.extra[:1], "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-kl nan", "--target-kl is nan; allowed: above 0"),
        ("--target-kl -1", "--target-kl is -1.0; allowed: above 0"),
        (
            "--track",
            "$WANDB_MODE is 'off'; allowed: online, offline, ",
        ),
        (
            "--compile off --env-id CartPole-v1",
            "--env-id CartPole-v1 is no environment of this kind: ",
        ),
        ("--cohort nobody", "nobody: suffix ''; allowed: .csv, .parquet, or a shipped cohort: "),
    ],
)
def test_request_is_refused_in_one_line(ppo, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "off")
    assert ppo.main(["--no-oracle", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "mymod.py").write_text(
        "import hydrogel_gym\nmake = lambda: hydrogel_gym.load_reward_model('mechanistic')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert type(load_reward_model("mymod:make")).__name__ == "MechanisticModel"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "first", r"\$RANK is 'first'; allowed: a whole number"),
        ("RANK", "2", r"\$RANK is 2; allowed: below \$WORLD_SIZE, 2"),
        ("MASTER_PORT", "", r"\$MASTER_PORT is not set; allowed: a port"),
    ],
)
def test_ranks_that_no_launcher_set_are_refused(monkeypatch, name, value, message):
    ranks_set = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    for variable, given in (ranks_set | {name: value}).items():
        monkeypatch.setenv(variable, given)
    with pytest.raises(UsageError, match=message):
        ranks.connect(ranks.world_from_environment(), CPU)


def test_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, given in dict(MASTER_ADDR="localhost", MASTER_PORT=port).items():
            monkeypatch.setenv(name, given)
        with pytest.raises(UsageError, match=f"the ranks cannot meet at localhost:{port}: "):
            ranks.connect(ranks.World(0, 2), CPU)


def test_compiler_without_a_folder_to_write_to_is_no_compiler(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "/proc/nope")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(CompileError, match="FileNotFoundError: .*'/proc/nope'"):
        CompiledFunction(torch.relu)


def test_resumed_run_removes_a_checkpoint_too_many(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for iteration in (1, 2, 3, 4):
        (folder / f"checkpoint-{iteration:06d}.pt").touch()
    options = RunOptions(output_dir=tmp_path, resume="auto", keep_checkpoints=3)
    directory.prepare_output_dir(tmp_path, options, 4)
    assert sorted(int(path.stem[-6:]) for path in folder.iterdir()) == [2, 3, 4]


@pytest.fixture
def short_search(monkeypatch):
    monkeypatch.setattr(search, "ROUNDS", search.ROUNDS[:1])
    monkeypatch.setattr(search, "NUM_SOBOL", 64)


def test_cache_that_cannot_be_written_costs_a_warning(tmp_path, capsys, short_search):
    (tmp_path / "file").touch()
    best = best_designs(ONE, cache_dir=tmp_path / "file" / "oracle")
    assert best.score.isfinite().all()
    assert capsys.readouterr().err.startswith("warning: the oracle's result could not be kept: ")


def test_no_damaged_cache_is_trusted(tmp_path, short_search):
    best_designs(ONE, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content, key = path.read_bytes(), None
    import pyarrow.parquet as pq

    key = pq.ParquetFile(path).schema_arrow.metadata[b"key"].decode()
    whole = cache.read_cache(path, key, 1)
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        read = cache.read_cache(path, key, 1)
        parts = zip(read[0], whole[0], strict=True) if read else ()
        assert all(torch.equal(a, b) for a, b in parts)


def test_stage1_file_without_pessimism_is_refused(tmp_path, make_stage1):
    path = tmp_path / "m.pt"
    save_stage1(path, make_stage1(), {})
    saved = torch.load(path, weights_only=True)
    del saved["pessimism"]
    torch.save(saved, path)
    with pytest.raises(Stage1Error, match="its pessimism is None; expected a number"):
        read_stage1(path)


def test_artifact_that_is_refused_does_not_end_the_log(capsys):
    class Run:
        offline = False

        def use_artifact(self, artifact):
            raise ValueError("Invalid artifact name")

    log = object.__new__(tracking.WandbLog)
    log.run, log._cohort_artifact = Run(), lambda *_: None
    log.use_cohorts({"train": (ONE, None)})
    assert "going on without the train cohort: Invalid artifact name" in capsys.readouterr().err
