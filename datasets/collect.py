"""Makes a data set.

    python datasets/collect.py --dataset omar_simple_spread-medium                 # a million transitions, about half a minute
    python datasets/collect.py --dataset omar_simple_tag-expert --transitions 100000 --seed 3

Splits: `random`, `medium` and `expert` are played by uniformly random actions and by the behaviour policies in `datasets/policies/`;
`random-medium` and `medium-expert` are the first halves of two of these; `medium-replay` is everything that the training run of the
medium policy lived through until it was that good. The result depends on the arguments only, not on interruptions: an interrupted
command goes on where it was. Layout: `common/datasets.py`.
"""

import dataclasses
import importlib.metadata
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import omad
from behaviour import POLICIES, Act, BehaviourError, command, load_behaviour
from common.datasets import DATA, DataError, Writer, data_folder, layout, sha256, split_name
from common.envs import find_prey, find_task, make_vec

LEVELS = {  # split -> who plays how large a share of it
    "random": {"random": 1.0},
    "random-medium": {"random": 0.5, "medium": 0.5},
    "medium": {"medium": 1.0},
    "medium-expert": {"medium": 0.5, "expert": 0.5},
    "expert": {"expert": 1.0},
}
CHUNK = 10_000  # transitions that are played side by side and written together


@dataclass(frozen=True)
class Options:
    """Makes an offline data set."""

    dataset: str
    """<task>-<split>: omar_simple_spread, omar_simple_tag, omar_simple_world or omar_halfcheetah_2x3, then random, random-medium,
    medium-replay, medium, medium-expert or expert"""
    transitions: int = 0
    """how many; 0 is 1,000,000, or for medium-replay the whole of the training run"""
    seed: int = 0
    """seed of start states and actions; of medium-replay, added to the seed of the training run"""
    prey: str = ""
    """tag and world: a file with the prey's network (OMAR's pretrained_adv_model.pt); else the project's own prey"""
    out: Path = DATA
    """folder of all data sets; this one goes into <task>/<split>/seed_<seed>_data"""
    policies: Path = POLICIES
    """folder with the behaviour policies"""


class Progress:
    """A line with what is done, how fast, and how long it will take: rewritten on a terminal, else a new one every 10 s."""

    def __init__(self, name: str, total: int, done: int):
        self.name, self.total, self.first, self.started, self.last = name, total, done, time.time(), 0.0

    def show(self, done: int) -> None:
        now, terminal = time.time(), sys.stdout.isatty()
        if done < self.total and now - self.last < (0.2 if terminal else 10):
            return
        self.last, rate = now, (done - self.first) / max(now - self.started, 1e-6)
        bar = "#" * (30 * done // self.total)
        left = f"{(self.total - done) / rate:.0f} s left" if done < self.total else f"{now - self.started:.0f} s"
        print(
            f"{self.name} [{bar:<30}] {done:,}/{self.total:,} | {rate:,.0f} transitions/s | {left:<12}",
            end="\r" if terminal and done < self.total else "\n",
            flush=True,
        )


class Recorder(gym.vector.VectorWrapper):
    """Writes what happens in `envs` into the files of `writer`: from row `start` on, episode after episode.

    The copies step side by side, but a row is the place of a transition in its episode, and an episode follows the one before it in
    the same copy, copy after copy. That needs to know when all copies start afresh: at each `reset` with a seed.
    """

    def __init__(self, envs: gym.vector.VectorEnv, writer: Writer, env_id: str, start: int = 0):
        super().__init__(envs)
        self.writer, self.horizon, self.base, self.count = writer, find_task(env_id).horizon, start, 0

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=dict(options) if options else None)
        if seed is not None:
            self.base, self.count, self.state = self.base + self.count * self.num_envs, 0, info["state"]
        else:
            self.state = np.where(options["reset_mask"][:, None], info["state"], self.state)
        self.obs = obs
        return obs, info

    def step(self, actions):
        result = next_obs, _, terminated, truncated, info = self.env.step(actions)
        actions = np.clip(actions, -1.0, 1.0)
        episode, step = divmod(self.count, self.horizon)
        rows = self.base + (episode * self.num_envs + np.arange(self.num_envs)) * self.horizon + step
        keep = rows < self.writer.transitions
        for name, array in self.writer.files.items():
            kind, _, i = name.rpartition("_")
            i = int(i)
            if i >= self.writer.agents:
                values = {
                    "obs": info["prey_obs"], "acs": info["prey_action"], "rews": info["prey_reward"],
                    "next_obs": info["prey_next_obs"], "dones": terminated,
                }[kind]  # fmt: skip
            else:
                values = {
                    "obs": self.obs[:, i], "acs": actions[:, i], "rews": info["agent_rewards"][:, i], "next_obs": next_obs[:, i],
                    "dones": terminated, "states": self.state, "next_states": info["state"],
                }[kind]  # fmt: skip
            array[rows[keep]] = values[keep, : array.shape[1]] if array.ndim > 1 else values[keep]
        self.obs, self.state, self.count = next_obs, info["state"], self.count + 1
        return result


