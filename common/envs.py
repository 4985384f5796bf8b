"""Multi-agent tasks as ordinary gymnasium environments, and what is kept of a run in them.

`TeamEnv` turns a PettingZoo parallel environment into a `gymnasium.Env` with one observation array, one action array
and one reward, so that gymnasium's own vector environments, episode statistics and video wrappers work on it unchanged.
`find_task` says what `make_env` opens:

    mpe_<scenario>                     the cooperative scenarios of mpe2, and simple_adversary against a script
    mamujoco_<scenario>_<partition>    the robots of gymnasium-robotics' MaMuJoCo
    omar_<scenario>                    the tasks in which OMAR's offline data were made (`common/omar.py`)
    doors_blind                        two agents who must mix several ways (`common/doors.py`)

Definitions, used everywhere in this project:
    team reward = mean over the team's agents of the environment's own reward
    return      = sum of the team reward over one episode

Shape letters: E copies, N agents, O observation size (of the largest agent), A action size (likewise), S joint state.
"""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # the banner would come before our own first line

import farama_notifications
import gymnasium as gym
import mujoco
import numpy as np
import torch

farama_notifications.notifications.pop("gymnasium_robotics", None)  # printed at every import, about other robots
from gymnasium_robotics import mamujoco_v1
from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer
from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges
from mpe2 import (
    collect_treasure_v1, simple_adversary_v3, simple_formation_v1, simple_line_v1, simple_reference_v3,
    simple_speaker_listener_v4, simple_spread_v3, simple_v3,
)  # fmt: skip
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import aec_to_parallel

from common import BadInput, omar
from common.doors import BlindDoors

# Otherwise mujoco prints that a robot's file uses a deprecated attribute, once per copy, and keeps a log file of it.
mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(f"mujoco: {text}", file=sys.stderr))

Opponent = Callable[[np.ndarray], np.ndarray]  # own observation -> action in [-1, 1], like a team member's


@dataclass(frozen=True)
class Task:
    """How one task is made, and what stands for it in listings."""

    make: Callable[..., ParallelEnv]  # make(render_mode=); joints=, motion= too in MaMuJoCo, shift= in OMAR's scenarios
    description: str
    horizon: int = 25  # steps of the longest episode
    opponents: Mapping[str, Opponent] = field(default_factory=dict)  # agents outside the team, and each one's script
    own_state: bool = False  # the joint state is the environment's own, not all observations
    robot: bool = False  # simulated by MuJoCo: worth a process each; one reward for all agents
    terminates: bool = False  # an episode can end before its last step, by a fall
    scenario: str = ""  # of `common/omar.py`, where many copies are arrays
    shifts: tuple[str, ...] = ()  # how the environment can differ from the usual one, see `make_env`


# --- MPE ---


def _mpe(module, description: str, opponents: Mapping[str, Opponent] = {}, **kwargs) -> Task:
    """An MPE scenario: 25 steps, continuous actions."""

    def make(render_mode=None):  # `raw_env` leaves out PettingZoo's call-order checks, a third of the time
        env = module.raw_env(continuous_actions=True, max_cycles=25, render_mode=render_mode, **kwargs)
        return aec_to_parallel(env)

    return Task(make, description, opponents=opponents)


def scripted_adversary(obs: np.ndarray) -> np.ndarray:
    """The opponent of simple_adversary, which is not told which of the landmarks is the goal.

    It walks to the landmark that a good agent is closest to: the team does best with one agent on each. Its force is
    its distance from there, at most 1 on each axis; a larger one swings past it. Deterministic.

    obs: relative positions of two landmarks and two good agents [8] -> force [2] in [-1, 1].
    """
    landmarks, team = obs.reshape(2, 2, 2)  # [landmark, xy], [agent, xy]
    nearest = ((landmarks[:, None] - team) ** 2).sum(-1).min(1)  # [landmark] squared distance to the closest agent
    return np.clip(landmarks[nearest.argmin()], -1.0, 1.0)


