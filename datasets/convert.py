"""Turns data that others made into this project's layout (`common/datasets.py`), and back.

    python datasets/convert.py from-vault 2halfcheetah.vlt/Good --env-id mamujoco_halfcheetah_2x3 --out my_data
    python datasets/convert.py from-madiff 4ant/Good --env-id mamujoco_ant_4x2 --out my_data
    python datasets/convert.py to-vault omar_simple_spread-medium --out simple_spread.vlt/Medium

Vaults are the format of OG-MARL (one zarr array [1, T, N, ...] per quantity in a tensorstore database); they need the package
tensorstore, which nothing else here does. MADiff's MaMuJoCo data are obs.npy, actions.npy, rewards.npy [T, N, ...] and path_lengths.npy.

Neither of them keeps the observation after the last step of an episode. In its place stands the last observation again, the card says
so (`last_next_obs`), and `Dataset.next_known` marks these rows: a method that learns values has to leave them out.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.datasets import DataError, Writer, layout, load_dataset, split_episodes
from common.envs import UnknownTask, find_task

VERSION = 1.2  # of vaults
LENGTH = 10**13  # rows that a vault's arrays are declared with; vault_index says how many there are


@dataclass(frozen=True)
class FromVault:
    """An OG-MARL vault becomes a data set of this project."""

    vault: tyro.conf.Positional[Path]
    """folder with the vault's metadata.json"""
    env_id: str
    """the task it is from"""
    out: Path
    """the new folder"""


@dataclass(frozen=True)
class FromMadiff:
    """A MaMuJoCo data set of MADiff becomes one of this project."""

    folder: tyro.conf.Positional[Path]
    """folder with obs.npy, actions.npy, rewards.npy and path_lengths.npy"""
    env_id: str
    """the task it is from"""
    out: Path
    """the new folder"""


@dataclass(frozen=True)
class ToVault:
    """A data set becomes an OG-MARL vault."""

    dataset: tyro.conf.Positional[str]
    """name of a data set, or the path of a folder"""
    out: Path
    """the new folder, by custom <scenario>.vlt/<quality>"""
    env_id: str = ""
    """the task of a folder without card"""


def write(env_id: str, out: Path, source: str, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray,
          dones: np.ndarray, state: np.ndarray | None) -> None:  # fmt: skip
    """Writes obs [T, N, O], actions [T, N, A], rewards [T, N], dones [T] (terminations) and state [T, S] as a data set, and checks it.

    N counts the prey, if it is there; rows of smaller agents are padded at their end with anything that is not a number.
    """
    team, prey, agents = layout(env_id)
    preys = len(prey) // 5
    if obs.shape[1] not in (agents, agents + preys):
        raise DataError(f"{source}: has {obs.shape[1]} agents, {env_id} has {agents}")
    shapes = team | prey if obs.shape[1] > agents else team
    shapes = {name: shape for name, shape in shapes.items() if state is not None or "states" not in name}
    shapes = {name: (obs.shape[2],) if shape == (None,) else shape for name, shape in shapes.items()}
    for i in range(obs.shape[1]):
        size, given = shapes[f"obs_{i}"][0], np.isfinite(obs[0, i]).sum()
        if given != size or shapes[f"acs_{i}"][0] > actions.shape[2]:
            raise DataError(
                f"{source}: agent {i} observes {given} numbers and has {actions.shape[2]} actions; in {env_id} it is {size} and "
                f"{shapes[f'acs_{i}'][0]}"
            )
    if state is not None and "states_0" in shapes and state.shape[1:] != shapes["states_0"]:
        raise DataError(f"{source}: states of shape {list(state.shape[1:])}, in {env_id} they are {list(shapes['states_0'])}")
    if not find_task(env_id).terminates:
        dones = np.zeros_like(dones)
    writer = Writer(out, env_id, shapes, len(obs), {"source": source})
    after = np.arange(1, len(obs) + 1)
    last = split_episodes(env_id, dones)[:, 1] - 1
    after[last] = last  # what follows the last step is not in the source
    values = {"rews": rewards, "obs": obs, "acs": actions, "next_obs": obs[after]}
    for name, array in writer.files.items():
        kind, _, i = name.rpartition("_")
        if kind in values:
            part = values[kind][:, int(i)]
            array[:] = part[:, : array.shape[1]] if array.ndim > 1 else part
        else:
            array[:] = {"dones": dones, "states": state, "next_states": None if state is None else state[after]}[kind]
    writer.close({"source": source, "last_next_obs": False})
    try:
        data = load_dataset(str(out))  # every check
    except DataError:
        shutil.rmtree(out)
        raise
    print(
        f"{out}: {len(data.obs):,} transitions, {len(data.returns):,} episodes, return {data.returns.mean():.1f} ± {data.returns.std():.1f}"
    )


# --- vaults ---


def tensorstore():
    """The package; a `DataError` if it is not installed."""
    try:
        import tensorstore
    except ImportError as error:
        raise DataError("vaults need the package tensorstore: pip install tensorstore") from error
    return tensorstore


