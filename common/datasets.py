"""Offline data sets: what they look like on disk, and `load_dataset`, which reads and checks them.

A data set is a folder of .npy files in the layout that OMAR introduced, one of each kind for every agent i:

    obs_<i> [T, O]  acs_<i> [T, A]  rews_<i> [T]  next_obs_<i> [T, O]  dones_<i> [T]
    states_<i> [T, S]  next_states_<i> [T, S]                              MuJoCo only, the same for every agent

Row t is a transition, and episodes follow each other row by row. In the particle tasks `dones` is 0 throughout, and
episodes are blocks of 25 rows. In MuJoCo it is 1 in the last row of an episode: after `horizon` steps (1000) that is
the time limit, before that a fall. Tag and world also hold the prey, as the last agent. Data that have a name here have
a `card.json`: what they are, who made them, how they score, and a checksum of every file. Others load without.

Shape letters: T transitions, N agents (of the team), O observation, A action, S joint state, K episodes.
"""

import difflib
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import BadInput
from common.checks import check_agents, check_order, check_values
from common.envs import TeamEnv, find_task, make_env, sha256

DATA = Path(__file__).parent.parent / "datasets" / "data"  # where data sets made here go
FORMAT = "omar-npy-1"  # of card.json
SPLITS = ("random", "random-medium", "medium-replay", "medium", "medium-expert", "expert")  # of every task
FOLDERS = {  # task -> its folder in OMAR's data
    "omar_simple_spread": "simple_spread",
    "omar_simple_tag": "simple_tag",
    "omar_simple_world": "simple_world",
    "omar_halfcheetah_2x3": "HalfCheetah-v2",
}
NAMES = [f"{task}-{split}" for task in FOLDERS for split in SPLITS]
NAMES.insert(len(SPLITS), "omar_simple_spread-adaptive")  # of a script: agents that adapt to each other
SCORES = {  # task -> returns that normalise to 0 and 100: MADiff's for the particle tasks, OMSD's for HalfCheetah
    "omar_simple_spread": (159.8, 516.8),
    "omar_simple_tag": (-4.1, 185.6),
    "omar_simple_world": (-6.8, 79.5),
    "omar_halfcheetah_2x3": (-284.0, 3568.8),
}


class AgentArray:
    """N memory-mapped arrays [T, ...] as one [T, N, ...], in single precision; smaller agents are padded with zeros.

    `array[rows]`, with a number, a slice or an array of rows, reads just these from the disk; `array[rows, i]` reads
    them of agent i only, without padding. `numpy.asarray(array)` reads all.
    """

    def __init__(self, parts: list[np.ndarray], rows: np.ndarray | None = None):
        self.parts, self.rows = parts, rows
        self.widths = [part.shape[1] for part in parts if part.ndim > 1]  # of each agent
        length = len(parts[0]) if rows is None else len(rows)
        self.shape = (length, len(parts), max(self.widths)) if self.widths else (length, len(parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        rows, agent = key if isinstance(key, tuple) else (key, None)
        rows = rows if self.rows is None else self.rows[rows]
        if agent is not None:
            return np.array(self.parts[agent][rows], np.float32)
        parts = [np.asarray(part[rows], np.float32) for part in self.parts]
        if self.widths:
            parts = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.shape[-1] - x.shape[-1])]) for x in parts]
        return np.stack(parts, -2 if self.widths else -1)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


@dataclass(frozen=True)
class Dataset:
    """A data set that has passed every check."""

    name: str
    env_id: str
    folder: Path
    obs: AgentArray  # [T, N, O]
    actions: AgentArray  # [T, N, A]
    rewards: AgentArray  # [T, N]
    next_obs: AgentArray  # [T, N, O]
    state: AgentArray | None  # [T, 1, S], MuJoCo only
    next_state: AgentArray | None  # [T, 1, S]
    terminations: np.ndarray  # [T] bool: the episode ended by a fall, nothing comes after
    truncations: np.ndarray  # [T] bool: the time was up, or the data end; the value of next_obs counts
    next_known: np.ndarray  # [T] bool: next_obs is real, or not needed after a fall. Some formats do not keep the last
    episodes: np.ndarray  # [K, 2]: first row, and the row after the last
    returns: np.ndarray  # [K] team returns: sums over the episode of the mean over the team's agents
    card: dict | None

    @property
    def checksum(self) -> str:
        """Tells other data apart."""
        return hashlib.sha256(self.episodes.tobytes() + self.returns.tobytes()).hexdigest()

    def __str__(self) -> str:
        result = f"return {self.returns.mean():.1f} ± {self.returns.std():.1f}"
        return f"{self.folder}: {len(self.obs):,} transitions, {len(self.returns):,} episodes, {result}"