TASKS: dict[str, Task] = {
    "mpe_simple_spread": _mpe(simple_spread_v3, "three agents cover three landmarks without colliding"),
    "mpe_simple_spread_n4": _mpe(simple_spread_v3, "four agents cover four landmarks without colliding", N=4),
    "mpe_simple_adversary": _mpe(
        simple_adversary_v3,
        "two agents reach the goal and keep a scripted adversary guessing which landmark it is",
        {"adversary_0": scripted_adversary},
    ),
    "mpe_simple": _mpe(simple_v3, "one agent goes to a landmark"),
    "mpe_simple_reference": _mpe(simple_reference_v3, "two agents tell each other where to go"),
    "mpe_simple_speaker_listener": _mpe(simple_speaker_listener_v4, "one agent sees the goal, the other can move"),
    "mpe_simple_formation": _mpe(simple_formation_v1, "four agents form a circle around a landmark"),
    "mpe_simple_line": _mpe(simple_line_v1, "four agents line up between two landmarks"),
    "mpe_collect_treasure": _mpe(collect_treasure_v1, "six collectors bring treasures to two movable deposits"),
}


# --- a task of this project ---

TASKS["doors_blind"] = Task(
    BlindDoors, "two agents look for the open one of four windows, blind", horizon=100, own_state=True, terminates=True
)


# --- OMAR's tasks ---


def _omar(scenario: str, description: str) -> Task:
    return Task(
        lambda render_mode=None, shift="": aec_to_parallel(omar.ParticleEnv(scenario, render_mode, shift)),
        f"{description}; OMAR's rewards and physics",
        opponents=omar.make_prey(scenario),
        scenario=scenario,
        shifts=("fewer" if scenario == "simple_spread_6" else "speed",),
    )


# HalfCheetah's shifts, as DOM2's (arXiv 2307.01472): what is drawn evenly, from which intervals, before each episode.
ROBOT_SHIFTS = {
    "random": {"power": [(0.8, 1.2)], "density": [(750.0, 1250.0)], "friction": [(0.25, 0.55)]},
    "extreme": {
        "power": [(0.6, 0.8), (1.2, 1.4)],
        "density": [(500.0, 750.0), (1250.0, 1500.0)],
        "friction": [(0.1, 0.25), (0.55, 0.7)],
    },
}
TASKS |= {
    "omar_simple_spread": _omar("simple_spread", "three agents cover three landmarks"),
    "omar_simple_tag": _omar("simple_tag", "three predators keep touching a prey among obstacles"),
    "omar_simple_world": _omar("simple_world", "three predators keep touching a prey in a wood"),
    "omar_simple_spread_6": _omar("simple_spread_6", "three agents cover any three of six landmarks"),
    "omar_halfcheetah_2x3": Task(
        partial(mamujoco_v1.parallel_env, "HalfCheetah", "2x3", agent_obsk=0, global_categories=()),
        "HalfCheetah-v5, 6 actuators shared by 2 agents, each of which sees its own joints only",
        horizon=1000,
        own_state=True,
        robot=True,
        shifts=tuple(ROBOT_SHIFTS),
    ),
}

# --- Multi-Agent MuJoCo ---

ROBOTS = {  # in gymnasium-robotics -> its partitions; of many segments an example of any agents x segments each
    "Ant": ("2x4", "2x4d", "4x2"), "HalfCheetah": ("2x3", "6x1"), "Walker2d": ("2x3",), "Swimmer": ("2x1",),
    "Hopper": ("3x1",), "Humanoid": ("9|8",), "HumanoidStandup": ("9|8",), "Reacher": ("2x1",), "Pusher": ("3p",),
    "ManySegmentSwimmer": ("10x2",), "ManySegmentAnt": ("2x3",),
}  # fmt: skip
EXTRAS = {  # what the state of a robot holds beside the positions and velocities of its joints
    "Ant": ["cfrc_ext"],
    **dict.fromkeys(("Humanoid", "HumanoidStandup"), ["cinert", "cvel", "qfrc_actuator", "cfrc_ext"]),
}


