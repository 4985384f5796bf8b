"""Makes a data set.

    python datasets/collect.py --dataset omar_simple_spread-medium          # a million transitions, about half a minute
    python datasets/collect.py --dataset omar_simple_tag-expert --transitions 100000 --seed 3

Splits: `random`, `medium` and `expert` are played by uniformly random actions and by the behaviour policies in
`datasets/policies/`, `adaptive` (spread only) by a script; `random-medium` and `medium-expert` are the first halves of
two of these; `medium-replay` is everything that happens in the training run whose policy is the medium one (with
`--seed` or `--prey`, in a run of the same length), and takes as long as that. The result depends on the arguments, the
machine and the packages only, not on interruptions: an interrupted command goes on where it was. Layout:
`common/datasets.py`.
"""

import dataclasses
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
from behaviour import POLICIES, command, load_behaviour
from common.datasets import DATA, data_folder, layout, split_name
from common.envs import Act, BadInput, check_options, find_task, make_vec, mix_seed, sha256, versions
from scripts import noisy, spread, uniform
from writer import Writer

CHUNK = 10_000  # transitions that are played side by side and written together
GAIN, NOISE = 4.0, 0.45  # of `adaptive`: so its mean return is that of OMAR's expert data
LEVELS = {  # who plays, in an order that seeds know; what a card says of it, or nothing of a behaviour policy
    "random": "uniform in [-1, 1]", "medium": "", "expert": "",
    "adaptive": f"scripts.spread, gain {GAIN:g}, noise {NOISE}",
}  # fmt: skip
SAVE_EVERY = 5.0  # seconds of work that an interruption may cost


@dataclass(frozen=True)
class Options:
    """Makes an offline data set."""

    dataset: str
    """<task>-<split>: omar_simple_spread, omar_simple_tag, omar_simple_world or omar_halfcheetah_2x3, then random,
    random-medium, medium-replay, medium, medium-expert or expert; or omar_simple_spread-adaptive"""
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


class Recorder(gym.vector.VectorWrapper):
    """Writes what happens in `envs` into the files of `writer`, from row `start` up to row `end`, episode by episode.

    The copies step side by side, but a row is the place of a transition in its episode, and an episode follows the one
    before it in the same place, copy after copy. That needs to know when all copies start afresh: at each `reset` with
    a seed, when all have just finished an episode.
    """

    def __init__(self, envs: gym.vector.VectorEnv, writer: Writer, start: int, end: int):
        super().__init__(envs)
        self.writer, self.horizon = writer, find_task(writer.env_id).horizon
        self.base, self.end, self.count = start, end, 0
        self.marks_limits = find_task(writer.env_id).own_state  # as OMAR's data do

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
        episode, step = divmod(self.count, self.horizon)
        rows = self.base + (episode * self.num_envs + np.arange(self.num_envs)) * self.horizon + step
        keep = rows < self.end
        dones = terminated | truncated if self.marks_limits else terminated
        shared = {"dones": dones, "states": self.state, "next_states": info["state"]}
        actions, rewards = np.clip(actions, -1.0, 1.0), info["agent_rewards"]
        team = {"obs": self.obs, "acs": actions, "rews": rewards, "next_obs": next_obs}
        prey = {"obs": "prey_obs", "acs": "prey_action", "rews": "prey_reward", "next_obs": "prey_next_obs"}
        for name, array in self.writer.files.items():
            kind, _, i = name.rpartition("_")
            if kind in shared:
                value = shared[kind]
            else:
                value = team[kind][:, int(i)] if int(i) < self.writer.agents else info[prey[kind]]
            array[rows[keep]] = value[keep, : array.shape[1]] if array.ndim > 1 else value[keep]
        self.obs, self.state, self.count = next_obs, info["state"], self.count + 1
        if truncated.all():  # an episode of every copy is whole: on the disk before a checkpoint can say so
            self.writer.flush()
        return result