def store(folder: Path, name: str, **options):
    """One array of a vault."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{folder.resolve()}", "path": name},
        "metadata": {"compressor": {"id": "gzip", "level": 5}} if options else {},
    }
    return tensorstore().open(spec, **options).result()


def from_vault(options: FromVault) -> None:
    tensorstore()
    source = str(options.vault)
    try:
        metadata = json.loads((options.vault / "metadata.json").read_bytes())
        if int(metadata["version"]) != int(VERSION):
            raise DataError(f"{source}: a vault of version {metadata['version']}, known is {VERSION}")
        rows = int(store(options.vault, "vault_index").read().result()[0])
        names = ["observations.", "actions.", "rewards.", "terminals.", "truncations."]
        obs, actions, rewards, terminals, truncations = (store(options.vault, name)[0, :rows].read().result() for name in names)
        state = (
            store(options.vault, "infos.state.")[0, :rows].read().result()
            if "state" in metadata["structure_shape"].get("infos", {})
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: no OG-MARL vault there ({type(error).__name__}: {reason})") from error
    env_id = options.env_id
    dones, cut = terminals.reshape(rows, -1).all(1), truncations.reshape(rows, -1).all(1)
    ends = np.flatnonzero(dones | cut) + 1
    expected = split_episodes(env_id, dones & find_task(env_id).terminates)[:, 1]
    if len(ends) and not np.array_equal(ends, expected[: len(ends)]):
        raise DataError(f"{source}: its episodes end elsewhere than those of {env_id}; another task's data?")
    if env_id.startswith("omar_simple"):
        state = None  # nothing but all observations
    write(env_id, options.out, source, obs, actions, rewards, dones, state)


def to_vault(options: ToVault) -> None:
    tensorstore()
    data = load_dataset(options.dataset, env_id=options.env_id)
    if options.out.exists():
        raise DataError(f"{options.out}: is there already")
    parts = {kind: [np.load(data.folder / f"{kind}_{i}.npy", mmap_mode="r") for i in range(99) if (data.folder / f"{kind}_{i}.npy").exists()]
             for kind in ("obs", "acs", "rews")}  # fmt: skip
    size = max(part.shape[1] for part in parts["obs"])
    pad = lambda part: np.pad(part, [(0, 0), (0, size - part.shape[1])], constant_values=-np.inf)  # as OG-MARL pads
    agents = len(parts["obs"])
    state = np.asarray(data.state)[:, 0] if data.state is not None else np.asarray(data.obs).reshape(len(data.obs), -1)
    each = lambda marks: np.repeat(marks[:, None], agents, 1)
    arrays = {
        "observations.": np.stack([pad(part) for part in parts["obs"]], 1), "actions.": np.stack(parts["acs"], 1),
        "rewards.": np.stack(parts["rews"], 1), "terminals.": each(data.terminations), "truncations.": each(data.truncations),
        "infos.state.": state,
    }  # fmt: skip
    temporary = options.out.with_name(f"{options.out.name}.tmp")
    temporary.mkdir(parents=True)
    shape, dtype = {}, {}
    for name, array in arrays.items():
        options_ = dict(shape=(1, LENGTH, *array.shape[1:]), dtype=array.dtype.name, create=True)
        store(temporary, name, **options_)[:, : len(array)].write(array[None]).result()
        *path, leaf = name.rstrip(".").split(".")
        for tree, value in ((shape, str((1, *array.shape))), (dtype, array.dtype.name)):
            for key in path:
                tree = tree.setdefault(key, {})
            tree[leaf] = value
    store(temporary, "vault_index", shape=(1,), dtype="int32", create=True).write(np.array([len(state)], np.int32)).result()
    metadata = {"version": VERSION, "structure_shape": shape, "structure_dtype": dtype, "source": options.dataset}
    (temporary / "metadata.json").write_text(json.dumps(metadata))
    temporary.rename(options.out)
    print(f"{options.out}: {len(state):,} steps of {agents} agents")


# --- MADiff ---


def from_madiff(options: FromMadiff) -> None:
    source = str(options.folder)
    try:
        obs, actions, rewards, lengths = (
            np.load(options.folder / f"{name}.npy", allow_pickle=False) for name in ("obs", "actions", "rewards", "path_lengths")
        )
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{source}: no data of MADiff there ({' '.join(str(error).split())[:200]})") from error
    rewards = rewards.reshape(rewards.shape[:2])
    if obs.ndim != 3 or len({len(obs), len(actions), len(rewards), int(lengths.sum())}) > 1:
        raise DataError(f"{source}: obs {list(obs.shape)}, actions {list(actions.shape)}, rewards {list(rewards.shape)} and paths of "
                        f"{int(lengths.sum()):,} steps in all do not belong together")  # fmt: skip
    agents = obs.shape[1]
    if not (obs[:, :, :agents] == np.eye(agents)).all():
        raise DataError(f"{source}/obs.npy: observations do not begin with the agent's number as one of {agents}")
    horizon, dones = find_task(options.env_id).horizon, np.zeros(len(obs), bool)
    dones[lengths.cumsum() - 1] = lengths < horizon
    if lengths.max() > horizon or dones.any() and not find_task(options.env_id).terminates:
        raise DataError(
            f"{source}/path_lengths.npy: episodes of {lengths.min()} to {lengths.max()} steps; those of {options.env_id} have "
            + ("at most " if find_task(options.env_id).terminates else "") + str(horizon)
        )  # fmt: skip
    write(options.env_id, options.out, source, obs[:, :, agents:], actions, rewards, dones, None)


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed."""
    command = Annotated[FromVault, tyro.conf.subcommand("from-vault")] | Annotated[FromMadiff, tyro.conf.subcommand("from-madiff")]
    options = tyro.cli(command | Annotated[ToVault, tyro.conf.subcommand("to-vault")])
    try:
        if options.env_id:
            find_task(options.env_id)
        if options.out.exists():
            raise DataError(f"{options.out}: is there already; give the name of a new folder")
        {FromVault: from_vault, FromMadiff: from_madiff, ToVault: to_vault}[type(options)](options)
        return 0
    except (DataError, UnknownTask) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"convert.py: failed: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
