"""Whether the arrays of a data set can be what they say: their numbers, the order of their rows, whose they are.

Every check raises `BadInput` that names the file and the row. Shape letters as in `common/datasets.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import BadInput
from common.envs import find_task
from common.omar import SCENARIOS, LegacyWorld, distance

Files = dict[str, np.ndarray]  # by name, without .npy


def _refuse(rows: np.ndarray, path: Path | str, what: str) -> None:
    """Raises for the first of these rows of a file, if there are any."""
    if len(rows):
        raise BadInput(f"{path}.npy, row {rows[0]:,}: {what}")


def _blocks(rows: int) -> Iterator[slice]:
    """Rows that are looked at together, so that checking needs little memory."""
    return (slice(start, min(start + (1 << 16), rows)) for start in range(0, rows, 1 << 16))


def check_values(folder: Path, env_id: str, files: Files, agents: int) -> np.ndarray:
    """Every number is finite, actions are in [-1, 1], `dones` fit the task. Returns the marks of ends [T]."""
    for name, array in files.items():
        for rows in _blocks(len(array)):
            with np.errstate(over="ignore"):  # too large for single precision: infinite
                block = np.asarray(array[rows], np.float32).reshape(rows.stop - rows.start, -1)
            bad, what = ~np.isfinite(block), "is not finite"
            if not bad.any() and name.startswith("acs_"):
                bad, what = np.abs(block) > 1.001, "is outside [-1, 1]; clip the actions, or scale them, to that range"
            if not bad.any() and name.startswith("dones_"):
                bad, what = (block != 0) & (block != 1), "is neither 0 nor 1"
            if bad.any():
                row, column = np.argwhere(bad)[0] + (rows.start, 0)
                number, value = (f", number {column}", array[row, column]) if array.ndim > 1 else ("", array[row])
                raise BadInput(f"{folder / name}.npy, row {row:,}{number}: {value} {what}")
            if name.startswith(("obs_", "states_")) and block.shape[1] > 2:
                empty = rows.start + np.flatnonzero(~block.any(1))
                _refuse(empty, folder / name, "all numbers are 0: rows that were never filled?")
    task, marks = find_task(env_id), np.asarray(files["dones_0"]) != 0
    for i in range(1, agents):
        differ = np.flatnonzero((np.asarray(files[f"dones_{i}"]) != 0) != marks)
        _refuse(differ, folder / f"dones_{i}", "not as in dones_0.npy; an episode ends for the whole team")
    if not task.terminates:
        early = np.flatnonzero(marks & (np.arange(len(marks)) % task.horizon != task.horizon - 1))
        what = f"marks an end in the middle of an episode; those of {env_id} all have {task.horizon} steps"
        _refuse(early, folder / "dones_0", f"{what}. Rows lost or shuffled?")
        if len(marks) % task.horizon:
            raise BadInput(
                f"{folder}: {len(marks):,} rows are no whole number of episodes of {task.horizon} steps, as all of "
                f"{env_id} are. Cut short, or another task's data?"
            )
    return marks


def check_order(folder: Path, files: Files, ends: np.ndarray, falls: np.ndarray) -> None:
    """Inside an episode, what comes next in one row is what is there in the next row; after a fall it is not."""
    for name in files:
        if not name.startswith(("obs_", "states_")):
            continue
        now, then = files[name], files[f"next_{name}"]
        if now.shape != then.shape:
            raise BadInput(f"{folder}/next_{name}.npy: has shape {list(then.shape)}, but {name}.npy {list(now.shape)}")
        for rows in _blocks(len(now) - 1):
            differ = np.abs(np.asarray(then[rows]) - now[rows.start + 1 : rows.stop + 1]).max(1)
            broken = rows.start + np.flatnonzero((differ > 1e-3) & ~ends[rows])
            what = f"not what {name}.npy has in the next row of the same episode"
            _refuse(broken, folder / f"next_{name}", f"{what}. Shuffled, shifted, or files of two agents exchanged?")
            unbroken = rows.start + np.flatnonzero((differ == 0) & falls[rows])
            what = "marks a fall, but the episode goes on in the next row. Marks shifted?"
            _refuse(unbroken, folder / "dones_0", what)


def check_agents(
    folder: Path, env_id: str, files: Files, agents: int, episodes: np.ndarray, kept: np.ndarray, sample: bool
) -> None:
    """Files belong to their agents: in the particle tasks by physics and rewards, in HalfCheetah by the joint state.

    `kept` [T]: rows whose next observation is there. With `sample`, only 200 episodes of the particle tasks are looked
    at: there are checksums.
    """
    task = find_task(env_id)
    if task.scenario:
        for i in range(agents):
            moving = episodes[np.abs(files[f"obs_{i}"][episodes[:, 0], :2]).max(1) > 1e-6, 0]
            what = f"an episode starts in motion. Blocks of {task.horizon} rows are episodes; rows lost or shifted?"
            _refuse(moving, folder / f"obs_{i}", what)
        if sample:
            episodes = episodes[np.linspace(0, len(episodes) - 1, min(200, len(episodes))).astype(int)]
        for part in np.array_split(episodes, -(-len(episodes) // 1000)):
            rows = np.concatenate([np.arange(first, end) for first, end in part])
            _check_particles(folder, env_id, files, agents, rows[kept[rows]])
        return
    for i in range(1, agents) if task.robot else ():  # one reward, one state for all
        for kind in ["rews"] + ["states", "next_states"] * ("states_0" in files):
            mine, first = files[f"{kind}_{i}"], files[f"{kind}_0"]
            for rows in _blocks(len(mine)):
                differ = rows.start + np.argwhere(mine[rows] != first[rows])[:, 0]
                _refuse(differ, folder / f"{kind}_{i}", f"not as for agent 0, but {env_id} has one for all agents")
    if env_id == "omar_halfcheetah_2x3" and "states_0" in files:
        for rows in _blocks(len(files["states_0"])):
            block = {name: np.asarray(array[rows]) for name, array in files.items()}
            _check_cheetah(folder, block, rows.start)


def _check_cheetah(folder: Path, files: Files, start: int) -> None:
    """Joints that an agent sees are not the other's, and the reward is the speed minus a tenth of all squared actions.

    Whose actions are whose cannot be told from that, nor from any sum over both.
    """
    state, after = files["states_0"], files["next_states_0"]
    joints = [np.stack([state[:, k] for j in own for k in (2 + j, 11 + j)], 1) for own in ((2, 1, 0), (5, 4, 3))]
    for i in range(2):  # position and velocity of foot, shin and thigh
        own, other = (np.abs(files[f"obs_{i}"] - joints[j]).max(1) < 1e-3 for j in (i, 1 - i))
        if (other & ~own).mean() > 0.01:
            what = f"has the joints of agent {1 - i}. Files of two agents exchanged?"
            _refuse(start + np.flatnonzero(other & ~own), folder / f"obs_{i}", what)
    speed = files["rews_0"] + 0.1 * sum((files[f"acs_{i}"] ** 2).sum(1) for i in range(2))  # mean over the step
    off = np.abs(speed - (state[:, 8] + after[:, 8]) / 2) > 1.5
    if off.mean() > 0.01:
        what = "not the speed in states_0.npy minus a tenth of the squared actions. Another task's?"
        _refuse(start + np.flatnonzero(off), folder / "rews_0", what)


def _check_particles(folder: Path, env_id: str, files: Files, agents: int, rows: np.ndarray) -> None:
    """In these rows all agents see the same places, and everybody moves and earns as the task says.

    One in a hundred rewards, and speeds of agents that touch nothing, may be off, by a few contacts at most: where
    agents just about touch, single precision decides.
    """
    everybody = range(sum(name.startswith("acs_") for name in files))
    read = lambda kind: [np.asarray(files[f"{kind}_{i}"][rows], np.float32).T for i in everybody]
    obs, after, actions, rewards = read("obs"), read("next_obs"), read("acs"), read("rews")
    rules = SCENARIOS[find_task(env_id).scenario]()
    world = rules.make_world()
    mismatch = getattr(rules, "mismatch", lambda seen, expected: np.abs(seen - expected))

    def check_sight(kind: str, seen: list[np.ndarray]) -> None:  # of positions and, by predators, the prey's velocity
        place(world, seen)
        for i in everybody:
            wrong = ~(mismatch(seen[i], rules.observation(world.agents[i], world)) < 1e-3)  # [O, rows]
            others = [f"agent {j}" for j in range(len(world.agents)) if j != i]
            names = [f"landmark {k}" for k in range(len(world.landmarks))] + others
            names += ["the prey's velocity"] * (i < agents < len(world.agents))
            bad = np.argwhere(wrong[: 4 + 2 * len(names)])
            if len(bad):
                what = f"sees {names[bad[0][0] // 2 - 2]} where the other agents' files do not"
                _refuse(rows[bad[:1, 1]], folder / f"{kind}_{i}", f"{what}. Files of two agents exchanged?")

    check_sight("obs", obs)
    solid = [[other for other in world.entities if other.collide and other is not agent] for agent in world.agents]
    apart = lambda agent, other: distance(agent, other) > agent.size + other.size + 0.02
    free = [np.all([apart(world.agents[i], other) for other in solid[i]], axis=0) for i in everybody]
    for i in everybody:
        agent = world.agents[i]
        off = ~(np.abs(after[i][2:4] - obs[i][2:4] - world.dt * after[i][:2]).max(0) < 2e-3)
        what = "the agent is not where its velocity took it. At the end of an episode this is the last observation"
        _refuse(rows[off], folder / f"next_obs_{i}", f"{what}, not the first of the next")
        miss = [np.abs(after[i][:2] - glide(world, agent, x))[:, free[i]].max(0) > 2e-3 for x in actions]
        if free[i].any() and miss[i].mean() > 0.01:
            best = min(everybody, key=lambda j: miss[j].mean())
            exchanged = f"as acs_{best}.npy says. Files of two agents exchanged?"
            what = f"agent {i} does not move as this file says but "
            what += exchanged if miss[best].mean() <= 0.01 else "otherwise. Shifted?"
            _refuse(rows[free[i]][miss[i]], folder / f"acs_{i}", what)
    check_sight("next_obs", after)
    for i in range(agents):
        off = np.abs(rules.reward(world.agents[i], world) - rewards[i])
        far, wrong = off > 31, off > 0.02 * np.maximum(1, np.abs(rewards[i]))  # 31: three contacts of 10
        if far.any() or wrong.mean() > 0.01:
            what = f"not the reward of {env_id} in this place. Another task's, or shifted?"
            _refuse(rows[far if far.any() else wrong], folder / f"rews_{i}", what)


def place(world: LegacyWorld, obs: list[np.ndarray]) -> None:
    """Puts agents and landmarks where the observations [O, rows] say; a prey without any, where agent 0 sees it."""
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
