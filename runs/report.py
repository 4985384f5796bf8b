"""Writes every table, between its marks, and every picture of the documents, from the raw files that lie beside them.

Statistics over seeds are those of Agarwal et al. (arXiv 2108.13264): interquartile mean, 95 % interval by stratified
bootstrap, probability of improvement. Single cells are compared by Welch's test at 5 %. A picture carries a checksum.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from moviepy import VideoFileClip
from PIL import Image
from scipy import stats

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
import campaign
import cards
import omad
from common.datasets import SCORES, SPLITS, normalize
from common.doors import WINDOWS
from common.envs import find_task, record_video

DOCUMENTS = ["README.md", *(f"runs/{name}.md" for name in ("omad", "dom2", "speed"))]
DOCUMENTS += [f"datasets/{name}README.md" for name in ("", "cards/", "policies/")]
MARKS = re.compile(r"(<!-- report: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RESULTS = ROOT / "runs" / "results"
MPE, DOORS = "mpe_simple_spread", "doors_blind"
CHEETAH, ANT, WALKER = "mamujoco_halfcheetah_2x3", "mamujoco_ant_2x4", "mamujoco_walker2d_2x3"
SPREAD, TAG, WORLD, ROBOT = SCORES
SHARED, SIX, PAIRS = f"{SPREAD}-expert", "omar_simple_spread_6-assignments", f"{DOORS}-pairs"
METHODS = ("dom2", "imitation", "deterministic")
DATA, OTHERS = [f"{task}-{split}" for task in SCORES for split in SPLITS], METHODS[1:]
NAMES = {MPE: "spread", "mpe_simple_spread_n4": "spread, four agents", "mpe_simple_adversary": "physical deception"}
NAMES |= {SPREAD: "spread", TAG: "tag", WORLD: "world", ROBOT: "HalfCheetah", DOORS: "blind doors"}
ROBOTS = "HalfCheetah 2x3", "HalfCheetah 6x1", "Ant 2x4", "Ant 2x4d", "Ant 4x2", "Walker2d 2x3", "Swimmer 2x1"
NAMES |= {f"mamujoco_{robot.lower().replace(' ', '_')}": robot for robot in ROBOTS}
NAMES |= {"diffusion": "OMAD", "dime": "DIME's chain", "gaussian": "Gaussian ablation"}
NAMES |= {"dom2": "DOM2", "deterministic": "baseline", "dime, K = 4": "DIME's chain, K = 4"}
NAMES |= {f"{task}-{split}": f"{NAMES[task]}, {split}" for task in SCORES for split in SPLITS}
TIMED = NAMES | {"omad": "OMAD", "growth": "N agents", "diffusion": "K = 4", "unet": "K = 5"}
TIMED |= {"critic update": "critics' update", "act in 1": "one decision", "act in 256": "256 decisions at once"}
MARGINS = {MPE: 8, DOORS: 1.5}  # above standing still; in blind doors that is above the best policies with one mode
CHAIN = {MPE: ("spread", 200_000), CHEETAH: ("robots", 30_000), WALKER: ("robots", 135_000), ANT: ("robots", 60_000)}
CHAIN |= {"mamujoco_swimmer_2x1": ("others", 100_000)}  # which runs of the preset to compare with, after how many steps
LEVELS = {MPE: -13.0, CHEETAH: 5300.0, WALKER: 4000.0, ANT: 5400.0, "mamujoco_ant_4x2": 5400.0}  # HATD3: published.csv
CPU = "One core of a shared two-core virtual machine (AMD EPYC), no GPU"  # of all runs that do not say their machine
name = lambda key: NAMES.get(key, key)
places = lambda task: 0 if task.startswith("mamujoco") else 2


# Reading ==============================================================================================================
@dataclass(frozen=True)
class Result:
    """One finished run."""

    folder: str
    config: dict
    curve: dict[str, np.ndarray]  # of eval.csv
    fresh: dict[str, float]  # return over fresh episodes, by setting


def rows_of(path: Path) -> list[dict]:
    """Of a csv file, with numbers as numbers."""
    value = lambda text: float(text) if re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", text) else text
    return [{key: value(text) for key, text in row.items()} for row in campaign.rows_of(path)]


@cache
def read(experiment: str, on: str, variant: str) -> list[Result]:
    """The finished runs of a variant, by seed."""
    found = []
    for path in (RESULTS / experiment / on / variant).glob("*/fresh.csv"):
        rows, config = rows_of(path.with_name("eval.csv")), json.loads(path.with_name("config.json").read_text())
        curve = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        found.append(Result(path.parent.name, config, curve, {r["setting"]: r["return_mean"] for r in rows_of(path)}))
    return sorted(found, key=lambda run: run.config["args"]["seed"])


def fresh(experiment: str, on: str, variant: str, setting: str = "usual") -> np.ndarray:
    """Fresh returns [seeds]."""
    return np.array([run.fresh[setting] for run in read(experiment, on, variant) if setting in run.fresh])


def offline(dataset: str, setting: str = "usual") -> list[np.ndarray]:
    """Fresh returns of the three methods."""
    return [fresh("offline", dataset, method, setting) for method in METHODS]


def data_return(dataset: str) -> float:
    """Mean return of the data that the runs learned from. Stops if runs that are compared learned from unequal ones."""
    own = RESULTS / "offline" / dataset / "data.json"  # of older runs, whose config.json does not say it
    said = json.loads(own.read_text())["return_mean"] if own.exists() else cards.read_cards()[dataset]["return"]["mean"]
    names = "offline", "updates", "deviations", "offline_long"
    known = [read(run.experiment, dataset, run.place.name) for run in campaign.declared(names) if run.on == dataset]
    found = sorted({round(run.config.get("data_return", said), 2) for runs in known for run in runs}) or [said]
    if len(found) > 1:
        raise SystemExit(f"report.py: {dataset}: runs that learned from unequal data do not compare: {found}")
    return found[0]


# Statistics ===========================================================================================================
def iqm(*cells: np.ndarray) -> np.ndarray:
    """Interquartile mean over all seeds of all cells: [..., seeds] each -> [...]."""
    return stats.trim_mean(np.concatenate(cells, -1), 0.25, axis=-1)


def improvement(*cells: np.ndarray) -> np.ndarray:
    """Probability that a run of the first half is better than one of the second in the same cell, over all cells."""
    better = lambda a, b: (np.sign(a[..., None] - b[..., None, :]) / 2 + 0.5).mean((-2, -1))
    return np.mean([better(a, b) for a, b in zip(cells[: len(cells) // 2], cells[len(cells) // 2 :])], 0)


def interval(*cells: np.ndarray, statistic: Callable = iqm) -> tuple[float, ...]:
    """Within which 95 % of the statistic lie, when seeds are drawn again within each cell."""
    rng = np.random.default_rng(0)
    return tuple(np.percentile(statistic(*(rng.choice(cell, (2000, len(cell))) for cell in cells)), [2.5, 97.5]))


def welch(ours: np.ndarray, theirs: np.ndarray) -> str:
    """win, tie or loss of the first; "" with fewer than two seeds of either."""
    if min(len(ours), len(theirs)) < 2:
        return ""
    pvalue = stats.ttest_ind(ours, theirs, equal_var=False).pvalue if ours.std() + theirs.std() else 1.0
    return decided(ours.mean() - theirs.mean(), pvalue)


ends = lambda cells, digits=1: ", ".join(number(end, digits) for end in interval(*cells))
pooled = lambda cells, digits=1: f"{number(iqm(*cells), digits)} [{ends(cells, digits)}]"
decided = lambda more, pvalue: "tie" if not pvalue < 0.05 else "win" if more > 0 else "loss"
tally = lambda verdicts: " – ".join(str(verdicts.count(word)) for word in ("win", "tie", "loss"))
mostly = lambda verdicts: verdicts.count("win") > 2 * verdicts.count("loss")


# Words ================================================================================================================
def number(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def cell(values: np.ndarray, digits: int = 1) -> str:
    """Interquartile mean [interval] (seeds)."""
    if not len(values):
        return "–"
    return (pooled([values], digits) if len(values) > 1 else number(values[0], digits)) + f" ({len(values)})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *notes: str) -> str:
    rows = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "".join(f"\n\n{note}" for note in notes)


def plain(file: str, columns: dict[str, str], keep: Callable[[dict], bool] = lambda row: True, **words: str) -> str:
    """A table of the rows of a csv file: the heads of its columns, and formats of the values in them."""
    known, rows = NAMES | words, [row for row in rows_of(RESULTS / f"{file}.csv") if keep(row)]
    rows = [{key: known.get(value, value) for key, value in row.items()} for row in rows]
    return re.sub(r"(?<!\w)-(?=\d)", "−", table(columns, [[f.format(**row) for f in columns.values()] for row in rows]))


def speed() -> str:
    """Two of the script's tables time how presets act: the first time is shown."""
    rows = {}
    for row in rows_of(RESULTS / "speed_cpu.csv"):
        words = f"{row['label']} {row['version']}".replace(" eager", "").split(maxsplit=2)
        key = tuple(TIMED.get(word, word) for word in [*words, row["what"]])
        rows.setdefault(key, [*key, f"{row['operations']:,.0f}", f"{row['ms']:.3g}", f"{row['share']:.0%}"])
    return table(["program", "task", "policies", "what", "operations", "ms", "share"], rows.values())


