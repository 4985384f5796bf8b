"""Turns data that others made into this project's layout (`common/datasets.py`), and back.

    python datasets/convert.py from-vault 2halfcheetah.vlt/Good --env-id mamujoco_halfcheetah_2x3 --out my_data
    python datasets/convert.py from-madiff 4ant/Good --env-id mamujoco_ant_4x2 --out my_data
    python datasets/convert.py to-vault omar_simple_spread-medium --out simple_spread.vlt/Medium

Vaults are the format of OG-MARL (one zarr array [1, T, N, ...] per quantity in a tensorstore database); they need the package
tensorstore, which nothing else here does. MADiff's MaMuJoCo data are obs.npy, actions.npy, rewards.npy [T, N, ...] and path_lengths.npy.

In vaults, `terminals` mark every end of an episode, and `truncations` those by the time limit, as OG-MARL's own tools expect; in vaults of
others an end after exactly as many steps as an episode can have counts as a time limit, whichever of the two marks it.

Neither of them keeps the observation after the last step of an episode. In its place stands the last observation again, the card says
so (`last_next_obs`), and `Dataset.next_known` marks these rows where the episode did not end by a fall: a method that learns values has
to leave them out.
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
import omad
from common.datasets import DataError, Writer, layout, load_dataset, split_episodes
from common.envs import UnknownTask, find_task
from common.omar import SCENARIOS

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
          marks: np.ndarray, state: np.ndarray | None) -> None:  # fmt: skip
    """Writes obs [T, N, O], actions [T, N, A], rewards [T, N], the marks of ends [T] and state [T, S] as a data set, and checks it.

    N counts the prey, if it is there. Observations and actions of smaller agents are padded at their end.
    """
    team, prey, agents = layout(env_id)
    rows = len(obs)
    if obs.ndim != 3 or actions.ndim != 3 or not rows or {actions.shape[:2], rewards.shape} != {obs.shape[:2]}:
        shapes = f"observations {list(obs.shape)}, actions {list(actions.shape)}, rewards {list(rewards.shape)}"
        raise DataError(f"{source}: {shapes} do not belong together")
    if obs.shape[1] not in (agents, agents + len(prey) // 5):
        raise DataError(f"{source}: has {obs.shape[1]} agents, {env_id} has {agents}")
    shapes = team | prey if obs.shape[1] > agents else team
    sizes = {"obs": obs.shape[2], "states": 0 if state is None else state.shape[1]}
    if state is not None and "states_0" in team and team["states_0"] not in ((None,), state.shape[1:]):
        print(f"left out: states of {state.shape[1]} numbers, where {env_id} has {team['states_0'][0]}")
        state = None
    shapes = {name: shape for name, shape in shapes.items() if state is not None or "states" not in name}
    shapes = {name: (sizes[kind_of(name)],) if shape == (None,) else shape for name, shape in shapes.items()}
    widths = [(shapes[f"obs_{i}"][0], shapes[f"acs_{i}"][0]) for i in range(obs.shape[1])]
    if (obs.shape[2], actions.shape[2]) != tuple(map(max, zip(*widths))):
        raise DataError(
            f"{source}: {obs.shape[2]} observations and {actions.shape[2]} actions of an agent; in {env_id} they are "
            f"{max(widths)[0]} and {max(width for _, width in widths)}"
        )
    for name, values in (("observation", obs), ("action", actions), ("reward", rewards)):
        real = np.ones(values.shape, bool)
        for i, width in enumerate(widths):
            if values.ndim == 3:
                real[:, i, width[name == "action"] :] = False
        bad = np.argwhere(~np.isfinite(values) & real)
        if len(bad):
            raise DataError(f"{source}: {name} of agent {bad[0][1]} in row {bad[0][0]:,} is not finite")
    wild = np.abs(actions) > 1
    if wild.any():
        print(f"clipped: {wild.sum():,} of {wild.size:,} actions, the largest {np.abs(actions).max():.3g}, to [-1, 1]")
        actions = np.clip(actions, -1, 1)
    episodes, terminations, _ = split_episodes(env_id, marks)
    if not find_task(env_id).terminates and (terminations.any() or rows % find_task(env_id).horizon):
        raise DataError(f"{source}: its episodes end elsewhere than those of {env_id}; another task's data?")
    last = episodes[:, 1] - 1
    dones = np.zeros(rows, np.float32)
    if env_id.removeprefix("omar_") not in SCENARIOS:
        dones[last[: len(last) - (not marks[-1] and rows - episodes[-1, 0] < find_task(env_id).horizon)]] = (
            1  # not where data just stop
        )
    after = np.arange(1, rows + 1)
    after[last] = last  # what follows the last step is not in the source
    writer = Writer(out, env_id, shapes, rows, {"source": source})
    try:
        values = {"rews": rewards, "obs": obs, "acs": actions, "next_obs": obs[after]}
        for name, array in writer.files.items():
            kind, _, i = name.rpartition("_")
            if kind in values:
                part = values[kind][:, int(i)]
                array[:] = part[:, : array.shape[1]] if array.ndim > 1 else part
            else:
                array[:] = {"dones": dones, "states": state, "next_states": None if state is None else state[after]}[kind]
        writer.close(
            {"split": None, "seed": None, "behaviour": "unknown", "prey": "unknown", "source": source, "last_next_obs": False}
        )
        data = load_dataset(out)  # every check
    except BaseException as error:
        writer.discard()
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, DataError):
            raise DataError(f"{source}: does not pass the checks once converted: {str(error).replace(f'{out}/', '')}") from error
        raise
    print(
        f"{out}: {rows:,} transitions, {len(data.returns):,} episodes, return {data.returns.mean():.1f} ± {data.returns.std():.1f}"
    )


def kind_of(name: str) -> str:
    return "states" if "states" in name else "obs"


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
    source, path = str(options.vault), options.vault / "metadata.json"
    if not path.is_file():
        inside = sorted(folder.parent.name for folder in options.vault.glob("*/metadata.json"))
        raise DataError(
            f"{source}: no metadata.json there" + f", but the vaults {', '.join(inside)}: give one of these" * bool(inside)
        )
    try:
        metadata = json.loads(path.read_bytes())
        version = int(float(metadata["version"]))
        has_state = "state" in metadata["structure_shape"].get("infos", {})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not the metadata of a vault ({type(error).__name__}: {error})") from error
    if version != int(VERSION):
        raise DataError(f"{source}: a vault of version {metadata['version']}, known is {VERSION}")
    try:
        rows = int(store(options.vault, "vault_index").read().result()[0])
        names = ["observations.", "actions.", "rewards.", "terminals.", "truncations."] + ["infos.state."] * has_state
        if rows < 1:
            raise ValueError(f"vault_index says {rows} rows")
        arrays = [store(options.vault, name)[0, :rows].read().result() for name in names]
    except (OSError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: an array of the vault is not there, or broken ({reason})") from error
    obs, actions, rewards, terminals, truncations, *state = arrays
    marks = (terminals.reshape(rows, -1) != 0).all(1) | (truncations.reshape(rows, -1) != 0).all(1)
    joint = state[0] if state and not options.env_id.startswith("omar_simple") else None  # there it is nothing but all observations
    if joint is not None and joint.ndim == 3:  # a copy for each agent
        joint = joint[:, 0] if (joint == joint[:, :1]).all() else None
        if joint is None:
            print("left out: states, which differ from agent to agent")
    write(options.env_id, options.out, source, obs, actions, rewards, marks, joint)


def to_vault(options: ToVault) -> None:
    tensorstore()
    data = load_dataset(options.dataset, env_id=options.env_id)
    agents = len(list(data.folder.glob("obs_*.npy")))  # with the prey
    parts = {
        kind: [np.load(data.folder / f"{kind}_{i}.npy", mmap_mode="r") for i in range(agents)] for kind in ("obs", "acs", "rews")
    }

    def stack(kind: str, filler: float) -> np.ndarray:
        size = max(part.shape[1] for part in parts[kind])
        pad = lambda part: np.pad(part, [(0, 0), (0, size - part.shape[1])], constant_values=filler)
        return np.stack([pad(part) for part in parts[kind]], 1, dtype=np.float32)

    state = np.asarray(data.state)[:, 0] if data.state is not None else np.asarray(data.obs).reshape(len(data.obs), -1)
    each = lambda marks: np.repeat(marks[:, None], agents, 1)
    arrays = {
        "observations.": stack("obs", -np.inf), "actions.": stack("acs", 0.0), "rewards.": np.stack(parts["rews"], 1, dtype=np.float32),
        "terminals.": each(data.terminations | data.truncations), "truncations.": each(data.truncations), "infos.state.": state,
    }  # fmt: skip
    temporary = options.out.with_name(f".{options.out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shape, dtype = {}, {}
    for name, array in arrays.items():
        how = dict(shape=(1, LENGTH, *array.shape[1:]), dtype=array.dtype.name, create=True)
        store(temporary, name, **how)[:, : len(array)].write(array[None]).result()
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
    source, arrays = str(options.folder), {}
    for name in ("obs", "actions", "rewards", "path_lengths"):
        try:
            arrays[name] = np.load(options.folder / f"{name}.npy", allow_pickle=False)
            if not isinstance(arrays[name], np.ndarray) or arrays[name].dtype.kind not in "fiu":
                raise ValueError("no array of numbers")
        except Exception as error:  # a damaged header can raise anything
            reason = " ".join(str(error).split())[:100]
            raise DataError(f"{source}/{name}.npy: missing, cut short, or not a file of MADiff's ({reason})") from error
    obs, actions, rewards, lengths = arrays.values()
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths) or lengths.min() < 1 or lengths.sum() != len(obs):
        raise DataError(f"{source}/path_lengths.npy: not the lengths of the episodes in {len(obs):,} rows")
    if obs.ndim != 3 or rewards.ndim not in (2, 3) or rewards.shape[2:] not in ((), (1,)):
        raise DataError(f"{source}: obs {list(obs.shape)} and rewards {list(rewards.shape)} are not [T, N, ...]")
    agents = obs.shape[1]
    if not (obs[:, :, :agents] == np.eye(agents)).all():
        raise DataError(f"{source}/obs.npy: observations do not begin with the agent's number as one of {agents}")
    task, marks = find_task(options.env_id), np.zeros(len(obs), bool)
    marks[lengths.cumsum() - 1] = True
    if lengths.max() > task.horizon or lengths.min() < task.horizon and not task.terminates:
        raise DataError(
            f"{source}/path_lengths.npy: episodes of {lengths.min()} to {lengths.max()} steps; those of {options.env_id} have "
            + "at most " * task.terminates
            + str(task.horizon)
        )
    write(options.env_id, options.out, source, obs[:, :, agents:], actions, rewards.reshape(rewards.shape[:2]), marks, None)


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""
    command = Annotated[FromVault, tyro.conf.subcommand("from-vault")] | Annotated[FromMadiff, tyro.conf.subcommand("from-madiff")]
    try:
        options = omad.read_flags(command | Annotated[ToVault, tyro.conf.subcommand("to-vault")], sys.argv[1:], prog="convert.py")
        if options.env_id:
            find_task(options.env_id)
        if options.out.exists():
            raise DataError(f"{options.out}: is there already; give the name of a new folder")
        {FromVault: from_vault, FromMadiff: from_madiff, ToVault: to_vault}[type(options)](options)
        return 0
    except (DataError, UnknownTask, omad.BadInput) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"convert.py: failed: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("convert.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
