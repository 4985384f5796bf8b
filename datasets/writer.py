"""Writes a data set in the layout of `common/datasets.py`, so that an interrupted command can go on."""

import json
import os
import shutil
from pathlib import Path

import filelock
import numpy as np

from common.datasets import FORMAT, layout, split_episodes
from common.envs import BadInput, find_task, sha256, versions


class Writer:
    """Writes into a hidden folder, which gets the name `folder` when it is whole. An interrupted one is gone on with.

    Args:
        folder: where the data set goes.
        env_id: its task.
        shapes: its files, and the shape of a row in each (`layout`).
        transitions: T, its rows.
        origin: what decides its contents; if another origin's rows are there, they are thrown away.

    Attributes: `files`, the arrays to write to; `done`, how many parts of the work are finished (`save`); `scratch`, a
    folder that is deleted in the end.

    Raises `BadInput` if another process is making the same data set, `OSError` if the disk is too small for it.
    """

    def __init__(self, folder: Path, env_id: str, shapes: dict[str, tuple[int, ...]], transitions: int, origin: dict):
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}.unfinished")
        self.env_id, self.transitions, self.agents = env_id, transitions, layout(env_id)[2]
        self.origin, self.scratch = json.loads(json.dumps(origin)), self.temporary / "scratch"
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.temporary.with_suffix(".lock"))
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise BadInput(f"{folder}: another process is making this data set") from error
        if folder.exists():  # looked at only now, when no other process can be about to make it
            self._unlock()
            raise BadInput(f"{folder}: is there already; delete it first, or give the name of a new folder")
        progress, self.done = self.temporary / "progress.json", 0
        if progress.exists():
            before = json.loads(progress.read_bytes())
            self.done = before["done"] if before["origin"] == self.origin else 0
            if not self.done:
                print(f"thrown away: an unfinished data set of other arguments, packages or code in {self.temporary}")
        try:
            if not self.done:
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()
            self.files = {name: self._open(self.temporary / f"{name}.npy", shape) for name, shape in shapes.items()}
        except BaseException:
            self._unlock() if self.done else self.discard()
            raise

    def _open(self, path: Path, shape: tuple[int, ...]) -> np.memmap:
        if self.done:
            return np.lib.format.open_memmap(path, mode="r+")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(self.transitions, *shape))
        if hasattr(os, "posix_fallocate"):  # a disk that is too small says so now, and does not end the process later
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def discard(self) -> None:
        """Throws everything away."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def flush(self) -> None:
        for array in self.files.values():
            array.flush()

    def save(self, done: int) -> None:
        """Everything put so far is on the disk, and `done` parts of the work need not be done again."""
        self.flush()
        self.done = done
        _write(self.temporary / "progress.json", {"origin": self.origin, "done": done})

    def close(self, about: dict) -> dict:
        """Adds the card, which says `about` and what can be counted, and names the data set. Returns the card."""
        self.flush()
        episodes = split_episodes(self.env_id, np.asarray(self.files["dones_0"]))[0]
        team = np.mean([self.files[f"rews_{i}"] for i in range(self.agents)], axis=0, dtype=np.float64)
        returns = np.add.reduceat(team, episodes[:, 0])
        counts, edges = np.histogram(returns, 60)
        marked = "1 in the last row of an episode: the time limit if it is as long as an episode can be, else a fall"
        if find_task(self.env_id).scenario:
            marked = "0 throughout; episodes are blocks of 25 rows and end by the time limit"
        card = {
            "format": FORMAT, "task": self.env_id, "last_next_obs": True, **about, "dones": marked,
            "transitions": self.transitions, "episodes": len(episodes),
            "return": {key: round(float(getattr(returns, key)()), 4) for key in ("mean", "std", "min", "max")},
            "histogram": {"first": float(edges[0]), "last": float(edges[-1]), "counts": counts.tolist()},
            **versions(), "files": {f"{name}.npy": sha256(self.temporary / f"{name}.npy") for name in self.files},
        }  # fmt: skip
        _write(self.temporary / "card.json", card)
        # Only what has its name may lose what an interrupted call would go on from.
        os.replace(self.temporary, self.folder)
        (self.folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / self.scratch.name, ignore_errors=True)
        self._unlock()
        return card


def save_arrays(folder: Path, rows: dict[str, np.ndarray]) -> None:
    """A small data set without a card, at once: rows of each kind [T, N, ...], a file for each agent."""
    scratch = folder.with_name(folder.name + ".tmp")
    scratch.mkdir(parents=True, exist_ok=True)
    for name, values in rows.items():
        for i in range(values.shape[1]):
            np.save(scratch / f"{name}_{i}.npy", values[:, i].astype(np.float32))
    scratch.rename(folder)


def _write(path: Path, content: dict) -> None:
    """Under a temporary name first: after a crash the old file is still there."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