def made(runs: list[Result]) -> str:
    """What the cells are, and the hardware and dates of the runs."""
    days = sorted(re.sub(r"(....)(..)(..)", r"\1-\2-\3", run.folder.split("__")[3][:8]) for run in runs)
    machines = sorted({re.sub("x86_64, 2 cores(, no GPU)?", CPU, run.config.get("machine", CPU)) for run in runs})
    what = "Interquartile mean [95 % interval; of up to four seeds the lowest and the highest] (seeds)"
    return f"*{what}. {'; '.join(machines)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}.*"


folders = lambda experiment: {run.variant: run.place.name for run in campaign.declared((experiment,))}
minutes = lambda *runs: number(np.mean([run.curve["wall_time_s"][-1] for run in runs]) / 60) if runs else "–"


# Online ===============================================================================================================
def online(experiment: str, *tasks: str) -> str:
    """A row for each task and variant that has runs."""
    known = [(on, who, read(experiment, on, folder)) for on in tasks for who, folder in folders(experiment).items()]
    rows, there = [], [found for found in known if found[2]]
    for task, policy, runs in there:
        hits = [(run, np.flatnonzero(run.curve["return_mean"] >= LEVELS.get(task, np.inf))) for run in runs]
        times = [run.curve["wall_time_s"][hit[0]] / 60 for run, hit in hits if len(hit)]
        reached = f"{len(times)} of {len(runs)}" + (f", after {number(np.median(times))} min" if times else "")
        reached += f", at most {number(max(times))}" if len(times) > 1 else ""
        values = [(run.fresh["usual"], run.curve["return_mean"][-1], run.curve["return_mean"].max()) for run in runs]
        steps, cells = f"{runs[0].curve['step'][-1]:,.0f}", [cell(v, places(task)) for v in np.transpose(values)]
        rows.append([name(task), name(policy), steps, *cells, reached if task in LEVELS else "–", minutes(*runs)])
    head = "task", "policy", "steps", "fresh return", "last evaluation", "best evaluation", "HATD3's level", "minutes"
    return table(head, rows, made([run for *_, runs in there for run in runs])) if rows else "Not run yet."


