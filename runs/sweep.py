"""The search behind the presets of dom2.py: short runs around a first guess, one value changed at a time.

    python runs/sweep.py                                        # every data set; about three hours on two cores
    python runs/sweep.py --datasets omar_simple_tag-expert      # one of them
    python runs/sweep.py --datasets omar_halfcheetah_2x3-expert --repeat 3      # the best three with two more seeds
    python runs/sweep.py --show > runs/results/dom2_sweep.md    # only the table of all complete searches

Each row of runs/results/dom2_sweep.csv is one run: what was set, and the return of its last policy on 400 episodes
(20 of HalfCheetah). Rows that are there are not run again, whatever the revision they were made at: what is not a
column is the preset's of that revision. Rows of other lengths or first guesses, from earlier searches, stay in the
file and out of the table. The runs' seed is 101, so that neither their batches nor the start states of their
evaluations are those of the results shown in README.md (seeds 1 to 3). All trials on a data set take about the same
time, and diffusion policies and the deterministic baseline get equally many: where eta is changed for the one, which
the other does not know, the other's learning rate of the policies is. One seed each: differences of less than about
ten in the return of spread are noise, and the best of several is a little lucky. On HalfCheetah,
where seeds differ by hundreds, that is too few: --repeat runs the best again, and the mean of all seeds decides.
"""

import concurrent.futures
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import assignments
import offline
from common.datasets import SCORES, SPLITS, open_dataset

