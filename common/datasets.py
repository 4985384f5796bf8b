"""Offline data sets: what they look like on disk, and `load_dataset`, which reads and checks them.

A data set is a folder of .npy files in the layout that OMAR introduced, one of each kind for every agent i:

    obs_<i> [T, O]  acs_<i> [T, A]  rews_<i> [T]  next_obs_<i> [T, O]  dones_<i> [T]
    states_<i> [T, S]  next_states_<i> [T, S]                                            MuJoCo only, the same for every agent

Row t is a transition, and episodes follow each other row by row. `dones` marks terminations, not time limits: in tasks whose episodes
always have the same length (25 in the particle tasks, 1000 in HalfCheetah) it is 0 throughout, and episodes are blocks of that length.
Tag and world also hold the prey, as the last agent. Beside the arrays, data made here have a `card.json`: what they are, who made them,
how they score, and a checksum of every file. Data that others made have none, and load all the same.

Shape letters: T transitions, N agents (of the team), O observation, A action, S joint state, K episodes.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.envs import UnknownTask, find_task, make_env
from common.omar import SCENARIOS

DATA = Path(__file__).parent.parent / "datasets" / "data"  # where data sets made here go
FORMAT = "omar-npy-1"  # of card.json
SPLITS = ("random", "random-medium", "medium-replay", "medium", "medium-expert", "expert")
FOLDERS = {  # task -> its folder in OMAR's data
    "omar_simple_spread": "simple_spread",
    "omar_simple_tag": "simple_tag",
    "omar_simple_world": "simple_world",
    "omar_halfcheetah_2x3": "HalfCheetah-v2",
}
SCORES = {  # task -> returns that normalise to 0 and 100: MADiff's for the particle tasks, OMSD's for HalfCheetah
    "omar_simple_spread": (159.8, 516.8),
    "omar_simple_tag": (-4.1, 185.6),
    "omar_simple_world": (-6.8, 79.5),
    "omar_halfcheetah_2x3": (-284.0, 3568.8),
}
ROWS = 1 << 16  # rows that are looked at together, so that checking needs little memory


class DataError(ValueError):
    """A data set that is not there or cannot be right: what is wrong, in which file and row, and what to do."""


class AgentArray:
    """N memory-mapped arrays [T, ...] as one [T, N, ...]; agents of smaller size are padded with zeros.

    `array[rows]`, with a number, a slice or an array of rows, reads just these from the disk; `numpy.asarray(array)` reads all.
    """

    def __init__(self, parts: list[np.ndarray], rows: np.ndarray | None = None):
        self.parts, self.rows = parts, rows
        self.size = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
        self.shape = (len(parts[0]) if rows is None else len(rows), len(parts), *([self.size] if self.size else []))
        self.ndim, self.dtype = len(self.shape), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        rows = rows if self.rows is None else self.rows[rows]
        parts = [np.asarray(part[rows], np.float32) for part in self.parts]
        if self.size:
            parts = [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, self.size - part.shape[-1])]) for part in parts]
        return np.stack(parts, axis=-2 if self.size else -1)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


@dataclass(frozen=True)
class Dataset:
    """A data set that has passed every check. Arrays are in single precision and read from the disk when indexed."""

    name: str
    env_id: str
    folder: Path
    obs: AgentArray  # [T, N, O]
    actions: AgentArray  # [T, N, A]
    rewards: AgentArray  # [T, N]
    next_obs: AgentArray  # [T, N, O]
    state: AgentArray | None  # [T, 1, S], MuJoCo only
    next_state: AgentArray | None  # [T, 1, S]
    terminations: np.ndarray  # [T] bool: the episode ended, nothing comes after
    truncations: np.ndarray  # [T] bool: the time was up, the value of next_obs counts
    next_known: np.ndarray  # [T] bool: next_obs is real. False at the ends of episodes from formats that do not keep it
    episodes: np.ndarray  # [K, 2]: first row, and the row after the last
    returns: np.ndarray  # [K] team returns: sums over the episode of the mean over the team's agents
    card: dict | None

    def normalized(self, score: float | np.ndarray) -> float | np.ndarray:
        """A return on the scale of this task's published scores: 0 is random, 100 is expert."""
        if self.env_id not in SCORES:
            raise DataError(f"{self.env_id}: no published scores to normalise by")
        low, high = SCORES[self.env_id]
        return 100 * (score - low) / (high - low)