def stack_rows(data: Dataset, part: slice) -> np.ndarray:
    """Transitions in one array [rows, N, O + O + A + 2]: obs, next_obs, action, reward and terminated, float32."""
    rewards, actions = data.rewards[part][..., None], np.clip(data.actions[part], -1, 1)
    ended = np.broadcast_to(data.terminations[part, None, None], rewards.shape)
    return np.concatenate([data.obs[part], data.next_obs[part], actions, rewards, ended], -1, dtype=np.float32)


def normalize(env_id: str, score: float | np.ndarray) -> float | np.ndarray:
    """A return on the scale of the task's published scores, 0 random and 100 expert; NaN if there are none."""
    low, high = SCORES.get(env_id, (math.nan, math.nan))
    return 100 * (score - low) / (high - low)


def layout(env_id: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], int]:
    """Shapes of a row in the files of a task, for the team and for the prey, by file name; and the team's agents.

    In Multi-Agent MuJoCo the data decide how large observations and states are: None stands for such a size.
    """
    env, open_size = make_env(env_id), env_id.startswith("mamujoco_")
    sizes = [(None if open_size else obs, action) for obs, action in zip(env.obs_sizes, env.action_sizes)]
    sizes += [(env.env.observation_space(name).shape[0], 2) for name in env.opponents]
    state, team, prey = (None if open_size else env.state_size,), {}, {}
    for i, (obs, action) in enumerate(sizes):
        files = {"obs": (obs,), "acs": (action,), "rews": (), "next_obs": (obs,), "dones": ()}
        files |= {"states": state, "next_states": state} if env.own_state else {}
        (team if i < env.num_agents else prey).update({f"{kind}_{i}": shape for kind, shape in files.items()})
    env.close()
    return team, prey, env.num_agents


def split_name(name: str) -> tuple[str, str]:
    """`<task>-<split>` -> task, split. Raises `BadInput` with the near misses."""
    env_id, _, split = name.partition("-")
    if name not in NAMES:
        near = " or ".join(difflib.get_close_matches(name, NAMES, cutoff=0.4) or ["omar_simple_spread-medium"])
        raise BadInput(f"unknown data set {name!r}; did you mean {near}? A folder on disk is given by its path")
    return env_id, split


def data_folder(name: str, seed: int = 0, root: Path | None = None) -> Path:
    """Where the data set of that name lies, in OMAR's order of folders; `root` is `DATA` if not given."""
    env_id, split = split_name(name)
    return (root or DATA) / FOLDERS[env_id] / split / f"seed_{seed}_data"


def is_folder(source: str | Path) -> bool:
    """Whether that is the path of a folder, and not a name: a `Path`, a folder that is there, or several parts."""
    if isinstance(source, Path):
        return True
    return source != "" and (Path(source).expanduser().is_dir() or len(Path(source).parts) > 1)


def find_env_id(source: str | Path, env_id: str = "") -> str:
    """The task of a data set: of its name, or by its card, its path or `env_id`. No array is read."""
    if not is_folder(source):
        task = split_name(str(source))[0]
        if env_id not in ("", task):
            raise BadInput(f"--env-id {env_id}: {source} is of {task}")
        return task
    folder, names = Path(source).expanduser(), {name: task for task, name in FOLDERS.items()}
    if not folder.is_dir():
        raise BadInput(f"{source}: there is no such folder")
    card, asked = _read_card(folder), names.get(env_id, env_id)
    parts = [*folder.resolve().parts, *folder.absolute().parts]
    found = card["task"] if card else next((names[part] for part in reversed(parts) if part in names), "")
    if asked and found and asked != found:
        raise BadInput(f"{folder}: {'its card' if card else 'its path'} says {found}, not {asked}")
    if not (asked or found):
        raise BadInput(f"{folder}: neither a card nor the path says which task this is; say it (--env-id)")
    find_task(asked or found)
    return asked or found


