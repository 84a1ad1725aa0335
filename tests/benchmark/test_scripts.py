import importlib
import sys
from pathlib import Path

import common
import pytest

FOLDER = Path(common.__file__).parent
SCRIPTS = [
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in sorted(FOLDER.rglob("*.py"))
    if "run_script(main)" in path.read_text()
]
assert len(SCRIPTS) == 23


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_first_what_it_measures(name, capsys):
    for part, library in {"baselines3": "stable_baselines3", "xla": "jax"}.items():
        if part in name:
            pytest.importorskip(library)
    module = importlib.import_module(name)
    with pytest.raises(SystemExit, match="^0$"):
        module.main(["--help"])
    said, first = " ".join(capsys.readouterr().out.split()), module.__doc__.splitlines()[0]
    assert first in (said if "trainers" in name else said[: len(first)])


def test_every_name_has_its_turn_in_every_round_another_one_first():
    calls = []
    measured = common.in_turn("abc", 4, lambda name, k: calls.append(name) or k)
    assert measured == {name: [0, 1, 2, 3] for name in "abc"}
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"


def test_a_process_is_told_with_what_it_took_or_why_it_failed():
    script = "import os, time; x = b'x' * 10**8; time.sleep(0.2); print(os.environ['SAID'])"
    ended = common.run(["{python}", "-c", script], threads=1, SAID="yes")
    assert ended.output == "yes\n"
    assert ended.seconds > max(0.2, ended.processor_seconds)
    assert 100 < ended.megabytes < 200
    with pytest.raises(ChildProcessError, match="code 1: IndexError: list index out of range"):
        common.run(["{python}", "-c", "print('before'); [][0]"])


def test_a_table_says_by_what_it_was_made(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "speed" / "some.py"), "--rounds", "3"])
    made = common.made_by(2)
    assert made.startswith("Made by `python benchmark/speed/some.py --rounds 3` at commit ")
    common.write(tmp_path, "some", common.table(["a", "b"], [[1, 2]]), made=made)
    assert (tmp_path / "some.md").read_text() == f"{made}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
