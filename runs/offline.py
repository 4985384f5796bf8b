"""The results of DOM2 on OMAR's data: DOM2, the same without the critic's gradient, and the deterministic baseline.

    python runs/offline.py --datasets omar_simple_spread-medium     # trains what is missing, evaluates, shows the table
    python runs/offline.py --datasets omar_simple_spread-expert --fractions 0.05      # from 5 % of the episodes
    python runs/offline.py                                          # only the table of everything there is

Every run has the preset of its data set, but for what suits the baseline better (`baseline`). DOM2 makes the preset's
number of updates; the others, whose updates are cheaper, make so many more (`COST`) that they take about as long: the
table has the minutes of each. A run's last policy is then evaluated over 1000 episodes (50 of HalfCheetah) whose seed
no run and no search used: fresh.csv in the run's folder, one row for the usual environment and one for each of its
shifts. Everything is kept in runs/results/offline/<data set>/<method>[-<percent>]/, beside data.json, what the data
earn; an interrupted run is gone on with.
"""

import concurrent.futures
import csv
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dom2
from common.datasets import SCORES, SPLITS, normalize, open_dataset
from common.envs import evaluate, make_vec, offers_shift

RESULT = ROOT / "runs" / "results" / "offline"
METHODS = {"dom2": "", "cloning": "--q-weight 0", "deterministic": "--policy deterministic"}
# Milliseconds of an update on one core of a shared virtual machine, 2026-11-20, by the width of the critics, for equal
# time to within a quarter or so: particle tasks, HalfCheetah.
COST = {"dom2": {64: 24.0, 256: 62.1}, "cloning": {64: 6.9, 256: 6.9}, "deterministic": {64: 8.0, 256: 46.0}}
COST_ROBOT = {"dom2": {64: 28.0, 256: 56.0}, "cloning": {64: 5.6, 256: 5.6}, "deterministic": {64: 7.0, 256: 37.3}}
# The deterministic policies: their rate, where the search found no other, and what else suits them other than presets.
BASELINE_LR = 1e-3
BASELINE = {
    "omar_simple_spread-random": dict(thresholds=8),
    "omar_simple_spread-random-medium": dict(policy_lr=3e-3, cql_weight=1.0),
    "omar_simple_spread-medium": dict(cql_weight=0.25),
    "omar_simple_spread-expert": dict(cql_weight=0.5),
    "omar_simple_tag-random-medium": dict(cql_weight=4.0, thresholds=3),
    "omar_simple_tag-medium-replay": dict(cql_weight=4.0, thresholds=3),
    "omar_simple_tag-medium": dict(policy_lr=3e-3),
    "omar_simple_tag-expert": dict(policy_lr=3e-3),
    "omar_simple_world-random": dict(gamma=0.9, cql_weight=1.0),
    "omar_simple_world-random-medium": dict(cql_weight=4.0),
    "omar_simple_world-medium-replay": dict(cql_weight=4.0, thresholds=3),
    "omar_simple_world-medium": dict(thresholds=8),
    "omar_simple_world-expert": dict(thresholds=8),
    "omar_halfcheetah_2x3-random": dict(policy_lr=BASELINE_LR / 3, cql_weight=8.0),
    "omar_halfcheetah_2x3-random-medium": dict(cql_weight=2.0),
    "omar_halfcheetah_2x3-medium-replay": dict(cql_weight=8.0, thresholds=8),
    "omar_halfcheetah_2x3-medium": dict(cql_weight=32.0, thresholds=3),
    "omar_halfcheetah_2x3-medium-expert": dict(policy_lr=BASELINE_LR / 3),
    "omar_halfcheetah_2x3-expert": dict(policy_lr=3e-3),
}
OTHERS = tuple(METHODS)[1:]  # what DOM2 is compared with
FRESH = 10**6  # seed of the fresh episodes


@dataclass(frozen=True)
class Options:
    """What to train; without data sets nothing is trained."""

    datasets: tuple[str, ...] = ()  # names of data sets
    methods: tuple[str, ...] = tuple(METHODS)  # of dom2, cloning, deterministic
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of training
    fractions: tuple[float, ...] = (1.0,)  # shares of the episodes to learn from
    updates: int = 0  # updates of DOM2, instead of the preset's
    jobs: int = 2  # runs side by side, one core each


def folder(dataset: str, method: str, fraction: float) -> Path:
    return RESULT / dataset / (method if fraction == 1 else f"{method}-{100 * fraction:g}")