def compared(experiment: str, tasks: dict[str, tuple[str, int]]) -> str:
    """A row for each variant, the two policies first, whose runs `tasks` names. Fresh returns, or after some steps."""
    rows, used, known = [], [], dict.fromkeys(("diffusion", "gaussian"))
    for variant, folder in (known | folders(experiment)).items():
        row = [name(variant)]
        for task, (other, steps) in tasks.items():
            used.append(read(experiment, task, folder) if folder else read(other, task, variant))
            ended = all(run.curve["step"][-1] <= steps for policy in known for run in read(other, task, policy))
            last = lambda run: run.curve["return_mean"][np.searchsorted(run.curve["step"], steps)]
            values = [run.fresh["usual"] if ended else last(run) for run in used[-1]]
            row.append(cell(np.array(values), places(task)))
        rows.append(row)
    head = [f"{name(task)}, {steps:,} steps" for task, (_, steps) in tasks.items()]
    return table(["variant", *head], rows, made(sum(used, []))) if any(used[2 * len(tasks) :]) else "Not run yet."


def noises() -> str:
    """Other ways to act with the policies of HalfCheetah."""
    settings, policies = ["usual", "no last noise", "K = 2", "K = 1"], ("diffusion", "gaussian")
    rows = [[name(policy), *(cell(fresh("robots", CHEETAH, policy, x), 0) for x in settings)] for policy in policies]
    used = sum((read("robots", CHEETAH, policy) for policy in policies), [])
    return table(["policy", "as trained", *settings[1:]], rows, made(used)) if used else "Not run yet."


