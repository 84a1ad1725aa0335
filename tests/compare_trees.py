"""Run two trees side by side and compare what they write, to the bit.

    python tests/compare_trees.py /path/of/old/tree [CASE ...]

Removed when the rebuild ends. One thread each; what the old tree wrote is kept in the folder.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

NEW = Path(__file__).parents[1]
OLD = Path(sys.argv[1])
WORK = Path(os.environ.get("COMPARE_DIR", "/tmp/cmp"))
Q = "--preset quick --num-iterations 8 --seed 5 --no-oracle --compile off"
TRAIN = {
    "autoregressive": Q,
    "factored": f"{Q} --policy factored --no-state-std",
    "horizon": f"{Q} --horizon 3",
    "fp64": f"{Q} --precision fp64",
    "compiled": f"{Q[:-3]}on",
    "ranks": Q,
    "ranks_compiled": f"{Q[:-3]}on",
    "resumed": f"{Q} --resume {WORK}/old/autoregressive/checkpoints/checkpoint-000004.pt",
    "random": f"{Q} --patient-assignment random --target-kl 0.01 --clip-vloss --horizon 2",
    "source": "--preset source --num-iterations 2 --num-steps 4 --seed 5 --no-oracle --compile off",
    "oracle": f"--preset quick --num-iterations 8 --seed 5 --num-envs 80 --minibatch-size 80 "
    f"--compile off --cohort {WORK}/c.csv --holdout-cohort {WORK}/h.csv",
    "stage1_run": f"{Q} --reward-model {WORK}/old/stage1/stage1.pt --pessimism 0.5 "
    "--true-reward-model mechanistic",
}
POLICY = WORK / "old" / "oracle"
AFTER = {
    "stage1": f"train/fit_stage1.py {WORK}/outcomes.csv --num-epochs 2 --num-members 2 "
    "--batch-size 64 --trunk-dim 16 --truth mechanistic --overwrite",
    "candidates": f"train/generate_candidates.py --policy {POLICY} --patient P0000 P0003 "
    "--num-candidates 300000 --compile off --top-k 50 --show --explore 0.2",
    "candidates_warm": f"train/generate_candidates.py --policy {POLICY} --patient P0001 "
    "--num-candidates 100000 --compile off --top-k 20 --temperature 1.7 --top-only",
    "refine": f"train/refine_patients.py --policy {POLICY} --patient P0000 P0005 P0007 "
    "--num-copies 50 --num-iterations 5 --top-k 20 --learning-rate 0.01 --max-kl 0.05",
}
TIMING = "rollout_seconds reward_model_seconds update_seconds wall_seconds samples_per_second"
IGNORED = set(TIMING.split()) | {
    "seconds",
    "training_began",
    "output_dir",
    "compile_seconds",
    "wandb_project",
    "wandb_entity",
    "reward_precision",
    "evaluate",
    "overwrite",
    "true_reward_model",
    "policy_file",
    "resume",
}


def run(tree: Path, script: str, *, ranks: int = 0) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    if tree == NEW:
        env.pop("PYTHONPATH")
    launcher = [sys.executable]
    if ranks:
        launcher += f"-m torch.distributed.run --standalone --nproc-per-node={ranks}".split()
    done = subprocess.run(
        [*launcher, *script.split()], cwd=tree, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{tree} {script}: {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def make(tree: Path, side: str, case: str) -> None:
    out = WORK / side / case
    if side == "old" and out.exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    flag = f"--output-dir {out}"
    if case in TRAIN:
        ranks = 2 if case.startswith("ranks") else 0
        flags = TRAIN[case] + " --checkpoint-interval 4" * ("resumed" not in case)
        run(tree, f"train/ppo_hybrid.py {flags} {flag} --overwrite", ranks=ranks)
    elif case == "ranked":
        shutil.copytree(WORK / "old" / "candidates", out)
        run(tree, f"train/rank_designs.py {out} --policy {POLICY}")
    elif case == "report":
        out.mkdir(parents=True)
        printed = run(tree, f"train/report.py {POLICY} --output {out}/report.html")
        (out / "printed.txt").write_text(printed.partition("(")[2])
        run(tree, f"train/report.py {POLICY} {WORK}/old/factored --output {out}/comparison.html")
    elif case == "evaluate":
        command = (
            "evaluate.py"
            if (tree / "train" / "evaluate.py").exists()
            else "ppo_hybrid.py --evaluate"
        )
        policy = f"{POLICY}/stage2_policy.pt"
        run(tree, f"train/{command} {policy} --cohort {WORK}/h.csv {flag}")
        run(tree, f"train/{command} {WORK}/old/horizon/stage2_policy.pt --no-oracle {flag}")
        evaluated = f"{WORK}/old/stage1_run/stage2_policy.pt --true-reward-model mechanistic"
        if "ppo" not in command:
            return
        run(tree, f"train/{command} {evaluated} --no-oracle --cohort {WORK}/c.csv {flag}")
    else:
        printed = run(tree, f"{AFTER[case]} {flag}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "printed.txt").write_text(
            "\n".join(x for x in printed.splitlines() if str(WORK) not in x)
        )


def same(a, b, where: str, close: bool) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return [f"{where}: {a.shape} {a.dtype} / {b.shape} {b.dtype}"]
        if torch.equal(a, b) or (
            a.is_floating_point() and torch.equal(a.nan_to_num(7.7), b.nan_to_num(7.7))
        ):
            return []
        gap = (a.double() - b.double()).abs().max().item()
        return [] if close and gap < 2e-2 else [f"{where}: differs by {gap:g}"]
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in {**a, **b}:
            if key in IGNORED:
                continue
            if key not in a or key not in b:
                found.append(f"{where}.{key}: only in {'old' if key in a else 'new'}")
            else:
                found += same(a[key], b[key], f"{where}.{key}", close)
        return found
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            x
            for i, (p, q) in enumerate(zip(a, b, strict=True))
            for x in same(p, q, f"{where}[{i}]", close)
        ]
    if isinstance(a, float) and isinstance(b, float) and (math.isnan(a) and math.isnan(b)):
        return []
    if (
        isinstance(a, float)
        and isinstance(b, float)
        and close
        and math.isclose(a, b, rel_tol=2e-2, abs_tol=2e-2)
    ):
        return []
    if isinstance(a, str) and isinstance(b, str):
        a, b = (x.replace("/old/", "/SIDE/").replace("/new/", "/SIDE/") for x in (a, b))
    return [] if a == b else [f"{where}: {str(a)[:80]!r} / {str(b)[:80]!r}"]


def read(path: Path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.name in ("metrics.csv", "history.csv"):
        rows = list(csv.DictReader(path.open()))
        return [{k: float(v) if v else None for k, v in row.items()} for row in rows]
    return path.read_bytes()


def compare(case: str) -> list[str]:
    old, new = (WORK / side / case for side in ("old", "new"))
    close = "compiled" in case
    found = []
    names = {p.relative_to(root) for root in (old, new) for p in root.rglob("*") if p.is_file()}
    names = {n for n in names if "oracle" not in n.parts}
    for name in sorted(names):
        if not (old / name).exists() or not (new / name).exists():
            found.append(f"{name}: only in {'old' if (old / name).exists() else 'new'}")
            continue
        if close and name.suffix == ".png":
            continue
        found += same(read(old / name), read(new / name), str(name), close)
    if not names:
        found.append("nothing was written")
    return found


def main() -> int:
    for name, table in (("c", "cohort"), ("h", "cohort_holdout")):
        lines = (OLD / "patients" / f"{table}.csv").read_text().splitlines()[:41]
        WORK.mkdir(exist_ok=True)
        (WORK / f"{name}.csv").write_text("\n".join(lines) + "\n")
    outcomes = WORK / "outcomes.csv"
    if not outcomes.exists():
        run(
            OLD, f"patients/make_outcomes.py --output {outcomes} --patients 12 --rows 2304 --seed 3"
        )
    cases = sys.argv[2:] or [*TRAIN, *AFTER, "ranked", "report", "evaluate"]
    first = [
        "stage1",
        "autoregressive",
        "oracle",
        "factored",
        "horizon",
        "stage1_run",
        "candidates",
    ]
    for case in first:
        make(OLD, "old", case)

    def both(case: str) -> list[str]:
        try:
            make(OLD, "old", case)
            make(NEW, "new", case)
            return compare(case)
        except Exception as error:
            return [f"failed: {error}"]

    bad = 0
    with ThreadPoolExecutor(2) as pool:
        for case, found in zip(cases, pool.map(both, cases), strict=True):
            bad += bool(found)
            print(
                f"{'SAME' if not found else 'DIFFERS'}: {case}",
                *found[:12],
                sep="\n    ",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