def _mamujoco(scenario: str, partition: str) -> Task:
    """A robot whose actuators are shared out among agents."""
    kind = scenario.removeprefix("ManySegment")  # Ant or Swimmer

    def make(render_mode=None, joints=None, motion=False):
        """joints: how far each agent sees. None: not at all, for callers that hand it the state (a third faster).
        motion: the state is positions and velocities of joints only."""
        options = dict(agent_obsk=joints or 0, render_mode=render_mode)
        options |= dict(local_categories=[[]], global_categories=()) if joints is None else {}
        extras = {f"include_{extra}_in_observation": not motion for extra in EXTRAS.get(kind, ())}
        if scenario != kind:  # upstream writes the robot's file into the installed package, where two processes collide
            generator = {"Ant": many_segment_ant, "Swimmer": many_segment_swimmer}[kind]
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "robot.xml")
                generator.gen_asset(n_segs=math.prod(map(int, partition.split("x"))), asset_path=path)
                options["gym_env"] = gym.make(f"{kind}-v5", xml_file=path, render_mode=render_mode, **extras)
        return mamujoco_v1.parallel_env(scenario, partition, **options, **extras)

    parts = [len(part) for part in get_parts_and_edges(scenario, partition)[0]]
    share = f"{parts[0]} each" if len(set(parts)) == 1 else " + ".join(map(str, parts))
    return Task(
        make,
        f"{scenario}-v5, {sum(parts)} actuators shared by {len(parts)} agents ({share})",
        gym.spec(f"{kind}-v5").max_episode_steps,
        own_state=True,
        robot=True,
        terminates=kind in ("Ant", "Walker2d", "Hopper", "Humanoid"),
        shifts=tuple(ROBOT_SHIFTS) if kind == "HalfCheetah" else (),
    )


# --- the list of tasks ---


def list_tasks() -> list[str]:
    """Every task by name; those of MaMuJoCo's many-segment robots are examples of any number of segments."""
    return [*TASKS, *(f"mamujoco_{robot.lower()}_{name}" for robot, listed in ROBOTS.items() for name in listed)]


def find_task(env_id: str) -> Task:
    """The task of that name. Raises `BadInput` with the closest names."""
    if env_id in TASKS:
        return TASKS[env_id]
    near = difflib.get_close_matches(env_id, list_tasks(), cutoff=0.5) or ["mpe_simple_spread", "mamujoco_ant_2x4"]
    for robot, listed in ROBOTS.items():
        if env_id.startswith(f"mamujoco_{robot.lower()}"):
            partition = env_id.removeprefix(f"mamujoco_{robot.lower()}_")
            many = "Segment" in robot and re.fullmatch(r"[1-9]\d?x[1-9]\d?", partition) and partition != "1x1"
            if partition in listed or many:
                return _mamujoco(robot, partition)
            near = [f"mamujoco_{robot.lower()}_{name}" for name in listed]
    raise BadInput(f"unknown task {env_id!r}; did you mean {' or '.join(near)}? --list-tasks shows all")


def task_table() -> str:
    """Every task with its sizes, a line each."""
    lines = [f"{'task':33} agents  {'observations':16} {'actions':20} state  steps  what it is"]
    brief = lambda sizes: ", ".join(f"{len(list(group))} x {size}" for size, group in itertools.groupby(sizes))
    for env_id in list_tasks():
        env, task = make_env(env_id), find_task(env_id)
        sizes = f"{env.num_agents:6}  {brief(env.obs_sizes):16} {brief(env.action_sizes):20} {env.state_size:5}"
        lines.append(f"{env_id:33} {sizes}  {task.horizon:5}  {task.description}")
    lines.append("MaMuJoCo's observations and states are those of --observation full; omad.py's default for Ants,")
    lines.append("motion, leaves contact forces out. Robots named manysegment... take any number of agents x segments.")
    lines.append("Names with a | in them need quotes. Defaults: python omad.py --help --env-id TASK")
    return "\n".join(lines)


