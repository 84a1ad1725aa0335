"""Where a run computes: which device, in which arithmetic, in how much memory."""

from __future__ import annotations

import pytest
import torch

from hydrogel_gym import errors
from hydrogel_gym.runs import devices, ranks

CPU = torch.device("cpu")


def test_a_launched_rank_takes_the_gpu_that_its_launcher_gives_it_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(errors.UsageError, match="--device cuda for 2 ranks .* which has 1 GPUs"):
        devices.resolve_device("cuda", ranks.World(0, 4, 2))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # there may be no such device
    for name, index in (("cuda", 3), ("cuda:1", 1)):
        device = devices.resolve_device(name, ranks.World(launched=True))
        assert device == torch.device("cuda", index)


def test_a_batch_that_every_rank_gathers_counts_against_the_memory(monkeypatch):
    monkeypatch.setattr(devices, "available_bytes", lambda _: 1_000_000_000)
    devices.check_rollout_memory(1_000_000, 1, CPU, ranks.ALONE)
    with pytest.raises(errors.UsageError, match="needs about 2.0 GB .* 1.0 GB left; 1,000,000 sam"):
        devices.check_rollout_memory(1_000_000, 2, CPU, ranks.ALONE)
    too_large = "needs about 0.9 GB .* 0.5 GB left; 555,555 samples"
    with pytest.raises(errors.UsageError, match=too_large):
        devices.check_rollout_memory(1_000_000, 1, CPU, ranks.World(0, 2, 2))


@pytest.mark.torch("2.13")
def test_bfloat16_on_hardware_without_it_is_refused_with_the_fallback(
    ppo, small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(errors.UsageError, match="no bfloat16 arithmetic .* use --precision fp32"):
        ppo.train(small_run(tmp_path / "run", precision="bf16"))
    assert not (tmp_path / "run").exists()


def test_the_faster_products_are_still_float32():
    before = torch.get_float32_matmul_precision()
    factor = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    with devices.fast_float32(CPU):
        product = factor @ factor
    exact = factor.double() @ factor.double()
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=1e-4)
    assert torch.get_float32_matmul_precision() == before
