import subprocess
import sys

import common
import gpu
import pytest
import torch

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path, capsys):
    code = gpu.run_script(lambda: gpu.main(["--output-dir", str(tmp_path)]))
    said = capsys.readouterr().err
    assert (code, said) == (2, "error: there is no CUDA device here; --dry-run needs none\n")
    assert not list(tmp_path.iterdir())


def test_a_row_that_fails_or_hangs_is_told_in_one_line_and_the_others_are_measured(
    tmp_path, capsys, monkeypatch
):
    def hang(plan):
        while True:
            pass

    def fail(plan):
        raise ArithmeticError("first\nsecond")

    plan = gpu.Plan(tmp_path, "cpu", num_envs=(), seconds=(60, 1))
    for name, function in {"cuda_tests": hang, "designs": fail}.items():
        monkeypatch.setattr(gpu, name, function)
    for name in ("time_to_quality", "refined", "ensemble", "two_ranks", "source_preset"):
        row = lambda plan: "measured"  # noqa: E731
        row.__doc__ = name
        monkeypatch.setattr(gpu, name, row)
    fail.__doc__ = "Candidates."
    assert gpu.measure(plan, {}, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == [
        "**failed**: TimeoutError: took too long",
        "measured",
        "**failed**: ArithmeticError: first",
        *["measured"] * 4,
    ]
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("Made by ")
    assert page.count("| measured |") == 5


@pytest.mark.slow
def test_dry_run_walks_every_path_without_a_gpu_and_writes_no_result():
    results = common.RESULTS / "gpu.md"
    before = results.exists() and results.read_bytes()
    command = [sys.executable, common.ROOT / "benchmark" / "gpu.py", "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert "failed" not in ended.stdout
    assert len(ended.stdout.splitlines()) == 11
    assert (results.exists() and results.read_bytes()) == before
