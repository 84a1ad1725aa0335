"""Signals: what stops a run, what has it saved, and what is left of either."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch

from hydrogel_gym.runs import policies, ranks, signals
from hydrogel_gym.train.ppo_hybrid import Agent

CPU = torch.device("cpu")


@pytest.fixture
def send_in(ppo, monkeypatch):
    """Has a signal raised in this process within an iteration."""

    def send(number, iteration):
        rollouts, plain = [], ppo.rollout

        def rollout(*args, **kwargs):
            rollouts.append(1)
            if len(rollouts) == iteration:
                signal.raise_signal(number)
            return plain(*args, **kwargs)

        monkeypatch.setattr(ppo, "rollout", rollout)

    return send


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_a_signal_to_stop_saves_the_iteration_it_came_in_and_says_so(
    ppo, cut, finished_run, of_runs, send_in, main_with, monkeypatch, capsys, interruptible, number
):
    before, rollout = signal.getsignal(number), ppo.rollout
    send_in(number, 1)
    assert main_with(cut) == 130
    assert "interrupted: what was trained so far is saved" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert of_runs.iterations_saved(cut.output_dir) == [2, 4, 5]
    summary = json.loads((cut.output_dir / "summary.json").read_text())
    assert (summary["interrupted"], summary["iterations"], summary["samples"]) == (True, 5, 960)
    policies.load_policy(cut.output_dir / "stage2_policy.pt", Agent, "cpu")
    monkeypatch.setattr(ppo, "rollout", rollout)
    ppo.train(cut)
    of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)


def test_the_warning_of_a_batch_queue_saves_and_goes_on(ppo, cut, finished_run, of_runs, send_in):
    send_in(signal.SIGUSR1, 1)
    assert not ppo.train(dataclasses.replace(cut, checkpoint_interval=100))["interrupted"]
    assert of_runs.iterations_saved(cut.output_dir) == [2, 4, 5, 6]
    of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)


def test_a_warning_while_the_requests_are_read_is_met_by_the_next_iteration(monkeypatch):
    plain = torch.tensor

    def interrupted(*args, **kwargs):
        flags = plain(*args, **kwargs)
        signal.raise_signal(signal.SIGUSR1)
        return flags

    with signals.Signals(ranks.ALONE) as sent:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", interrupted)
            assert sent.requests(CPU).tolist() == [0, 0]
        assert sent.requests(CPU).tolist() == [0, 1]
        assert sent.requests(CPU).tolist() == [0, 0]


def test_a_second_signal_to_stop_stops_at_once_unless_a_launcher_sends_it(interruptible):
    with signals.Signals(ranks.ALONE) as sent:
        signal.raise_signal(signal.SIGINT)
        assert sent.requests(CPU).tolist() == [1, 0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with signals.Signals(ranks.World(launched=True)) as sent:
        for _ in range(2):  # the signal of the terminal, and the launcher's own
            signal.raise_signal(signal.SIGINT)
        assert sent.requests(CPU).tolist() == [1, 0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` or a shell's background leave it
    with signals.Signals(ranks.ALONE) as sent:
        signal.raise_signal(signal.SIGINT)
        assert sent.requests(CPU).tolist() == [0, 0]
        signal.raise_signal(signal.SIGTERM)  # which was not ignored
        assert sent.requests(CPU).tolist() == [1, 0]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
