"""The tables and the picture of datasets/README.md, which runs/report.py writes, from the cards of data and policies.

python datasets/cards.py --data datasets/data     # copies the cards of all data sets in that folder to datasets/cards
"""

import csv
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.datasets import FOLDERS, NAMES, SPLITS, normalize

HERE = Path(__file__).parent
M = 10**6
OMAR = {  # its data (arXiv 2111.11188): return mean, std, transitions of random, medium-replay, medium, expert
    "omar_simple_spread": [(160, 60, M), (204, 80, 97_500), (273, 92, M), (531, 71, M)],
    "omar_simple_tag": [(-4.1, 10.8, M), (3.9, 20.3, 62_500), (116, 59, M), (208, 78, M)],
    "omar_simple_world": [(-6.8, 5.7, M), (1.2, 13.5, 80_000), (65.9, 29.6, M), (85.2, 31.1, M)],
    "omar_halfcheetah_2x3": [(-283, 78, M), (423, 656, 460_000), (1569, 273, M), (3339, 253, M)],
}
OMAR = {env_id: dict(zip(("random", "medium-replay", "medium", "expert"), rows)) for env_id, rows in OMAR.items()}


@dataclass(frozen=True)
class Options:
    """Copies cards."""

    data: Path  # folder whose data sets' cards are copied to datasets/cards


def numbers(*values: float, between: str) -> str:
    """Numbers of one kind, without decimals if the first is large."""
    return between.join(f"{value:,.{0 if abs(values[0]) >= 100 else 1}f}" for value in values)


def read_cards() -> dict[str, dict]:
    """Of the data sets, by name."""
    paths = [HERE / "cards" / f"{name}.json" for name in NAMES]
    return {path.stem: json.loads(path.read_bytes()) for path in paths if path.exists()}


def dataset_table() -> str:
    lines = [
        "| data set | transitions | return: mean ± std | smallest … largest | normalised | OMAR's: mean ± std "
        "| OMAR's transitions |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, card in read_cards().items():
        env_id, split = card["task"], card["split"]
        result, theirs = card["return"], OMAR[env_id].get(split)
        cells = [
            f"`{name}`", f"{card['transitions']:,}", numbers(result["mean"], result["std"], between=" ± "),
            numbers(result["min"], result["max"], between=" … "), f"{normalize(env_id, result['mean']):.0f}",
            numbers(*theirs[:2], between=" ± ") if theirs else "–", f"{theirs[2]:,}" if theirs else "–",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return re.sub(r"(?<= )-0(\.0)?(?= )", r"0\1", "\n".join(lines)).replace(" -", " −")


def policy_table() -> str:
    """One task's behaviour policies after the other."""
    lines = [
        "| policy | return: mean ± std | episodes | OMAR's data | steps | minutes | command |",
        "|---|---|---|---|---|---|---|",
    ]
    paths = [HERE / "policies" / f"{env_id}-{level}.json" for env_id in FOLDERS for level in ("medium", "expert")]
    for card in (json.loads(path.read_bytes()) for path in paths):
        result, theirs = card["return"], OMAR[card["task"]][card["level"]]
        cells = [
            f"`{card['task']}-{card['level']}`", numbers(result["mean"], result["std"], between=" ± "),
            f"{result['episodes']:,}", numbers(*theirs[:2], between=" ± "), f"{card['steps']:,}",
            f"{card['minutes']:g}", f"`{card['command']}`",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def port_table() -> str:
    """Random teams here and in OMAR's environment."""
    whose = {"omar": "OMAR's", "own": "the project's own", "none": "–"}
    lines = [
        "| task | prey | here, 40,000 episodes | OMAR's random data | measured in OMAR's environment | difference |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in csv.DictReader((HERE.parent / "runs" / "results" / "omar_port.csv").open()):
        pairs = [(row[f"{place}_mean"], row[f"{place}_std"]) for place in ("here", "data", "there")]
        cells = [f"{float(mean):.2f} ± {float(std):.2f}" if mean else "–" for mean, std in pairs]
        apart = f"{float(row['apart_se']):.1f} s.e." if row["apart_se"] else "–"
        lines.append(f"| `{row['task']}` | {whose[row['prey']]} | {' | '.join([*cells, apart])} |")
    return "\n".join(lines).replace(" -", " −")


def draw() -> Figure:
    """A row for each task, a histogram of episode returns for each split, with the mean of OMAR's data as a line."""
    cards, tasks = read_cards(), list(FOLDERS)
    figure = Figure(figsize=(2.2 * len(SPLITS), 1.9 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(SPLITS), sharex="row", squeeze=False)
    for row, env_id in zip(axes, tasks):
        for axis, split in zip(row, SPLITS):
            card = cards.get(f"{env_id}-{split}")
            if card:
                bins, counts = card["histogram"], np.array(card["histogram"]["counts"])
                edges = np.linspace(bins["first"], bins["last"], len(counts) + 1)
                axis.stairs(counts / counts.sum() / np.diff(edges), edges, fill=True, color="C0", alpha=0.7)
                axis.axvline(card["return"]["mean"], color="C0", linewidth=1)
            if split in OMAR[env_id]:
                axis.axvline(OMAR[env_id][split][0], color="C1", linestyle="--", linewidth=1)
            axis.set_yticks([])
            axis.tick_params(labelsize=7)
            if env_id == tasks[0]:
                axis.set_title(split, fontsize=9)
        row[0].set_ylabel(env_id.removeprefix("omar_").removeprefix("simple_"), fontsize=8)
    figure.supxlabel("team return of an episode; lines: mean here (solid) and in OMAR's data (dashed)", fontsize=8)
    return figure


def main() -> None:
    options = tyro.cli(Options)
    for path in sorted(options.data.glob("*/*/seed_0_data/card.json")):
        card = json.loads(path.read_bytes())
        shutil.copy(path, HERE / "cards" / f"{card['task']}-{card['split']}.json")
        print(f"{card['task']}-{card['split']}")


if __name__ == "__main__":
    main()
