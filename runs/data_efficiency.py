"""How much of the data is needed? Return against the share of the episodes, for DOM2 and the deterministic baseline.

    python runs/data_efficiency.py --datasets omar_simple_spread-expert       # trains what is missing, then shows it
    python runs/data_efficiency.py                                            # only shows what there is

The share at which DOM2 passes what the baseline earns from all of the data is the paper's claim (at most 5 %); it is
interpolated between the shares that were run. Picture: runs/results/data_efficiency.png.
"""

from dataclasses import dataclass

import numpy as np
import offline
import tyro
from matplotlib.figure import Figure

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = ("dom2", "deterministic")


@dataclass(frozen=True)
class Options:
    """What to train; without data sets nothing is trained."""

    datasets: tuple[str, ...] = ()  # names of data sets
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of training, which also draw the episodes
    jobs: int = 2  # runs side by side


def passing(shares: list[float], means: list[float], level: float) -> float | None:
    """The smallest share from which on `means` stay at or above `level`, log-linear between those that were run."""
    below = [i for i, mean in enumerate(means) if mean < level]
    if not means or below and below[-1] == len(means) - 1:
        return None
    if not below:
        return shares[0]
    last = slice(below[-1], below[-1] + 2)
    return float(np.exp(np.interp(level, means[last], np.log(shares[last]))))


def main() -> None:
    options = tyro.cli(Options)
    offline.run(offline.Options(options.datasets, METHODS, options.seeds, FRACTIONS, jobs=options.jobs))
    curves = {}
    for dataset in sorted(path.name for path in offline.RESULT.glob("*")):
        for method in METHODS:
            found = {f: offline.read(dataset, method, f) for f in FRACTIONS}
            told = lambda values: (np.mean(values), np.std(values, ddof=len(values) > 1), len(values))
            curves[dataset, method] = {f: told([*v.values()]) for f, v in found.items() if v}
    shown = [dataset for dataset in dict.fromkeys(key[0] for key in curves) if len(curves[dataset, "dom2"]) > 1]
    offline.head("data set", "method", *(f"{f:.0%}" for f in FRACTIONS))
    for dataset in shown:
        for method in METHODS:
            found = [curves[dataset, method].get(f) for f in FRACTIONS]
            offline.line(dataset, method, *(f"{c[0]:.0f} ± {c[1]:.0f} ({c[2]})" if c else "" for c in found))
        whole = curves[dataset, "deterministic"].get(1.0)
        if whole:
            own = curves[dataset, "dom2"]
            share = passing(list(own), [value[0] for value in own.values()], whole[0])
            text = f"from {share:.1%} of the data on" if share else "not with any share"
            print(f"| | | DOM2 is at or above the baseline's {whole[0]:.0f} from all data: {text} |")
    if shown:
        draw(curves, shown)


def draw(curves: dict, shown: list[str]) -> None:
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    for axis, dataset in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for k, method in enumerate(METHODS):
            points = curves[dataset, method]
            mean, std = (np.array([value[i] for value in points.values()]) for i in (0, 1))
            axis.errorbar([100 * f for f in points], mean, std, color=f"C{k}", marker="o", capsize=3, label=method)
            if 1.0 in points:
                axis.axhline(points[1.0][0], color=f"C{k}", lw=0.7, ls=":")
        axis.set(xscale="log", xlabel="% of the episodes", ylabel="return (seeds: mean ± std)")
        axis.set_title(dataset.removeprefix("omar_"))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(offline.RESULT.parent / "data_efficiency.png", dpi=110)


if __name__ == "__main__":
    main()