# Offline ==============================================================================================================
def dom2_returns(experiment: str) -> str:
    """Of the data sets that are there; `updates` has DOM2's runs of `offline`."""
    rows, used = [], []
    for dataset in DATA:
        runs = [read("offline" if method == "dom2" else experiment, dataset, method) for method in METHODS]
        if not all(runs):
            continue
        used += sum(runs, [])
        values = [np.array([run.fresh["usual"] for run in of]) for of in runs]
        score = number(normalize(dataset.partition("-")[0], iqm(values[0])), 0)
        best = " · ".join(number(np.mean([run.curve["return_mean"].max() for run in of]), 0) for of in runs)
        cells, told = [cell(v, 0) for v in values], [welch(values[0], other) for other in values[1:]]
        rows.append([name(dataset), number(data_return(dataset), 0), *cells, *told, score, best])
    head = ["data set", "data", *map(name, METHODS), *(f"against {name(m)}" for m in OTHERS), "normalised"]
    note = "*Best*: mean over seeds of a run's best own evaluation: DOM2 · imitation · baseline."
    totals = ["all", "", "", "", "", *(tally([row[k] for row in rows]) for k in (5, 6)), "", ""]
    return table([*head, "best"], [*rows, totals], note, made(used)) if rows else "Not run yet."


def variants(experiment: str, head: str, reference: str, form: str, methods: Iterable[str]) -> str:
    """First `methods` of `offline`, then each variant, and whether it is worse or better than DOM2 in `reference`."""
    known, word = campaign.declared((experiment,)), {"win": " worse", "loss": " better"}
    sets = {run.on: data_return(run.on) for run in known}
    rows = [[form.format(name(m)), *(cell(fresh("offline", on, m), 0) for on in sets)] for m in methods]
    for variant, place in folders(experiment).items():
        values = [(fresh(reference, on, "dom2"), fresh(experiment, on, place)) for on in sets]
        rows.append([name(variant), *(cell(theirs, 0) + word.get(welch(ours, theirs), "") for ours, theirs in values)])
    used = [run for run in known for run in read(experiment, run.on, run.place.name)]
    beside = [run for on in sets for method in methods for run in read("offline", on, method)]
    return table([head, *map(name, sets)], rows, made(used + beside)) if used else "Not run yet."


def dom2_summary() -> str:
    """Over all data sets."""
    scores, rows = {method: normalised(method) for method in METHODS}, []
    for method, own in scores.items():
        took = minutes(*(run for dataset in DATA for run in read("offline", dataset, method)))
        low, high = interval(*scores["dom2"], *own, statistic=improvement)
        better = f"{improvement(*scores['dom2'], *own):.0%} [{low:.0%}, {high:.0%}]"
        told = tally([against(dataset)[METHODS.index(method) - 1] for dataset in DATA])
        rows.append([name(method), pooled(own), *(["", ""] if method == "dom2" else [better, told]), took])
    head = ["method", "normalised", "a run of DOM2 is better", "DOM2's wins – ties – losses", "minutes"]
    return table(head, rows, f"*{len(DATA)} data sets; in the first two columns equally many seeds of each, else all.*")


SHIFTED = [(dataset, shift) for dataset in DATA for shift in find_task(dataset.partition("-")[0]).shifts]
against = lambda on, setting="usual": [welch(offline(on, setting)[0], other) for other in offline(on, setting)[1:]]
best_of = lambda dataset, shift: max(METHODS, key=lambda m: iqm(fresh("offline", dataset, m, shift)))
alike = lambda scores: [own[: min(map(len, scores))] for own in scores]  # the same number of seeds
normalised = lambda method: alike([normalize(d.partition("-")[0], fresh("offline", d, method)) for d in DATA])


def dom2_shift() -> str:
    rows = []
    for dataset, shift in SHIFTED:
        kept = [iqm(there) / iqm(usual) for there, usual in zip(offline(dataset, shift), offline(dataset))]
        kept = " · ".join(f"{x:.0%}" for x in kept) if min(map(iqm, offline(dataset))) > 20 else "–"
        cells = [cell(values, 0) for values in offline(dataset, shift)]
        rows.append([f"{name(dataset)}: {shift}", *cells, *against(dataset, shift), kept])
    totals = [tally([row[k] for row in rows]) for k in (4, 5)]
    best = f"highest in {sum(best_of(*where) == 'dom2' for where in SHIFTED)} of {len(rows)}"
    head = ["setting", *map(name, METHODS), *(f"against {name(m)}" for m in OTHERS), "share kept by each"]
    used = [run for dataset in DATA for method in METHODS for run in read("offline", dataset, method)]
    return table(head, [*rows, ["all", best, "", "", *totals, ""]], made(used))