def longer(dataset: str, method: str, critic_hidden: int, usual: int) -> float:
    """How many updates with critics of that width take the time of one of DOM2 with critics of the usual width."""
    cost = COST_ROBOT if "cheetah" in dataset else COST
    return cost["dom2"][usual] / cost[method][critic_hidden]


def baseline(dataset: str) -> dict:
    """What the deterministic policies have instead of the preset's."""
    return dict(policy_lr=BASELINE_LR) | BASELINE.get(dataset, {})


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def find_run(dataset: str, method: str, fraction: float, seed: int) -> Path | None:
    """The folder of a finished run."""
    return next((path.parent for path in folder(dataset, method, fraction).glob(f"*__dom2__{seed}__*/fresh.csv")), None)


def train(dataset: str, method: str, fraction: float, seed: int, updates: int) -> None:
    """One run, unless it is there already."""
    if not find_run(dataset, method, fraction, seed):
        preset = dom2.preset(dataset)
        own = baseline(dataset) if method == "deterministic" else {}
        times = longer(dataset, method, own.get("critic_hidden", preset.critic_hidden), preset.critic_hidden)
        evaluations = math.ceil((updates or preset.total_updates) / preset.eval_every)
        every = round(times * (updates or preset.total_updates) / evaluations)
        count = every * evaluations
        flags = ["--dataset", dataset, *METHODS[method].split(), *as_flags(own), "--data-fraction", str(fraction)]
        flags += ["--total-updates", str(count), "--eval-every", str(every)]
        complete(folder(dataset, method, fraction), seed, flags)


def complete(place: Path, seed: int, flags: list[str]) -> None:
    """One run of dom2.py, as a user would start it, or the rest of one; and the evaluation of its last policy."""
    program, begun = [sys.executable, str(ROOT / "dom2.py")], next(place.glob(f"[!.]*__dom2__{seed}__*"), None)
    rest = ["--resume", str(begun)] if begun else [*flags, "--seed", str(seed), "--run-dir", str(place)]
    done = subprocess.run([*program, *rest], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join([*program, *rest])}\n{done.stderr}")
    run = next(place.glob(f"[!.]*__dom2__{seed}__*"))
    (run / "curve.png").unlink(missing_ok=True)  # it can be drawn from eval.csv
    config = json.loads((run / "config.json").read_text())
    config["args"] |= dict(run_dir="runs", resume="", dataset=config["args"]["dataset"].replace(f"{ROOT}/", ""))
    (run / "config.json").write_text(json.dumps(config, indent=2))
    rows = fresh(run)
    write_rows(run / "fresh.csv", rows)  # now it is a finished run
    minutes = done.stdout.splitlines()[-1].split(":")[0]
    print(f"{place.relative_to(RESULT.parent)} seed {seed}: {rows[0]['return_mean']:.1f} ({minutes})", flush=True)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A csv file, whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    scratch.rename(path)


def fresh(run: Path) -> list[dict]:
    """Returns of a run's last policy over fresh episodes, in the usual environment and in its shifts."""
    policy, saved = dom2.load_policy(run)
    env_id, act = saved["env_id"], dom2.make_act(policy)
    count, rows = 50 if "cheetah" in env_id else 1000, []
    for shift in ("", *offers_shift(env_id)):
        returns = evaluate(act, make_vec(env_id, count, shift=shift), FRESH)
        rows.append(dict(shift=shift or "usual", return_mean=returns.mean(), return_std=returns.std(), episodes=count))
    return rows


def read(dataset: str, method: str, fraction: float, shift: str = "usual") -> dict[int, float]:
    """Fresh returns by seed."""
    return read_folder(folder(dataset, method, fraction), shift)


def read_folder(place: Path, shift: str) -> dict[int, float]:
    found = {int(path.parent.name.split("__")[2]): path for path in sorted(place.glob("*__dom2__*/fresh.csv"))}
    rows = [(seed, row) for seed, path in found.items() for row in csv.DictReader(path.open())]
    return {seed: float(row["return_mean"]) for seed, row in rows if row["shift"] == shift}


