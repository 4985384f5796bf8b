"""Where the robots of some runs have been: the measure of exploration in the paper's comparison on Ant.

    python runs/coverage.py RUN_DIR RUN_DIR ...

Counts the square bins of the ground plane that the torso visited during the first training steps (random ones
included) of each run, and gives each run its share of the union: the bins that any of the given runs visited. A share
depends on which runs are compared, a count does not. The map has one panel per run, darker where it was more often;
the cross is where episodes start.

The paper reports 934, 753 and 662 bins, 68.3, 55.0 and 48.4 %, for OMAD, HASAC and HATD3 on Ant 2x4 in 250,000 steps,
but neither the size of its bins nor its denominator is known to us: counts compare only with counts made here.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Options:
    """Bins of the ground plane that runs visited."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs
    steps: int = 250_000  # how many of the first training steps count
    bin_size: float = 1.0  # side of a bin, in metres
    picture: Path = Path("coverage.png")  # where the map goes


def visited(xy: np.ndarray, bin_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Bins [V, 2] that positions xy [steps, 2] fall into, and how many positions [V] do. NaN: not recorded."""
    bins = np.floor(xy[np.isfinite(xy).all(1)] / bin_size).astype(int)
    return np.unique(bins, axis=0, return_counts=True)


def load(run: Path) -> tuple[str, np.ndarray]:
    """What a run is called here, and the torso's position after each of its steps [steps, 2] in metres."""
    try:
        args = json.loads((run / "config.json").read_text())["args"]
        xy = np.load(run / "torso_xy.npy", allow_pickle=False)
        if xy.ndim != 2 or xy.shape[1] != 2 or xy.dtype.kind != "f":
            raise ValueError(f"positions of shape {xy.shape} and kind {xy.dtype}, not [steps, 2] of floats")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"coverage.py: error: {run}: no positions of a robot that walks in a plane: {error}") from None
    return f"{args['env_id']}, {args['policy']}, seed {args['seed']}", xy


def draw(path: Path, panels: list[tuple[str, np.ndarray, np.ndarray]], bin_size: float) -> None:
    everything = np.concatenate([bins for _, bins, _ in panels])
    low, high = everything.min(0) - 1, everything.max(0) + 2
    width, height = high - low
    columns, (w, h) = (1, (9, 1.2 + 8 * height / width)) if width > 2 * height else (min(len(panels), 4), (4.4, 4.6))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(w * columns, h * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    most = max(np.log10(counts.max()) for _, _, counts in panels)
    for axis, (title, bins, counts) in zip(axes.flat, panels):
        grid = np.full(high - low, np.nan)
        grid[tuple((bins - low).T)] = np.log10(counts)
        edges = [np.arange(low[i], high[i] + 1) * bin_size for i in range(2)]
        mesh = axis.pcolormesh(*edges, grid.T, cmap="viridis_r", vmin=0, vmax=most)
        axis.plot(0, 0, "r+", markersize=10)
        axis.set(title=title, xlabel="x (m)", ylabel="y (m)", aspect="equal")
    figure.colorbar(mesh, ax=list(axes.flat[: len(panels)]), label="log10 of the steps spent in a bin")
    figure.savefig(path, dpi=110)


def main() -> None:
    options = tyro.cli(Options)
    if not options.runs or options.steps < 1 or not 0 < options.bin_size < np.inf:
        raise SystemExit("coverage.py: error: give at least one run, --steps of at least 1 and a --bin-size above 0")
    panels, union = [], set()
    for run in options.runs:
        name, xy = load(run)
        xy = xy[: options.steps]
        bins, counts = visited(xy, options.bin_size)
        if not len(bins):
            raise SystemExit(f"coverage.py: error: {run}: not one position is recorded yet")
        union |= set(map(tuple, bins.tolist()))
        panels.append((f"{name}\n{len(bins)} bins in {len(xy):,} steps", bins, counts))
        if counts.sum() < options.steps:
            print(f"note: {run} has the positions of {counts.sum():,} steps only", file=sys.stderr)
    print(
        f"bins of {options.bin_size:g} m x {options.bin_size:g} m; union of the {len(panels)} runs: {len(union)} bins"
    )
    for run, (title, bins, _) in zip(options.runs, panels):
        print(f"{len(bins):6d} bins {100 * len(bins) / len(union):5.1f} %  {title.splitlines()[0]}  ({run})")
    try:
        draw(options.picture, panels, options.bin_size)
    except OSError as error:
        raise SystemExit(f"coverage.py: error: --picture {options.picture}: {error}") from None
    print(f"map: {options.picture}")


if __name__ == "__main__":
    main()