def shares() -> dict[int, list[np.ndarray]]:
    """Fresh returns of the three methods by percentage of the episodes."""
    some = {share: [fresh("shares", SHARED, f"{m}-{share}") for m in METHODS] for share in (1, 2, 5, 10, 20, 50)}
    return some | {100: offline(SHARED)}


def dom2_modes() -> str:
    """Where there are several good ways."""
    rows, one, scripts = [], "dom2_eta_1", rows_of(RESULTS / "controllers.csv")
    for what, *where, digits in (
        ("six landmarks", "assignments", SIX, "usual", 0),
        ("three of them gone", "assignments", SIX, "fewer", 0),
        ("blind doors", "modes", PAIRS, "usual", 2),
    ):
        known = [r for r in scripts if (r["task"], r["setting"]) == (where[1].partition("-")[0], where[2])]
        told = "; ".join(f"{r['controller']}: {number(r['return_mean'], digits)}" for r in known)
        rows.append([what, *(cell(fresh(*where[:2], m, where[2]), digits) for m in METHODS), told])
    rows.append(["blind doors, η 1", cell(fresh("modes", PAIRS, one), 2), "", "", ""])
    used = [run for on in (("assignments", SIX), ("modes", PAIRS)) for m in (*METHODS, one) for run in read(*on, m)]
    return table(["", *map(name, METHODS), "scripts"], rows, made(used))


# The README ===========================================================================================================
def verdicts() -> str:
    """Does it work?"""
    scale = {(row["task"], row["controller"]): row["return_mean"] for row in rows_of(RESULTS / "controllers.csv")}
    word, rows = {"win": "yes", "tie": "undecided", "loss": "no, it is behind", "": "undecided"}, []

    def add(claim: str, verdict: str, told: str, runs: list[Result], file: str) -> None:
        rows.append([claim, f"**{verdict}**", told, minutes(*runs), f"[{file}.md](runs/{file}.md)"])

    for task, experiment in {MPE: "spread", CHEETAH: "robots", WALKER: "robots", ANT: "robots", DOORS: "doors"}.items():
        ours, ablation = (fresh(experiment, task, policy) for policy in ("diffusion", "gaussian"))
        if not len(ours):
            add(f"OMAD learns {name(task)}", "not run yet", "–", [], "omad")
            continue
        digits, still = {MPE: 1, DOORS: 2}.get(task, 0), scale[task, "standing still"]
        told = f"{cell(ours, digits)}; standing still {number(still, digits)}"
        told += f", a script {number(scale[task, 'scripted'])}" if task == MPE else ""
        runs, learns = read(experiment, task, "diffusion"), int(interval(ours)[0] > still + MARGINS.get(task, 1000))
        add(f"OMAD learns {name(task)}", ["no", "yes"][learns] + ", one seed" * (len(runs) == 1), told, runs, "omad")
        told, runs = f"ablation {cell(ablation, digits)}", read(experiment, task, "gaussian")
        if learns and runs:
            add("… and beats its Gaussian ablation there", word[welch(ours, ablation)], told, runs, "omad")
    runs = [run for dataset in DATA for run in read("offline", dataset, "dom2")]
    pairs = [(offline(dataset)[0], data_return(dataset)) for dataset in DATA]
    found = [decided(ours.mean() - level, stats.ttest_1samp(ours, level).pvalue) for ours, level in pairs]
    told = f"{tally(found)} (above – undecided – below, data sets)"
    add("DOM2 earns more than its data", "mostly" if mostly(found) else "no", told, runs, "dom2")
    scores = [f"{pooled(own)} ({sum(map(len, own))})" for own in map(normalised, METHODS)]
    for k, other in enumerate(("imitation", "the baseline")):
        found = [against(dataset)[k] for dataset in DATA]
        told = f"{tally(found)} (wins – ties – losses); normalised {scores[0]}, {other} {scores[k + 1]}"
        add(f"… and more than {other}, in equal time", "mostly" if mostly(found) else "no", told, runs, "dom2")
    best = sum(best_of(*where) == "dom2" for where in SHIFTED)
    told = f"highest return in {best} of {len(SHIFTED)} settings; the paper: in 28"
    add("… and is best where the environment shifts", "yes" if best > 20 else "no", told, runs, "dom2")
    few, everything, runs = shares()[5][0], shares()[100][2], read("shares", SHARED, "dom2-5")
    verdict, told = iqm(few) >= iqm(everything), f"{name(SHARED)}: {cell(few)}; baseline, all: {cell(everything)}"
    add("… and needs 5 % of the baseline's data", "yes" if verdict else "no", told, runs, "dom2")
    (ours, copies, other), runs = [fresh("modes", PAIRS, m) for m in METHODS], read("modes", PAIRS, "dom2")
    told = f"{cell(ours, 2)}; imitation {cell(copies, 2)}; baseline {cell(other, 2)}"
    add("… and keeps several ways (blind doors)", word[welch(ours, other)], told, runs, "dom2")
    add("The papers' sizes, on a GPU", "not measured", "–", [], "speed")
    return table(["claim", "verdict", "fresh return [interval] (seeds)", "minutes a run", "more"], rows)


