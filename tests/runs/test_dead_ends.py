"""Requests and machines on which a run once ended in a traceback, or not at all."""

from __future__ import annotations

import pytest
import torch

from hydrogel_gym import Cohort, load_cohort, load_reward_model
from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.models.ensemble import Stage1Error, read_stage1, save_stage1
from hydrogel_gym.oracle import best_designs, cache, search

SHIPPED = load_cohort("holdout")
ONE = Cohort(SHIPPED.patient_ids[:1], SHIPPED.features[:1], SHIPPED.extra[:1], "one")


def test_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "mymod.py").write_text(
        "import hydrogel_gym\nmake = lambda: hydrogel_gym.load_reward_model('mechanistic')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert type(load_reward_model("mymod:make")).__name__ == "MechanisticModel"


@pytest.mark.torch("2.10")
def test_compiler_without_a_folder_to_write_to_is_no_compiler(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "/proc/nope")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(CompileError, match="FileNotFoundError: .*'/proc/nope'"):
        CompiledFunction(torch.relu, torch.device("cpu"))


def test_cache_that_is_damaged_or_cannot_be_written_is_not_trusted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "ROUNDS", search.ROUNDS[:1])
    monkeypatch.setattr(search, "NUM_SOBOL", 64)
    best_designs(ONE, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    key = content.split()[2].decode()
    assert cache.read_designs(path, key)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert cache.read_designs(path, key) is None
    capsys.readouterr()
    assert best_designs(ONE, cache_dir=path / "oracle").score.isfinite().all()
    assert capsys.readouterr().err.startswith("warning: the oracle's result could not be kept: ")


def test_stage1_file_without_pessimism_is_refused(tmp_path, make_stage1):
    path = tmp_path / "m.pt"
    save_stage1(path, make_stage1(), {})
    saved = torch.load(path, weights_only=True)
    del saved["pessimism"]
    torch.save(saved, path)
    with pytest.raises(Stage1Error, match="its pessimism is None; expected a number"):
        read_stage1(path)