def play(options: Options, writer: Writer, split: str) -> list[dict]:
    """Fills the files with episodes of policies that do not learn. Returns the share of each, and the policy's own card."""
    env_id, horizon = writer.env_id, find_task(writer.env_id).horizon
    rows, players, shares, first = [], {}, [], 0
    for level, share in LEVELS[split].items():
        last = first + round(share * writer.transitions / horizon) * horizon if share < 1 and not first else writer.transitions
        about = None
        if level != "random":
            players[level] = load_behaviour(env_id, level, options.policies)
            about = {key: players[level].about[key] for key in ("command", "seed", "steps", "return", "git_revision")}
        shares.append({"level": level, "transitions": last - first, "policy": about or "uniform in [-1, 1]"})
        rows += [(level, part, start, min(start + CHUNK, last)) for part, start in enumerate(range(first, last, CHUNK))]
        first = last
    progress = Progress(
        options.dataset, writer.transitions, rows[writer.done][2] if writer.done < len(rows) else writer.transitions
    )
    envs = {}  # by number of copies: one for whole chunks, others for the ends
    for done in range(writer.done, len(rows)):
        level, part, start, end = rows[done]
        copies = (end - start) // horizon
        if copies not in envs:
            envs[copies] = make_vec(env_id, copies, prey=options.prey)
        recorder = Recorder(envs[copies], writer, env_id, start)
        # A chunk's start states and actions depend on its own place only; two unrelated seeds, lest they correlate.
        key = (options.seed, ("random", "medium", "expert").index(level), part)
        seeds = np.random.SeedSequence((*key, 0)).generate_state(copies) // 2
        act = (
            random_actions(key, envs[copies])
            if level == "random"
            else players[level].act(torch.Generator().manual_seed(omad.mix_seed(*key, 1)))
        )
        obs, _ = recorder.reset(seed=[int(seed) for seed in seeds])
        for _ in range(horizon):
            obs = recorder.step(act(obs))[0]
        if done % 10 == 9 or done == len(rows) - 1:
            writer.save(done + 1)
        progress.show(end)
    return shares


def random_actions(key: tuple[int, ...], envs: gym.vector.VectorEnv) -> Act:
    generator = np.random.default_rng(np.random.SeedSequence((*key, 1)))
    return lambda obs: generator.uniform(-1.0, 1.0, envs.action_space.shape).astype(np.float32)