def line(*cells: object) -> None:
    """Of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |")


def head(*names: str) -> None:
    line(*names)
    print("|" + "---|" * len(names))


def cell(values: dict[int, float]) -> str:
    spread = f" ± {np.std([*values.values()], ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean([*values.values()]):.1f}{spread} ({len(values)})" if values else ""


def minutes(dataset: str, method: str, fraction: float) -> str:
    """Mean wall time of the finished runs, and their updates."""
    finished = [path.with_name("eval.csv") for path in folder(dataset, method, fraction).glob("*/fresh.csv")]
    ends = [list(csv.DictReader(path.open()))[-1] for path in finished]
    seconds = [float(end["wall_time_s"]) for end in ends]
    return f"{np.mean(seconds) / 60:.1f} min, {int(ends[0]['step']):,}" if ends else ""


def note_data(dataset: str, returns: np.ndarray) -> None:
    """Keeps what the data of these runs earn: HalfCheetah's, made on another machine, are others than the card's. Stops
    if there are runs on other data."""
    path = RESULT / dataset / "data.json"
    mean, std = (round(float(value), 2) for value in (returns.mean(), returns.std()))
    told = {"return_mean": mean, "return_std": std, "episodes": len(returns)}
    if path.exists() and json.loads(path.read_text()) != told and any(path.parent.glob("*/*/fresh.csv")):
        theirs = f"theirs earn {data_return(dataset):.2f}, those here {mean:.2f}"
        raise SystemExit(f"{path.parent} has runs on other data: {theirs}; delete it to start anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"data.json.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(told) + "\n")
    scratch.rename(path)


def data_return(dataset: str) -> float:
    """Mean return of the data of these runs; nan if it is not known."""
    here, card = RESULT / dataset / "data.json", ROOT / "datasets" / "cards" / f"{dataset}.json"
    if here.exists():
        return json.loads(here.read_text())["return_mean"]
    return json.loads(card.read_text())["return"]["mean"] if card.exists() else math.nan


def compare(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Win, tie or loss of the first, by two standard errors over seeds; "" with fewer than two seeds of either."""
    if min(len(ours), len(theirs)) < 2:
        return ""
    a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return "tie" if abs(a.mean() - b.mean()) <= 2 * error else "win" if a.mean() > b.mean() else "loss"


def tally(verdicts: list[str]) -> str:
    """How many of each there are."""
    counts = {word: verdicts.count(word) for word in ("win", "tie", "loss")}
    plural = lambda word: word + ("es" if word == "loss" else "s") * (counts[word] > 1)
    return ", ".join(f"{count} {plural(word)}" for word, count in counts.items() if count) or "none"


def show() -> None:
    """Fresh returns of everything there is: mean ± standard deviation over seeds (number of seeds); how DOM2 fares
    against the other two; and how often it does so with all data."""
    head("data set", "share", "data", *METHODS, "against these two", "normalised", "time and updates of each")
    against, order = [], [f"{env_id}-{split}" for env_id in SCORES for split in SPLITS]
    place = lambda name: ([*order, name].index(name), name)
    for dataset in sorted((path.name for path in RESULT.glob("*")), key=place):
        fractions = {float(path.name.partition("-")[2] or 100) / 100 for path in (RESULT / dataset).glob("*/")}
        for fraction in sorted(fractions, reverse=True):
            found = {method: read(dataset, method, fraction) for method in METHODS}
            env_id, own = dataset.partition("-")[0], list(found["dom2"].values())
            score = f"{normalize(env_id, np.mean(own)):.0f}" if own and env_id in SCORES else ""
            took = "; ".join(minutes(dataset, method, fraction) for method in METHODS)
            verdicts = [compare(found["dom2"], found[method]) for method in OTHERS]
            if fraction == 1:
                against.append((dataset.removeprefix("omar_").partition("-")[0], verdicts))
            said = ", ".join(verdict or "–" for verdict in verdicts)
            where = (dataset.removeprefix("omar_"), f"{fraction:.0%}", f"{data_return(dataset):.0f}")
            line(*where, *map(cell, found.values()), said, score, took)
    tasks = list(dict.fromkeys(task for task, _ in against))
    print("\nWith all data:\n")
    head("dom2 against", *tasks, "all")
    for k, method in enumerate(OTHERS):
        line(method, *(tally([verdicts[k] for task, verdicts in against if x in ("", task)]) for x in (*tasks, "")))


def run(options: Options) -> None:
    """Trains and evaluates what is missing."""
    torch.set_num_threads(1)
    for dataset in options.datasets:
        note_data(dataset, open_dataset(dataset).returns)  # made here if missing, lest two runs make it at once
    jobs = itertools.product(options.seeds, options.datasets, options.fractions, options.methods)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: train(job[1], job[3], job[2], job[0], options.updates), jobs))


def main() -> None:
    run(tyro.cli(Options))
    show()


if __name__ == "__main__":
    main()
