"""Turns data that others made into this project's layout (`common/datasets.py`), and back.

    python datasets/convert.py from-vault 2halfcheetah.vlt/Good --env-id mamujoco_halfcheetah_2x3 --out my_data
    python datasets/convert.py from-madiff 4ant/Good --env-id mamujoco_ant_4x2 --out my_data
    python datasets/convert.py to-vault omar_simple_spread-medium --out simple_spread.vlt/Medium

Vaults are the format of OG-MARL (one zarr array [1, T, N, ...] per quantity in a tensorstore database); they need the
package tensorstore. Our `terminals` mark every end of an episode, our `truncations` those by the time limit, as
OG-MARL's own tools expect; in vaults of others an end after as many steps as an episode can have counts as a time
limit, whichever marks it. MADiff's MaMuJoCo data are obs.npy, actions.npy, rewards.npy [T, N, ...], path_lengths.npy.

Neither keeps the observation after the last step of an episode. In its place stands the last one again, the card says
so (`last_next_obs`), and `Dataset.next_known` is False in these rows unless the episode ended by a fall: a method that
learns values has to leave them out.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from common.datasets import layout, load_dataset, split_episodes
from common.envs import BadInput, find_task
from writer import Writer

VERSION = 1.2  # of vaults
LENGTH = 10**13  # rows that a vault's arrays are declared with; vault_index says how many there are


def write(
    env_id: str, out: Path, source: Path, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, marks: np.ndarray,
    state: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Writes obs [T, N, O], actions [T, N, A], rewards [T, N], the marks of ends [T] and state [T, S] as a data set.

    N counts the prey, if it is there. Observations and actions of smaller agents are padded at their end. The data set
    is checked as any other; one that does not pass is deleted.
    """
    team, prey, agents = layout(env_id)
    task, rows = find_task(env_id), len(obs)
    if obs.ndim != 3 or actions.ndim != 3 or not rows or {actions.shape[:2], rewards.shape} != {obs.shape[:2]}:
        shapes = f"observations {list(obs.shape)}, actions {list(actions.shape)}, rewards {list(rewards.shape)}"
        raise BadInput(f"{source}: {shapes} do not belong together")
    if obs.shape[1] not in (agents, agents + sum(name.startswith("obs_") for name in prey)):
        raise BadInput(f"{source}: has {obs.shape[1]} agents, {env_id} has {agents}")
    shapes = team | prey if obs.shape[1] > agents else team
    if state is not None and "states_0" in team and team["states_0"] not in ((None,), state.shape[1:]):
        print(f"left out: states of {state.shape[1]} numbers, where {env_id} has {team['states_0'][0]}")
        state = None
    if state is None:
        shapes = {name: shape for name, shape in shapes.items() if "states" not in name}
    open_size = lambda name: state.shape[1:] if "states" in name else obs.shape[2:]
    shapes = {name: open_size(name) if shape == (None,) else shape for name, shape in shapes.items()}
    widths = [max(shapes[f"{kind}_{i}"][0] for i in range(obs.shape[1])) for kind in ("obs", "acs")]
    if [obs.shape[2], actions.shape[2]] != widths:
        theirs = f"{obs.shape[2]} observations and {actions.shape[2]} actions of an agent"
        raise BadInput(f"{source}: {theirs}; in {env_id} they are {widths[0]} and {widths[1]}")
    if not np.isfinite(rewards).all():  # other numbers are looked at once they are written
        row, agent = np.argwhere(~np.isfinite(rewards))[0]
        raise BadInput(f"{source}: reward of agent {agent} in row {row:,} is not finite")
    wild = np.abs(actions) > 1
    if wild.any():
        print(f"clipped: {wild.sum():,} of {wild.size:,} actions, the largest {np.abs(actions).max():.3g}, to [-1, 1]")
        actions = np.clip(actions, -1, 1)
    episodes, terminations, _ = split_episodes(env_id, marks)
    if not task.terminates and (terminations.any() or rows % task.horizon):
        raise BadInput(f"{source}: its episodes end elsewhere than those of {env_id}; another task's data?")
    last, after, dones = episodes[:, 1] - 1, np.arange(1, rows + 1), np.zeros(rows, np.float32)
    after[last] = last  # what follows the last step is not in the source
    if not task.scenario:
        cut = not marks[-1] and rows - episodes[-1, 0] < task.horizon  # the data just stop: that is no end
        dones[last[: len(last) - cut]] = 1
    writer = Writer(out, env_id, shapes, rows, {"source": str(source)})
    try:
        values = {"rews": rewards, "obs": obs, "acs": actions, "next_obs": obs[after]}
        shared = {"dones": dones, "states": state, "next_states": None if state is None else state[after]}
        for name, array in writer.files.items():
            kind, _, i = name.rpartition("_")
            part = shared[kind] if kind in shared else values[kind][:, int(i)]
            array[:] = part[:, : array.shape[1]] if array.ndim > 1 else part
        about = {"split": None, "seed": None, "behaviour": "unknown", "prey": "unknown", "source": str(source)}
        writer.close(about | {"last_next_obs": False})
        print(load_dataset(out))  # every check
    except BaseException as error:
        writer.discard()
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, BadInput):
            reason = str(error).replace(f"{out}/", "")
            raise BadInput(f"{source}: does not pass the checks once converted: {reason}") from error
        raise