def layout(env_id: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], int]:
    """Shapes of a row in the files of a task, for the team and for the prey, by file name; and the number of agents in the team.

    In Multi-Agent MuJoCo the data decide how large an observation is: None stands for its size. Raises `UnknownTask`.
    """
    env = make_env(env_id)
    open_size = env_id.startswith("mamujoco_")
    sizes = [(None if open_size else obs, action) for obs, action in zip(env.obs_sizes, env.action_sizes)]
    sizes += [(env.env.observation_space(name).shape[0], 2) for name in env.opponents]
    shapes = [
        {f"obs_{i}": (obs,), f"acs_{i}": (action,), f"rews_{i}": (), f"next_obs_{i}": (obs,), f"dones_{i}": ()}
        for i, (obs, action) in enumerate(sizes)
    ]
    if env.own_state:
        for i, files in enumerate(shapes):
            files |= {f"states_{i}": (env.state_size,), f"next_states_{i}": (env.state_size,)}
    env.close()
    merge = lambda several: {name: shape for files in several for name, shape in files.items()}
    return merge(shapes[: env.num_agents]), merge(shapes[env.num_agents :]), env.num_agents


def split_name(name: str) -> tuple[str, str]:
    """`<task>-<split>` -> task, split. Raises `DataError` with the near misses."""
    env_id, _, split = name.partition("-")
    if env_id not in FOLDERS or split not in SPLITS:
        names = [f"{task}-{part}" for task in FOLDERS for part in SPLITS]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or ["omar_simple_spread-medium"]
        raise DataError(f"unknown data set {name!r}; did you mean {' or '.join(near)}? A folder on disk is given by its path")
    return env_id, split


def data_folder(name: str, seed: int = 0, root: Path = DATA) -> Path:
    """Where the data set of that name lies, in OMAR's order of folders. Raises `DataError`."""
    env_id, split = split_name(name)
    return root / FOLDERS[env_id] / split / f"seed_{seed}_data"


