"""Does it still work where the environment is not that of the data? The paper's 30 settings: 6 splits x (3 particle
tasks + 2 shifts of HalfCheetah).

    python runs/generalization.py                                     # table and picture of everything there is
    python runs/offline.py --datasets omar_simple_tag-medium ...      # makes more of it

Nothing is trained for it: policies learn from the usual data (runs/offline.py) and are evaluated, without learning,
where every agent has a pace of its own (particle tasks) or where the body is another one in every episode
(HalfCheetah: random, extreme). A win is a difference of more than two standard errors, counted over the seeds of
training; less is a tie. With three seeds each, two equal methods would be called different in 12 to 18 % of the
settings. "Best of all" counts the highest mean, whatever the errors, as the paper does. Written: generalization.csv
and .png in runs/results/.
"""

import math

import numpy as np
import offline
from matplotlib.figure import Figure

SETTINGS = [
    *((f"omar_simple_{task}-{split}", "speed") for task in ("spread", "tag", "world") for split in offline.SPLITS),
    *((f"omar_halfcheetah_2x3-{split}", shift) for shift in ("random", "extreme") for split in offline.SPLITS),
]


def main() -> None:
    rows, against, best = [], [], []
    offline.head("setting", *offline.METHODS, *(f"against {other}" for other in offline.OTHERS))
    for dataset, shift in SETTINGS:
        found = {method: offline.read(dataset, method, 1.0, shift) for method in offline.METHODS}
        if not any(found.values()):
            continue
        verdicts = [offline.compare(found["dom2"], found[other]) for other in offline.OTHERS]
        offline.line(f"{dataset.removeprefix('omar_')}, {shift}", *map(offline.cell, found.values()), *verdicts)
        for method, values in found.items():
            rows += [
                dict(dataset=dataset, shift=shift, method=method, seed=s, return_mean=x) for s, x in values.items()
            ]
        against.append(verdicts)
        if all(found.values()):
            best.append(max(found, key=lambda method: np.mean(list(found[method].values()))))
    print(f"best of all: dom2 in {best.count('dom2')} of {len(best)} settings")
    for k, other in enumerate(offline.OTHERS):
        verdicts = [pair[k] for pair in against if pair[k]]
        shown = f"{len(verdicts)} of {len(SETTINGS)} settings with two seeds or more"
        print(f"against {other}: {offline.tally(verdicts)} in {shown}")
    if rows:
        offline.write_rows(offline.RESULT.parent / "generalization.csv", rows)
        draw(rows)


def draw(rows: list[dict]) -> None:
    """A panel for each task and shift: returns by split, usual environment (open) and shifted (full)."""
    tasks = list(dict.fromkeys((row["dataset"].partition("-")[0], row["shift"]) for row in rows))
    columns, lines = min(3, len(tasks)), math.ceil(len(tasks) / 3)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, (task, shift) in zip(axes.flat, tasks):
        for k, method in enumerate(offline.METHODS):
            for i, split in enumerate(offline.SPLITS):
                for where, face in (("usual", "none"), (shift, f"C{k}")):
                    values = list(offline.read(f"{task}-{split}", method, 1.0, where).values())
                    label = f"{method}, {where}" if values and i == len(offline.SPLITS) - 1 else None
                    style = dict(color=f"C{k}", mfc=face, ms=5, label=label)
                    axis.plot([i + 0.22 * (k - 1)] * len(values), values, "o", **style)
        axis.set_xticks(range(len(offline.SPLITS)), offline.SPLITS, rotation=30, ha="right")
        axis.set(title=f"{task.removeprefix('omar_')}: {shift}", ylabel="return of a seed")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(offline.RESULT.parent / "generalization.png", dpi=110)


if __name__ == "__main__":
    main()