# --- environments ---


def check_options(env_id: str, observation: str, prey: str, shift: str) -> tuple[Task, Mapping[str, Opponent]]:
    """The task and its opponents. Raises `BadInput` for an option that it does not have, see `make_env`."""
    task, robot = find_task(env_id), env_id.startswith("mamujoco_")
    if observation and not re.fullmatch(r"full|motion|k\d" if robot else "own", observation):
        offer = "'full', 'motion', 'k0', 'k1' ... 'k9'" if robot else "'own' only"
        raise BadInput(f"--observation {observation!r}: {env_id} offers {offer}")
    if shift not in ("", *task.shifts):
        offer = f"can be shifted by {' or '.join(map(repr, task.shifts))} only" if task.shifts else "cannot be shifted"
        raise BadInput(f"--shift {shift!r}: {env_id} {offer}")
    if prey and task.scenario not in omar.PREY_SIZES:
        raise BadInput(f"--prey {prey}: {env_id} has no prey, only omar_simple_tag and omar_simple_world have")
    return task, omar.make_prey(task.scenario, prey) if prey else task.opponents


def make_env(env_id: str, observation="", render_mode: str | None = None, prey="", shift="") -> gym.Env:
    """Opens one task.

    Args:
        env_id: a name that `find_task` knows.
        observation: what each agent sees. "own": what the environment gives it, the only setting of MPE and of OMAR's
            tasks. MaMuJoCo: "full" is the whole state and a one-hot agent id (HARL's setting); "motion" the same, but
            of the state only positions and velocities of joints, no contact forces of an Ant, for the critic too;
            "k0", "k1", ... its own joints and those at most k joints away. "" is "own" or, in MaMuJoCo, "full".
        render_mode: None or "rgb_array".
        prey: a file with the prey's network, for OMAR's tag and world; "" for the project's own.
        shift: how the environment differs from the one that policies were trained for; "" not at all. "speed" (OMAR's
            spread, tag, world): every agent has a pace of its own in each episode. "fewer" (omar_simple_spread_6):
            three landmarks are gone in each episode. "random", "extreme" (HalfCheetah): another body in each episode.

    Raises `BadInput` for what the task does not have.
    """
    task, opponents = check_options(env_id, observation, prey, shift)
    if render_mode and task.robot and sys.platform == "linux":  # not earlier: with it, mujoco's import needs libEGL
        os.environ.setdefault("MUJOCO_GL", "egl")  # gymnasium then draws without a screen
    kind = partial(ShiftedRobot, shift) if shift in ROBOT_SHIFTS else TeamEnv
    if env_id.startswith("mamujoco_"):
        joints = int(observation[1:]) if observation.startswith("k") else None
        robot = task.make(render_mode=render_mode, joints=joints, motion=observation == "motion")
        return kind(robot, own_state=True, observe_state=joints is None)
    inside = {"shift": shift} if task.scenario else {}
    return kind(task.make(render_mode=render_mode, **inside), opponents, own_state=task.own_state)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_vec(env_id: str, num_envs: int, observation="", processes: bool | None = None, prey="", shift=""):
    """`num_envs` copies in one of gymnasium's vector environments, each with episode statistics in `info["episode"]`.

    With `processes` every copy has a process of its own, as many at work at a time as there are cores. By default 2 to
    64 MuJoCo robots have, where there are four cores or more: on two, measured, what they tell each other costs more
    than they gain. OMAR's particle tasks are arrays of all copies, with the same numbers: 30 times as fast with 32.
    Autoreset is off: `step` returns the true final observation and state of an episode, and the caller restarts the
    finished copies with `reset(options={"reset_mask": done})`. The other arguments are those of `make_env`.
    """
    task, _ = check_options(env_id, observation, prey, shift)
    if task.scenario:
        return gym.wrappers.vector.RecordEpisodeStatistics(omar.ParticleVec(task.scenario, num_envs, prey, shift))
    make = lambda: gym.wrappers.RecordEpisodeStatistics(make_env(env_id, observation, prey=prey, shift=shift))
    disabled = gym.vector.AutoresetMode.DISABLED
    if processes is None:
        processes = task.robot and 1 < num_envs <= 64 and cores() >= 4
    if processes:
        return gym.vector.AsyncVectorEnv([make] * num_envs, autoreset_mode=disabled, max_concurrency=cores())
    return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=disabled)


