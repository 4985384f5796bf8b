"""Makes a data set.

    python datasets/collect.py --dataset omar_simple_spread-medium                 # a million transitions, about half a minute
    python datasets/collect.py --dataset omar_simple_tag-expert --transitions 100000 --seed 3

Splits: `random`, `medium` and `expert` are played by uniformly random actions and by the behaviour policies in `datasets/policies/`;
`random-medium` and `medium-expert` are the first halves of two of these; `medium-replay` is everything that happens in the training run
whose policy is the medium one (with `--seed` or `--prey`, in a run of the same length), and takes as long as that. The result depends on
the arguments, the machine and the packages only, not on interruptions: an interrupted command goes on where it was. Layout:
`common/datasets.py`.
"""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import omad
from behaviour import POLICIES, Act, BehaviourError, command, load_behaviour
from common.datasets import DATA, DataError, Writer, data_folder, layout, sha256, split_name, versions
from common.envs import find_prey, find_task, make_vec

LEVELS = {  # split -> who plays how large a share of it
    "random": {"random": 1.0},
    "random-medium": {"random": 0.5, "medium": 0.5},
    "medium": {"medium": 1.0},
    "medium-expert": {"medium": 0.5, "expert": 0.5},
    "expert": {"expert": 1.0},
}
CHUNK = 10_000  # transitions that are played side by side and written together
SAVE_EVERY = 5.0  # seconds of work that an interruption may cost


@dataclass(frozen=True)
class Options:
    """Makes an offline data set."""

    dataset: str
    """<task>-<split>: omar_simple_spread, omar_simple_tag, omar_simple_world or omar_halfcheetah_2x3, then random, random-medium,
    medium-replay, medium, medium-expert or expert"""
    transitions: int = 0
    """how many; 0 is 1,000,000, or for medium-replay the whole training run"""
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
        self.name, self.total, self.first, self.started, self.last, self.stream = name, total, done, time.time(), 0.0, sys.stdout

    def show(self, done: int) -> None:
        now, terminal = time.time(), self.stream.isatty()
        if done < self.total and now - self.last < (0.2 if terminal else 10):
            return
        self.last, rate = now, (done - self.first) / max(now - self.started, 1e-6)
        bar = "#" * (30 * done // self.total)
        left = f"{(self.total - done) / rate:.0f} s left" if done < self.total and rate else f"{now - self.started:.0f} s"
        end = "\r" if terminal and done < self.total else "\n"
        line = f"{self.name} [{bar:<30}] {done:,}/{self.total:,} | {rate:,.0f} transitions/s | {left:<12}"
        print(line, end=end, file=self.stream, flush=True)


class Recorder(gym.vector.VectorWrapper):
    """Writes what happens in `envs` into the files of `writer`, from row `start` up to row `end`, episode after episode.

    The copies step side by side, but a row is the place of a transition in its episode, and an episode follows the one before it in
    the same place, copy after copy. That needs to know when all copies start afresh: at each `reset` with a seed, when all have just
    finished an episode.
    """

    def __init__(self, envs: gym.vector.VectorEnv, writer: Writer, start: int, end: int, progress: Progress | None = None):
        super().__init__(envs)
        self.writer, self.horizon, self.progress = writer, find_task(writer.env_id).horizon, progress
        self.base, self.end, self.count = start, end, 0
        self.marks_limits = "cheetah" in writer.env_id  # as OMAR's data do

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=dict(options) if options else None)
        if seed is not None:
            assert self.count % self.horizon == 0, "all copies must start afresh together"
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
        keep = rows < self.end
        dones = terminated | truncated if self.marks_limits else terminated
        for name, array in self.writer.files.items():
            kind, _, agent = name.rpartition("_")
            i = int(agent)
            if i >= self.writer.agents:
                values = {
                    "obs": info["prey_obs"], "acs": info["prey_action"], "rews": info["prey_reward"],
                    "next_obs": info["prey_next_obs"], "dones": dones,
                }[kind]  # fmt: skip
            else:
                values = {
                    "obs": self.obs[:, i], "acs": actions[:, i], "rews": info["agent_rewards"][:, i], "next_obs": next_obs[:, i],
                    "dones": dones, "states": self.state, "next_states": info["state"],
                }[kind]  # fmt: skip
            array[rows[keep]] = values[keep, : array.shape[1]] if array.ndim > 1 else values[keep]
        self.obs, self.state, self.count = next_obs, info["state"], self.count + 1
        if self.progress:
            if truncated.all():  # an episode of every copy is whole: on the disk before a checkpoint can say so
                self.writer.flush()
            self.progress.show(min(self.base + self.count * self.num_envs, self.end))
        return result


