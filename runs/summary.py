"""The tables and the picture of committed results of omad.py.

    python runs/summary.py                       # every run of omad.py under runs/results
    python runs/summary.py runs/results/omad runs/results/omad_gaussian --picture compare.png

A folder holds the runs of one variant, one per seed; there is a table, and a row of the picture, for each task. The
table shows, over seeds (mean ± standard deviation): the final policy's return on start states it never saw
(fresh.txt, made by `bash runs/simple_spread.sh fresh` or `bash runs/mamujoco.sh fresh`), the last and the best
evaluation of the run itself, and the wall time and steps until its first evaluation at or above the task's threshold.
"""

import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import omad

RUNS = "*__omad__*/eval.csv"  # in the folder of a variant; runs of dom2.py are offline.py's
THRESHOLDS = {  # levels whose first reaching is timed: HARL's HATD3 at 200k steps; HATD3's published curves at 3M steps
    "mpe_simple_spread": -13.0,
    "mamujoco_halfcheetah_2x3": 5300.0,
    "mamujoco_ant_2x4": 5400.0,
    "mamujoco_walker2d_2x3": 4000.0,
}


@dataclass(frozen=True)
class Options:
    """Tables and picture of finished runs."""

    # folders with runs of omad.py in them; all of runs/results if none is given
    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    picture: Path = Path(__file__).parent / "results" / "curves.png"  # where the picture goes


@dataclass(frozen=True)
class Result:
    """One run."""

    args: dict
    columns: dict[str, np.ndarray]  # of its eval.csv
    fresh: float  # its final policy's return on fresh start states, or NaN


def read(folder: Path) -> list[Result]:
    """The runs of one variant, by seed: they must differ in nothing else."""
    results = []
    for path in sorted(folder.glob(RUNS)):
        rows = list(csv.DictReader(path.open()))
        fresh = path.parent / "fresh.txt"
        value = float(re.search(r"return (\S+) ±", fresh.read_text())[1]) if fresh.exists() else np.nan
        args = json.loads((path.parent / "config.json").read_text().replace('"num_atoms"', '"n_atoms"'))["args"]
        args = vars(omad.Args(**args))  # flags that came after the run have their defaults
        results.append(Result(args, {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}, value))
    if not results:
        raise SystemExit(f"{folder}: no runs of omad.py there")
    same = {json.dumps(result.args | dict(seed=0, run_dir="", resume="")) for result in results}
    if len(same) > 1 or len({result.args["seed"] for result in results}) < len(results):
        raise SystemExit(f"{folder}: the runs differ in more than their seeds, or a seed is there twice")
    return sorted(results, key=lambda result: result.args["seed"])


def spread(values: list[float], digits: int) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "–"
    text = f"{np.mean(known):,.{digits}f}" + (f" ± {np.std(known, ddof=1):,.{digits}f}" if len(known) > 1 else "")
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def table(env_id: str, variants: dict[str, list[Result]]) -> None:
    """One task's table, in Markdown."""
    threshold = THRESHOLDS.get(env_id, np.inf)
    level, digits = f"{threshold:g}", 2 if env_id.startswith("mpe_") else 0
    print(f"{env_id}\n")
    reached = f"seconds to {level} | steps to {level}"
    print(
        f"| variant | seeds | steps | fresh return | last return | best return | {reached} | minutes |\n|" + "---|" * 9
    )
    for name, results in variants.items():
        columns = [result.columns for result in results]
        reached = [np.flatnonzero(run["return_mean"] >= threshold) for run in columns]
        first = lambda key: [run[key][at[0]] if len(at) else np.nan for run, at in zip(columns, reached)]
        seeds = ", ".join(str(result.args["seed"]) for result in results)
        cells = [
            name, seeds, f"{columns[0]['step'][-1]:,.0f}", spread([result.fresh for result in results], digits),
            spread([run["return_mean"][-1] for run in columns], digits),
            spread([run["return_mean"].max() for run in columns], digits),
            spread(first("wall_time_s"), 0), spread(first("step"), 0),
            spread([run["wall_time_s"][-1] / 60 for run in columns], 1),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print()


def draw(axes: np.ndarray, env_id: str, variants: dict[str, list[Result]]) -> None:
    """Return against steps and against minutes, a line for each run."""
    mpe = env_id.startswith("mpe_")
    for i, (name, results) in enumerate(variants.items()):
        for k, result in enumerate(results):
            run, style = result.columns, dict(color=f"C{i}", alpha=0.8, label=name if k == 0 else None)
            later = run["step"] > 0  # a logarithmic axis has no place for the evaluation before learning
            axes[0].plot(run["step"][later], run["return_mean"][later], **style)
            axes[1].plot(run["wall_time_s"][later] / 60, run["return_mean"][later], **style)
    for axis, label in zip(axes, ("environment steps", "minutes")):
        if env_id in THRESHOLDS:
            axis.axhline(THRESHOLDS[env_id], color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel=label, xscale="log" if mpe else "linear", title=env_id)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("team return")
    axes[0].legend(loc="lower right", fontsize="small")


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    found = (Path(__file__).parent / "results").glob(f"*/{RUNS}")
    folders = options.folders or sorted({path.parent.parent for path in found})
    tasks: dict[str, dict[str, list[Result]]] = {}
    for folder in folders:
        results = read(folder)
        tasks.setdefault(results[0].args["env_id"], {})[folder.name] = results
    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for row, (env_id, variants) in zip(axes, tasks.items()):
        table(env_id, variants)
        draw(row, env_id, variants)
    figure.savefig(options.picture, dpi=110)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