TRAINED = {"task": "{env_id}", "policy": "{policy}", "seed": "{seed:.0f}"}
CONTROLLER = {"task": "{task}", "who": "{controller}", "return": "{return_mean:,.1f}"}
TABLES: dict[str, Callable[[], str]] = {
    "verdicts": verdicts, "omad-noise": noises, "omad-chain": lambda: compared("chain", CHAIN),
    "omad-spread": lambda: online("spread", MPE), "omad-longer": lambda: online("longer", CHEETAH),
    "omad-others": lambda: online("others", *dict.fromkeys(run.on for run in campaign.declared(("others",)))),
    "omad-entropy": lambda: plain("entropy", TRAINED | {"bound": "{bound:.1f}", "entropy": "{entropy:.1f}"}),
    "omad-coverage": lambda: plain("entropy", TRAINED | {
        "steps": "{total_timesteps:,.0f}", "squares of 1 m²": "{squares:,.0f}"}, lambda row: row["squares"]),
    "omad-doors": lambda: online("doors", DOORS), "omad-robots": lambda: online("robots", CHEETAH, WALKER, ANT),
    "omad-ablations": lambda: compared("ablations", {task: CHAIN[task] for task in (CHEETAH, MPE)}),
    "omad-scripts": lambda: plain("controllers", CONTROLLER | {"episodes": "{episodes:,.0f}"},
                                  lambda row: not row["task"].startswith("omar")),
    "omad-published": lambda: plain("published", {"task": "{task}", "who": "{who}", "return": "{return_mean:,.0f}",
                                                  "source": "{source}"}),
    "dom2-updates": lambda: dom2_returns("updates"), "dom2-returns": lambda: dom2_returns("offline"),
    "dom2-summary": dom2_summary, "dom2-shift": dom2_shift, "dom2-modes": dom2_modes,
    "dom2-deviations": lambda: variants("deviations", "without", "offline", "none: {}", METHODS[:1]),
    "dom2-long": lambda: variants("offline_long", "runs", "offline_long", "{}, preset", METHODS[::2]),
    "dom2-data": lambda: table(["share of the episodes", *map(name, METHODS)],
                               [[f"{share} %", *map(cell, values)] for share, values in shares().items()]),
    "dom2-belief": lambda: plain("belief", {
        "data set": "{dataset}", "policies": "{policy}", "seed": "{seed:.0f}",
        "return": "{return_mean:,.0f}", "believed": "{believed:,.0f}", "earned": "{earned:,.0f}",
        "actions beyond 0.99": "{edge:.0%}"}, diffusion="DOM2"),
    "speed-cpu": speed, "dom2-scripts": lambda: plain("controllers", CONTROLLER, lambda row: row["task"] == SPREAD),
    "datasets": cards.dataset_table, "policies": cards.policy_table, "port": cards.port_table,
    "pursuit": lambda: plain("controllers", CONTROLLER | {"std over episodes": "{return_std:.1f}"},
                             lambda row: row["task"] in (TAG, WORLD)),
}  # fmt: skip


