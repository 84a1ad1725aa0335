from __future__ import annotations

import pytest

from hydrogel_gym import oracle


@pytest.fixture
def short_search(monkeypatch):
    """Hardly any evolution, for what does not depend on how good the designs are."""
    shorter = tuple(stage._replace(generations=1) for stage in oracle.search.ROUNDS)
    monkeypatch.setattr(oracle.search, "ROUNDS", shorter)
