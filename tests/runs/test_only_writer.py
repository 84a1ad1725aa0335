from __future__ import annotations

import pytest

from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.directory import LOCK_FILE, only_writer


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_ended(tmp_path):
    with only_writer(tmp_path / "run"):
        with pytest.raises(UsageError, match="another run is writing there"):
            only_writer(tmp_path / "run").__enter__()
    with only_writer(tmp_path / "run"):
        pass


def test_lock_of_a_dead_run_keeps_nobody_out(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    with only_writer(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    with only_writer(tmp_path / "runs" / "one"):
        pass
    assert list(tmp_path.iterdir()) == []
