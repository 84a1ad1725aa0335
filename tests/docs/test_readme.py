import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_readme_example_runs_and_prints_what_it_looks_at(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a file
    torch.manual_seed(0)  # and has random weights
    exec(compile(block, "README.md", "exec"), {})
    reward, delta_ef, toxicity = map(float, capsys.readouterr().out.split())
    assert abs(reward - 3.0 * delta_ef) < 6.0  # the other terms of the reward
    assert 0.0 <= toxicity <= 1.0


@pytest.mark.parametrize("extra", ["train", "test"])
def test_readme_prints_each_install_command_once(extra):
    command = f'pip install -c constraints.txt -e ".[{extra}]" && '
    assert README.count(command) == 1


def test_readme_links_lead_to_files_of_the_repository():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_tables_of_results_are_rows_that_the_benchmarks_wrote():
    sections = (
        README[README.index("## Use the environment") : README.index("## Train")],
        README[README.index("| preset | log |") : README.index("### From policy")],
        README[README.index("## The oracle") : README.index("## Your own patients")],
        README[README.index("### Not fooled") : README.index("## What the source does")],
    )
    rows = [line for line in "".join(sections).splitlines() if line.startswith("|")]
    results = (ROOT / "benchmark" / "results").glob("*.md")
    written = {line for path in results for line in path.read_text().splitlines()}
    assert len(rows) > 20
    assert [row for row in rows if row not in written] == []