def split_episodes(env_id: str, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Episodes by the marks [T] of their ends: first row and row after the last [K, 2], terminations, truncations [T].

    An episode ends where it is marked, after `horizon` steps, or with the data; by termination if marked before that.
    """
    horizon, ends, start = find_task(env_id).horizon, [], 0
    for end in [*np.flatnonzero(marks) + 1, len(marks)]:
        ends += range(start + horizon, end, horizon)
        if end > start:
            ends.append(end)
        start = end
    episodes = np.stack([[0, *ends[:-1]], ends], 1)
    last, whole = episodes[:, 1] - 1, episodes[:, 1] - episodes[:, 0] == horizon
    terminations, truncations = np.zeros(len(marks), bool), np.zeros(len(marks), bool)
    terminations[last] = marks[last].astype(bool) & ~whole
    truncations[last] = ~terminations[last]
    return episodes, terminations, truncations


def open_dataset(source: str | Path, fraction=1.0, seed=0, env_id="", data_seed=0) -> Dataset:
    """`load_dataset`, but a data set of this project's that is not there yet is made first."""
    if data_seed and is_folder(source):
        raise BadInput("--data-seed goes with the name of a data set, not with a folder")
    if not is_folder(source) and not data_folder(source, data_seed).is_dir():
        print(f"data      {source} is not there yet: making it", flush=True)
        script = Path(__file__).parent.parent / "datasets" / "collect.py"
        if subprocess.run([sys.executable, str(script), "--dataset", source, "--seed", str(data_seed)]).returncode:
            raise BadInput(f"{source}: could not be made, see above")
    return load_dataset(source, fraction, seed, env_id, data_seed)


def load_dataset(source: str | Path, fraction=1.0, seed=0, env_id="", data_seed=0) -> Dataset:
    """Reads and checks a data set.

    Args:
        source: a name, `<task>-<split>`, of data made here (`datasets/collect.py`); or the path of a folder.
        fraction: the share of its episodes to keep; whole episodes, drawn without replacement.
        seed: decides which.
        env_id: the task of a folder without card whose path does not say it; OMAR's names of the tasks will do.
        data_seed: with a name, the `--seed` that the data were made with.

    Raises `BadInput` for data that are not there or cannot be right: what is wrong, in which row, and what to do.
    """
    if not 0 < fraction <= 1:
        raise BadInput(f"--data-fraction {fraction} must be above 0 and at most 1")
    folder = Path(source).expanduser() if is_folder(source) else data_folder(source, data_seed)
    if not is_folder(source) and not folder.is_dir():
        recipe = f"python datasets/collect.py --dataset {source} --seed {data_seed}"
        raise BadInput(f"{source}: not made yet; make it with: {recipe}")
    env_id, card = find_env_id(folder, env_id), _read_card(folder)
    if not any(folder.glob("*.npy")):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        inside = f", but the folders {', '.join(inside[:5])}: give one of these" if inside else "; get the data again"
        raise BadInput(f"{folder}: no .npy files there{inside}")
    if card and not is_folder(source) and (card["split"], card["seed"]) != (split_name(source)[1], data_seed):
        raise BadInput(f"{folder}: its card says {card['split']}, seed {card['seed']}; move it to where that belongs")
    try:
        files, agents = _open_files(folder, env_id, card)
        marks = check_values(folder, env_id, files, agents)
        episodes, terminations, truncations = split_episodes(env_id, marks)
        ends = terminations | truncations
        kept = ~ends if card and not card["last_next_obs"] else np.ones(len(ends), bool)  # next_obs is there
        check_order(folder, files, ends, terminations & kept)
        check_agents(folder, env_id, files, agents, episodes, kept, sample=card is not None)
        for name in files if card else ():
            if card["files"].get(f"{name}.npy") != sha256(folder / f"{name}.npy"):
                raise BadInput(f"{folder}/{name}.npy: not the file that its card.json describes (sha256 differs)")
    except BadInput as error:
        command = (card or {}).get("command")
        again = f"delete the folder and make the data again with: {command}" if command else "get the data again"
        raise BadInput(f"{error}; {again}") from error
    next_known = kept | terminations

    team = np.mean([files[f"rews_{i}"] for i in range(agents)], axis=0, dtype=np.float64)  # [T]
    returns, rows = np.add.reduceat(team, episodes[:, 0]), None  # [K]
    if fraction < 1:
        count = max(1, round(fraction * len(episodes)))
        keep = np.sort(np.random.default_rng(seed).choice(len(episodes), count, replace=False))
        rows = np.concatenate([np.arange(first, end) for first, end in episodes[keep]])
        ends = np.cumsum(episodes[keep, 1] - episodes[keep, 0])
        episodes, returns = np.stack([np.append(0, ends[:-1]), ends], 1), returns[keep]
        terminations, truncations, next_known = terminations[rows], truncations[rows], next_known[rows]
    join = lambda kind, count=agents: AgentArray([files[f"{kind}_{i}"] for i in range(count)], rows)
    state, next_state = (join("states", 1), join("next_states", 1)) if "states_0" in files else (None, None)
    return Dataset(
        str(source), env_id, folder, join("obs"), join("acs"), join("rews"), join("next_obs"), state, next_state,
        terminations, truncations, next_known, episodes, returns, card,
    )  # fmt: skip


def check_sizes(data: Dataset, env: TeamEnv) -> None:
    """Raises `BadInput` if the agents of `env` do not see and do what the data hold."""
    theirs, ours = (data.obs.widths, data.actions.widths), (env.obs_sizes, env.action_sizes)
    if theirs != ours:
        raise BadInput(
            f"{data.name}: observations {theirs[0]} and actions {theirs[1]}, in {data.env_id} they are {ours[0]} and "
            f"{ours[1]}; --observation says what agents see"
        )


def _read_card(folder: Path) -> dict | None:
    path = folder / "card.json"
    if not path.exists():
        return None
    try:
        card = json.loads(path.read_bytes())
        if card["format"] != FORMAT:
            raise ValueError(f"it is of format {card['format']}")
        return card
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        way_out = "delete it to read the folder as data of unknown origin"
        raise BadInput(f"{path}: not a card of format {FORMAT} ({error}); {way_out}") from error


def _open_files(folder: Path, env_id: str, card: dict | None) -> tuple[dict[str, np.ndarray], int]:
    """The team's files, and the prey's if they are there, memory-mapped: name -> array; and the number of agents."""
    team, prey, agents = layout(env_id)
    there = {path.stem for path in folder.glob("*.npy")}
    wanted = team | (prey if there & set(prey) else {})
    if not any("states" in name for name in there):  # the joint state is all there or not at all
        wanted = {name: shape for name, shape in wanted.items() if "states" not in name}
    for name in [*wanted, *(name.removesuffix(".npy") for name in (card["files"] if card else ()))]:
        if name not in there:
            raise BadInput(f"{folder}: {name}.npy is missing, which {env_id} with its {agents} agents needs")
    files = {name: _open(folder / f"{name}.npy", shape) for name, shape in wanted.items()}
    rows = len(files["obs_0"])
    for name, array in files.items():
        if len(array) != rows:
            raise BadInput(f"{folder / name}.npy has {len(array):,} rows, obs_0.npy has {rows:,}: one is cut short")
    return files, agents


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("an archive of several arrays")
    except Exception as error:  # a damaged header can raise anything
        raise BadInput(f"{path}: cut short, or not a .npy file ({' '.join(str(error).split())[:100]})") from error
    numbers = "fbiu" if path.stem.startswith("dones") else "f"
    if array.dtype.kind not in numbers or array.dtype.kind == "f" and array.dtype.itemsize < 4:
        convert = "convert it with numpy.save(path, array.astype('float32'))"
        raise BadInput(f"{path}: holds {array.dtype}, not float32; {convert}")
    fits = array.ndim == 1 + len(shape) and all(want in (None, n) for want, n in zip(shape, array.shape[1:]))
    if not fits or not array.size:
        wanted = ", ".join("any" if size is None else str(size) for size in ("T", *shape))
        raise BadInput(f"{path}: has shape {list(array.shape)}, not [{wanted}]: another task's or agent's data?")
    return array
