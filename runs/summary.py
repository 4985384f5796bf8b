"""The table and the picture of committed results.

    python runs/summary.py                       # everything under runs/results
    python runs/summary.py runs/results/omad runs/results/omad_gaussian --picture compare.png

A folder holds the runs of one variant, one per seed. The table shows, over seeds (mean ± standard deviation): the final policy's
return on 1000 start states it never saw (fresh.txt, made by `bash runs/simple_spread.sh fresh`), the last and the best
evaluation of the run itself, and the wall time and steps until its first evaluation at or above the threshold.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro


@dataclass(frozen=True)
class Options:
    """Table and picture of finished runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders with runs in them; all of runs/results if none is given"""
    threshold: float = -13.0
    """level whose first reaching is timed"""
    picture: Path = Path(__file__).parent / "results" / "curves.png"
    """where the picture goes"""


@dataclass(frozen=True)
class Result:
    """One run: its arguments, the columns of its eval.csv, and its final policy's return on fresh start states (or NaN)."""

    args: dict
    columns: dict[str, np.ndarray]
    fresh: float


def read(folder: Path) -> list[Result]:
    """The runs of one variant, by seed: they must differ in nothing else."""
    results = []
    for path in sorted(folder.glob("*/eval.csv")):
        rows = list(csv.DictReader(path.open()))
        fresh = path.parent / "fresh.txt"
        value = float(re.search(r"return (\S+) ±", fresh.read_text())[1]) if fresh.exists() else np.nan
        args = json.loads((path.parent / "config.json").read_text())["args"]
        results.append(Result(args, {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}, value))
    same = {json.dumps({key: value for key, value in result.args.items() if key not in ("seed", "run_dir")}) for result in results}
    seeds = [result.args["seed"] for result in results]
    if len(same) > 1 or len(set(seeds)) < len(seeds):
        raise SystemExit(f"{folder}: the runs differ in more than their seeds, or a seed is there twice")
    return sorted(results, key=lambda result: result.args["seed"])


def spread(values: list[float], digits: int) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "–"
    text = f"{np.mean(known):,.{digits}f}" + (f" ± {np.std(known, ddof=1):,.{digits}f}" if len(known) > 1 else "")
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def main() -> None:
    options = tyro.cli(Options)
    folders = options.folders or sorted({path.parent.parent for path in (Path(__file__).parent / "results").glob("*/*/eval.csv")})
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    level = f"{options.threshold:g}"
    print(
        f"| variant | seeds | steps | fresh return | last return | best return | seconds to {level} | steps to {level} | minutes |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for i, folder in enumerate(folders):
        results = read(folder)
        columns = [result.columns for result in results]
        reached = [np.flatnonzero(run["return_mean"] >= options.threshold) for run in columns]
        cells = [
            folder.name,
            ", ".join(str(result.args["seed"]) for result in results),
            f"{columns[0]['step'][-1]:,.0f}",
            spread([result.fresh for result in results], 2),
            spread([run["return_mean"][-1] for run in columns], 2),
            spread([run["return_mean"].max() for run in columns], 2),
            *(
                spread([run[key][at[0]] if len(at) else np.nan for run, at in zip(columns, reached)], 0)
                for key in ("wall_time_s", "step")
            ),
            spread([run["wall_time_s"][-1] / 60 for run in columns], 1),
        ]
        print(f"| {' | '.join(cells)} |")
        for k, run in enumerate(columns):
            style = dict(color=f"C{i}", alpha=0.8, label=folder.name if k == 0 else None)
            later = run["step"] > 0  # a logarithmic axis has no place for the evaluation before learning
            by_step.plot(run["step"][later], run["return_mean"][later], **style)
            by_time.plot(run["wall_time_s"][later] / 60, run["return_mean"][later], **style)
    for axis, label in ((by_step, "environment steps"), (by_time, "minutes")):
        axis.axhline(options.threshold, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.3, which="both")
    by_step.set(ylabel="team return")
    by_step.legend(loc="lower right", fontsize="small")
    figure.savefig(options.picture, dpi=120)
    print(f"\npicture: {options.picture}")


if __name__ == "__main__":
    main()