def load_dataset(source: str, fraction: float = 1.0, seed: int = 0, env_id: str = "") -> Dataset:
    """Reads and checks a data set.

    Args:
        source: a name, `<task>-<split>`, of data made here (`datasets/collect.py`); or the path of a folder with .npy files.
        fraction: the share of its episodes to keep; whole episodes, drawn without replacement.
        seed: decides which.
        env_id: the task of a folder without card whose path does not say it.

    Raises `DataError`.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"fraction {fraction} must be above 0 and at most 1")
    folder = _find_folder(source)
    card = _read_card(folder)
    env_id = _find_task(folder, card, env_id)
    files, agents = _open_files(folder, env_id, card)
    for name, array in files.items():
        _check_values(folder, name, array)
    episodes, terminations = _find_episodes(folder, env_id, files, agents)
    truncations = np.zeros(len(terminations), bool)
    truncations[episodes[:, 1] - 1] = ~terminations[episodes[:, 1] - 1]
    next_known = ~truncations if card and not card["last_next_obs"] else np.ones(len(truncations), bool)
    _check_order(folder, files, terminations | truncations)
    if env_id.removeprefix("omar_") in SCENARIOS:
        _check_particles(folder, env_id, files, agents, episodes)
    if card:
        _check_sums(folder, card, files)

    team = np.mean([files[f"rews_{i}"] for i in range(agents)], axis=0, dtype=np.float64)  # [T]
    returns, rows = np.add.reduceat(team, episodes[:, 0]), None  # [K]
    if fraction < 1:
        count = max(1, round(fraction * len(episodes)))
        keep = np.sort(np.random.default_rng(seed).choice(len(episodes), count, replace=False))
        rows = np.concatenate([np.arange(first, end) for first, end in episodes[keep]])
        ends = np.cumsum(episodes[keep, 1] - episodes[keep, 0])
        episodes, returns = np.stack([np.append(0, ends[:-1]), ends], 1), returns[keep]
        terminations, truncations, next_known = terminations[rows], truncations[rows], next_known[rows]
    several = lambda kind, count=agents: AgentArray([files[f"{kind}_{i}"] for i in range(count)], rows)
    state, next_state = (several("states", 1), several("next_states", 1)) if "states_0" in files else (None, None)
    return Dataset(
        source, env_id, folder, several("obs"), several("acs"), several("rews"), several("next_obs"), state, next_state,
        terminations, truncations, next_known, episodes, returns, card,
    )  # fmt: skip


class Writer:
    """Writes a data set into `<folder>.tmp`, which gets the name `folder` when it is whole. What an interrupted one left is gone on with.

    Args:
        folder: where the data set goes.
        env_id: its task.
        shapes: its files, and the shape of a row in each (`layout`).
        transitions: T, its rows.
        origin: what decides its contents; if another origin's rows are there, they are thrown away.

    Attributes: `files`, the arrays to write to; `done`, how many parts of the work earlier calls have finished (`save`).
    """

    def __init__(self, folder: Path, env_id: str, shapes: dict[str, tuple[int, ...]], transitions: int, origin: dict):
        self.folder, self.temporary = folder, folder.with_name(f"{folder.name}.tmp")
        self.env_id, self.transitions, self.agents = env_id, transitions, layout(env_id)[2]
        origin = json.loads(json.dumps(origin))
        progress, self.done = self.temporary / "progress.json", 0
        try:
            before = json.loads(progress.read_bytes())
            self.done = before["done"] if before["origin"] == origin else 0
        except (OSError, ValueError, KeyError):
            pass
        if not self.done:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        self.origin = origin
        mode = {"mode": "r+"} if self.done else {"mode": "w+", "dtype": np.float32}
        self.files = {
            name: np.lib.format.open_memmap(
                self.temporary / f"{name}.npy", **mode, **({} if self.done else {"shape": (transitions, *shape)})
            )
            for name, shape in shapes.items()
        }

    def save(self, done: int) -> None:
        """Everything put so far is on the disk, and `done` parts of the work need not be done again."""
        for array in self.files.values():
            array.flush()
        self.done = done
        path = self.temporary / "progress.json"
        path.with_suffix(".tmp").write_text(json.dumps({"origin": self.origin, "done": done}))
        os.replace(path.with_suffix(".tmp"), path)

    def close(self, about: dict) -> dict:
        """Adds the card, which says `about` and what can be counted, and gives the data set its name. Returns the card."""
        dones = np.asarray(self.files["dones_0"]) != 0
        episodes = split_episodes(self.env_id, dones)
        team = np.mean([self.files[f"rews_{i}"] for i in range(self.agents)], axis=0, dtype=np.float64)
        returns = np.add.reduceat(team, episodes[:, 0])
        counts, edges = np.histogram(returns, 60)
        for array in self.files.values():
            array.flush()
        card = {
            "format": FORMAT, "task": self.env_id, "last_next_obs": True, **about,
            "dones": "terminations only; at a time limit they are 0",
            "transitions": self.transitions, "episodes": len(episodes),
            "return": {key: round(float(getattr(returns, key)()), 4) for key in ("mean", "std", "min", "max")},
            "histogram": {"first": float(edges[0]), "last": float(edges[-1]), "counts": counts.tolist()},
            "files": {f"{name}.npy": sha256(self.temporary / f"{name}.npy") for name in self.files},
        }  # fmt: skip
        (self.temporary / "card.json").write_text(json.dumps(card, indent=1))
        (self.temporary / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.temporary, self.folder)
        return card


# --- finding ---


def _find_folder(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or len(folder.parts) > 1:
        raise DataError(f"{source}: there is no such folder")
    folder = data_folder(source)
    if not folder.is_dir():
        raise DataError(f"{source}: not made yet; make it with: python datasets/collect.py --dataset {source}")
    return folder


def _read_card(folder: Path) -> dict | None:
    path = folder / "card.json"
    if not path.exists():
        return None
    try:
        card = json.loads(path.read_bytes())
        kinds = {"format": str, "task": str, "transitions": int, "last_next_obs": bool, "files": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(card.get(key), kind)]
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a card: {error}. Delete it to read the folder as data of unknown origin") from error
    if wrong or card["format"] != FORMAT:
        raise DataError(
            f"{path}: not a card of format {FORMAT} ({', '.join(wrong) or card['format']}). Delete it to read the folder as data of "
            "unknown origin"
        )
    return card


def _find_task(folder: Path, card: dict | None, asked: str) -> str:
    by_path = {name: env_id for env_id, name in FOLDERS.items()}
    found = card["task"] if card else next((by_path[part] for part in reversed(folder.resolve().parts) if part in by_path), "")
    if asked and card and asked != found:
        raise DataError(f"{folder}: its card says {found}, not {asked}")
    if not (asked or found):
        raise DataError(f"{folder}: neither a card nor the path says which task this is; say it with --env-id")
    try:
        find_task(asked or found)
    except UnknownTask as error:
        raise DataError(f"{folder}: {error}") from error
    return asked or found


def _open_files(folder: Path, env_id: str, card: dict | None) -> tuple[dict[str, np.ndarray], int]:
    """The files of the team, and those of the prey if they are there, memory-mapped: name -> array; and the number of agents."""
    team, prey, agents = layout(env_id)
    there = {path.stem for path in folder.glob("*.npy")}
    wanted = team | (prey if there & set(prey) else {})
    if not there:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise DataError(
            f"{folder}: no .npy files there" + (f", but the folders {', '.join(inside[:5])}: give one of these" if inside else "")
        )
    stateless = not any("states" in name for name in there)  # the joint state is all there or not at all
    missing = [name for name in wanted if name not in there and not (stateless and "states" in name)]
    if missing:
        raise DataError(f"{folder}: {missing[0]}.npy is missing, which {env_id} with its {agents} agents needs; {_remedy(card)}")
    known = r"(obs|acs|rews|next_obs|dones|states|next_states)_\d+"
    extra = sorted(name for name in there - set(team | prey) if re.fullmatch(known, name))
    if extra:
        raise DataError(f"{folder}: {extra[0]}.npy does not belong to {env_id}, which has {agents} agents; another task's data?")
    files = {name: _open(folder / f"{name}.npy", shape, card) for name, shape in wanted.items() if name in there}
    for name, array in files.items():
        if len(array) != len(files["obs_0"]):
            raise DataError(
                f"{folder / name}.npy has {len(array):,} rows, obs_0.npy has {len(files['obs_0']):,}: one of them is cut short; {_remedy(card)}"
            )
    if card and card["transitions"] != len(files["obs_0"]):
        raise DataError(f"{folder}: {len(files['obs_0']):,} rows, but its card says {card['transitions']:,}; {_remedy(card)}")
    return files, agents


def _open(path: Path, shape: tuple[int, ...], card: dict | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        if "Python objects" in str(error):
            raise DataError(
                f"{path}: holds Python objects, which are never loaded: they could run code. Save it as float32"
            ) from error
        raise DataError(f"{path}: cut short, or not a .npy file ({' '.join(str(error).split())[:100]}); {_remedy(card)}") from error
    numbers = "fbiu" if path.stem.startswith("dones") else "f"
    if array.dtype.kind not in numbers or array.dtype.kind == "f" and array.dtype.itemsize < 4:
        raise DataError(f"{path}: holds {array.dtype}, not float32; convert it with numpy.save(path, array.astype('float32'))")
    if (
        len(array.shape[1:]) != len(shape)
        or any(size not in (None, n) for size, n in zip(shape, array.shape[1:]))
        or not len(array)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in ("T", *shape))
        raise DataError(
            f"{path}: has shape {list(array.shape)}, not [{wanted}]: another task's or agent's data, or other observations?"
        )
    return array


def _remedy(card: dict | None) -> str:
    if card and card.get("command"):
        return f"make the data again with: {card['command']}"
    return "get the data again from where they came"


# --- checking ---


def split_episodes(env_id: str, dones: np.ndarray) -> np.ndarray:
    """First row, and row after the last, of each episode [K, 2]: it ends where `dones` [T] says so, or when the time is up."""
    horizon, ends, start = find_task(env_id).horizon, [], 0
    for end in [*np.flatnonzero(dones) + 1, len(dones)]:
        ends += range(start + horizon, end, horizon)
        if end > start:
            ends.append(end)
        start = end
    return np.stack([[0, *ends[:-1]], ends], 1)


def _check_values(folder: Path, name: str, array: np.ndarray) -> None:
    """Every number is finite; actions are in [-1, 1]; `dones` are 0 or 1."""
    for start in range(0, len(array), ROWS):
        block = np.asarray(array[start : start + ROWS])
        bad, what = ~np.isfinite(block), "is not finite"
        if not bad.any() and name.startswith("acs_"):
            bad, what = np.abs(block) > 1.001, "is outside [-1, 1]; scale the actions to that range"
        if not bad.any() and name.startswith("dones_"):
            bad, what = (block != 0) & (block != 1), "is neither 0 nor 1"
        if bad.any():
            first = np.argwhere(bad)[0]
            row, place = start + first[0], "" if block.ndim == 1 else f", number {first[1]}"
            raise DataError(f"{folder / name}.npy, row {row:,}{place}: {block[tuple(first)]} {what}")


def _find_episodes(folder: Path, env_id: str, files: dict[str, np.ndarray], agents: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and row after the last of each episode [K, 2], and the terminations [T]."""
    task, dones = find_task(env_id), np.asarray(files["dones_0"]) != 0
    for i in range(1, agents):
        differ = np.flatnonzero((np.asarray(files[f"dones_{i}"]) != 0) != dones)
        if len(differ):
            raise DataError(f"{folder}/dones_{i}.npy, row {differ[0]:,}: not as in dones_0.npy; an episode ends for the whole team")
    if not task.terminates:
        early = np.flatnonzero(dones & (np.arange(len(dones)) % task.horizon != task.horizon - 1))
        if len(early):
            raise DataError(
                f"{folder}/dones_0.npy, row {early[0]:,}: marks an end in the middle of an episode; those of {env_id} all have "
                f"{task.horizon} steps. Rows lost or shuffled?"
            )
        if len(dones) % task.horizon:
            raise DataError(
                f"{folder}: {len(dones):,} rows are no whole number of episodes of {task.horizon} steps: {env_id} has no others. Cut "
                "short, or another task's data?"
            )
        dones = np.zeros(len(dones), bool)  # a mark at the end of such an episode means the time limit
    return split_episodes(env_id, dones), dones


