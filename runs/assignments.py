"""Where expressiveness should pay: three agents, six landmarks, several good assignments in the data.

    python runs/assignments.py                    # makes data, trains what is missing, evaluates, draws: ten minutes
    python runs/assignments.py --methods dom2     # a part of it

The motivating example of the paper, as far as we know it. The data are episodes of a script on omar_simple_spread_6:
at the start of each it draws one of the 10 assignments (of 120) of agents to landmarks with the shortest way in
total, and walks there, a little noisily. So an agent that stands still at the start has several good ways to go, and
their mean is none. Three policies learn from these data: DOM2, the same without the critic's gradient (behaviour
cloning), and the deterministic baseline with the same critic. They are evaluated where they learned, and with the
shift "fewer", where three random landmarks are gone and those left have to be covered exactly.

Each takes about the same time. Results go to runs/results/assignments/: eval.csv, config.json and fresh.csv (1000
fresh episodes, usual and shifted) of every run, and paths.png.
"""

import concurrent.futures
import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dom2
import offline
from common.envs import make_vec

TASK, NAME = "omar_simple_spread_6", "omar_simple_spread_6-assignments"
DATA = ROOT / "datasets" / "data" / "simple_spread_6" / "assignments" / "seed_0_data"
SOURCE = ["--dataset", str(DATA), "--env-id", TASK]
RESULT = ROOT / "runs" / "results" / "assignments"
# First guesses. Of six trials each (runs/sweep.py --datasets NAME) none was better by more than noise.
COMMON, UPDATES = "--gamma 0.9 --no-reweight --eval-every 1000", 4_000
OWN = {"dom2": "--q-weight 0.1 --cql-weight 8", "deterministic": "--cql-weight 8"}
EPISODES, BEST, NOISE, KICKS = 20_000, 10, 0.1, 0.1
ORDERS = np.array(list(itertools.permutations(range(6), 3)))  # [120, 3] landmark of each agent


@dataclass(frozen=True)
class Options:
    """Which part to do; what is there already is kept."""

    methods: tuple[str, ...] = tuple(offline.METHODS)  # of dom2, cloning, deterministic
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of training
    jobs: int = 2  # runs side by side


def landmarks(envs: gym.vector.VectorEnv) -> tuple[np.ndarray, np.ndarray]:
    """Where they are [E, 6, 2], and which of them are gone [E, 6]."""
    all_six = envs.unwrapped.world.landmarks
    gone = [np.broadcast_to(x.counts == 0, envs.num_envs) for x in all_six]
    return np.stack([x.state.p_pos.T for x in all_six], 1), np.stack(gone, 1)


def choose(obs: np.ndarray, places: np.ndarray, gone: np.ndarray, rng: np.random.Generator, best: int) -> np.ndarray:
    """obs [E, 3, O] -> where each agent goes [E, 3, 2]: to its landmark in one of the `best` assignments in total."""
    far = np.linalg.norm(places[:, None] - obs[:, :, None, 2:4], axis=-1) + 100.0 * gone[:, None]  # [E, 3, 6]
    total = far[:, np.arange(3), ORDERS].sum(-1)  # [E, 120]
    rank = np.argsort(total, 1)[np.arange(len(obs)), rng.integers(best, size=len(obs))]
    return places[np.arange(len(obs))[:, None], ORDERS[rank]]


