"""Offline data sets: what they look like on disk, and `load_dataset`, which reads and checks them.

A data set is a folder of .npy files in the layout that OMAR introduced, one of each kind for every agent i:

    obs_<i> [T, O]  acs_<i> [T, A]  rews_<i> [T]  next_obs_<i> [T, O]  dones_<i> [T]
    states_<i> [T, S]  next_states_<i> [T, S]                                            MuJoCo only, the same for every agent

Row t is a transition, and episodes follow each other row by row. In the particle tasks `dones` is 0 throughout, and episodes are
blocks of 25 rows. In MuJoCo it is 1 in the last row of an episode: after `horizon` steps (1000) that is the time limit, before that
a fall. Tag and world also hold the prey, as the last agent. Beside the arrays, data made here have a `card.json`: what they are, who
made them, how they score, and a checksum of every file. Data that others made have none, and load all the same.

Shape letters: T transitions, N agents (of the team), O observation, A action, S joint state, K episodes.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.envs import UnknownTask, find_task, make_env
from common.omar import SCENARIOS, LegacyWorld, distance

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
    """N memory-mapped arrays [T, ...] as one [T, N, ...], in single precision; agents of smaller size are padded with zeros.

    `array[rows]`, with a number, a slice or an array of rows, reads just these from the disk; `array[rows, i]` reads them of agent i
    only, without padding. `numpy.asarray(array)` reads all.
    """

    def __init__(self, parts: list[np.ndarray], rows: np.ndarray | None = None):
        self.parts, self.rows = parts, rows
        self.widths = [part.shape[1] for part in parts if part.ndim > 1]  # of each agent
        length = len(parts[0]) if rows is None else len(rows)
        self.shape = (length, len(parts), max(self.widths)) if self.widths else (length, len(parts))
        self.ndim, self.dtype = len(self.shape), np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        rows, *agent = key if isinstance(key, tuple) else (key,)
        if rows is None or rows is Ellipsis or isinstance(rows, (bool, tuple)) or len(agent) > 1 or not all(map(_is_number, agent)):
            raise IndexError("an AgentArray is indexed by rows, or by rows and the number of an agent")
        rows = rows if self.rows is None else self.rows[rows]
        if agent:
            return np.array(self.parts[agent[0]][rows], np.float32)
        parts = [np.asarray(part[rows], np.float32) for part in self.parts]
        if self.widths:
            parts = [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, self.shape[-1] - part.shape[-1])]) for part in parts]
        return np.stack(parts, axis=-2 if self.widths else -1)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __reduce__(self):  # a worker process gets the names of the files, not their contents
        return _reopen, ([str(part.filename) if isinstance(part, np.memmap) else part for part in self.parts], self.rows)


def _reopen(parts: list[np.ndarray | str], rows: np.ndarray | None) -> AgentArray:
    return AgentArray([np.load(part, mmap_mode="r", allow_pickle=False) if isinstance(part, str) else part for part in parts], rows)


def _is_number(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


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
    next_known: np.ndarray  # [T] bool: next_obs is real, or not needed after a fall. Some formats do not keep it at the time limit
    episodes: np.ndarray  # [K, 2]: first row, and the row after the last
    returns: np.ndarray  # [K] team returns: sums over the episode of the mean over the team's agents
    scores: tuple[float, float] | None  # returns that normalise to 0 and 100, if there are published ones
    card: dict | None

    def normalized(self, score: float | np.ndarray) -> float | np.ndarray:
        """A return on the scale of this task's published scores: 0 is random, 100 is expert."""
        if self.scores is None:
            raise DataError(f"{self.env_id}: no published scores to normalise by")
        return normalize(score, self.scores)


def normalize(score: float | np.ndarray, scores: tuple[float, float]) -> float | np.ndarray:
    """A return on the scale where the two `scores` are 0 and 100."""
    low, high = scores
    return 100 * (score - low) / (high - low)


def layout(env_id: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], int]:
    """Shapes of a row in the files of a task, for the team and for the prey, by file name; and the number of agents in the team.

    In Multi-Agent MuJoCo the data decide how large observations and states are: None stands for such a size. Raises `UnknownTask`.
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
        state = (None if open_size else env.state_size,)
        for i, files in enumerate(shapes):
            files |= {f"states_{i}": state, f"next_states_{i}": state}
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


def data_folder(name: str, seed: int = 0, root: str | Path | None = None) -> Path:
    """Where the data set of that name lies, in OMAR's order of folders; `root` is `DATA` if not given. Raises `DataError`."""
    env_id, split = split_name(name)
    return Path(root or DATA) / FOLDERS[env_id] / split / f"seed_{seed}_data"