def play(act: Act, envs: gym.vector.VectorEnv, seeds: list[int]) -> None:
    """One episode in each of `envs`, which all have the same length."""
    obs, _ = envs.reset(seed=seeds)
    truncated = np.zeros(1, bool)
    while not truncated.all():
        obs, _, _, truncated, _ = envs.step(act(obs))


def play_all(options: Options, writer: Writer, split: str) -> list[dict]:
    """Fills the files with episodes of policies that do not learn. Returns the share of each, and the policy's card."""
    env_id, horizon = writer.env_id, find_task(writer.env_id).horizon
    chunks, players, shares, first = [], {}, [], 0
    for level in split.split("-"):
        half = round(0.5 * writer.transitions / horizon) * horizon
        last = half if "-" in split and not first else writer.transitions
        about = LEVELS[level]
        if not about:
            policy, known = load_behaviour(env_id, level, options.policies)
            players[level] = omad.make_act(policy)
            about = {key: known[key] for key in ("command", "seed", "steps", "return", "git_revision", "sha256")}
        count = last - first
        shares.append({"level": level, "transitions": count, "episodes": count // horizon, "policy": about})
        chunks += [(level, part, start, last) for part, start in enumerate(range(first, last, CHUNK))]
        first = last
    envs = make_vec(env_id, CHUNK // horizon, prey=options.prey)
    saved = time.time()
    for done in range(writer.done, len(chunks)):
        level, part, start, end = chunks[done]
        # A chunk's start states and actions depend on its own place only; two unrelated seeds, lest they correlate. It
        # is always played whole, so that a shorter data set is the beginning of a longer one.
        key = (options.seed, list(LEVELS).index(level), part)
        seeds = np.random.SeedSequence((*key, 0)).generate_state(envs.num_envs) // 2
        torch.manual_seed(mix_seed(*key, 1))
        act = players[level] if level in players else scripted(level, key, envs)
        play(act, Recorder(envs, writer, start, end), [int(seed) for seed in seeds])
        if time.time() - saved > SAVE_EVERY or done == len(chunks) - 1:
            writer.save(done + 1)
            saved = time.time()
            print(f"{options.dataset}: {min(start + CHUNK, end):,} of {writer.transitions:,} transitions", flush=True)
    envs.close()
    return shares


def scripted(level: str, key: tuple[int, ...], envs: gym.vector.VectorEnv) -> Act:
    """Uniformly random actions; or agents that take the assignment which is cheapest at the moment, with noise."""
    generator = np.random.default_rng(np.random.SeedSequence((*key, 1)))
    if level == "adaptive":
        return noisy(spread(envs, None, generator, gain=GAIN), generator, NOISE)
    return uniform(envs, None, generator)


def replay_args(options: Options, env_id: str) -> omad.Args:
    """Arguments of the training run that medium-replay records: the medium policy's, with another seed or prey."""
    args = load_behaviour(env_id, "medium", options.policies)[1]["args"]
    whole = args.num_envs * find_task(env_id).horizon  # all copies end an episode together after so many
    for name in ("eval_every", "total_timesteps"):
        if getattr(args, name) % whole:
            raise BadInput(f"the run of {env_id}'s medium policy cannot be recorded: {name} is no multiple of {whole}")
    seed = args.seed + options.seed
    return dataclasses.replace(args, seed=seed, prey=options.prey, device="cpu", torch_threads=1)


def relive(options: Options, args: omad.Args, writer: Writer) -> list[dict]:
    """Fills the files with everything that happens in a training run."""
    found, step = list(writer.scratch.glob("*/checkpoint.pt")), 0
    run = dataclasses.replace(args, run_dir=str(writer.scratch))
    if found and writer.done:
        run = dataclasses.replace(run, resume=str(found[0].parent))
        step = torch.load(found[0], weights_only=True)["step"]
    else:
        shutil.rmtree(writer.scratch, ignore_errors=True)
    writer.save(1)  # from here on, what is there belongs to the checkpoint
    envs = make_vec(args.env_id, args.num_envs, args.observation, prey=args.prey)
    omad.train(run, envs=Recorder(envs, writer, step, writer.transitions))
    envs.close()
    (path,) = writer.scratch.glob("*/policy.pt")
    policy, last = omad.load_policy(path)
    medium = load_behaviour(args.env_id, "medium", options.policies)[0].state_dict()
    result = {"mean": round(last["return_mean"], 2), "std": round(last["return_std"], 2)}
    about = {
        "command": command(args), "seed": args.seed, "steps": last["step"],
        "return": result | {"episodes": args.eval_episodes},
        "ends_as_the_medium_policy": all(torch.equal(x, medium[name]) for name, x in policy.state_dict().items()),
    }  # fmt: skip
    episodes = writer.transitions // find_task(args.env_id).horizon
    return [{"level": "replay", "transitions": writer.transitions, "episodes": episodes, "policy": about}]


def check(options: Options) -> tuple[str, str, int, omad.Args | None]:
    """Task, split, number of transitions, and the training run to record, if any. Raises `BadInput`."""
    env_id, split = split_name(options.dataset)
    check_options(env_id, "", options.prey, "")
    if not 0 <= options.seed < 10**6:
        raise BadInput(f"--seed {options.seed} must be at least 0 and below 1,000,000")
    horizon = find_task(env_id).horizon
    if options.transitions % horizon or options.transitions < 0:
        raise BadInput(f"--transitions {options.transitions} must be a multiple of {horizon}, the length of an episode")
    args = replay_args(options, env_id) if split == "medium-replay" else None
    total = options.transitions or (args.total_timesteps if args else 1_000_000)
    if args and total > args.total_timesteps:
        raise BadInput(f"--transitions {total:,}: the run of {env_id}'s medium policy has {args.total_timesteps:,}")
    if not args and "-" in split and total < 2 * horizon:
        raise BadInput(f"--transitions {total}: two halves need two episodes, {2 * horizon}")
    return env_id, split, total, args


def collect(options: Options) -> Path:
    """Makes the data set and returns its folder. Raises `BadInput`."""
    env_id, split, transitions, args = check(options)
    folder = data_folder(options.dataset, options.seed, options.out)
    levels = [level for level in ("medium", "expert") if level in split]
    origin = {
        "dataset": options.dataset, "transitions": transitions, "seed": options.seed,
        "prey": sha256(options.prey) if options.prey else "the project's own",
        "policies": {level: load_behaviour(env_id, level, options.policies)[1]["sha256"] for level in levels},
        "args": dataclasses.asdict(args) | {"prey": ""} if args else None,
        "versions": versions(),
    }  # fmt: skip
    team, prey, _ = layout(env_id)
    writer = Writer(folder, env_id, team | prey, transitions, origin)
    if writer.done:
        print(f"going on with the unfinished data set in {writer.temporary}")
    shares = relive(options, args, writer) if args else play_all(options, writer, split)
    words = ["python", "datasets/collect.py", "--dataset", options.dataset, "--transitions", str(transitions)]
    words += ["--seed", str(options.seed)]
    words += ["--prey", options.prey] if options.prey else []
    words += ["--policies", str(options.policies)] if options.policies != POLICIES else []
    about = {"split": split, "seed": options.seed, "behaviour": shares, "prey": origin["prey"] if prey else None}
    card = writer.close(about | {"command": shlex.join(words)})
    result = f"return {card['return']['mean']:.1f} ± {card['return']['std']:.1f}"
    print(f"{folder}: {card['transitions']:,} transitions, {card['episodes']:,} episodes, {result}")
    return folder


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""
    torch.set_num_threads(1)
    try:
        collect(tyro.cli(Options))
        return 0
    except BadInput as error:
        print(f"collect.py: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError, OSError, MemoryError) as error:
        print(f"collect.py: failed: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("collect.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