def script(obs: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """obs [E, 3, O], goals [E, 3, 2] -> forces: straight there, slower near it."""
    wanted = 2.0 * (goal - obs[..., 2:4])
    wanted *= np.minimum(1.0, 0.8 / np.maximum(np.linalg.norm(wanted, axis=-1, keepdims=True), 1e-9))
    # A force of 1 adds 0.5 to the velocity, of which a quarter is lost.
    return np.clip((wanted - 0.75 * obs[..., :2]) / 0.5, -1.0, 1.0)


def begins_with(rows: dict[str, list[np.ndarray]]) -> bool:
    """Whether the data on disk have this first step in every episode; not so if task or script were others then."""
    same = lambda path, first: np.array_equal(np.load(path, mmap_mode="r")[::25], first.astype(np.float32))
    try:
        return all(same(DATA / f"{x}_{i}.npy", steps[0][:, i]) for x, steps in rows.items() for i in range(3))
    except (OSError, ValueError):
        return False


def make_data() -> None:
    """One file per agent and quantity, in OMAR's layout, unless they are there."""
    rng, envs = np.random.default_rng(0), make_vec(TASK, EPISODES)
    obs, _ = envs.reset(seed=1)
    rows = {name: [] for name in ("obs", "acs", "rews", "next_obs", "dones")}
    for step in range(25):
        if not step:
            goal = choose(obs, *landmarks(envs), rng, BEST)
        action = np.clip(script(obs, goal) + NOISE * rng.standard_normal((EPISODES, 3, 2)), -1, 1)
        kicked = rng.random((EPISODES, 3, 1)) < KICKS
        action = np.where(kicked, rng.uniform(-1, 1, action.shape), action).astype(np.float32)
        next_obs, _, terminated, _, info = envs.step(action)
        values = (obs, action, info["agent_rewards"], next_obs, np.repeat(terminated[:, None], 3, 1))
        for name, value in zip(rows, values):
            rows[name].append(value)
        obs = next_obs
        if not step and begins_with(rows):
            return
    scratch = DATA.with_name(DATA.name + ".tmp")
    scratch.mkdir(parents=True, exist_ok=True)
    for name, steps in rows.items():
        whole = np.stack(steps, 1, dtype=np.float32)  # [episodes, 25, 3, ...]
        for i in range(3):
            np.save(scratch / f"{name}_{i}.npy", whole[:, :, i].reshape(EPISODES * 25, *whole.shape[3:]))
    shutil.rmtree(DATA, ignore_errors=True)
    scratch.rename(DATA)
    print(f"data      {DATA}: return {info['episode']['r'].mean():.1f} ± {info['episode']['r'].std():.1f}", flush=True)


def train(method: str, seed: int) -> None:
    if seed not in offline.read_folder(RESULT / method, "usual"):
        width = dom2.Args().critic_hidden
        count = str(round(UPDATES * offline.longer(NAME, method, width, width)))
        flags = f"{COMMON} {offline.METHODS[method]} {OWN.get(method, '')} --total-updates {count}".split()
        offline.complete(RESULT / method, seed, [*SOURCE, *flags])


def players(methods: tuple[str, ...]) -> dict[str, Callable]:
    """A trained policy of each method, if its file is there: a checkout has none."""
    found = {method: sorted((RESULT / method).glob("*/policy.pt")) for method in methods}
    return {method: dom2.make_act(dom2.load_policy(paths[0])[0]) for method, paths in found.items() if paths}


def script_returns(best: int, shift: str, alone: bool = False) -> np.ndarray:
    """Of the script, over the fresh episodes. It knows what is gone, and decides for all; or each agent `alone`."""
    envs, rng = make_vec(TASK, 1000, shift=shift), np.random.default_rng(7)
    obs, _ = envs.reset(seed=offline.FRESH)
    decide = lambda: choose(obs, *landmarks(envs), rng, best)
    goal = np.stack([decide()[:, i] for i in range(3)], 1) if alone else decide()
    for _ in range(25):
        obs, _, _, _, info = envs.step(script(obs, goal))
    return info["episode"]["r"]


def draw(first: dict[str, Callable]) -> None:
    """Paths of 40 episodes from one start that is not in the data; usual above, shifted below."""
    figure = Figure(figsize=(3.2 * (1 + len(first)), 6.6), layout="constrained")
    for row, shift in zip(figure.subplots(2, 1 + len(first), squeeze=False), ("", "fewer")):
        envs = make_vec(TASK, 40, shift=shift)
        for axis, (name, act) in zip(row, [("data", None), *first.items()]):
            obs, _ = envs.reset(seed=[offline.FRESH + 5000] * 40)
            torch.manual_seed(0)
            goal, path = choose(obs, *landmarks(envs), np.random.default_rng(0), BEST), [obs[..., 2:4]]
            if act is None and shift:
                axis.set_axis_off()
                continue
            for _ in range(25):
                obs = envs.step(act(obs) if act else script(obs, goal))[0]
                path.append(obs[..., 2:4])
            path = np.stack(path)  # [26, 40, 3, xy]
            for i in range(3):
                axis.plot(*path[:, :, i].transpose(2, 0, 1), color=f"C{i}", lw=0.7, alpha=0.5)
                axis.plot(*path[0, 0, i], "o", color=f"C{i}", ms=9)
            places = obs[0, 0, 4:16].reshape(6, 2) + obs[0, 0, 2:4]
            axis.plot(*places.T, "k*", ms=13, zorder=3)
            box = dict(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[], aspect="equal")
            axis.set(**box, title=f"{name}{', fewer' if shift else ''}")
    figure.savefig(RESULT / "paths.png", dpi=110)


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    RESULT.mkdir(parents=True, exist_ok=True)
    make_data()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: train(job[1], job[0]), itertools.product(options.seeds, options.methods)))
    print("return over 1000 fresh episodes; mean ± std over seeds (number of seeds)")
    for shift in ("usual", "fewer"):
        for method in options.methods:
            print(f"{shift:6s} {method:22s} {offline.cell(offline.read_folder(RESULT / method, shift))}")
        some = 6 if shift == "fewer" else BEST
        scripts = {"some good way": (some, False), "each alone": (some, True), "shortest": (1, False)}
        for name, (best, alone) in scripts.items():
            returns = script_returns(best, shift.replace("usual", ""), alone)
            print(f"{shift:6s} {'script, ' + name:22s} {returns.mean():.1f}")
    if len(found := players(options.methods)) == len(options.methods):
        draw(found)


if __name__ == "__main__":
    main()