RESULT = ROOT / "runs" / "results" / "dom2_sweep.csv"
FLAGS = (
    "policy", "network", "gamma", "q_weight", "cql_weight", "cql_own", "thresholds", "top_quantile", "critic_hidden",
    "policy_lr", "q_lr", "total_updates", "seed",
)  # fmt: skip
SAID = {  # in the table: what was changed
    "q_weight": "η", "cql_weight": "ζ", "policy_lr": "policy rate", "gamma": "γ", "thresholds": "thresholds",
    "cql_own": "own action", "critic_hidden": "critics",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Which part of the search to run."""

    # data sets to search
    datasets: tuple[str, ...] = tuple(f"{env_id}-{split}" for env_id in SCORES for split in SPLITS) + (
        assignments.NAME,
    )
    jobs: int = 2  # runs side by side
    network: str = "unet"  # of the diffusion policies
    repeat: int = 0  # how many of the best trials of each kind, by the first seed, to run with two more seeds
    show: bool = False  # run nothing, show the table of complete searches


# First guesses, from trials: eta and zeta by split ...
TAG_WORLD = dict(zip(SPLITS, ((4.0, 1.0), (0.4, 16.0), (0.4, 16.0), (0.2, 16.0), (0.05, 16.0), (0.05, 16.0))))
GUESS = {
    "omar_simple_spread": dict(
        zip(SPLITS, ((120.0, 0.5), (10.0, 1.0), (10.0, 1.0), (8.0, 1.0), (2.0, 2.0), (1.0, 2.0)))
    ),
    "omar_simple_tag": TAG_WORLD,
    "omar_simple_world": TAG_WORLD,
    "omar_halfcheetah_2x3": dict(
        zip(SPLITS, ((128.0, 8.0), (4.0, 8.0), (4.0, 8.0), (1.0, 8.0), (1.0, 8.0), (0.5, 8.0)))
    ),
}
# ... and the rest by task.
PARTICLES = dict(gamma=0.9, policy_lr=1e-3, q_lr=3e-3, cql_own=False, total_updates=2_000)
CHASES = dict(gamma=0.95, policy_lr=1e-2, cql_own=True)  # tag and world
ROBOT = dict(gamma=0.99, policy_lr=1e-3, q_lr=1e-3, cql_own=True, total_updates=2_000)
ASSIGNMENTS = dict(q_weight=0.1, cql_weight=8.0, total_updates=2_000, thresholds=0)
SEEDS = (101, 102, 103)  # the first for every trial
NARROW, WIDE = 64, 256  # critics
FACTOR = 4  # by which eta and zeta are changed


def trials(dataset: str, network: str) -> list[dict]:
    """What to try on a data set."""
    task, _, split = dataset.partition("-")
    base = dict(network=network, thresholds=3, top_quantile=0.98, critic_hidden=NARROW, seed=SEEDS[0])
    base |= ROBOT if "cheetah" in task else PARTICLES
    base |= CHASES if task in ("omar_simple_tag", "omar_simple_world") else {}
    if split == "random" and "cheetah" not in task:  # which takes longer
        base |= dict(total_updates=6_000, cql_own=False, policy_lr=min(base["policy_lr"], 3e-3))
    if dataset == assignments.NAME:
        base |= ASSIGNMENTS
    else:
        base |= dict(zip(("q_weight", "cql_weight"), GUESS[task][split]))
    changes = [{}, *({name: base[name] * f} for name in ("cql_weight", "q_weight") for f in (1 / FACTOR, FACTOR))]
    changes += [dict(critic_hidden=WIDE) if task == "omar_simple_spread" else dict(cql_own=not base["cql_own"])]
    if split in ("random", "medium") and "cheetah" not in task:
        changes += [dict(gamma=0.95 if base["gamma"] == 0.9 else 0.9)]
    if base["thresholds"]:
        changes += [dict(thresholds=8)]
    result = []
    for policy, method in (("diffusion", "dom2"), ("deterministic", "deterministic")):
        for change in changes:
            trial = base | change | dict(policy=policy)
            if policy == "deterministic":  # which has neither network nor eta
                factor = {base["q_weight"] / FACTOR: 1 / 3, base["q_weight"] * FACTOR: 3}.get(trial["q_weight"], 1)
                trial |= dict(network="", q_weight=1.0, policy_lr=offline.BASELINE_LR * factor)
            # As many as take the same time, as in the results.
            times = offline.longer(dataset, method, trial["critic_hidden"], base["critic_hidden"])
            trial |= dict(total_updates=round(times * base["total_updates"]))
            result.append(trial)
    return result


def key(dataset: str, trial: dict) -> tuple[str, ...]:
    """The same for a trial and for the row that it made."""
    return dataset, *(str(trial[name]) for name in FLAGS)


def rows() -> list[dict]:
    return list(csv.DictReader(RESULT.open())) if RESULT.exists() else []


def make(dataset: str) -> None:
    """The data, if they are missing."""
    if dataset == assignments.NAME:
        assignments.make_data()
    else:
        open_dataset(dataset)


def run(dataset: str, trial: dict) -> dict | str:
    """One run of dom2.py, as a user would start it: its row, or what went wrong."""
    flags = [*assignments.SOURCE] if dataset == assignments.NAME else ["--dataset", dataset]
    flags += offline.as_flags({name: value for name, value in trial.items() if value != ""})
    if not trial["thresholds"]:
        flags += ["--no-reweight"]
    with tempfile.TemporaryDirectory() as folder:
        flags += [
            "--eval-every",
            str(trial["total_updates"]),
            "--eval-episodes",
            "20" if "cheetah" in dataset else "400",
        ]
        command = [sys.executable, str(ROOT / "dom2.py"), *flags, "--device", "cpu", "--run-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)}\n{done.stderr}"
        last = list(csv.DictReader(next(Path(folder).glob("*/eval.csv")).open()))[-1]
        revision = json.loads(next(Path(folder).glob("*/config.json")).read_text())["git_revision"]
    found = dict(return_mean=round(float(last["return_mean"]), 2), return_std=round(float(last["return_std"]), 2))
    found |= dict(episodes=last["episodes"], seconds=last["wall_time_s"], git_revision=revision)
    return dict(dataset=dataset) | trial | found


def star(dataset: str, policy: str, network: str) -> list[dict]:
    """The rows of a complete search, the first guess first; of another, none."""
    found = {key(row["dataset"], row): row for row in rows()}
    keys = [key(dataset, trial) for trial in trials(dataset, network) if trial["policy"] == policy]
    return [found[k] for k in keys] if set(keys) <= set(found) else []


def returns(row: dict) -> list[float]:
    """What the trial of the row gave, with each of the seeds it was run with."""
    same = lambda other: all(other[name] == row[name] for name in ("dataset", *FLAGS) if name != "seed")
    found = {other["seed"]: float(other["return_mean"]) for other in rows() if same(other)}
    return [found[str(seed)] for seed in SEEDS if str(seed) in found]


def again(dataset: str, network: str, count: int) -> list[dict]:
    """The best trials of each kind in a complete search, by the first seed, with the other seeds."""
    result = []
    for policy in ("diffusion", "deterministic"):
        found = sorted(star(dataset, policy, network), key=lambda row: -float(row["return_mean"]))
        best = {key(dataset, row) for row in found[: max(count, 0)]}
        chosen = [trial for trial in trials(dataset, network) if key(dataset, trial) in best]
        result += [trial | dict(seed=seed) for trial in chosen for seed in SEEDS[1:]]
    return result


def show(datasets: tuple[str, ...], network: str) -> None:
    """Every complete search as a line: the return of the first guess, and what one change of it gave; in bold the best.
    Trials with several seeds: their mean ± standard deviation (seeds); where there are any, the best is one of them."""
    given = "return ± standard error over episodes, or mean ± standard deviation (seeds)"
    offline.head("data set", "policies", "first guess", given, "one change, and the return then")
    for dataset in datasets:
        for policy in ("diffusion", "deterministic"):
            if found := star(dataset, policy, network):
                best, told = best_of(found), lambda row: f"**{tell(row)}**" if row is best else tell(row)
                said = [name for name in SAID if policy == "diffusion" or name != "q_weight"]
                guess = ", ".join(f"{SAID[name]} {short(found[0][name])}" for name in said)
                error = float(found[0]["return_std"]) / float(found[0]["episodes"]) ** 0.5
                first = told(found[0]) + ("" if len(returns(found[0])) > 1 else f" ± {error:.1f}")
                changes = []
                for row in found[1:]:
                    name = next(name for name in FLAGS if name != "total_updates" and row[name] != found[0][name])
                    changes.append(f"{SAID[name]} {short(row[name])}: {told(row)}")
                offline.line(dataset, policy, guess, first, "; ".join(changes))


def best_of(found: list[dict]) -> dict:
    """The best trial of a complete search: by the mean over seeds, of those that were run with all; if there are not at
    least two of them, by the first seed."""
    repeated = [row for row in found if len(returns(row)) == len(SEEDS)]
    if len(repeated) > 1:
        return max(repeated, key=lambda row: np.mean(returns(row)))
    return max(found, key=lambda row: float(row["return_mean"]))


def tell(row: dict) -> str:
    """The return of a trial; of one with several seeds, mean ± standard deviation (seeds)."""
    values = returns(row)
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f} ({len(values)})" if len(values) > 1 else "")


def short(value: str) -> str:
    """A number in few digits; "yes" or "no"."""
    return {"True": "yes", "False": "no"}.get(value) or f"{float(value):.3g}"


def run_all(todo: list[tuple[str, dict]], jobs: int) -> None:
    """Runs what has no row yet; each row is in the file as soon as its run is done."""
    known = {key(row["dataset"], row) for row in rows()}
    todo = list({key(*item): item for item in todo if key(*item) not in known}.values())
    for dataset in dict.fromkeys(dataset for dataset, _ in todo):
        make(dataset)  # here, lest two runs make it at once
    os.environ["OMP_NUM_THREADS"] = "1"
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, *item) for item in todo]):
            if isinstance(row := future.result(), str):
                print(row, file=sys.stderr, flush=True)  # the others go on
                continue
            offline.write_rows(RESULT, [*rows(), row])
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def main() -> None:
    options = tyro.cli(Options)
    if not options.show:
        run_all([(d, t) for d in options.datasets for t in trials(d, options.network)], options.jobs)
        run_all([(d, t) for d in options.datasets for t in again(d, options.network, options.repeat)], options.jobs)
    show(options.datasets, options.network)


if __name__ == "__main__":
    main()