class TeamEnv(gym.Env):
    """A team of N agents behind the interface of a single-agent environment.

    observation  [N, O] float32; agent i's own numbers first, then zeros (`obs_mask` marks the real ones)
    action       [N, A] in [-1, 1]; entries outside `action_mask` are ignored, values beyond the box are clipped
    reward       the team reward (module docstring)
    info         "state" [S]: the joint state, without padding;
                 "agent_rewards" [N]: what the environment gave each agent (zeros on reset);
                 "torso_xy" [2]: where the robot is, in metres, after a step (only robots that move in a plane)

    Args:
        env: the environment.
        opponents: the agents that are not of the team, and the script each follows. What they earn is not counted.
        own_state: the joint state is the environment's `state()`; otherwise every team member's observation in a row.
        observe_state: every agent observes the joint state, followed by its own one-hot id.

    Attributes: `num_agents` N, `obs_sizes` and `action_sizes` per agent, `obs_mask` [N, O], `action_mask` [N, A],
    `state_size` S. The final observation and state of an episode are returned by `step` like any other.
    """

    def __init__(self, env: ParallelEnv, opponents: Mapping[str, Opponent] = {}, own_state=False, observe_state=False):
        self.env, self.opponents, self.own_state, self.observe_state = env, opponents, own_state, observe_state
        self.agents = [agent for agent in env.possible_agents if agent not in opponents]
        self.num_agents = len(self.agents)
        inner = getattr(env, "single_agent_env", env)  # of MaMuJoCo
        self.render_mode = inner.render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": inner.metadata.get("render_fps", 10)}
        self._converters = {agent: _action_converter(env, agent) for agent in env.possible_agents}
        self._opponent_obs: dict[str, np.ndarray] = {}
        self.obs_sizes = [env.observation_space(agent).shape[0] for agent in self.agents]
        self.state_size = env.state().size if own_state else sum(self.obs_sizes)
        if observe_state:
            self.obs_sizes = [self.state_size + self.num_agents] * self.num_agents
        self.action_sizes = [self._converters[agent][0] for agent in self.agents]
        self.obs_mask = np.arange(max(self.obs_sizes)) < np.array(self.obs_sizes)[:, None]  # [N, O]
        self.action_mask = np.arange(max(self.action_sizes)) < np.array(self.action_sizes)[:, None]  # [N, A]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.obs_mask.shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_mask.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        observations, _ = self.env.reset(seed=seed)
        return self._gather(observations, np.zeros(self.num_agents, np.float32))

    def step(self, action: np.ndarray):
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        own = dict(zip(self.agents, action))
        own |= {name: script(self._opponent_obs[name]) for name, script in self.opponents.items()}
        moves = {agent: self._converters[agent][1](numbers) for agent, numbers in own.items()}
        observations, rewards, terminations, truncations, infos = self.env.step(moves)
        terminated = all(terminations[agent] for agent in self.agents)
        truncated = not terminated and all(terminations[agent] or truncations[agent] for agent in self.agents)
        obs, info = self._gather(observations, np.array([rewards[agent] for agent in self.agents], np.float32))
        about = infos.get(self.agents[0], {})
        if "x_position" in about and "y_position" in about:
            info["torso_xy"] = np.array([about["x_position"], about["y_position"]], np.float32)
        return obs, float(info["agent_rewards"].mean()), terminated, truncated, info

    def _gather(self, observations: dict[str, np.ndarray], agent_rewards: np.ndarray):
        self._opponent_obs = {name: observations[name] for name in self.opponents}
        every = np.concatenate([observations[agent] for agent in self.agents], dtype=np.float32)
        state = self.env.state().astype(np.float32) if self.own_state else every  # [S]
        obs = np.zeros(self.obs_mask.shape, np.float32)  # [N, O]
        if self.observe_state:
            obs[:, : self.state_size], obs[:, self.state_size :] = state, np.eye(self.num_agents)
        else:
            obs[self.obs_mask] = every  # row by row: agent after agent, padding stays zero
        return obs, {"state": state, "agent_rewards": agent_rewards}

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