# Figures ==============================================================================================================
def panels(rows: dict[str, list[tuple[str, dict[str, list[Result]]]]], width: int = 10) -> Figure:
    """A row for each task: interquartile mean and interval over seeds of runs by label, against `step` or time."""
    figure = Figure(figsize=(width, 3.4 * len(rows)), layout="constrained")
    scale = [(row["task"], row["controller"], row["return_mean"]) for row in rows_of(RESULTS / "controllers.csv")]
    scale += [(task, f"HATD3 after {'200k' if task == MPE else '3M'} steps", level) for task, level in LEVELS.items()]
    axes = figure.subplots(len(rows), len(next(iter(rows.values()))), sharey="row", squeeze=False)
    for (task, row), beside in zip(rows.items(), axes):
        for axis, (by, shown) in zip(beside, row):
            for k, (label, runs) in enumerate((label, runs) for label, runs in shown.items() if runs):
                kept = runs[0].curve["step"] <= min(run.curve["step"][-1] for own in shown.values() for run in own)
                returns = np.stack([run.curve["return_mean"][kept] for run in runs])  # [seeds, evaluations]
                x = np.mean([run.curve[by][kept] for run in runs], 0) / (1000 if by == "step" else 60)
                low, high = zip(*(interval(values) for values in returns.T))
                axis.plot(x, [iqm(values) for values in returns.T], f"C{k}", label=f"{label}, n = {len(runs)}")
                axis.fill_between(x, low, high, color=f"C{k}", alpha=0.2, lw=0)
            for who, level in [(who, level) for on, who, level in scale if on == task]:
                axis.axhline(level, color="grey", lw=0.8, ls=":")
                place = dict(xycoords=("axes fraction", "data"), ha="right", va="top" if who == "random" else "bottom")
                axis.annotate(who, (1, level), fontsize=7, **place)
            axis.set(xlabel="thousand environment steps" if by == "step" else "minutes", title=name(task))
            axis.grid(alpha=0.2)
            axis.legend(fontsize=7, loc="upper left")
        beside[0].set(ylabel="team return", ylim=(None, max(0, beside[0].get_ylim()[1])))
    return figure


def curves(experiment: str, *tasks: str) -> Figure:
    """Of the two policies, against steps and against minutes."""
    known = {task: {name(who): read(experiment, task, who) for who in ("diffusion", "gaussian")} for task in tasks}
    return panels({task: [("step", runs), ("wall_time_s", runs)] for task, runs in known.items()})


def ablation_curves() -> Figure:
    """The preset beside variants of K, of the atoms, of the support, and of the rest."""
    rows, known = {CHEETAH: [], MPE: []}, list(folders("ablations").items())
    for task in rows:
        for group in known[:4], known[4:7], known[7:9], known[9:]:
            variants = {who: read("ablations", task, place) for who, place in group}
            rows[task].append(("step", {"preset": read(CHAIN[task][0], task, "diffusion")} | variants))
    return panels(rows, width=16)


def doors_figure() -> Figure:
    """Where the two agents of a trained team go."""
    policy = omad.load_policy(ROOT / "runs" / "policies" / f"{DOORS}.pt")[0]
    places = omad.make_act(policy)(np.ones((50_000, 2, 1), np.float32))[..., 0]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axis = figure.add_subplot(xlabel="action, marked at the middles of windows", ylabel="density", xticks=WINDOWS)
    axis.hist(places, np.linspace(-1, 1, 201), density=True, histtype="step", label=("agent 0", "agent 1"))
    axis.legend(fontsize=8)
    return figure


