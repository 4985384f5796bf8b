"""Runs experiments: what is missing, and the rest of what was interrupted; on this machine or on a cluster.

An experiment is data: see experiments.toml; commands are in README.md. A run is named experiment/task/variant/seed. It
trains as a user would start it, then plays fresh episodes, whose start states no training and no search uses.
Everything lies in runs/results/<experiment>/<task or data set>/<variant>/<run>/; with fresh.csv in it a run is
finished. A run that fails is named, the others go on, and the exit code is 1.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import tyro
from filelock import FileLock
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dom2
import omad
from common.datasets import SPLITS, data_folder
from common.envs import BadInput, find_task

RESULTS = where = ROOT / "runs" / "results"  # the second: where this process looks, see --results
PROGRAMS = {"omad": omad, "dom2": dom2}
SEARCHED = 2000  # seed of the fresh episodes of a search; those of results have 1000
TRIED = "gamma q_weight cql_weight cql_own thresholds policy_hidden critic_hidden policy_lr q_lr time_power act_noise"


@dataclass(frozen=True, eq=False)
class Part:
    """Runs of an experiment that differ in task or data set, variant and seed only: see experiments.toml."""

    program: str
    on: list[str]
    variants: dict[str, str]
    seeds: list[int]
    flags: str = ""
    length: str = ""
    times: dict[str, float] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)


DECLARED = tomllib.loads((ROOT / "runs" / "experiments.toml").read_text())
WORDS, BASELINE, SOURCES = (DECLARED.pop(name) for name in ("words", "baseline", "sources"))
EXPERIMENTS = {name: [Part(**part) for part in parts] for name, parts in DECLARED.items()}


@dataclass(frozen=True, eq=False)
class Run:
    """One run of an experiment."""

    experiment: str
    part: Part
    on: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.on}/{self.variant}/{self.seed}"

    @property
    def place(self) -> Path:
        """The folder of the variant, with a run for every seed."""
        return where / self.experiment / self.on / re.sub(r"[^\w.-]+", "_", self.variant)

    @property
    def online(self) -> bool:
        """Whether its program is omad.py or a copy of it, not of dom2.py."""
        return hasattr(PROGRAMS[self.part.program].Args, "total_timesteps")

    @property
    def total(self) -> str:
        """The flag of its length."""
        return "--total-timesteps" if self.online else "--total-updates"

    @cached_property
    def flags(self) -> list[str]:
        """Of the program, but for where the run goes."""
        part, program = self.part, PROGRAMS[self.part.program]
        task = f"{'--env-id' if self.online else '--dataset'} {self.on}"
        task = SOURCES[self.on]["flags"] if self.on in SOURCES else task
        baseline = f"--policy deterministic --policy-lr 1e-3 {BASELINE.get(self.on, '')}"
        words = f"{task} --seed {self.seed} {part.flags} {part.variants[self.variant]}"
        words = words.format(baseline=baseline, **WORDS).split()
        count, _, unit = part.length.partition(" ")
        words += [self.total, count] if count and unit != "minutes" else []
        while starred := [i for i, word in enumerate(words) if word.startswith("*")]:  # so many times what it would be
            others = [word for i, word in enumerate(words) if i not in starred and i + 1 not in starred]
            times, flag = words.pop(starred[-1]), words.pop(starred[-1] - 1)
            words += [flag, f"{vars(program.parse(others))[flag[2:].replace('-', '_')] * float(times[1:]):.6g}"]
        if times := part.times.get(re.split("[ -]", self.variant)[0]):  # with as many evaluations
            args = program.parse(words)
            evaluations = math.ceil(args.total_updates / args.eval_every)
            every = round(times * args.total_updates / evaluations)
            words += [self.total, str(every * evaluations), "--eval-every", str(every)]
        return words

    def find(self) -> Path | None:
        """Its folder, if it was begun."""
        found = self.place.glob(f"*__{self.part.program}__{self.seed}__*/config.json")
        return next((path.parent for path in found), None)

    def share(self) -> float:
        """How much of it is there: 1 if it is finished."""
        run = self.find()
        if not run or not (rows := rows_of(run / "eval.csv")):
            return 0.0
        total = json.loads((run / "config.json").read_text())["args"][self.total[2:].replace("-", "_")]
        return 1.0 if (run / "fresh.csv").exists() else 0.99 * min(1.0, int(rows[-1]["step"]) / total)


def declared(names: tuple[str, ...] = tuple(EXPERIMENTS)) -> list[Run]:
    """All runs of these experiments, seed by seed, so that every variant has its first seed early."""
    runs = []
    for name, part in ((name, part) for name in names for part in EXPERIMENTS[name]):
        on = [whole for on in part.on for whole in ([on[:-1] + x for x in SPLITS] if on.endswith("-*") else [on])]
        runs += [Run(name, part, *both, seed) for both in itertools.product(on, part.variants) for seed in part.seeds]
    return sorted(runs, key=lambda run: (names.index(run.experiment), run.part.seeds.index(run.seed)))


def call(program: str, flags: list[str]) -> str:
    """What the program prints. Raises `RuntimeError` with its message."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = PROGRAMS[program].main(flags)
        except SystemExit:  # of the command line's parser, below a title
            raise RuntimeError((re.findall(r"\w.*\w", err.getvalue()) or ["bad flags"])[:2][-1]) from None
    if code:
        raise RuntimeError((err.getvalue().strip() or f"exit code {code}").splitlines()[-1])
    return out.getvalue()


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def record(path: Path, key: dict, **numbers: float) -> None:
    """Shows a row, and puts it into a csv file in the place of the row with the same key, or at the end."""
    row = {name: str(value) for name, value in key.items()}
    row |= {name: f"{round(float(value), 4):g}" for name, value in numbers.items()}
    print(*row.values(), sep=", ", flush=True)
    rows = {tuple(old[name] for name in key): old for old in rows_of(path)} | {tuple(map(str, key.values())): row}
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows.values())), lineterminator="\n")
        writer.writeheader(), writer.writerows(rows.values())
    path.with_suffix(".tmp").rename(path)