# --- vaults ---


def store(folder: Path, name: str, **options):
    """One array of a vault. Raises `BadInput` if tensorstore is not installed."""
    try:
        import tensorstore
    except ImportError as error:
        raise BadInput("vaults need the package tensorstore: pip install tensorstore") from error
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{folder.resolve()}", "path": name},
        "metadata": {"compressor": {"id": "gzip", "level": 5}} if options else {},
    }
    return tensorstore.open(spec, **options).result()


def from_vault(vault: tyro.conf.Positional[Path], env_id: str, out: Path) -> None:
    """An OG-MARL vault becomes a data set of this project.

    Args:
        vault: folder with the vault's metadata.json
        env_id: the task it is from
        out: the new folder
    """
    path = vault / "metadata.json"
    if not path.is_file():
        inside = ", ".join(sorted(folder.parent.name for folder in vault.glob("*/metadata.json")))
        raise BadInput(f"{vault}: no metadata.json there" + f", but the vaults {inside}: give one" * bool(inside))
    try:
        metadata = json.loads(path.read_bytes())
        if int(float(metadata["version"])) != int(VERSION):
            raise ValueError(f"version {metadata['version']}, known is {VERSION}")
        has_state = "state" in metadata["structure_shape"].get("infos", {})
        rows = int(store(vault, "vault_index").read().result()[0])
        if rows < 1:
            raise ValueError(f"vault_index says {rows} rows")
        names = ["observations.", "actions.", "rewards.", "terminals.", "truncations."] + ["infos.state."] * has_state
        arrays = [store(vault, name)[0, :rows].read().result() for name in names]
    except BadInput:
        raise
    except Exception as error:  # anything, in a file that is damaged
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{vault}: not a vault, or a broken one ({type(error).__name__}: {reason})") from error
    obs, actions, rewards, terminals, truncations, *state = arrays
    marks = (terminals.reshape(rows, -1) != 0).all(1) | (truncations.reshape(rows, -1) != 0).all(1)
    joint = state[0] if state and not find_task(env_id).scenario else None  # there it is nothing but all observations
    if joint is not None and joint.ndim == 3:  # a copy for each agent
        same = (joint == joint[:, :1]).all()
        print("left out: states, which differ from agent to agent\n" * (not same), end="")
        joint = joint[:, 0] if same else None
    write(env_id, out, vault, obs, actions, rewards, marks, joint)