def _check_order(folder: Path, files: dict[str, np.ndarray], last: np.ndarray) -> None:
    """Inside an episode, what comes next in one row is what is there in the next row."""
    for name in files:
        if not name.startswith(("obs_", "states_")):
            continue
        now, then = files[name], files[f"next_{name}"]
        if now.shape != then.shape:
            raise DataError(f"{folder}/next_{name}.npy: has shape {list(then.shape)}, but {name}.npy {list(now.shape)}")
        for start in range(0, len(now) - 1, ROWS):
            end = min(start + ROWS, len(now) - 1)
            wrong = np.abs(np.asarray(then[start:end]) - now[start + 1 : end + 1]).max(1) > 1e-3
            rows = start + np.flatnonzero(wrong & ~last[start:end])
            if len(rows):
                raise DataError(
                    f"{folder}/next_{name}.npy, row {rows[0]:,}: not what {name}.npy has in row {rows[0] + 1:,} of the same episode. "
                    "Shuffled, shifted, or files of two agents exchanged?"
                )


def _check_particles(folder: Path, env_id: str, files: dict[str, np.ndarray], agents: int, episodes: np.ndarray) -> None:
    """Episodes start at rest, agents see each other where they are, and move as they act: finds exchanged and shifted files."""
    for i in range(agents):
        moving = np.flatnonzero(np.abs(files[f"obs_{i}"][episodes[:, 0], :2]).max(1) > 1e-6)
        if len(moving):
            raise DataError(
                f"{folder}/obs_{i}.npy, row {episodes[moving[0], 0]:,}: an episode starts in motion. Blocks of {episodes[0, 1]} rows are "
                "episodes; rows lost or shifted?"
            )
    sample = episodes[np.linspace(0, len(episodes) - 1, min(200, len(episodes))).astype(int)]
    rows = np.concatenate([np.arange(first, end) for first, end in sample])
    obs, after, actions = (np.stack([files[f"{kind}_{i}"][rows] for i in range(agents)]) for kind in ("obs", "next_obs", "acs"))
    place = 4 + 2 * len(SCENARIOS[env_id.removeprefix("omar_")]().make_world().landmarks)  # where the others' positions begin
    pushed = after[..., :2] - 0.75 * obs[..., :2]  # [N, rows, 2] change of velocity by force: the agent's own action, and contacts
    for i in range(agents):
        for k, j in enumerate(j for j in range(agents) if j != i):
            gap = obs[i, :, 2:4] + obs[i, :, place + 2 * k : place + 2 * k + 2] - obs[j, :, 2:4]
            wrong = np.flatnonzero(np.abs(gap).max(1) > 1e-3)
            if len(wrong):
                raise DataError(
                    f"{folder}/obs_{i}.npy, row {rows[wrong[0]]:,}: sees agent {j} where obs_{j}.npy says it is not. Files of two agents "
                    "exchanged?"
                )
        alike = [np.corrcoef(pushed[i].ravel(), action.ravel())[0, 1] if action.std() > 0 else 0.0 for action in actions]
        best = int(np.argmax(alike))
        if pushed[i].std() > 0 and alike[best] > alike[i] + 0.3:
            raise DataError(f"{folder}/acs_{i}.npy: agent {i} moves as acs_{best}.npy says. Files of two agents exchanged?")


def _check_sums(folder: Path, card: dict, files: dict[str, np.ndarray]) -> None:
    for name in files:
        if card["files"].get(f"{name}.npy") != sha256(folder / f"{name}.npy"):
            raise DataError(f"{folder}/{name}.npy: not the file that its card.json describes (sha256 differs); {_remedy(card)}")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