def split_episodes(env_id: str, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Episodes from the marks [T] of their ends: first row and row after the last [K, 2], terminations [T], truncations [T].

    An episode ends where it is marked, after `horizon` steps, or with the data. Only a mark before `horizon` steps is a termination.
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


def load_dataset(
    source: str | Path, fraction: float = 1.0, seed: int = 0, env_id: str = "", data_seed: int = 0,
    root: str | Path | None = None,
) -> Dataset:  # fmt: skip
    """Reads and checks a data set.

    Args:
        source: a name, `<task>-<split>`, of data made here (`datasets/collect.py`); or the path of a folder with .npy files.
        fraction: the share of its episodes to keep; whole episodes, drawn without replacement.
        seed: decides which.
        env_id: the task of a folder without card whose path does not say it; OMAR's names of the tasks will do.
        data_seed, root: with a name, the `--seed` and `--out` that the data were made with.

    Every file is read once, for its numbers and, if there is a card, its checksum. Raises `DataError`.
    """
    if not 0 < fraction <= 1 or seed < 0:
        raise DataError(f"fraction {fraction} must be above 0 and at most 1, seed {seed} at least 0")
    folder, named = _find_folder(str(source), data_seed, root)
    card = _read_card(folder)
    env_id = _find_task(folder, card, env_id)
    if named and card and (card["task"], card.get("split"), card.get("seed")) != (*split_name(str(source)), data_seed):
        raise DataError(
            f"{folder}: its card says {card['task']}-{card.get('split')}, seed {card.get('seed')}, which is not what its path says; move "
            f"it, then: {_recipe(str(source), data_seed, root)}"
        )
    try:
        files, agents = _open_files(folder, env_id, card)
        marks = _check_values(folder, env_id, files, agents)
        episodes, terminations, truncations = split_episodes(env_id, marks)
        ends = terminations | truncations
        kept = ~ends if card and not card["last_next_obs"] else np.ones(len(ends), bool)  # next_obs is there
        _check_order(folder, files, ends, terminations & kept)
        _check_agents(folder, env_id, files, agents, episodes, kept, sample=card is not None)
        if card:
            _check_card(folder, card, files)
    except DataError as error:
        remedy = "mend the file, or get the data again"
        if card and card.get("command"):
            elsewhere = f" --out {folder.parents[2]}" if len(folder.parts) > 3 and DATA not in folder.parents else ""
            remedy = f"delete the folder and make the data again with: {card['command']}{elsewhere}"
        raise DataError(f"{error}; {remedy}") from error
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
    several = lambda kind, count=agents: AgentArray([files[f"{kind}_{i}"] for i in range(count)], rows)
    state, next_state = (several("states", 1), several("next_states", 1)) if "states_0" in files else (None, None)
    return Dataset(
        str(source), env_id, folder, several("obs"), several("acs"), several("rews"), several("next_obs"), state, next_state,
        terminations, truncations, next_known, episodes, returns, SCORES.get(env_id), card,
    )  # fmt: skip


class Writer:
    """Writes a data set into a hidden folder, which gets the name `folder` when it is whole. An interrupted one is gone on with.

    Args:
        folder: where the data set goes.
        env_id: its task.
        shapes: its files, and the shape of a row in each (`layout`).
        transitions: T, its rows.
        origin: what decides its contents; if another origin's rows are there, they are thrown away.
        workplace: the hidden folder, on the same disk; beside `folder` if not given.

    Attributes: `files`, the arrays to write to; `done`, how many parts of the work earlier calls have finished (`save`); `scratch`, a
    folder that is deleted in the end.

    Raises `DataError` if another process is making the same data set, `OSError` if the disk is too small for it.
    """

    def __init__(
        self, folder: Path, env_id: str, shapes: dict[str, tuple[int, ...]], transitions: int, origin: dict, workplace: Path | None = None
    ):  # fmt: skip
        self.folder, self.temporary = folder, workplace or folder.with_name(f".{folder.name}.unfinished")
        self.env_id, self.transitions, self.agents = env_id, transitions, layout(env_id)[2]
        self.origin, self.scratch = json.loads(json.dumps(origin)), self.temporary / "scratch"
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            before = json.loads((self.temporary / "progress.json").read_bytes())
            self.done = before["done"] if before["origin"] == self.origin else 0
            if not self.done:
                print(f"thrown away: an unfinished data set of other arguments, packages or code in {self.temporary}")
        except (OSError, ValueError, KeyError, TypeError):
            self.done = 0
        try:
            if not self.done:
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()
                self._check_space(shapes)
            self.files = {name: self._open(self.temporary / f"{name}.npy", shape) for name, shape in shapes.items()}
        except BaseException:
            self._unlock() if self.done else self.discard()
            raise

    def _lock(self) -> None:
        self.lock = open(self.temporary.with_name(f"{self.temporary.name}.lock"), "w")
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.folder}: another process is making this data set") from error

    def _check_space(self, shapes: dict[str, tuple[int, ...]]) -> None:
        needed = 4 * self.transitions * sum(math.prod(shape) for shape in shapes.values())
        free = shutil.disk_usage(self.temporary).free
        if needed > free:
            raise OSError(f"{self.folder}: {needed / 1e9:,.1f} GB are needed, the disk has {free / 1e9:,.1f} GB left")

    def _open(self, path: Path, shape: tuple[int, ...]) -> np.memmap:
        if self.done:
            return np.lib.format.open_memmap(path, mode="r+")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(self.transitions, *shape))
        if hasattr(os, "posix_fallocate"):  # a disk that others fill says so now, and does not end the process later
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def discard(self) -> None:
        """Throws everything away."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        Path(self.lock.name).unlink(missing_ok=True)
        self.lock.close()

    def flush(self) -> None:
        for array in self.files.values():
            array.flush()

    def save(self, done: int) -> None:
        """Everything put so far is on the disk, and `done` parts of the work need not be done again."""
        self.flush()
        self.done = done
        path = self.temporary / "progress.json"
        with open(path.with_suffix(".tmp"), "w") as file:
            file.write(json.dumps({"origin": self.origin, "done": done}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)

    def close(self, about: dict) -> dict:
        """Adds the card, which says `about` and what can be counted, and gives the data set its name. Returns the card."""
        self.flush()
        episodes = split_episodes(self.env_id, np.asarray(self.files["dones_0"]))[0]
        team = np.mean([self.files[f"rews_{i}"] for i in range(self.agents)], axis=0, dtype=np.float64)
        returns = np.add.reduceat(team, episodes[:, 0])
        counts, edges = np.histogram(returns, 60)
        marked = "0 throughout; episodes are blocks of 25 rows and end by the time limit"
        if self.env_id.removeprefix("omar_") not in SCENARIOS:
            marked = "1 in the last row of an episode: the time limit if it is as long as an episode can be, else a fall"
        card = {
            "format": FORMAT, "task": self.env_id, "last_next_obs": True, **about, "dones": marked,
            "transitions": self.transitions, "episodes": len(episodes),
            "return": {key: round(float(getattr(returns, key)()), 4) for key in ("mean", "std", "min", "max")},
            "histogram": {"first": float(edges[0]), "last": float(edges[-1]), "counts": counts.tolist()},
            **versions(), "files": {f"{name}.npy": sha256(self.temporary / f"{name}.npy") for name in self.files},
        }  # fmt: skip
        path = self.temporary / "card.json"
        path.with_suffix(".tmp").write_text(json.dumps(card, indent=1))
        os.replace(path.with_suffix(".tmp"), path)
        # Only what has its name may lose what an interrupted call would go on from.
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.temporary, self.folder)
        (self.folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / self.scratch.name, ignore_errors=True)
        self._unlock()
        return card


def versions(*more: str) -> dict:
    """Of what makes data: this project, whose tasks `omar_...` are, Python, and the packages; and of `more` packages."""
    revision = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "pettingzoo", "mpe2", *more)
    return {
        "git_revision": revision,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- finding ---


def _find_folder(source: str, data_seed: int, root: str | Path | None) -> tuple[Path, bool]:
    """The folder, and whether it was found by the name of a data set."""
    folder, named = Path(source).expanduser(), False
    if not source or not folder.is_dir():
        if source and folder.exists() or len(folder.parts) > 1:
            raise DataError(f"{source}: there is no such folder")
        folder, named = data_folder(source, data_seed, root), True
        if not folder.is_dir():
            raise DataError(f"{source}: not made yet; make it with: {_recipe(source, data_seed, root)}")
    if (folder / "progress.json").exists() and not (folder / "card.json").exists():
        raise DataError(f"{folder}: not finished; the command that began it goes on with it")
    if not any(folder.glob("*.npy")):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        raise DataError(
            f"{folder}: no .npy files there"
            + (f", but the folders {', '.join(inside[:5])}: give one of these" if inside else "; get the data again")
        )
    return folder, named


def _recipe(name: str, data_seed: int, root: str | Path | None) -> str:
    return f"python datasets/collect.py --dataset {name}" + f" --seed {data_seed}" * bool(data_seed) + f" --out {root}" * bool(root)


def find_env_id(source: str | Path, env_id: str = "") -> str:
    """The task of a data set: of its name, or by its card, its path or `env_id`. Raises `DataError` if none of them says it."""
    folder = Path(source).expanduser()
    return _find_task(folder, _read_card(folder), env_id) if folder.is_dir() else split_name(str(source))[0]


def _read_card(folder: Path) -> dict | None:
    path = folder / "card.json"
    if not path.exists():
        return None
    way_out = "delete it to read the folder as data of unknown origin"
    try:
        card = json.loads(path.read_bytes())
        kinds = {"format": str, "task": str, "transitions": int, "last_next_obs": bool, "files": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(card.get(key), kind)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a card: {error}; {way_out}") from error
    if wrong or card["format"] != FORMAT:
        raise DataError(f"{path}: not a card of format {FORMAT} ({', '.join(wrong) or card['format']}); {way_out}")
    return card


def _find_task(folder: Path, card: dict | None, asked: str) -> str:
    names = {name: env_id for env_id, name in FOLDERS.items()}
    parts = [*folder.resolve().parts, *folder.absolute().parts]
    by_path = next((names[part] for part in reversed(parts) if part in names), "")
    asked = names.get(asked, asked)
    found = card["task"] if card else by_path
    if asked and found and asked != found:
        raise DataError(f"{folder}: {'its card' if card else 'its path'} says {found}, not {asked}")
    if not (asked or found):
        raise DataError(f"{folder}: neither a card nor the path says which task this is; say it (env_id, --env-id)")
    try:
        find_task(asked or found)
    except UnknownTask as error:
        raise DataError(f"{folder}: {error}") from error
    return asked or found


def _open_files(folder: Path, env_id: str, card: dict | None) -> tuple[dict[str, np.ndarray], int]:
    """The files of the team, and those of the prey if they are there, memory-mapped: name -> array; and the number of agents."""
    team, prey, agents = layout(env_id)
    there = {path.stem for path in folder.glob("*.npy")}
    stateless = not any("states" in name for name in there)  # the joint state is all there or not at all
    wanted = team | (prey if there & set(prey) else {})
    wanted = {name: shape for name, shape in wanted.items() if not (stateless and "states" in name)}
    listed = [name.removesuffix(".npy") for name in card["files"]] if card else []
    missing = [name for name in [*wanted, *listed] if name not in there]
    if missing:
        everybody = f"{agents} agents" + " and its prey" * (missing[0] in prey)
        raise DataError(f"{folder}: {missing[0]}.npy is missing, which {env_id} with its {everybody} needs")
    known = r"(obs|acs|rews|next_obs|dones|states|next_states)_\d+"
    extra = sorted(name for name in there - set(team | prey) if re.fullmatch(known, name))
    if extra:
        raise DataError(f"{folder}: {extra[0]}.npy does not belong to {env_id}, which has {agents} agents; another task's data?")
    files = {name: _open(folder / f"{name}.npy", shape) for name, shape in wanted.items()}
    rows = len(files["obs_0"])
    for name, array in files.items():
        if len(array) != rows:
            raise DataError(f"{folder / name}.npy has {len(array):,} rows, obs_0.npy has {rows:,}: one of them is cut short")
    if card and card["transitions"] != rows:
        raise DataError(f"{folder}: {rows:,} rows, but its card says {card['transitions']:,}")
    return files, agents


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("an archive of several arrays")
    except Exception as error:  # a damaged header can raise anything
        if "Python objects" in str(error):
            raise DataError(
                f"{path}: holds Python objects, which are never loaded: they could run code. Save it as float32"
            ) from error
        raise DataError(f"{path}: cut short, or not a .npy file ({' '.join(str(error).split())[:100]})") from error
    numbers = "fbiu" if path.stem.startswith("dones") else "f"
    if array.dtype.kind not in numbers or array.dtype.kind == "f" and array.dtype.itemsize < 4:
        raise DataError(f"{path}: holds {array.dtype}, not float32; convert it with numpy.save(path, array.astype('float32'))")
    if array.ndim != 1 + len(shape) or any(size not in (None, n) for size, n in zip(shape, array.shape[1:])) or not array.size:
        wanted = ", ".join("any" if size is None else str(size) for size in ("T", *shape))
        wide = shape == () and array.ndim == 2 and array.shape[1] == 1
        hint = "save array[:, 0]" if wide else "another task's or agent's data, or other observations?"
        raise DataError(f"{path}: has shape {list(array.shape)}, not [{wanted}]: {hint}")
    return array


# --- checking ---


def _check_values(folder: Path, env_id: str, files: dict[str, np.ndarray], agents: int) -> np.ndarray:
    """Every number is finite, actions are in [-1, 1], `dones` fit the task. Returns the marks of ends [T]."""
    for name, array in files.items():
        for start in range(0, len(array), ROWS):
            with np.errstate(over="ignore"):  # too large for single precision: infinite
                block = np.asarray(array[start : start + ROWS], np.float32)
            bad, what = ~np.isfinite(block), "is not finite"
            if not bad.any() and name.startswith("acs_"):
                bad, what = np.abs(block) > 1.001, "is outside [-1, 1]; clip the actions, or scale them, to that range"
            if not bad.any() and name.startswith("dones_"):
                bad, what = (block != 0) & (block != 1), "is neither 0 nor 1"
            if not bad.any() and name.startswith(("obs_", "states_")) and block.shape[1] > 2:
                bad, what = ~block.any(1), "and the rest of the row are 0: rows that were never filled?"
                bad = bad[:, None] & (np.arange(block.shape[1]) == 0)
            if bad.any():
                first = np.argwhere(bad)[0]
                row, place = start + first[0], "" if block.ndim == 1 else f", number {first[1]}"
                raise DataError(
                    f"{folder / name}.npy, row {row:,}{place}: {array[row] if block.ndim == 1 else array[row][first[1]]} {what}"
                )
    task, marks = find_task(env_id), np.asarray(files["dones_0"]) != 0
    for i in range(1, agents):
        differ = np.flatnonzero((np.asarray(files[f"dones_{i}"]) != 0) != marks)
        if len(differ):
            raise DataError(f"{folder}/dones_{i}.npy, row {differ[0]:,}: not as in dones_0.npy; an episode ends for the whole team")
    if not task.terminates:
        early = np.flatnonzero(marks & (np.arange(len(marks)) % task.horizon != task.horizon - 1))
        if len(early):
            raise DataError(
                f"{folder}/dones_0.npy, row {early[0]:,}: marks an end in the middle of an episode; those of {env_id} all have "
                f"{task.horizon} steps. Rows lost or shuffled?"
            )
        if len(marks) % task.horizon:
            raise DataError(
                f"{folder}: {len(marks):,} rows are no whole number of episodes of {task.horizon} steps: {env_id} has no others. Cut "
                "short, or another task's data?"
            )
    return marks


def _check_order(folder: Path, files: dict[str, np.ndarray], ends: np.ndarray, falls: np.ndarray) -> None:
    """Inside an episode, what comes next in one row is what is there in the next row; after a fall it is not."""
    for name in files:
        if not name.startswith(("obs_", "states_")):
            continue
        now, then = files[name], files[f"next_{name}"]
        if now.shape != then.shape:
            raise DataError(f"{folder}/next_{name}.npy: has shape {list(then.shape)}, but {name}.npy {list(now.shape)}")
        for start in range(0, len(now) - 1, ROWS):
            end = min(start + ROWS, len(now) - 1)
            differ = np.abs(np.asarray(then[start:end]) - now[start + 1 : end + 1]).max(1)
            broken = start + np.flatnonzero((differ > 1e-3) & ~ends[start:end])
            if len(broken):
                raise DataError(
                    f"{folder}/next_{name}.npy, row {broken[0]:,}: not what {name}.npy has in row {broken[0] + 1:,} of the same episode. "
                    "Shuffled, shifted, or files of two agents exchanged?"
                )
            unbroken = start + np.flatnonzero((differ == 0) & falls[start:end])
            if len(unbroken):
                raise DataError(
                    f"{folder}/dones_0.npy, row {unbroken[0]:,}: marks a fall, but the episode goes on in the next row. Marks shifted?"
                )


def _check_agents(
    folder: Path, env_id: str, files: dict, agents: int, episodes: np.ndarray, kept: np.ndarray, sample: bool
) -> None:
    """Files belong to their agents: in the particle tasks by physics and rewards, in HalfCheetah by the joint state.

    With `sample`, only 200 episodes of the particle tasks are looked at: there are checksums.
    """
    if env_id.removeprefix("omar_") in SCENARIOS:
        for i in range(agents):
            moving = np.flatnonzero(np.abs(files[f"obs_{i}"][episodes[:, 0], :2]).max(1) > 1e-6)
            if len(moving):
                raise DataError(
                    f"{folder}/obs_{i}.npy, row {episodes[moving[0], 0]:,}: an episode starts in motion. Blocks of {episodes[0, 1]} rows "
                    "are episodes; rows lost or shifted?"
                )
        some = np.linspace(0, len(episodes) - 1, min(200, len(episodes))).astype(int) if sample else np.arange(len(episodes))
        for part in np.array_split(episodes[some], -(-len(some) // 1000)):
            rows = np.concatenate([np.arange(first, end) for first, end in part])
            _check_particles(folder, env_id, files, agents, rows[kept[rows]])
        return
    for i in range(1, agents) if env_id.startswith(("mamujoco_", "omar_halfcheetah")) else ():  # one reward, one state for all
        for name in [f"rews_{i}"] + [f"states_{i}", f"next_states_{i}"] * ("states_0" in files):
            for start in range(0, len(files[name]), ROWS):
                differ = files[name][start : start + ROWS] != files[f"{name[: -len(str(i))]}0"][start : start + ROWS]
                if differ.any():
                    row = start + np.argwhere(differ)[0][0]
                    raise DataError(f"{folder}/{name}.npy, row {row:,}: not as for agent 0, but {env_id} has one for all agents")
    if env_id == "omar_halfcheetah_2x3" and "states_0" in files:
        for start in range(0, len(files["states_0"]), ROWS):
            _check_cheetah(folder, {name: np.asarray(array[start : start + ROWS]) for name, array in files.items()}, start)


def _check_cheetah(folder: Path, files: dict[str, np.ndarray], start: int) -> None:
    """Joints that an agent sees are not the other's, and the reward is the speed minus a tenth of all squared actions.

    Whose actions are whose cannot be told from that, nor from any sum over both.
    """
    state, after = files["states_0"], files["next_states_0"]
    joints = [np.stack([state[:, k] for j in own for k in (2 + j, 11 + j)], 1) for own in ((2, 1, 0), (5, 4, 3))]
    for i in range(2):  # position and velocity of foot, shin and thigh
        own, other = (np.abs(files[f"obs_{i}"] - joints[j]).max(1) < 1e-3 for j in (i, 1 - i))
        if (other & ~own).mean() > 0.01:
            row = start + np.flatnonzero(other & ~own)[0]
            raise DataError(f"{folder}/obs_{i}.npy, row {row:,}: has the joints of agent {1 - i}. Files of two agents exchanged?")
    speed = files["rews_0"] + 0.1 * sum((files[f"acs_{i}"] ** 2).sum(1) for i in range(2))  # mean over the step
    off = np.abs(speed - (state[:, 8] + after[:, 8]) / 2) > 1.5
    if off.mean() > 0.01:
        raise DataError(
            f"{folder}/rews_0.npy, row {start + np.flatnonzero(off)[0]:,}: not the speed in states_0.npy minus a tenth of the squared "
            "actions. Another task's?"
        )


def _check_particles(folder: Path, env_id: str, files: dict, agents: int, rows: np.ndarray) -> None:
    """In these rows all agents see the same places, and everybody moves and earns as the task says.

    One in a hundred rewards, and speeds of agents that touch nothing, may be off, by a few contacts at most: where agents just about
    touch, single precision decides.
    """
    everybody = range(sum(name.startswith("acs_") for name in files))
    read = lambda kind: [np.asarray(files[f"{kind}_{i}"][rows], np.float32).T for i in everybody]
    obs, after, actions, rewards = read("obs"), read("next_obs"), read("acs"), read("rews")
    rules = SCENARIOS[env_id.removeprefix("omar_")]()
    world = rules.make_world()
    mismatch = getattr(rules, "mismatch", lambda seen, expected: np.abs(seen - expected))

    def check_sight(kind: str, seen: list[np.ndarray]) -> None:  # of positions and, by predators, the prey's velocity
        place(world, seen)
        for i in everybody:
            off = mismatch(seen[i], rules.observation(world.agents[i], world))  # [O, rows]
            wrong = ~(off < 1e-3)
            wrong = wrong[: 2 * (1 + len(world.landmarks + world.agents) + (agents < len(world.agents) and i < agents))]
            if wrong.any():
                number, column = np.argwhere(wrong)[0]
                others = [f"agent {j}" for j in range(len(world.agents)) if j != i]
                names = [f"landmark {k}" for k in range(len(world.landmarks))] + others + ["the prey's velocity"]
                raise DataError(
                    f"{folder}/{kind}_{i}.npy, row {rows[column]:,}: sees {names[number // 2 - 2]} where the other agents' files do not. "
                    "Files of two agents exchanged?"
                )

    check_sight("obs", obs)
    solid = [[other for other in world.entities if other.collide and other is not agent] for agent in world.agents]
    apart = lambda agent, other: distance(agent, other) > agent.size + other.size + 0.02
    free = [np.all([apart(world.agents[i], other) for other in solid[i]], axis=0) for i in everybody]
    for i in everybody:
        agent = world.agents[i]
        off = ~(np.abs(after[i][2:4] - obs[i][2:4] - world.dt * after[i][:2]).max(0) < 2e-3)
        if off.any():
            raise DataError(
                f"{folder}/next_obs_{i}.npy, row {rows[np.flatnonzero(off)[0]]:,}: the agent is not where its velocity took it. At the "
                "end of an episode this is the last observation, not the first of the next"
            )
        miss = [np.abs(after[i][:2] - glide(world, agent, action))[:, free[i]].max(0) > 2e-3 for action in actions]
        if free[i].any() and miss[i].mean() > 0.01:
            best = min(everybody, key=lambda j: miss[j].mean())
            reason = (
                f"as acs_{best}.npy says. Files of two agents exchanged?" if miss[best].mean() <= 0.01 else "otherwise. Shifted?"
            )
            row = rows[free[i]][np.flatnonzero(miss[i])[0]]
            raise DataError(f"{folder}/acs_{i}.npy, row {row:,}: agent {i} does not move as this file says but {reason}")
    check_sight("next_obs", after)
    for i in range(agents):
        off = np.abs(rules.reward(world.agents[i], world) - rewards[i])
        wrong = off > 0.02 * np.maximum(1, np.abs(rewards[i]))
        if wrong.mean() > 0.01 or off.max() > 31:  # three contacts of 10
            row = rows[np.argmax(off > 31 if off.max() > 31 else wrong)]
            raise DataError(
                f"{folder}/rews_{i}.npy, row {row:,}: not the reward of {env_id} in this place. Another task's, or shifted?"
            )


def place(world: LegacyWorld, obs: list[np.ndarray]) -> None:
    """Puts agents and landmarks where the agents' observations [O, rows] say; a prey without observations, where agent 0 sees it."""
    count, everybody = len(world.landmarks), len(world.agents)
    for k, landmark in enumerate(world.landmarks):
        landmark.state.p_pos = obs[0][2:4] + obs[0][4 + 2 * k : 6 + 2 * k]
    for i, agent in enumerate(world.agents):
        at = 2 + 2 * (count + i)  # agent 0 sees agent i there
        agent.state.p_pos = obs[i][2:4] if i < len(obs) else obs[0][2:4] + obs[0][at : at + 2]
        agent.state.p_vel = obs[i][:2] if i < len(obs) else obs[0][2 + 2 * (count + everybody) :][:2]
        agent.state.c = np.zeros_like(obs[0][:2])


def glide(world: LegacyWorld, agent, action: np.ndarray) -> np.ndarray:
    """The agent's velocity after a step with this action [2, rows], if it touches nothing."""
    world.set_action(agent, action)
    return world.next_velocity(agent, world.action_force(agent))


def _check_card(folder: Path, card: dict, files: dict[str, np.ndarray]) -> None:
    for name in files:
        if card["files"].get(f"{name}.npy") != sha256(folder / f"{name}.npy"):
            raise DataError(f"{folder}/{name}.npy: not the file that its card.json describes (sha256 differs)")