def to_vault(dataset: tyro.conf.Positional[str], out: Path, env_id: str = "") -> None:
    """A data set becomes an OG-MARL vault.

    Args:
        dataset: name of a data set, or the path of a folder
        out: the new folder, by custom <scenario>.vlt/<quality>
        env_id: the task of a folder without card
    """
    if out.exists():
        raise BadInput(f"{out}: is there already")
    data = load_dataset(dataset, env_id=env_id)
    agents = len(list(data.folder.glob("obs_*.npy")))  # with the prey
    read = lambda kind: [np.load(data.folder / f"{kind}_{i}.npy", mmap_mode="r") for i in range(agents)]

    def stack(kind: str, filler: float) -> np.ndarray:
        parts = read(kind)
        size = max(part.shape[1] for part in parts)
        pad = lambda part: np.pad(part, [(0, 0), (0, size - part.shape[1])], constant_values=filler)
        return np.stack([pad(part) for part in parts], 1, dtype=np.float32)

    rows = len(data.obs)
    each = lambda marks: np.repeat(marks[:, None], agents, 1)
    arrays = {
        "observations.": stack("obs", -np.inf),
        "actions.": stack("acs", 0.0),
        "rewards.": np.stack(read("rews"), 1, dtype=np.float32),
        "terminals.": each(data.terminations | data.truncations),
        "truncations.": each(data.truncations),
        "infos.state.": np.asarray(data.obs if data.state is None else data.state).reshape(rows, -1),
    }
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shape, dtype = {}, {}
    for name, array in arrays.items():
        how = dict(shape=(1, LENGTH, *array.shape[1:]), dtype=array.dtype.name, create=True)
        store(temporary, name, **how)[:, :rows].write(array[None]).result()
        *path, leaf = name.rstrip(".").split(".")
        for tree, value in ((shape, str((1, *array.shape))), (dtype, array.dtype.name)):
            for key in path:
                tree = tree.setdefault(key, {})
            tree[leaf] = value
    store(temporary, "vault_index", shape=(1,), dtype="int32", create=True).write(np.array([rows], np.int32)).result()
    metadata = {"version": VERSION, "structure_shape": shape, "structure_dtype": dtype, "source": dataset}
    (temporary / "metadata.json").write_text(json.dumps(metadata))
    temporary.rename(out)
    print(f"{out}: {rows:,} steps of {agents} agents")


# --- MADiff ---


def from_madiff(folder: tyro.conf.Positional[Path], env_id: str, out: Path) -> None:
    """A MaMuJoCo data set of MADiff becomes one of this project.

    Args:
        folder: folder with obs.npy, actions.npy, rewards.npy and path_lengths.npy
        env_id: the task it is from
        out: the new folder
    """
    arrays = []
    for name in ("obs", "actions", "rewards", "path_lengths"):
        try:
            arrays.append(np.load(folder / f"{name}.npy", allow_pickle=False))
        except Exception as error:  # a damaged header can raise anything
            reason = " ".join(str(error).split())[:100]
            raise BadInput(f"{folder}/{name}.npy: missing, cut short, or not a file of MADiff's ({reason})") from error
    obs, actions, rewards, lengths = arrays
    fits = obs.ndim == 3 and rewards.shape[:1] == obs.shape[:1] and lengths.ndim == 1
    if not fits or not lengths.size or lengths.dtype.kind not in "iu":
        shapes = ", ".join(f"{list(array.shape)} {array.dtype}" for array in arrays)
        raise BadInput(f"{folder}: obs, actions, rewards and path_lengths are {shapes}: not as in MADiff's data")
    horizon = find_task(env_id).horizon
    if lengths.sum() != len(obs) or not 1 <= lengths.min() <= lengths.max() <= horizon:
        what = f"not the lengths of the episodes in {len(obs):,} rows, of at most {horizon} steps in {env_id}"
        raise BadInput(f"{folder}/path_lengths.npy: {what}")
    agents, marks = obs.shape[1], np.zeros(len(obs), bool)
    if obs.shape[2] < agents or not (obs[:, :, :agents] == np.eye(agents)).all():
        raise BadInput(f"{folder}/obs.npy: observations do not begin with the agent's number as one of {agents}")
    marks[lengths.cumsum() - 1] = True
    write(env_id, out, folder, obs[:, :, agents:], actions, rewards.reshape(len(obs), -1), marks)


def main() -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""

    commands = {"from-vault": from_vault, "from-madiff": from_madiff, "to-vault": to_vault}
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
        return 0
    except BadInput as error:
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