def play(options: Options, writer: Writer, split: str) -> list[dict]:
    """Fills the files with episodes of policies that do not learn. Returns the share of each, and the policy's own card."""
    env_id, horizon = writer.env_id, find_task(writer.env_id).horizon
    chunks, players, shares, first = [], {}, [], 0
    for level, share in LEVELS[split].items():
        last = first + round(share * writer.transitions / horizon) * horizon if share < 1 and not first else writer.transitions
        about = "uniform in [-1, 1]"
        if level != "random":
            players[level] = load_behaviour(env_id, level, options.policies)
            about = {key: players[level].about[key] for key in ("command", "seed", "steps", "return", "git_revision", "sha256")}
        shares.append({"level": level, "transitions": last - first, "episodes": (last - first) // horizon, "policy": about})
        chunks += [(level, part, start, last) for part, start in enumerate(range(first, last, CHUNK))]
        first = last
    envs = make_vec(env_id, CHUNK // horizon, prey=options.prey)
    done_rows = chunks[writer.done][2] if writer.done < len(chunks) else writer.transitions
    progress, saved = Progress(options.dataset, writer.transitions, done_rows), time.time()
    for done in range(writer.done, len(chunks)):
        level, part, start, end = chunks[done]
        # A chunk's start states and actions depend on its own place only; two unrelated seeds, lest they correlate. It is always
        # played whole, so that a shorter data set is the beginning of a longer one.
        key = (options.seed, ("random", "medium", "expert").index(level), part)
        seeds = np.random.SeedSequence((*key, 0)).generate_state(envs.num_envs) // 2
        if level == "random":
            act = random_actions(key, envs)
        else:
            act = players[level].act(torch.Generator().manual_seed(omad.mix_seed(*key, 1)))
        recorder = Recorder(envs, writer, start, end)
        obs, _ = recorder.reset(seed=[int(seed) for seed in seeds])
        for _ in range(horizon):
            obs = recorder.step(act(obs))[0]
        if time.time() - saved > SAVE_EVERY or done == len(chunks) - 1:
            writer.save(done + 1)
            saved = time.time()
        progress.show(min(start + CHUNK, end))
    envs.close()
    return shares


def random_actions(key: tuple[int, ...], envs: gym.vector.VectorEnv) -> Act:
    generator = np.random.default_rng(np.random.SeedSequence((*key, 1)))
    return lambda obs: generator.uniform(-1.0, 1.0, envs.action_space.shape).astype(np.float32)


def replay_args(options: Options, env_id: str) -> omad.Args:
    """Arguments of the training run that medium-replay records: the medium policy's, with another seed or prey if so asked."""
    args = omad.Args(**load_behaviour(env_id, "medium", options.policies).about["args"])
    whole = args.num_envs * find_task(env_id).horizon  # all copies end an episode together after so many
    for name in ("eval_every", "total_timesteps"):
        if getattr(args, name) % whole:
            raise DataError(f"the run of {env_id}'s medium policy cannot be recorded: its {name} is no multiple of {whole}")
    args = dataclasses.replace(args, seed=args.seed + options.seed, prey=options.prey, device="cpu", torch_threads=1)
    omad.validate(args)
    return args


def relive(options: Options, args: omad.Args, writer: Writer) -> list[dict]:
    """Fills the files with everything that happens in a training run."""
    runs, saved = writer.scratch, None
    found = [path.parent for path in runs.glob("*/checkpoint.pt")]
    run = dataclasses.replace(args, run_dir=str(runs))
    if found and writer.done:
        run = dataclasses.replace(run, resume=str(found[0]))
        saved = omad.load(run.resume)[1]
    else:
        shutil.rmtree(runs, ignore_errors=True)
    writer.save(1)  # from here on, what is there belongs to the checkpoint
    first = saved["step"] if saved else 0
    progress = Progress(options.dataset, writer.transitions, min(first, writer.transitions))
    envs = make_vec(args.env_id, args.num_envs, args.observation, prey=args.prey)
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        omad.train(run, saved, Recorder(envs, writer, first, writer.transitions, progress))
    envs.close()
    (path,) = runs.iterdir()
    end = torch.load(path / "checkpoint.pt", weights_only=True)
    medium = load_behaviour(args.env_id, "medium", options.policies).policy.state_dict()
    last = end["rows"][-1]
    about = {
        "command": command(args), "seed": args.seed, "steps": end["step"],
        "return": {"mean": round(last["return_mean"], 2), "std": round(last["return_std"], 2), "episodes": last["episodes"]},
        "ends_as_the_medium_policy": all(torch.equal(value, end["agent"][f"policy.{name}"]) for name, value in medium.items()),
    }  # fmt: skip
    episodes = writer.transitions // find_task(args.env_id).horizon
    return [{"level": "replay", "transitions": writer.transitions, "episodes": episodes, "policy": about}]


def check(options: Options) -> tuple[str, str, int, omad.Args | None]:
    """Task, split, number of transitions, and the training run to record, if any. Raises `DataError` for what cannot be made."""
    env_id, split = split_name(options.dataset)
    if options.prey:
        try:
            find_prey(env_id, options.prey)
        except ValueError as error:
            raise DataError(f"--prey {error}") from error
    if not 0 <= options.seed < 10**6:
        raise DataError(f"--seed {options.seed} must be at least 0 and below 1,000,000")
    horizon = find_task(env_id).horizon
    if options.transitions % horizon or not 0 <= options.transitions <= 10**9:
        raise DataError(
            f"--transitions {options.transitions} must be at most 1,000,000,000 and a multiple of {horizon}, the length of an episode "
            f"of {env_id}: {min(max(options.transitions // horizon, 1) * horizon, 10**9):,}, say"
        )
    if split != "medium-replay":
        total = options.transitions or 1_000_000
        if len(LEVELS[split]) > 1 and total < 2 * horizon:
            raise DataError(f"--transitions {total}: two halves need two episodes, {2 * horizon}")
        return env_id, split, total, None
    args = replay_args(options, env_id)
    if options.transitions > args.total_timesteps:
        raise DataError(
            f"--transitions {options.transitions:,}: the training run of {env_id}'s medium policy has {args.total_timesteps:,}"
        )
    return env_id, split, options.transitions or args.total_timesteps, args


def code() -> str:
    """A checksum of the code that decides what a data set holds."""
    here = Path(__file__).parent
    paths = [here.parent / "omad.py", here / "behaviour.py", here / "collect.py", *sorted((here.parent / "common").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def collect(options: Options) -> Path:
    """Makes the data set and returns its folder. Raises `DataError` or `BehaviourError`."""
    env_id, split, transitions, args = check(options)
    folder = data_folder(options.dataset, options.seed, options.out)
    if folder.exists():
        raise DataError(f"{folder}: there is a data set already; delete it first to make it anew")
    levels = [level for level in LEVELS.get(split, {"medium": 1}) if level != "random"]
    origin = {
        "dataset": options.dataset, "transitions": transitions, "seed": options.seed,
        "prey": sha256(Path(options.prey)) if options.prey else "the project's own",
        "policies": {level: load_behaviour(env_id, level, options.policies).about["sha256"] for level in levels},
        "args": {key: value for key, value in dataclasses.asdict(args).items() if key != "prey"} if args else None,
        "packages": versions()["packages"], "code": code(),
    }  # fmt: skip
    team, prey, _ = layout(env_id)
    # Not beside the finished ones, where readers look for folders of any name; but on the same disk.
    workplace = folder.parents[1] / f".{split}-{options.seed}.unfinished"
    writer = Writer(folder, env_id, team | prey, transitions, origin, workplace)
    if writer.done:
        print(f"going on with the unfinished data set in {writer.temporary}")
    shares = relive(options, args, writer) if args else play(options, writer, split)
    words = f"python datasets/collect.py --dataset {options.dataset} --transitions {transitions} --seed {options.seed}".split()
    words += ["--prey", options.prey] if options.prey else []
    words += ["--policies", str(options.policies)] if options.policies != POLICIES else []
    about = {"split": split, "seed": options.seed, "behaviour": shares, "prey": origin["prey"] if prey else None}
    card = writer.close(about | {"command": shlex.join(words)})
    result = card["return"]
    print(
        f"{folder}: {card['transitions']:,} transitions, {card['episodes']:,} episodes, return {result['mean']:.1f} ± {result['std']:.1f}"
    )
    return folder


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""
    torch.set_num_threads(1)
    try:
        collect(omad.read_flags(Options, sys.argv[1:], prog="collect.py"))
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