def probe(run: Run) -> int:
    """How many steps or updates take the minutes of the run, from a short one: between its last two evaluations."""
    minutes, count = float(run.part.length.split()[0]), 2000 if run.online else 200
    flags = f"{run.total} {count} --eval-every {count // 2} --eval-episodes 1"
    flags += f" --learning-starts {count // 2}" * run.online
    with tempfile.TemporaryDirectory() as folder:
        call(run.part.program, [*run.flags, *flags.split(), "--run-dir", folder])
        begin, end = rows_of(next(Path(folder).glob("*/eval.csv")))[-2:]
    seconds = (float(end["wall_time_s"]) - float(begin["wall_time_s"])) / (int(end["step"]) - int(begin["step"]))
    return round(60 * minutes / seconds)


def make_data(on: str) -> None:
    """Unless they are there; another process waits meanwhile."""
    maker = [SOURCES[on]["script"]] if on in SOURCES else ["datasets/collect.py", "--dataset", on]
    with FileLock(ROOT / "datasets" / ".lock"):
        if on in SOURCES or not data_folder(on).is_dir():
            made = subprocess.run([sys.executable, *maker], cwd=ROOT, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError((made.stderr.strip() or "the data could not be made").splitlines()[-1])


def keep_trial(args: dict, folder: Path, fresh: str) -> None:
    """A run of the search, with the numbers of its fresh episodes, as a row of search.csv: what presets come from."""
    seconds = rows_of(folder / "eval.csv")[-1]["wall_time_s"]
    args["thresholds"] *= args["reweight"]
    key = {name: args[name] for name in ("dataset", "policy", *TRIED.split(), "total_updates", "seed")}
    numbers = dict(zip(("return_mean", "return_std", "episodes"), fresh.split(",")))
    with FileLock(where / ".lock"):
        record(where / "search.csv", key, **numbers, seconds=seconds, fresh_seed=SEARCHED)


def work(run: Run) -> None:
    """The run, or the rest of it, and its fresh episodes. Raises `RuntimeError` with the program's message."""
    os.chdir(ROOT)  # so that config.json has no path of this machine
    make_data(run.on) if not run.online else None
    program, folder = run.part.program, run.find()
    if folder:
        call(program, ["--resume", str(folder)])
    else:
        length = [run.total, str(probe(run))] if run.part.length.endswith("minutes") else []
        call(program, [*run.flags, *length, "--run-dir", os.path.relpath(run.place)])
    folder = run.find()
    (folder / "curve.png").unlink(missing_ok=True)  # the report draws it from eval.csv
    args = PROGRAMS[program].load(folder / "policy.pt")["args"]
    task = find_task(args["env_id"])
    settings = {"usual": ""} | run.part.settings.get(run.variant, {})
    if not run.online and run.experiment != "search":
        settings |= {shift: f"--shift {shift}" for shift in task.shifts}
    lines = ["setting,return_mean,return_std,episodes"]
    for setting, flags in settings.items():
        episodes = 1000 if task.horizon <= 100 else 50
        flags += f" --seed {SEARCHED if run.experiment == 'search' else 1000} --eval-episodes {episodes} --device cpu"
        said = call(program, ["--evaluate", str(folder), *flags.split()])
        lines.append(",".join([setting, *re.search(r"return (\S+) ± (\S+) over", said).groups(), str(episodes)]))
    if run.experiment == "search":
        keep_trial(args, folder, lines[1].partition(",")[2])
    PROGRAMS[program].write(folder / "fresh.csv", lambda path: path.write_text("\n".join([*lines, ""])))


def here(todo: list[Run], jobs: int) -> Iterator[list[tuple[Run, str]]]:
    """On this machine, each in a process of its own. Yields every second what has finished, and what went wrong."""
    running, waiting = {}, list(todo)
    command = [sys.executable, str(Path(__file__).resolve()), "--results", str(where), "--one"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while running or waiting:
            for run in [waiting.pop(0) for _ in range(min(jobs - len(running), len(waiting)))]:
                running[run] = subprocess.Popen([*command, run.name], **quiet)
            time.sleep(1)
            done = {run: running.pop(run) for run in list(running) if running[run].poll() is not None}
            said = {run: (process.stderr.read().strip() or "killed").splitlines()[-1] for run, process in done.items()}
            yield [(run, said[run] if process.returncode else "") for run, process in done.items()]
    finally:
        for process in running.values():
            process.terminate(), process.wait()


def cluster(todo: list[Run], address: str, cpus: float, gpus: float) -> Iterator[list[tuple[Run, str]]]:
    """On a Ray cluster whose nodes share this folder. What a lost worker or node ran is gone on with elsewhere."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--address needs Ray: pip install -r runs/requirements-ray.txt") from None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address, log_to_driver=False)

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=5, max_calls=1)  # max_calls: a fresh process for each
    def remote(folder: str, name: str, place: Path) -> str:
        sys.path.insert(0, folder)
        import campaign

        campaign.where = place
        return campaign.one(name)

    def result(future) -> str:
        try:
            return ray.get(future)
        except ray.exceptions.RayError as error:  # lost more often than it was retried
            return str(error).strip().splitlines()[-1]

    futures = {remote.remote(str(Path(__file__).parent.resolve()), run.name, where): run for run in todo}
    while futures:
        done, _ = ray.wait(list(futures), timeout=1)
        yield [(futures.pop(future), result(future)) for future in done]


def one(name: str) -> str:
    """Works on the run of this name; what went wrong, if it did."""
    found = [run for run in declared(tuple({name.split("/")[0]} & EXPERIMENTS.keys())) if run.name == name]
    if not found:
        return "no such run is declared"
    try:
        work(found[0])
    except (RuntimeError, BadInput) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Options:
    """Runs experiments; without a name, lists them."""

    experiments: tyro.conf.Positional[tuple[str, ...]] = ()
    only: tuple[str, ...] = ()  # only runs with all of these words in their names
    seeds: int = 0  # only so many seeds of each
    jobs: int = 1  # runs side by side on this machine
    address: str = ""  # of a Ray cluster (auto: the one this machine belongs to), instead of this machine
    cpus: float = 1.0  # of the cluster, for each run
    gpus: float = 0.0  # of the cluster, for each run; 0.25: four runs share one
    one: str = ""  # the name of the one run to do in this process
    results: Path = RESULTS  # where they go


def main(argv: list[str] | None = None) -> int:
    global where
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also of a run, so that what it has started ends too
    options = tyro.cli(Options, args=argv)
    where = options.results.resolve()
    known, wrong = ", ".join(EXPERIMENTS), [name for name in options.experiments if name not in EXPERIMENTS]
    if wrong or options.jobs < 1:
        problem = f"no experiment {wrong[0]!r}; there are {known}" if wrong else "--jobs must be at least 1"
        print(f"campaign.py: {problem}", file=sys.stderr)
        return 2
    if options.one:
        if error := one(options.one):
            print(error, file=sys.stderr)
        return int(bool(error))
    if not options.experiments:
        for name in EXPERIMENTS:
            runs = declared((name,))
            print(f"{name:12s} {sum(run.share() == 1 for run in runs):5d} of {len(runs)} runs are there")
        return 0
    chosen = [run for run in declared(options.experiments) if all(word in run.name for word in options.only)]
    chosen = [run for run in chosen if not options.seeds or run.seed in run.part.seeds[: options.seeds]]
    print(f"{len(chosen)} runs, of which {sum(run.share() == 1 for run in chosen)} are there", flush=True)
    if not (todo := [run for run in chosen if run.share() < 1]):
        return 0 if chosen else 2
    failed, running, form = 0, set(todo), "{l_bar}{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}]"
    bar = tqdm(total=len(todo), initial=sum(run.share() for run in todo), bar_format=form)
    there = cluster(todo, options.address, options.cpus, options.gpus) if options.address else here(todo, options.jobs)
    try:
        for finished in there:
            for run, error in finished:
                running.discard(run)
                failed += bool(error)
                bar.write(f"failed: {run.name}: {error}" if error else f"finished: {run.name}")
            bar.n = len(todo) - len(running) + sum(run.share() for run in running)
            bar.refresh()
    except KeyboardInterrupt:
        there.close()  # on this machine that ends what runs
        print("\ncampaign.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    bar.close()
    if failed:
        print(f"campaign.py: {failed} of {len(todo)} runs failed; the same command tries them again", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