class ShiftedRobot(TeamEnv):
    """HalfCheetah whose body is redrawn at each reset, see `ROBOT_SHIFTS`: the factor on all motors' gears, the density
    of the torso (usually 1000: its mass and inertia follow), and the sliding friction of all surfaces (usually 0.4)."""

    def __init__(self, shift: str, env: ParallelEnv, *options, **more):
        super().__init__(env, *options, **more)
        robot = env.single_agent_env.unwrapped
        self.ranges, self.model, self.data = ROBOT_SHIFTS[shift], robot.model, robot.data
        self.torso, self.generator = self.model.body("torso").id, np.random.default_rng()
        self.usual = [x.copy() for x in (self.model.actuator_gear, self.model.body_mass, self.model.body_inertia)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is not None:  # a generator of its own, so that the starts are those of the usual environment
            self.generator = np.random.default_rng([seed, 1])
        draws = {}
        for name, intervals in self.ranges.items():
            sizes = np.array([high - low for low, high in intervals])
            low, high = intervals[self.generator.choice(len(intervals), p=sizes / sizes.sum())]
            draws[name] = self.generator.uniform(low, high)
        gear, mass, inertia = self.usual
        heavier = draws["density"] / 1000.0
        self.model.actuator_gear[:] = gear * draws["power"]
        self.model.body_mass[self.torso] = mass[self.torso] * heavier
        self.model.body_inertia[self.torso] = inertia[self.torso] * heavier
        self.model.geom_friction[:, 0] = draws["friction"]
        mujoco.mj_setConst(self.model, self.data)  # what follows from the masses
        return super().reset(seed=seed, options=options)


def _action_converter(env: ParallelEnv, agent: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Size of an agent's action in [-1, 1], and the function that turns it into the environment's own (float32).

    In general [-1, 1] is stretched onto the action space. MPE moves an agent by the force [a2 - a1, a4 - a3], four
    numbers for two: each sign is put in its own slot. Communication follows, from [-1, 1] onto [0, 1].
    """
    space = env.action_space(agent)
    size, low, high = space.shape[0], space.low, space.high

    def stretch(action: np.ndarray) -> np.ndarray:
        return low + (action[:size] + 1) / 2 * (high - low)

    def force(action: np.ndarray) -> np.ndarray:
        fx, fy, *message = action[: size - 3].tolist()
        own = [0.0, max(-fx, 0.0), max(fx, 0.0), max(-fy, 0.0), max(fy, 0.0), *((m + 1) / 2 for m in message)]
        return np.array(own, np.float32)

    if (low == -1).all() and (high == 1).all():
        return size, lambda action: action[:size]
    bodies = getattr(getattr(env.unwrapped, "world", None), "agents", None)  # MPE only
    movable = bodies is not None and bodies[env.possible_agents.index(agent)].movable
    return (size - 3, force) if movable else (size, stretch)


# --- what is kept of a run ---


Act = Callable[[np.ndarray], np.ndarray]  # observations [E, N, O] -> actions [E, N, A]


def check_video(wanted: bool = True) -> None:
    """Raises `BadInput` if videos are wanted and cannot be made."""
    if wanted and not importlib.util.find_spec("moviepy"):
        raise BadInput("--capture-video needs the package moviepy, see requirements.txt")


def evaluate(act: Act, envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """Team returns [E] of one episode in each of `envs`; start states and the noise of `act` depend on `seed` only."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the caller goes on as if nothing had been drawn
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        returns, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
        while not finished.all():
            obs, _, terminated, truncated, info = envs.step(act(obs))
            done = terminated | truncated
            if done.any():
                first = done & ~finished  # an environment that is done early runs on; only its first episode counts
                returns[first] = info["episode"]["r"][first]
                finished |= done
                obs, _ = envs.reset(options={"reset_mask": done})
    return returns


def record_video(act: Act, env_id: str, folder: Path, seed: int, observation="", prey="", shift="") -> None:
    """Videos of a policy through gymnasium's own wrapper, four short episodes or a long one; needs no screen.

    The start states are those of `seed`, `seed` + 1, ...; other arguments are those of `make_env`. Raises `BadInput`.
    """
    check_video()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older videos in the folder are replaced
        env = make_env(env_id, observation, "rgb_array", prey, shift)
        env = gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda _: True)
    for episode in range(4 if find_task(env_id).horizon <= 100 else 1):
        obs, done = env.reset(seed=seed + episode)[0], False
        while not done:
            obs, _, terminated, truncated, _ = env.step(act(obs[None])[0])
            done = terminated or truncated
    env.close()
    print(f"videos    {folder}")


def demonstrate(act: Act, env_id: str, episodes: int, seed: int, film: str = "", **options) -> float:
    """Prints and returns a policy's mean return over so many episodes; films it into videos/, in or beside `film`.

    `options` are those of `make_env`; the returns depend on `seed` only, a film's noise does not.
    """
    returns = evaluate(act, make_vec(env_id, episodes, **options), seed)
    said = ", ".join(
        [env_id, *(f"{name} {value}" for name, value in options.items() if value and name != "observation")]
    )
    print(f"{said}: return {returns.mean():.2f} ± {returns.std():.2f} over {episodes} episodes")
    if film:
        folder = Path(film) if Path(film).is_dir() else Path(film).parent
        record_video(act, env_id, folder / "videos", seed, **options)
    return float(returns.mean())


class RecordPositions(gym.vector.VectorWrapper):
    """Remembers where robots that move in a plane are after every step; `before`: the `positions` of a resumed run.

    Raises `FloatingPointError` at the first observation or reward that is not finite, before anything learns from it.
    """

    def __init__(self, envs: gym.vector.VectorEnv, before: np.ndarray | tuple = ()):
        super().__init__(envs)
        self._xy = bytearray(np.asarray(before, np.float32).tobytes())

    def step(self, actions):
        result = self.env.step(actions)
        if not (np.isfinite(result[0]).all() and np.isfinite(result[1]).all()):
            raise FloatingPointError("an observation or a reward of the environment is not finite")
        self._xy += result[4].get("torso_xy", np.zeros(0)).astype(np.float32).tobytes()
        return result

    @property
    def positions(self) -> np.ndarray:
        """[environment steps, 2] in metres: step after step, and in each step copy after copy."""
        return np.frombuffer(bytes(self._xy), np.float32).reshape(-1, 2)


def draw_curve(evaluations: list[dict], xlabel: str, path: Path) -> None:
    """The return at each evaluation against `step`, with bars of one standard deviation, as a picture."""
    from matplotlib.figure import Figure  # here, as it takes half a second, which no other use of this module needs

    steps, means, stds = ([row[name] for row in evaluations] for name in ("step", "return_mean", "return_std"))
    axis = Figure(layout="constrained").add_subplot(xlabel=xlabel, ylabel="team return (bars: std)")
    axis.errorbar(steps, means, stds, marker=".")
    axis.figure.savefig(path)


def versions() -> dict:
    """What makes runs and data: the machine, this project's revision, Python, and the packages."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        revision = "unknown"
    packages = "torch numpy gymnasium gymnasium-robotics mujoco pettingzoo mpe2 tyro tensorboard".split()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}",
        "git_revision": revision,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def sha256(path: str | Path) -> str:
    """Checksum of a file that a run or a data set depends on."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mix_seed(*parts: int) -> int:
    """One well-mixed seed from several numbers, below 2^31 so that environments can count up from it."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] // 2)