def replay_args(options: Options, env_id: str) -> omad.Args:
    """Arguments of the training run that medium-replay records: the medium policy's, with another seed if so asked."""
    about = load_behaviour(env_id, "medium", options.policies).about
    args = omad.Args(**about["args"])
    whole = args.num_envs * find_task(env_id).horizon  # all copies end an episode together after so many
    steps = min(options.transitions or args.total_timesteps, args.total_timesteps)
    return dataclasses.replace(
        args,
        seed=args.seed + options.seed,
        total_timesteps=-(-steps // whole) * whole,
        prey=options.prey,
        device="cpu",
        torch_threads=1,
    )


def relive(args: omad.Args, writer: Writer) -> list[dict]:
    """Fills the files with everything that happens in a training run."""
    runs, saved = writer.temporary / "runs", None
    found = [path.parent for path in runs.glob("*/checkpoint.pt")]
    args = dataclasses.replace(args, run_dir=str(runs))
    if found and writer.done:
        args = dataclasses.replace(args, resume=str(found[0]))
        saved = omad.load(args.resume)[1]
    else:
        shutil.rmtree(runs, ignore_errors=True)
    writer.save(1)  # what the checkpoint has seen is on the disk: from here on, go on with it
    omad.validate(args)
    envs = make_vec(args.env_id, args.num_envs, args.observation, prey=args.prey)
    omad.train(args, saved, Recorder(envs, writer, args.env_id, saved["step"] if saved else 0))
    shutil.rmtree(runs)
    how = command(dataclasses.replace(args, resume="", run_dir="runs"))
    return [{"level": "replay", "transitions": writer.transitions, "policy": {"command": how, "seed": args.seed}}]


def check(options: Options) -> tuple[str, str, int, omad.Args | None]:
    """Task, split, number of transitions, and the training run to record, if any. Raises `DataError` for what cannot be made."""
    env_id, split = split_name(options.dataset)
    if options.prey:
        try:
            find_prey(env_id, options.prey)
        except ValueError as error:
            raise DataError(f"--prey {error}") from error
    if not 0 <= options.seed < 2**31:
        raise DataError(f"--seed {options.seed} must be at least 0 and below 2^31")
    horizon = find_task(env_id).horizon
    if options.transitions % horizon or options.transitions < 0:
        raise DataError(
            f"--transitions {options.transitions} must be a multiple of {horizon}, the length of an episode of {env_id}: "
            f"{max(options.transitions // horizon, 1) * horizon:,}, say"
        )
    if split != "medium-replay":
        total = options.transitions or 1_000_000
        if len(LEVELS[split]) > 1 and total < 2 * horizon:
            raise DataError(f"--transitions {total}: two halves need two episodes, {2 * horizon}")
        return env_id, split, total, None
    args = replay_args(options, env_id)
    return env_id, split, min(options.transitions or args.total_timesteps, args.total_timesteps), args


def collect(options: Options) -> Path:
    """Makes the data set and returns its folder. Raises `DataError` or `BehaviourError`."""
    env_id, split, transitions, args = check(options)
    folder = data_folder(options.dataset, options.seed, options.out)
    if folder.exists():
        raise DataError(f"{folder}: there is a data set already; delete it first to make it anew")
    policies = sorted({level for level in LEVELS.get(split, {"medium": 1}) if level != "random"})
    origin = {
        "dataset": options.dataset, "transitions": transitions, "seed": options.seed,
        "prey": sha256(Path(options.prey)) if options.prey else "the project's own",
        "policies": {level: sha256(options.policies / f"{env_id}-{level}.json") for level in policies if load_behaviour(env_id, level, options.policies)},
        "args": dataclasses.asdict(args) if args else None,
    }  # fmt: skip
    team, prey, _ = layout(env_id)
    writer = Writer(folder, env_id, team | prey, transitions, origin)
    if writer.done:
        print(f"going on with the unfinished data set in {writer.temporary}")
    shares = relive(args, writer) if args else play(options, writer, split)
    words = [
        "python",
        "datasets/collect.py",
        "--dataset",
        options.dataset,
        "--transitions",
        str(transitions),
        "--seed",
        str(options.seed),
    ]
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "pettingzoo", "mpe2")
    card = writer.close({
        "split": split, "seed": options.seed, "behaviour": shares, "prey": origin["prey"] if prey else None,
        "command": shlex.join(words + (["--prey", options.prey] if options.prey else [])),
        "python": sys.version.split()[0], "packages": {name: importlib.metadata.version(name) for name in packages},
    })  # fmt: skip
    result = card["return"]
    print(
        f"{folder}: {card['transitions']:,} transitions, {card['episodes']:,} episodes, return {result['mean']:.1f} ± {result['std']:.1f}"
    )
    return folder


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    try:
        collect(options)
        return 0
    except (DataError, BehaviourError, omad.BadInput) as error:
        print(f"collect.py: error: {error}", file=sys.stderr)
        return 2
    except (omad.FailedRun, OSError, MemoryError) as error:
        print(f"collect.py: failed: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("collect.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