def offline_figure() -> Figure:
    """A dot for each seed, a line at the mean of the data; a panel for each task."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for axis, task in zip(figure.subplots(2, 2).flat, (SPREAD, TAG, WORLD, ROBOT)):
        for i, dataset in enumerate(f"{task}-{split}" for split in SPLITS):
            axis.plot([i - 0.4, i + 0.4], [data_return(dataset)] * 2, "k", lw=1, label="" if i else "mean of the data")
            for k, (method, values) in enumerate(zip(METHODS, offline(dataset))):
                x = i + 0.24 * (k - 1) + 0.04 * (np.arange(len(values)) - len(values) / 2 + 0.5)  # beside each other
                axis.plot(x, values, f"C{k}o", ms=4, alpha=0.8, label=None if i else name(method))
        axis.set_xticks(range(len(SPLITS)), [split.replace("-", "-\n") for split in SPLITS], fontsize=8)
        axis.set(title=name(task), ylabel="fresh return of a seed", ylim=(min(0, axis.get_ylim()[0]), None))
        axis.grid(axis="y", alpha=0.2)
    axis.legend(fontsize=8)
    return figure


def shift_figure() -> Figure:
    """Dumbbells."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3).flat
    panels = dict.fromkeys((dataset.partition("-")[0], shift) for dataset, shift in SHIFTED)
    for axis, (task, shift) in zip(axes, panels):
        for i, split in enumerate(SPLITS):
            for k, method in enumerate(METHODS):
                ends = [iqm(fresh("offline", f"{task}-{split}", method, setting)) for setting in ("usual", shift)]
                y = -i - 0.22 * (k - 1)
                axis.plot(ends, [y, y], f"C{k}", lw=1.5, label=None if i else name(method))
                axis.plot(ends[0], y, f"C{k}o", ends[1], y, f"C{k}o", ms=5)[0].set_markerfacecolor("white")
        axis.set_yticks(-np.arange(len(SPLITS)), SPLITS, fontsize=8)
        axis.set(title=f"{name(task)}: {shift}", xlabel="fresh return", xlim=(min(0, axis.get_xlim()[0]), None))
        axis.grid(axis="x", alpha=0.2)
    axes[5].set_axis_off()
    axes[5].legend(*axes[0].get_legend_handles_labels(), loc="center", title="usual (open) to shifted (full)")
    return figure


def animation() -> list[Image.Image]:
    """A trained team, four episodes."""
    policy, saved = omad.load_policy(ROOT / "runs" / "policies" / f"{MPE}.pt")
    with tempfile.TemporaryDirectory() as folder:
        record_video(omad.make_act(policy), MPE, Path(folder), 3)
        films = [VideoFileClip(str(path)) for path in sorted(Path(folder).glob("*.mp4"))]
        frames = [Image.fromarray(frame) for film in films for frame in film.iter_frames()]
    return [frame.resize((240, 240)).quantize(12) for frame in frames]


finished = lambda of: ["runs/results/controllers.csv", *(f"runs/results/{of}/**/*{x}" for x in ("csv", "data.json"))]
FIGURES: dict[str, tuple[Iterable[str], Callable]] = {  # picture -> the files that it shows, what draws it
    "runs/results/spread.png": (finished("spread"), lambda: curves("spread", MPE)),
    "runs/results/robots.png": (finished("robots"), lambda: curves("robots", CHEETAH, WALKER, ANT)),
    "runs/results/ablations.png": ((*finished("ablations"), *finished("spread"), *finished("robots")), ablation_curves),
    "runs/results/doors.png": ((f"runs/policies/{DOORS}.pt",), doors_figure),
    "runs/results/offline.png": ([*finished("offline"), "datasets/cards/*.json"], offline_figure),
    "runs/results/shift.png": (finished("offline"), shift_figure),
    "runs/results/spread.gif": ((f"runs/policies/{MPE}.pt",), animation),
    "datasets/returns.png": (("datasets/cards/*.json",), cards.draw),
}  # fmt: skip


def checksum(patterns: Iterable[str]) -> str:
    """Of the files shown, and of what draws them."""
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    before, _, after = Path(__file__).read_text().partition("# Words ===")  # which, up to figures, is about tables
    drawing = (before + after.partition("# Figures ===")[2] + Path(cards.__file__).read_text()).encode()
    return hashlib.sha256(b"".join([*(path.read_bytes() for path in files), drawing])).hexdigest()


def main(check: bool = False) -> int:
    """Writes tables and figures. With `check` it changes nothing and says what differs."""
    differ = []
    for document in DOCUMENTS:
        before = (ROOT / document).read_text()
        after = MARKS.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", before)
        differ += [document] * (before != after)
        if not check and before != after:
            omad.write(ROOT / document, lambda path: path.write_text(after))
    for picture, (shown, draw) in FIGURES.items():
        noted = Image.open(ROOT / picture).info if (ROOT / picture).exists() else {}
        if (wanted := checksum(shown)) in (noted.get("Description"), noted.get("comment", b"").decode()):
            continue
        differ.append(picture)
        if not check and picture.endswith("gif"):
            first, *rest = draw()
            first.save(ROOT / picture, save_all=True, append_images=rest, duration=90, loop=0, comment=wanted)
        elif not check:
            draw().savefig(ROOT / picture, dpi=100, metadata={"Description": wanted})
    print("\n".join(f"{'differs' if check else 'written'}: {file}" for file in differ) or "all as it should be")
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
