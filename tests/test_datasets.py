"""Data sets: what collect.py makes, what the loader refuses, and the formats of others."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import behaviour
import cards
import collect
import convert
import gymnasium as gym
import numpy as np
import pytest
import scripts
import torch
import tyro

import omad
from common import checks
from common.datasets import (
    FOLDERS, SCORES, AgentArray, check_sizes, find_env_id, is_folder, layout, load_dataset, normalize, open_dataset,
    split_episodes,
)  # fmt: skip
from common.envs import BadInput, evaluate, make_env, make_vec, mix_seed
from conftest import ROOT

TINY = dict(
    total_timesteps=800, num_envs=4, eval_every=200, eval_episodes=3, learning_starts=80, batch_size=32, policy_hidden=16,
    critic_hidden=16, denoising_steps=3, updates_per_step=0.25,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "CHUNK", 1000)
        yield


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Behaviour policies that have learned nothing, for spread."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, level in enumerate(("medium", "expert")):
        args = dataclasses.replace(omad.preset("omar_simple_spread"), seed=7, **TINY)
        torch.manual_seed(seed)
        env = make_env(args.env_id)
        policy = omad.POLICIES[args.policy](env.obs_sizes, env.action_sizes, args)
        torch.save(policy.state_dict(), folder / f"{args.env_id}-{level}.pt")
        about = {
            "format": behaviour.FORMAT, "task": args.env_id, "level": level, "command": "python omad.py", "seed": 7, "steps": 800,
            "return": {"mean": 0.0, "std": 0.0, "episodes": 1}, "git_revision": "none", "args": dataclasses.asdict(args),
        }  # fmt: skip
        (folder / f"{args.env_id}-{level}.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, policies):
    """made(name, transitions, seed=0, part="") -> the folder of that data set, made once."""
    root, done = tmp_path_factory.mktemp("data"), {}

    def make(name, transitions, seed=0, part=""):
        key = (name, transitions, seed, part)
        if key not in done:
            out = root / f"{len(done)}"
            collect.CHUNK = 1000 if transitions <= 10_000 else 10_000  # large ones are quicker that way
            done[key] = collect.collect(collect.Options(name, transitions, seed, out=out, policies=policies))
        return done[key]

    return make


def arrays(folder):
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def sums(folder):
    return json.loads((folder / "card.json").read_bytes())["files"]


# --- what is made ---


def test_a_data_set_is_laid_out_like_omars(made):
    folder = made("omar_simple_spread-random", 1000, 3)
    assert folder.parts[-3:] == ("simple_spread", "random", "seed_3_data")
    files = arrays(folder)
    assert set(files) == {f"{kind}_{i}" for kind in ("obs", "acs", "rews", "next_obs", "dones") for i in range(3)}
    assert {name: array.shape for name, array in files.items() if name.endswith("1")} == {
        "obs_1": (1000, 18), "acs_1": (1000, 2), "rews_1": (1000,), "next_obs_1": (1000, 18), "dones_1": (1000,)
    }  # fmt: skip
    assert {array.dtype for array in files.values()} == {np.dtype(np.float32)} and not files["dones_0"].any()
    assert {path.name for path in folder.iterdir()} == {f"{name}.npy" for name in files} | {"card.json"}
    assert not list(folder.parent.glob("*.tmp"))
    tag = arrays(made("omar_simple_tag-random", 500))
    assert tag["obs_3"].shape == (500, 14) and tag["obs_0"].shape == (500, 16) and tag["acs_3"].shape == (500, 2)
    cheetah = made("omar_halfcheetah_2x3-random", 2000)
    files = arrays(cheetah)
    assert cheetah.parts[-3] == "HalfCheetah-v2" and files["states_1"].shape == (2000, 17)
    assert [np.flatnonzero(files[f"dones_{i}"]).tolist() for i in range(2)] == [
        [999, 1999]
    ] * 2  # as OMAR's, which readers rely on
    for kind in ("states", "next_states", "rews"):
        np.testing.assert_array_equal(files[f"{kind}_0"], files[f"{kind}_1"])
    for kind in ("", "next_"):  # to the very end of an episode: foot, shin and thigh of each half
        for i, own in enumerate(((2, 1, 0), (5, 4, 3))):
            joints = files[f"{kind}states_0"][:, [k for j in own for k in (2 + j, 11 + j)]]
            np.testing.assert_allclose(files[f"{kind}obs_{i}"], joints, rtol=1e-6)
    np.testing.assert_array_equal(files["next_obs_0"][:999], files["obs_0"][1:1000])
    assert (
        np.abs(files["next_obs_0"][999] - files["obs_0"][999]).max()
        > 0
        != np.abs(files["next_obs_0"][999] - files["obs_0"][1000]).max()
    )


@pytest.mark.parametrize("env_id", FOLDERS)
def test_rows_are_what_happens_in_the_environment(env_id, made):
    """From the start state of an episode, the recorded actions lead through the recorded rows, in an environment of one copy."""
    horizon = 1000 if "cheetah" in env_id else 25
    files = arrays(made(f"{env_id}-random", 2 * horizon if "cheetah" in env_id else 500))
    env = make_env(env_id)
    first = horizon  # the second episode
    if "cheetah" in env_id:
        env.reset(seed=0)
        robot = env.env.single_agent_env.unwrapped
        state = files["states_0"][first]
        robot.set_state(np.concatenate([[0.0], state[:8]]), state[8:])
    else:
        env.reset(seed=0)
        world = env.env.unwrapped.world
        obs = [files[f"obs_{i}"][first] for i in range(len(world.agents))]
        for agent, seen in zip(world.agents, obs):
            agent.state.p_vel, agent.state.p_pos = seen[:2].astype(float), seen[2:4].astype(float)
        for k, landmark in enumerate(world.landmarks):
            landmark.state.p_pos = (obs[0][2:4] + obs[0][4 + 2 * k : 6 + 2 * k]).astype(float)
        for name in env.opponents:
            env._opponent_obs[name] = env.env.unwrapped.observe(name)
    for row in range(first, first + (25 if horizon == 25 else 10)):
        actions = np.stack([files[f"acs_{i}"][row] for i in range(env.num_agents)])
        obs, reward, terminated, _, info = env.step(actions)
        for i in range(env.num_agents):
            np.testing.assert_allclose(obs[i], files[f"next_obs_{i}"][row], atol=2e-3)
            assert info["agent_rewards"][i] == pytest.approx(files[f"rews_{i}"][row], abs=2e-2)
            assert files[f"dones_{i}"][row] == 0 == terminated
        if env.opponents:
            np.testing.assert_allclose(env.env.unwrapped.observe("agent_0"), files["next_obs_3"][row], atol=2e-3)


def test_the_prey_s_rows(made):
    files = arrays(made("omar_simple_tag-random", 500))
    prey = make_env("omar_simple_tag").opponents["agent_0"]
    np.testing.assert_allclose(files["acs_3"], prey(files["obs_3"]), atol=1e-6)
    last = np.arange(500) % 25 == 24
    np.testing.assert_array_equal(files["next_obs_3"][:-1][~last[:-1]], files["obs_3"][1:][~last[:-1]])
    assert files["rews_3"].std() > 0 and not np.array_equal(files["rews_3"], files["rews_0"])


def test_the_same_arguments_make_the_same_data(made, policies):
    for name in ("omar_simple_spread-random", "omar_simple_spread-medium-expert", "omar_simple_spread-medium-replay"):
        assert sums(made(name, 800)) == sums(made(name, 800, part="again"))
        if "replay" not in name:
            assert sums(made(name, 800)) != sums(made(name, 800, 1))
    other = collect.Options("omar_simple_spread-medium-replay", seed=1, policies=policies)
    assert collect.replay_args(other, "omar_simple_spread").seed == 8  # another run
    # A longer one of the same seed begins like it, where chunks have the same length.
    short, long = (arrays(made("omar_simple_spread-random", n)) for n in (1000, 2000))
    np.testing.assert_array_equal(short["obs_0"], long["obs_0"][:1000])
    assert not np.array_equal(long["acs_0"][:25], long["acs_0"][1000:1025])  # every chunk is another one
    starts = {
        tuple(arrays(made(f"omar_simple_spread-{split}", 1000, seed))["obs_0"][0])
        for split in ("random", "medium", "expert")
        for seed in (0, 1)
    }
    # Every player, seed and chunk starts elsewhere.
    assert len(starts | {tuple(long["obs_0"][0]), tuple(long["obs_0"][1000])}) == 7


def test_start_states_and_actions_are_not_correlated(made):
    """One seed for both would give 152 instead of 160 in spread."""
    files = arrays(made("omar_simple_spread-random", 50_000))
    start = np.arange(0, 50_000, 25)
    for i in range(3):
        for j in range(3):
            corr = np.corrcoef(np.hstack([files[f"obs_{i}"][start, 2:4], files[f"acs_{j}"][start]]).T)[:2, 2:]
            assert np.abs(corr).max() < 0.1  # 2000 episodes: a standard deviation of 0.022
    returns = load_dataset(str(made("omar_simple_spread-random", 50_000))).returns
    assert abs(returns.mean() - 160) < 4 and abs(returns.std() - 60) < 3  # OMAR's data: 160 ± 60


def test_mixed_splits_are_the_first_halves_of_two(made):
    mixed, random, medium, expert = (
        arrays(made(f"omar_simple_spread-{split}", n))
        for split, n in (("random-medium", 1000), ("random", 1000), ("medium", 1000), ("expert", 1000))
    )
    random, medium, expert = (
        {name: array[:500] for name, array in files.items()} for files in (random, medium, expert)
    )
    np.testing.assert_array_equal(mixed["acs_1"][:500], random["acs_1"])
    np.testing.assert_array_equal(mixed["acs_1"][500:], medium["acs_1"])
    assert not np.array_equal(medium["acs_1"], expert["acs_1"])
    mixed = arrays(made("omar_simple_spread-medium-expert", 1000))
    np.testing.assert_array_equal(mixed["next_obs_2"][500:], expert["next_obs_2"])
    np.testing.assert_array_equal(mixed["next_obs_2"][:500], medium["next_obs_2"])


def test_behaviour_policies_act_with_their_own_noise(policies):
    policy, _ = behaviour.load_behaviour("omar_simple_spread", "medium", policies)
    obs, act = make_vec("omar_simple_spread", 6).reset(seed=0)[0], omad.make_act(policy)
    one, same, other = (torch.manual_seed(seed) and act(obs) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (6, 3, 2) and not np.array_equal(one, other)


@pytest.mark.parametrize("path", sorted(behaviour.POLICIES.glob("*.pt")), ids=lambda path: path.stem)
def test_the_policies_that_made_the_data_still_act_as_they_did(path):
    env_id, _, level = path.stem.rpartition("-")
    policy, about = behaviour.load_behaviour(env_id, level)
    episodes, wanted = 8 if "halfcheetah" in env_id else 200, about["return"]
    returns = evaluate(omad.make_act(policy), make_vec(env_id, episodes), 5)
    assert abs(returns.mean() - wanted["mean"]) < 4 * wanted["std"] / episodes**0.5


class Spy(gym.vector.VectorWrapper):
    """Keeps what happens, step by step: observations before and after [E, N, 2 O], and rewards [E]."""

    def __init__(self, envs):
        super().__init__(envs)
        self.seen, self.rewards = [], []

    def reset(self, **options):
        self.obs, info = self.env.reset(**options)
        return self.obs, info

    def step(self, actions):
        result = self.env.step(actions)
        self.seen.append(np.concatenate([self.obs, result[0]], 2))
        self.rewards.append(result[1])
        self.obs = result[0]
        return result


def test_medium_replay_is_what_happens_in_the_training_run(made, policies, tmp_path):
    """Its rows are those of a plain `omad.py` run of the same arguments, in another order: episode after episode."""
    files = arrays(made("omar_simple_spread-medium-replay", 800))
    args = behaviour.load_behaviour("omar_simple_spread", "medium", policies)[1]["args"]
    spy = Spy(make_vec(args.env_id, args.num_envs))
    omad.train(dataclasses.replace(args, run_dir=str(tmp_path)), envs=spy)
    (run,) = tmp_path.iterdir()
    order = lambda rows: rows[np.lexsort(rows.T)]
    ours = np.hstack([np.hstack([files[f"obs_{i}"], files[f"next_obs_{i}"]]) for i in range(3)])
    theirs = np.concatenate(spy.seen).reshape(800, -1)
    np.testing.assert_array_equal(order(ours), order(theirs))
    rewards = np.mean([files[f"rews_{i}"] for i in range(3)], 0)
    np.testing.assert_allclose(np.sort(np.concatenate(spy.rewards)), np.sort(rewards), rtol=1e-5)
    last = np.arange(800) % 25 == 24
    np.testing.assert_array_equal(files["next_obs_0"][:-1][~last[:-1]], files["obs_0"][1:][~last[:-1]])
    card = json.loads((made("omar_simple_spread-medium-replay", 800) / "card.json").read_bytes())
    about, last = card["behaviour"][0]["policy"], omad.load_policy(run / "policy.pt")[1]
    assert about["return"]["mean"] == round(last["return_mean"], 2) and about["steps"] == 800
    assert about["ends_as_the_medium_policy"] is False  # that of these tests was never trained
    short = arrays(made("omar_simple_spread-medium-replay", 200))  # its first part
    np.testing.assert_array_equal(short["acs_0"], files["acs_0"][:200])


def called(program, monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of a program's `main`."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    capsys.readouterr()
    try:
        code = program.main()
    except SystemExit as stop:  # tyro's
        code = stop.code
    return code, *capsys.readouterr()


def interrupted(monkeypatch, owner, method, calls):
    """Lets the user press Ctrl-C in the given call of a method."""
    plain, count = getattr(owner, method), iter(range(1, 10**6))

    def press(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, method, press)


PLACES = {  # where somebody presses Ctrl-C: split, method, its call
    "between two parts": ("medium-expert", (collect.Writer, "save"), 2),
    "in the middle of a part": ("medium-expert", (collect.Recorder, "step"), 60),
    "at an evaluation": ("medium-replay", (omad, "evaluate"), 3),
    "between two evaluations": ("medium-replay", (collect.Recorder, "step"), 130),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_command_goes_on_where_it_was(place, made, policies, tmp_path, monkeypatch, capsys):
    split, method, calls = PLACES[place]
    rows = 4000 if split == "medium-expert" else 800
    options = collect.Options(f"omar_simple_spread-{split}", rows, out=tmp_path, policies=policies)
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, *method, calls)
        collect.collect(options)
    part = tmp_path / f"simple_spread/{split}/.seed_0_data.unfinished"
    with pytest.raises(BadInput, match="rows that were never filled"):
        load_dataset(part)
    steps, play = [], collect.Recorder.step
    monkeypatch.setattr(
        collect.Recorder, "step", lambda self, actions: steps.append(self.num_envs) or play(self, actions)
    )
    capsys.readouterr()
    folder = collect.collect(options)
    assert "going on" in capsys.readouterr().out and 0 < sum(steps) < rows  # not all over again
    assert sums(folder) == sums(made(f"omar_simple_spread-{split}", rows))
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()} == {
        "simple_spread", f"simple_spread/{split}", f"simple_spread/{split}/seed_0_data"
    }  # fmt: skip
    assert not list(tmp_path.rglob(".*")) and not (folder / "progress.json").exists()


def test_an_unfinished_data_set_of_other_arguments_is_not_gone_on_with(made, policies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)
    options = collect.Options("omar_simple_spread-random", 3000, out=tmp_path, policies=policies)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, collect.Writer, "save", 2)
        collect.collect(options)
    folder = collect.collect(dataclasses.replace(options, transitions=1000))
    assert "thrown away" in capsys.readouterr().out
    assert sums(folder) == sums(made("omar_simple_spread-random", 1000))


def test_new_weights_of_a_policy_are_another_origin(policies, tmp_path, monkeypatch):
    own = tmp_path / "policies"
    shutil.copytree(policies, own)
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)
    options = collect.Options("omar_simple_spread-medium", 5000, out=tmp_path, policies=own)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, collect.Writer, "save", 3)
        collect.collect(options)
    shutil.copy(own / "omar_simple_spread-expert.pt", own / "omar_simple_spread-medium.pt")
    folder = collect.collect(options)
    fresh = collect.collect(dataclasses.replace(options, out=tmp_path / "fresh"))
    assert sums(folder) == sums(fresh)


def test_two_processes_do_not_make_the_same_data_set(policies, tmp_path):
    folder = tmp_path / "simple_spread/random/seed_0_data"
    files, _, _ = layout("omar_simple_spread")
    first = collect.Writer(folder, "omar_simple_spread", files, 50, {})
    with pytest.raises(BadInput, match="another process is making this data set"):
        collect.collect(collect.Options("omar_simple_spread-random", 1000, out=tmp_path))
    first.discard()
    collect.collect(collect.Options("omar_simple_spread-random", 1000, out=tmp_path))


def test_a_disk_that_is_too_small_says_so_at_once_and_stays_as_it_was(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    argv = ["--dataset", "omar_simple_spread-random", "--out", tmp_path]
    assert called(collect, monkeypatch, capsys, *argv)[::2] == (
        3,
        "collect.py: failed: [Errno 28] No space left on device\n",
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "split, when",
    [
        ("random", "before it has its name"),
        ("random", "when it has its name"),
        ("medium-replay", "before it has its name"),
    ],
)
def test_a_kill_in_the_last_moment_loses_nothing(split, when, made, policies, tmp_path, monkeypatch):
    options = collect.Options(f"omar_simple_spread-{split}", 800, out=tmp_path, policies=policies)
    replace, whole = os.replace, sums(made(options.dataset, 800))

    def kill(old, new):
        if str(new).endswith("seed_0_data"):
            if when == "when it has its name":
                replace(old, new)
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        collect.collect(options)
    folder = tmp_path / f"simple_spread/{split}/seed_0_data"
    if when == "before it has its name":
        monkeypatch.setattr(collect.Recorder, "step", None)  # nothing is played again
        assert collect.collect(options) == folder
    assert sums(folder) == whole and len(load_dataset(folder).returns) == 32


def test_a_failed_restart_keeps_what_is_there(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)
    options = collect.Options("omar_simple_spread-random", 5000, out=tmp_path, policies=policies)
    for owner, method, calls in ((collect.Writer, "save", 3), (collect.Writer, "_open", 2)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted(patch, owner, method, calls)
            collect.collect(options)
        assert (tmp_path / "simple_spread/random/.seed_0_data.unfinished/progress.json").exists()
    collect.collect(options)


def test_a_data_set_begun_with_other_versions_is_not_gone_on_with(policies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "SAVE_EVERY", 0.0)
    options = collect.Options("omar_simple_spread-random", 5000, out=tmp_path, policies=policies)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect, "versions", lambda: {"packages": {"numpy": "older"}})
        interrupted(patch, collect.Writer, "save", 3)
        collect.collect(options)
    collect.collect(options)
    assert "thrown away: an unfinished data set of other arguments, packages or code" in capsys.readouterr().out


def test_a_killed_process_loses_nothing(made, tmp_path):
    code = "import collect, sys; collect.SAVE_EVERY, collect.CHUNK = 0.0, 1000; sys.exit(collect.main())"
    command = [sys.executable, "-c", code, "--dataset", "omar_simple_world-random", "--transitions", "10000"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "datasets"), os.environ.get("PYTHONPATH", "")])
    }
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, env=environment)
    part = tmp_path / "simple_world/random/.seed_0_data.unfinished/progress.json"
    deadline = time.time() + 120
    while not part.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists(), "it was done before it could be killed"
    folder = collect.collect(collect.Options("omar_simple_world-random", 10_000, out=tmp_path))
    assert sums(folder) == sums(made("omar_simple_world-random", 10_000))


def test_runs_whose_evaluations_cut_episodes_are_not_recorded(policies, tmp_path):
    shutil.copytree(policies, tmp_path / "policies")
    path = tmp_path / "policies/omar_simple_spread-medium.json"
    about = json.loads(path.read_bytes())
    about["args"]["eval_every"] = 150
    path.write_text(json.dumps(about))
    with pytest.raises(BadInput, match="cannot be recorded: eval_every is no multiple of 100"):
        collect.collect(
            collect.Options("omar_simple_spread-medium-replay", out=tmp_path, policies=tmp_path / "policies")
        )
    assert not (tmp_path / "simple_spread").exists()
    files, _, _ = layout("omar_simple_spread")
    writer = collect.Writer(tmp_path / "x", "omar_simple_spread", files, 100, {})
    recorder = collect.Recorder(make_vec("omar_simple_spread", 4), writer, 0, 100)
    recorder.reset(seed=0)
    recorder.step(np.zeros((4, 3, 2)))
    with pytest.raises(AssertionError, match="start afresh together"):
        recorder.reset(seed=1)
    writer.discard()


def test_the_card(made, policies):
    folder = made("omar_simple_spread-medium-expert", 1000, 2)
    card, files = json.loads((folder / "card.json").read_bytes()), arrays(folder)
    team = np.mean([files[f"rews_{i}"] for i in range(3)], 0).reshape(-1, 25).sum(1)
    assert card["return"] == {key: pytest.approx(value, abs=1e-2) for key, value in
                              dict(mean=team.mean(), std=team.std(), min=team.min(), max=team.max()).items()}  # fmt: skip
    assert (card["task"], card["split"], card["seed"], card["transitions"], card["episodes"]) == (
        "omar_simple_spread", "medium-expert", 2, 1000, 40
    )  # fmt: skip
    assert [part["level"] for part in card["behaviour"]] == ["medium", "expert"] and sum(
        card["histogram"]["counts"]
    ) == 40
    assert (
        card["behaviour"][0]["policy"]["command"] == "python omad.py" and card["packages"]["torch"] == torch.__version__
    )
    assert card["files"]["acs_2.npy"] == hashlib.sha256((folder / "acs_2.npy").read_bytes()).hexdigest()
    assert card["git_revision"] and [part["episodes"] for part in card["behaviour"]] == [20, 20]
    medium = (policies / "omar_simple_spread-medium.pt").read_bytes()
    assert (
        card["behaviour"][0]["policy"]["sha256"] == hashlib.sha256(medium).hexdigest()
        and "--policies" in card["command"]
    )
    assert card["dones"].startswith("0 throughout") and card["command"].startswith(
        "python datasets/collect.py --dataset omar_simple_spread-medium"
    )
    assert json.loads((made("omar_simple_tag-random", 500) / "card.json").read_bytes())["prey"] == "the project's own"


def test_adaptive_agents_take_the_assignment_that_is_cheapest_at_the_moment(made):
    files = arrays(made("omar_simple_spread-adaptive", 10_000))
    obs, action = (np.stack([files[f"{kind}_{i}"] for i in range(3)], 1) for kind in ("obs", "acs"))
    script = scripts.spread(None, None, None, gain=4.0)(obs)
    noise = (action - script)[np.abs(script) < 0.2]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(0.45, abs=0.04)
    order = np.linalg.norm(obs[24::25, :, 4:10].reshape(400, 3, 3, 2), axis=-1).argmin(-1)  # where they end
    kinds, counts = np.unique(order[np.sort(order) @ [1, 10, 100] == 210], axis=0, return_counts=True)
    assert len(kinds) == 6 and counts.min() > 20 and counts.sum() > 300  # each at its own, and all ways about alike


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--dataset", "omar_simple_spred-medium"], "did you mean omar_simple_spread-medium"),
        (["--dataset", "omar_simple_spread"], "did you mean"),
        (["--dataset", "omar_simple_spread-random", "--transitions", "110"], "a multiple of 25"),
        (["--dataset", "omar_halfcheetah_2x3-random", "--transitions", "2500"], "a multiple of 1000"),
        (["--dataset", "omar_simple_spread-random-medium", "--transitions", "25"], "two halves need two episodes"),
        (["--dataset", "omar_simple_spread-random", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["--dataset", "omar_simple_spread-medium-replay", "--transitions", "1000"], "medium policy has 800"),
        (["--dataset", "omar_simple_spread-random", "--prey", "prey.pt"], "has no prey"),
        (["--dataset", "omar_simple_tag-random", "--prey", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (["--dataset", "omar_simple_tag-medium", "--transitions", "500"], "no such behaviour policy"),
    ],
)
def test_collect_refuses_in_one_line(argv, reason, tmp_path, policies, monkeypatch, capsys):
    code, out, err = called(collect, monkeypatch, capsys, *argv, "--out", tmp_path, "--policies", policies)
    assert code == 2 and reason in err and len(err.splitlines()) == 1 and not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value, said", [("--datset", "omar_simple_spread-random", "--dataset"), ("--seed", "1e5", "--seed")])  # fmt: skip
def test_flags_that_are_none_are_refused(flag, value, said, monkeypatch, capsys):
    code, out, err = called(collect, monkeypatch, capsys, "--dataset", "omar_simple_spread-random", flag, value)
    assert code == 2 and said in err and "Traceback" not in err and not out


def test_collect_does_not_replace_a_data_set(made, monkeypatch, capsys):
    folder = made("omar_simple_spread-random", 1000, 3)
    argv = ["--dataset", "omar_simple_spread-random", "--seed", "3", "--out", folder.parents[2]]
    code, _, err = called(collect, monkeypatch, capsys, *argv)
    assert code == 2 and "is there already; delete it first" in err


# --- what is read ---


def test_load_dataset(made):
    folder = made("omar_simple_spread-medium-expert", 1000, 2)
    data, files = load_dataset(str(folder)), arrays(folder)
    for name, kind in (("obs", "obs"), ("actions", "acs"), ("rewards", "rews"), ("next_obs", "next_obs")):
        array = getattr(data, name)
        want = np.stack([files[f"{kind}_{i}"] for i in range(3)], 1)
        assert array.shape == want.shape and all(isinstance(part, np.memmap) for part in array.parts)
        np.testing.assert_array_equal(np.asarray(array), want)
        rows = np.array([5, 999, 5, 0])
        np.testing.assert_array_equal(array[rows], want[rows])
        np.testing.assert_array_equal(array[7], want[7])
        np.testing.assert_array_equal(array[-3:], want[-3:])
    assert data.env_id == "omar_simple_spread" and data.state is None and data.next_known.all()
    np.testing.assert_array_equal(data.episodes, [(first, first + 25) for first in range(0, 1000, 25)])
    assert not data.terminations.any() and np.flatnonzero(data.truncations).tolist() == list(range(24, 1000, 25))
    np.testing.assert_allclose(data.returns, np.asarray(data.rewards).mean(1).reshape(-1, 25).sum(1), rtol=1e-5)
    cheetah = load_dataset(str(made("omar_halfcheetah_2x3-random", 2000)))
    assert cheetah.state.shape == cheetah.next_state.shape == (2000, 1, 17) and cheetah.episodes.tolist() == [
        [0, 1000],
        [1000, 2000],
    ]


def test_a_data_set_is_found_by_its_name(made, monkeypatch):
    folder = made("omar_simple_spread-random", 1000)
    monkeypatch.setattr("common.datasets.DATA", folder.parents[2])
    assert load_dataset("omar_simple_spread-random").folder == folder
    with pytest.raises(BadInput, match="make it with: python datasets/collect.py --dataset omar_simple_spread-expert"):
        load_dataset("omar_simple_spread-expert")
    assert is_folder(folder) and is_folder("nowhere/at/all") and not is_folder("omar_simple_spread-random")
    with pytest.raises(BadInput, match="no such folder"):
        load_dataset(Path("nowhere"))
    monkeypatch.setattr("common.datasets._open", None)
    assert [find_env_id(source) for source in (folder, "omar_simple_spread-expert")] == ["omar_simple_spread"] * 2


def test_data_that_are_not_there_are_made(made, tmp_path, monkeypatch, capsys):
    folder, commands = made("omar_simple_spread-random", 1000), []
    monkeypatch.setattr("common.datasets.DATA", tmp_path)

    def run(command):
        commands.append(command[1:])
        if command[3].endswith("random"):
            shutil.copytree(folder, tmp_path / "simple_spread/random/seed_0_data")
        return subprocess.CompletedProcess(command, int(command[3].endswith("expert")))

    monkeypatch.setattr(subprocess, "run", run)
    data = open_dataset("omar_simple_spread-random", 0.5, seed=1)
    assert (
        len(data.returns) == 20
        and "data      omar_simple_spread-random is not there yet: making it" in capsys.readouterr().out
    )
    script = str(ROOT / "datasets/collect.py")
    assert commands == [[script, "--dataset", "omar_simple_spread-random", "--seed", "0"]]
    assert open_dataset(folder).folder == folder and open_dataset("omar_simple_spread-random").checksum != data.checksum
    assert len(commands) == 1 and not capsys.readouterr().out
    with pytest.raises(BadInput, match="omar_simple_spread-expert: could not be made, see above"):
        open_dataset("omar_simple_spread-expert")


def test_a_data_set_must_be_what_agents_see_and_do(made):
    data = load_dataset(made("omar_simple_spread-random", 1000))
    check_sizes(data, make_env("omar_simple_spread"))
    with pytest.raises(BadInput, match=r"observations \[18, 18, 18\] and actions \[2, 2, 2\].*--observation says"):
        check_sizes(data, make_env("omar_simple_tag"))
    assert str(data).startswith(f"{data.folder}: 1,000 transitions, 40 episodes, return {data.returns.mean():.1f} ± ")


def test_a_fraction_is_of_whole_episodes(made):
    folder = str(made("omar_simple_spread-random", 1000))
    whole, part = load_dataset(folder), load_dataset(folder, 0.3, seed=5)
    assert (
        len(part.returns) == 12
        and len(part.obs) == len(part.terminations) == 300
        and part.episodes.tolist() == [[25 * k, 25 * k + 25] for k in range(12)]
    )
    kept = [int(np.flatnonzero(whole.returns == value)[0]) for value in part.returns]
    assert kept == sorted(set(kept)) and kept != list(range(12))
    for (first, end), k in zip(part.episodes, kept):
        for name in ("obs", "actions", "rewards", "next_obs"):
            np.testing.assert_array_equal(getattr(part, name)[first:end], getattr(whole, name)[25 * k : 25 * k + 25])
    assert part.truncations.sum() == 12
    np.testing.assert_array_equal(load_dataset(folder, 0.3, seed=5).returns, part.returns)
    assert not np.array_equal(load_dataset(folder, 0.3, seed=6).returns, part.returns)
    assert len(load_dataset(folder, 1e-6).returns) == 1
    for fraction in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(BadInput, match="must be above 0 and at most 1"):
            load_dataset(folder, fraction)


def test_scores_normalise_to_0_and_100():
    assert SCORES == {
        "omar_simple_spread": (159.8, 516.8), "omar_simple_tag": (-4.1, 185.6), "omar_simple_world": (-6.8, 79.5),
        "omar_halfcheetah_2x3": (-284.0, 3568.8),
    }  # fmt: skip
    for env_id, (low, high) in SCORES.items():
        np.testing.assert_allclose(normalize(env_id, np.array([low, high, 2 * high - low])), [0, 100, 200])
    assert np.isnan(normalize("mpe_simple_spread", 1.0))


def foreign(folder, root, name="simple_spread/medium/seed_0_data"):
    """The arrays of a data set in a folder laid out exactly like OMAR's: no card."""
    path = root / name
    shutil.copytree(folder, path)
    (path / "card.json").unlink()
    return path


def test_a_folder_of_omars_loads(made, tmp_path):
    for task, env_id, rows in (("simple_spread", "omar_simple_spread", 1000), ("simple_tag", "omar_simple_tag", 500),
                               ("HalfCheetah-v2", "omar_halfcheetah_2x3", 2000)):  # fmt: skip
        path = foreign(made(f"{env_id}-random", rows), tmp_path, f"{task}/random/seed_0_data")
        for name, array in arrays(path).items():
            if name.startswith("dones"):
                np.save(path / f"{name}.npy", array.astype(bool))  # other writers' dtypes
            elif name.startswith("rews"):
                np.save(path / f"{name}.npy", array.astype(np.float64))
        data = load_dataset(str(path))
        assert data.env_id == env_id and len(data.obs) == rows and data.card is None and data.next_known.all()
    path = foreign(made("omar_simple_tag-random", 500), tmp_path, "elsewhere")
    for old in path.glob("*_3.npy"):
        old.unlink()  # without the prey
    assert load_dataset(str(path), env_id="omar_simple_tag").env_id == "omar_simple_tag"
    dones = np.zeros(500, np.float32)
    dones[24::25] = 1  # some mark the time limit: that is no termination
    for i in range(3):
        np.save(path / f"dones_{i}.npy", dones)
    data = load_dataset(str(path), env_id="omar_simple_tag")
    assert not data.terminations.any() and data.truncations.sum() == 20


def change(name, function):
    def damage(folder):
        path = folder / f"{name}.npy"
        np.save(path, function(np.load(path)), allow_pickle=True)

    return damage


def put(name, row, value):
    def function(array):
        array[row] = value
        return array

    return change(name, function)


def exchange(*kinds, a=0, b=1):
    def damage(folder):
        for kind in kinds:
            one, two = folder / f"{kind}_{a}.npy", folder / f"{kind}_{b}.npy"
            one.rename(folder / "x"), two.rename(one), (folder / "x").rename(two)

    return damage


def every(function):
    def damage(folder):
        for name in arrays(folder):
            change(name, function)(folder)

    return damage


def tag_instead(folder):
    tag = folder.parents[2] / "tag"
    for path in folder.glob("*.npy"):
        path.unlink()
    for path in tag.glob("*.npy"):
        shutil.copy(path, folder)


def edit(**values):
    def damage(folder):
        card = json.loads((folder / "card.json").read_bytes())
        (folder / "card.json").write_text(json.dumps(card | values))

    return damage


def pickled(folder):
    (folder / "obs_0.npy").write_bytes(pickle.dumps(np.zeros(3)))


def cut(folder):
    path = folder / "next_obs_1.npy"
    os.truncate(path, path.stat().st_size - 1000)


FOREIGN = {  # what happens to the files of a folder without card -> what the message says
    "a missing file": (lambda f: (f / "acs_1.npy").unlink(), ["acs_1.npy is missing", "3 agents", "get the data again"]),
    "a short file": (change("obs_2", lambda a: a[:-25]), ["obs_2.npy has 975 rows", "1,000"]),
    "all files short": (every(lambda a: a[:-7]), ["993 rows", "25 steps"]),
    "a file cut short": (cut, ["next_obs_1.npy: cut short"]),
    "an empty file": (lambda f: (f / "rews_0.npy").write_bytes(b""), ["rews_0.npy: cut short, or not a .npy file"]),
    "a text file": (lambda f: (f / "rews_0.npy").write_text("1.0\n2.0\n"), ["rews_0.npy", "not a .npy file"]),
    "a pickle": (pickled, ["obs_0.npy", "not a .npy file"]),
    "an object array": (change("obs_0", lambda a: a.astype(object)), ["obs_0.npy: cut short, or not a .npy file ", "Python objects"]),
    "whole numbers": (change("obs_1", lambda a: a.astype(int)), ["obs_1.npy: holds int64, not float32", "astype"]),
    "half precision": (change("acs_1", lambda a: a.astype(np.float16)), ["acs_1.npy: holds float16"]),
    "not a number": (put("obs_1", (417, 3), np.nan), ["obs_1.npy, row 417, number 3: nan is not finite"]),
    "an infinite reward": (put("rews_2", 8, np.inf), ["rews_2.npy, row 8: inf is not finite"]),
    "a wild action": (put("acs_0", (3, 1), 1.7), ["acs_0.npy, row 3, number 1: 1.7", "outside [-1, 1]"]),
    "a strange mark": (put("dones_0", 30, 2), ["dones_0.npy, row 30: 2.0 is neither 0 nor 1"]),
    "an end in the middle": (lambda f: [put(f"dones_{i}", 30, 1)(f) for i in range(3)], ["dones_0.npy, row 30", "25 steps"]),
    "an end for one agent": (put("dones_1", 24, 1), ["dones_1.npy, row 24", "whole team"]),
    "exchanged observations": (exchange("obs", "next_obs", b=2), ["sees agent", "exchanged"]),
    "exchanged observations of neighbours": (exchange("obs", "next_obs"), ["sees agent 0 where", "exchanged"]),
    "exchanged actions": (exchange("acs", a=1, b=2), ["acs_1.npy", "agent 1 does not move", "as acs_2.npy says"]),
    "exchanged next observations": (exchange("next_obs"), ["next_obs_0.npy, row 0", "obs_0.npy", "exchanged"]),
    "shuffled rows": (every(lambda a: a[np.random.default_rng(0).permutation(1000)]), ["Shuffled", "row"]),
    "a lost row": (every(lambda a: np.delete(a, [30, *range(976, 1000)], 0)), ["next_obs_0.npy, row 29"]),
    "a lost first row": (every(lambda a: a[[*range(1, 976)]]), ["next_obs_0.npy, row 23"]),
    "another start": (lambda f: [put(f"obs_{i}", (50, 0), 0.3)(f) for i in range(3)], ["obs_0.npy, row 50", "starts in motion"]),
    "another task": (tag_instead, ["another task's or agent's data?"]),
    "a column of rewards": (change("rews_1", lambda a: a[:, None]), ["rews_1.npy: has shape [1000, 1], not [T]"]),
    "a table turned round": (change("obs_0", lambda a: a.T), ["obs_0.npy: has shape [18, 1000], not [T, 18]"]),
    "no rows": (every(lambda a: a[:0]), ["has shape [0"]),
    "nothing there": (lambda f: [p.unlink() for p in f.glob("*.npy")], ["no .npy files"]),
}  # fmt: skip
CARDED = {
    "a changed number": (put("rews_1", 500, 3.25), ["rews_1.npy: not the file that its card.json describes", "sha256", "delete the folder and make", "collect.py"]),
    "all agents exchanged": (exchange("obs", "next_obs", "acs", "rews", "dones"), ["sees agent 0 where", "exchanged"]),
    "a broken card": (lambda f: (f / "card.json").write_text("{"), ["card.json: not a card"]),
    "a folder for a card": (lambda f: ((f / "card.json").unlink(), (f / "card.json").mkdir()), ["card.json: not a card", "delete it"]),
    "a list for a card": (lambda f: (f / "card.json").write_text("[1]"), ["card.json: not a card"]),
    "a card of another format": (edit(format="omar-npy-99"), ["card.json: not a card of format", "omar-npy-99"]),
    "a card of another task": (edit(task="omar_simple_tag"), ["has shape [1000, 18], not [T, 16]", "another task's"]),
    "a card without sums": (edit(files={}), ["not the file that its card.json describes"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_damage_is_named(kind, made, tmp_path):
    shutil.copytree(made("omar_simple_tag-random", 500), tmp_path / "tag")
    folder = foreign(made("omar_simple_spread-random", 1000), tmp_path)
    load_dataset(str(folder))
    damage, words = FOREIGN[kind]
    damage(folder)
    with pytest.raises(BadInput) as caught:
        load_dataset(str(folder))
    message = str(caught.value)
    assert all(word in message for word in words) and str(folder) in message and len(message.splitlines()) == 1, message
    assert "get the data again" in message, "what to do"


@pytest.mark.parametrize("row", [0, 65_535, 65_536, 69_998])
def test_rows_out_of_order_are_found_where_blocks_of_rows_meet(row):
    now = np.arange(70_000, dtype=np.float32)[:, None]
    files, never = {"obs_0": now, "next_obs_0": now + 1}, np.zeros(70_000, bool)
    checks.check_order(Path("data"), files, never, never)
    files["next_obs_0"][row] += 0.5
    with pytest.raises(BadInput, match=f"next_obs_0.npy, row {row:,}: not what"):
        checks.check_order(Path("data"), files, never, never)


@pytest.mark.parametrize("kind", CARDED)
def test_damage_is_named_by_the_card(kind, made, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(made("omar_simple_spread-random", 1000), folder)
    damage, words = CARDED[kind]
    damage(folder)
    with pytest.raises(BadInput) as caught:
        load_dataset(str(folder))
    message = str(caught.value)
    assert all(word in message for word in words) and str(folder) in message and len(message.splitlines()) == 1, message


def shift(name, rows=1):
    return change(name, lambda a: np.roll(a, rows, 0))


def noise(name):
    return change(name, lambda a: np.random.default_rng(0).uniform(-1, 1, a.shape).astype(np.float32))


def never_filled(folder):
    for path in folder.glob("*.npy"):
        array = np.load(path)
        array[len(array) // 2 :] = 0
        np.save(path, array)


def exchanged_later(folder):
    for kind in ("obs", "next_obs"):
        one, two = (np.load(folder / f"{kind}_{i}.npy") for i in range(2))
        later = np.arange(len(one))[:, None] >= 1000
        (
            np.save(folder / f"{kind}_0.npy", np.where(later, two, one)),
            np.save(folder / f"{kind}_1.npy", np.where(later, one, two)),
        )


def first_for_last(folder):
    for i in range(3):
        change(f"next_obs_{i}", lambda a, i=i: np.where((np.arange(len(a)) % 25 == 24)[:, None], np.roll(np.load(folder / f"obs_{i}.npy"), -1, 0), a))(folder)  # fmt: skip


SUBTLE = {  # task, damage -> what the message says; none of it shows in shapes or ranges
    "actions shifted by a row": ("spread", shift("acs_0"), ["acs_0.npy", "does not move as this file says"]),
    "all actions shifted by a row": ("spread", lambda f: [shift(f"acs_{i}")(f) for i in range(3)], ["acs_0.npy", "does not move"]),
    "noise for actions": ("spread", noise("acs_2"), ["acs_2.npy", "agent 2 does not move"]),
    "no actions": ("tag", change("acs_1", np.zeros_like), ["acs_1.npy", "agent 1 does not move"]),
    "no rewards": ("spread", change("rews_1", np.zeros_like), ["rews_1.npy, row 0: not the reward of omar_simple_spread"]),
    "rewards shifted": ("tag", shift("rews_0", 7), ["rews_0.npy", "not the reward of omar_simple_tag"]),
    "rewards of the prey": ("tag", exchange("rews", b=3), ["rews_0.npy", "not the reward"]),
    "actions of the prey": ("tag", exchange("acs", b=3), ["acs_0.npy", "as acs_3.npy says"]),
    "a landmark that stays": ("spread", lambda f: [change(f"{k}obs_1", lambda a: np.hstack([a[:, :4], 0 * a[:, 4:6] + 0.3, a[:, 6:]]))(f) for k in ("", "next_")], ["sees landmark 0 where"]),
    "rows never filled": ("spread", never_filled, ["row 500", "never filled"]),
    "rows of a robot never filled": ("cheetah", never_filled, ["row 1,000", "never filled"]),
    "exchanged joints": ("cheetah", exchange("obs", "next_obs"), ["obs_0.npy, row 0: has the joints of agent 1"]),
    "exchanged joints in an episode": ("cheetah", exchanged_later, ["obs_0.npy, row 1,000: has the joints of agent 1"]),
    "another state": ("cheetah", lambda f: [change(f"{k}states_1", lambda a: a + 1)(f) for k in ("", "next_")], ["states_1.npy, row 0: not as for agent 0"]),
    "another state afterwards": ("cheetah", put("next_states_1", (1999, 4), 9.0), ["next_states_1.npy, row 1,999: not as for agent 0"]),
    "rewards of the other sign": ("cheetah", lambda f: [change(f"rews_{i}", np.negative)(f) for i in range(2)], ["rews_0.npy, row", "not the speed"]),
    "an odd reward among many": ("spread", put("rews_0", 7, 1e4), ["rews_0.npy, row 7: not the reward"]),
    "half of the rewards": ("tag", change("rews_1", lambda a: np.where(np.arange(len(a)) % 50 < 25, a, 0)), ["rews_1.npy, row 25: not the reward"]),
    "a new start for a last observation": ("spread", first_for_last, ["next_obs_0.npy, row 24: the agent is not where its velocity took it", "not the first of the next"]),
    "a far place at the end": ("tag", put("next_obs_0", (24, 0), 1e30), ["next_obs_0.npy, row 24: the agent is not where"]),
    "another place of a friend at the end": ("tag", put("next_obs_1", (49, 9), 0.123), ["next_obs_1.npy, row 49: sees agent 0 where"]),
    "another velocity of the prey": ("tag", lambda f: [put("obs_1", (60, 15), 0.7)(f), put("next_obs_1", (59, 15), 0.7)(f)], ["obs_1.npy, row 60: sees the prey's velocity where"]),
    "another reward": ("cheetah", put("rews_1", 1500, 3.0), ["rews_1.npy, row 1,500: not as for agent 0"]),
    "a number too large": ("cheetah", change("rews_0", lambda a: np.where(np.arange(2000) == 3, 1e300, a.astype(float))), ["rews_0.npy, row 3: 1e+300 is not finite"]),
}  # fmt: skip
SETS = {
    "spread": ("omar_simple_spread-random", 1000),
    "tag": ("omar_simple_tag-random", 500),
    "cheetah": ("omar_halfcheetah_2x3-random", 2000),
}


@pytest.mark.parametrize("kind", SUBTLE)
def test_subtle_damage_is_named(kind, made, tmp_path):
    task, damage, words = SUBTLE[kind]
    name, rows = SETS[task]
    env_id = name.partition("-")[0]
    folder = foreign(made(name, rows), tmp_path, f"{FOLDERS[env_id]}/random/seed_0_data")
    damage(folder)
    with pytest.raises(BadInput) as caught:
        load_dataset(str(folder))
    message = str(caught.value)
    assert all(word in message for word in words) and str(folder) in message and "get the data again" in message, (
        message
    )


def played(scenario, act, tmp_path, episodes=40):
    """A folder like OMAR's, of a team that acts by act(observations [E, N, O], random generator)."""
    folder = tmp_path / FOLDERS[f"omar_{scenario}"] / "own" / "seed_0_data"
    team, prey, _ = layout(f"omar_{scenario}")
    writer = collect.Writer(folder, f"omar_{scenario}", team | prey, 25 * episodes, {})
    recorder = collect.Recorder(make_vec(f"omar_{scenario}", episodes), writer, 0, 25 * episodes)
    obs, generator = recorder.reset(seed=0)[0], np.random.default_rng(0)
    for _ in range(25):
        obs = recorder.step(act(obs, generator).astype(np.float32))[0]
    writer.close({})
    (folder / "card.json").unlink()
    return folder


def test_without_a_card_every_episode_is_looked_at(made, tmp_path):
    folder = foreign(
        made("omar_simple_spread-random", 50_000), tmp_path
    )  # 2000 episodes; with a card, 200 would be enough
    load_dataset(folder)
    put("rews_2", 33_333, 200.0)(folder)
    with pytest.raises(BadInput, match="rews_2.npy, row 33,333: not the reward of omar_simple_spread"):
        load_dataset(folder)


def test_agents_that_stand_still_or_do_the_same_are_no_damage(tmp_path):
    def one_stands(obs, generator):
        return np.concatenate([np.zeros((len(obs), 1, 2)), generator.uniform(-1, 1, (len(obs), 2, 2))], 1)

    def all_meet(obs, generator):
        return np.clip(-10 * obs[:, :, 2:4], -1, 1)

    def all_chase(obs, generator):
        return np.clip(10 * obs[:, :, 12:14], -1, 1)

    for k, (scenario, act) in enumerate(
        [("simple_spread", one_stands), ("simple_spread", all_meet), ("simple_tag", all_chase)]
    ):
        folder = played(scenario, act, tmp_path / str(k))
        assert len(load_dataset(str(folder)).returns) == 40
        if act is all_chase:  # three that run after one do nearly the same; still, whose actions are whose can be told
            exchange("acs")(folder)
            with pytest.raises(BadInput, match="as acs_1.npy says"):
                load_dataset(str(folder))


def test_what_the_card_lists_must_be_there(made, tmp_path):
    for name, rows, gone in (
        ("omar_simple_tag-random", 500, "*_3.npy"),
        ("omar_halfcheetah_2x3-random", 2000, "*states_*.npy"),
    ):
        shutil.copytree(made(name, rows), tmp_path / name)
        for path in (tmp_path / name).glob(gone):
            path.unlink()
        with pytest.raises(BadInput, match="npy is missing.*make the data again with: python datasets/collect.py"):
            load_dataset(str(tmp_path / name))


def test_anything_in_the_place_of_an_array_is_a_data_error(made, tmp_path):
    folder = foreign(made("omar_simple_spread-random", 1000), tmp_path)
    path, good = folder / "acs_1.npy", (folder / "acs_1.npy").read_bytes()

    def archive():
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))

    bad = [lambda: np.save(path, np.float32(3)), archive, lambda: path.write_bytes(b"PK\x03\x04 and no more")]
    rng = np.random.default_rng(0)
    for _ in range(60):  # a damaged header

        def flip(place=int(rng.integers(6, 100)), bit=int(rng.integers(8))):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])

        bad.append(flip)
    refused = 0
    for damage in bad:
        damage()
        try:
            load_dataset(str(folder))
        except BadInput as error:
            refused += "acs_1.npy" in str(error)
    assert refused >= 50  # some flips only touch a space
    for keywords in (dict(seed=-1, fraction=0.5), dict(fraction=2.0)):
        with pytest.raises(BadInput):
            load_dataset(str(folder), **keywords)


def test_end_marks_at_the_time_limit_are_no_falls(tmp_path):
    """In an Ant data set with dones = 1 at every end, as OG-MARL's wrappers write them."""
    rng, folder = np.random.default_rng(0), tmp_path / "ant"
    folder.mkdir()
    obs = rng.normal(size=(1500, 7)).astype(np.float32)
    dones = np.zeros(1500, np.uint8)
    dones[[999, 1299]] = 1
    for i in range(2):
        (
            np.save(folder / f"obs_{i}.npy", obs),
            np.save(folder / f"next_obs_{i}.npy", np.vstack([obs[1:], obs[:1]]) + 0.0 * obs),
        )
        np.save(folder / f"acs_{i}.npy", rng.uniform(-1, 1, (1500, 4))), np.save(folder / f"dones_{i}.npy", dones)
        np.save(folder / f"rews_{i}.npy", obs[:, 0])
    with pytest.raises(BadInput, match="row 1,299: marks a fall, but the episode goes on in the next row"):
        load_dataset(folder, env_id="mamujoco_ant_2x4")
    for i in range(2):
        change(f"next_obs_{i}", lambda a: np.where(np.arange(1500)[:, None] == 1299, 5.0, a).astype(np.float32))(folder)
    data = load_dataset(folder, env_id="mamujoco_ant_2x4")
    assert np.flatnonzero(data.terminations).tolist() == [1299] and np.flatnonzero(data.truncations).tolist() == [
        999,
        1499,
    ]
    part = load_dataset(folder, 0.67, seed=1, env_id="mamujoco_ant_2x4")  # two of three episodes, of different lengths
    lengths = np.diff(part.episodes, axis=1)[:, 0]
    assert len(part.obs) == lengths.sum() and set(lengths) < {1000, 300, 200} and part.episodes[0, 0] == 0
    assert part.terminations.sum() == (300 in lengths) and (part.terminations | part.truncations).sum() == 2
    for (first, end), value in zip(part.episodes, part.returns):
        assert value == pytest.approx(part.rewards[first:end].mean(1).sum(), abs=1e-3)


def test_agent_arrays_are_indexed_by_rows_and_agent():
    array = AgentArray([np.arange(8.0).reshape(4, 2), 10 + np.arange(12.0).reshape(4, 3)], rows=np.array([3, 1]))
    assert array.shape == (2, 2, 3) and array.widths == [2, 3]
    assert (
        array[0].tolist() == [[6, 7, 0], [19, 20, 21]]
        and array[:1, 0].tolist() == [[6, 7]]
        and array[1, 1].tolist() == [13, 14, 15]
    )
    assert array[np.array([1, 0]), 1].shape == (2, 3) and array[:, 0].dtype == np.float32
    whole = AgentArray([np.ones((4, 2), np.float32)])
    whole[:2, 0][:] = 7  # a copy
    assert whole[0, 0].tolist() == [1, 1]


def test_names_with_seeds_and_other_folders(made, tmp_path, monkeypatch):
    folder = made("omar_simple_spread-random", 1000, 3)
    monkeypatch.setattr("common.datasets.DATA", folder.parents[2])
    assert load_dataset("omar_simple_spread-random", data_seed=3).folder == folder
    with pytest.raises(BadInput, match="not made yet; .* --dataset omar_simple_spread-random --seed 4"):
        load_dataset("omar_simple_spread-random", data_seed=4)
    monkeypatch.setattr("common.datasets.DATA", tmp_path)
    for seed, split in ((4, "random"), (3, "expert")):  # what is in the place of another one
        shutil.copytree(folder, tmp_path / f"simple_spread/{split}/seed_{seed}_data")
        with pytest.raises(BadInput, match="its card says random, seed 3; move it to where that belongs"):
            load_dataset(f"omar_simple_spread-{split}", data_seed=seed)
    shutil.rmtree(tmp_path / "simple_spread")
    path = foreign(folder, tmp_path, "store")
    (tmp_path / "simple_spread").symlink_to(path)
    assert load_dataset(tmp_path / "simple_spread").env_id == "omar_simple_spread"
    assert load_dataset(path, env_id="simple_spread").env_id == "omar_simple_spread"  # OMAR's name of it
    with pytest.raises(BadInput, match="its path says omar_simple_spread, not omar_simple_tag"):
        load_dataset(tmp_path / "simple_spread", env_id="omar_simple_tag")


def test_other_things_that_are_not_there(made, tmp_path):
    tag, cheetah = made("omar_simple_tag-random", 500), made("omar_halfcheetah_2x3-random", 2000)
    path = foreign(tag, tmp_path, "simple_tag/random/seed_0_data")
    (path / "acs_3.npy").unlink()  # the prey is there, but not whole
    with pytest.raises(BadInput, match="acs_3.npy is missing"):
        load_dataset(str(path))
    path = foreign(cheetah, tmp_path, "HalfCheetah-v2/random/seed_0_data")
    (path / "next_states_1.npy").unlink()
    with pytest.raises(BadInput, match="next_states_1.npy is missing"):
        load_dataset(str(path))
    path = foreign(tag, tmp_path, "mystery")
    with pytest.raises(BadInput, match="say it .--env-id."):
        load_dataset(str(path))
    with pytest.raises(BadInput, match="unknown task 'omar_simple_tugs'"):
        load_dataset(str(path), env_id="omar_simple_tugs")
    with pytest.raises(BadInput, match="its card says omar_simple_tag, not omar_simple_spread"):
        load_dataset(str(tag), env_id="omar_simple_spread")
    with pytest.raises(BadInput, match="no .npy files there, but the folders seed_0_data: give one of these"):
        load_dataset(str(tag.parent))
    with pytest.raises(BadInput, match="there is no such folder"):
        load_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="unknown data set ''"):
        load_dataset("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: no .npy files there"):
        load_dataset(tmp_path / "empty", env_id="omar_simple_tag")
    with pytest.raises(BadInput, match="did you mean omar_simple_spread-medium"):
        load_dataset("omar_simple_spread-mdium")


def test_nothing_in_a_file_is_executed(made, tmp_path):
    folder = foreign(made("omar_simple_spread-random", 1000), tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.save(folder / "obs_0.npy", np.array([Evil()]), allow_pickle=True)
    with pytest.raises(BadInput, match="Python objects"):
        load_dataset(str(folder))
    assert not (tmp_path / "executed").exists()


def test_agents_of_different_sizes_are_padded():
    array = AgentArray([np.ones((4, 2), np.float32), np.full((4, 3), 2.0)])
    assert array.shape == (4, 2, 3) and array[1].tolist() == [[1, 1, 0], [2, 2, 2]] and array[:2].shape == (2, 2, 3)


def test_episodes_that_can_end_early():
    dones = np.zeros(2600, bool)
    dones[[99, 1199, 1200]] = True
    want = [[0, 100], [100, 1100], [1100, 1200], [1200, 1201], [1201, 2201], [2201, 2600]]
    dones[[2200]] = True  # exactly as long as an episode can be: the time limit, whoever marked it
    episodes, terminations, truncations = split_episodes("mamujoco_ant_2x4", dones)
    assert episodes.tolist() == want and np.flatnonzero(terminations).tolist() == [99, 1199, 1200]
    assert np.flatnonzero(truncations).tolist() == [1099, 2200, 2599]
    assert split_episodes("omar_simple_spread", np.zeros(75, bool))[0].tolist() == [[0, 25], [25, 50], [50, 75]]


# --- formats of others ---

needs_tensorstore = pytest.mark.skipif(
    not importlib.util.find_spec("tensorstore"), reason="needs the package tensorstore"
)


def converted(monkeypatch, capsys, *argv):
    return called(convert, monkeypatch, capsys, *argv)


@needs_tensorstore
@pytest.mark.parametrize("name, rows", [("omar_simple_spread-random", 1000), ("omar_simple_tag-random", 500), ("omar_halfcheetah_2x3-random", 2000)])  # fmt: skip
def test_to_a_vault_and_back(name, rows, made, tmp_path, monkeypatch, capsys):
    folder, vault, back = made(name, rows), tmp_path / "some.vlt" / "Random", tmp_path / "back"
    assert converted(monkeypatch, capsys, "to-vault", folder, "--out", vault)[0] == 0
    metadata = json.loads((vault / "metadata.json").read_bytes())
    obs, _ = layout(name.partition("-")[0])[:2]
    agents = {"omar_simple_spread": 3, "omar_simple_tag": 4, "omar_halfcheetah_2x3": 2}[name.partition("-")[0]]
    assert (
        metadata["structure_shape"]["observations"] == str((1, rows, agents, obs["obs_0"][0]))
        and metadata["version"] == 1.2
    )
    assert metadata["structure_dtype"]["terminals"] == "bool" and "state" in metadata["structure_shape"]["infos"]

    def theirs(name):  # the specification with which flashbax opens an array
        import tensorstore

        kvstore = {"driver": "ocdbt", "base": f"file://{vault}", "path": name}
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore, "metadata": {}}).result()

    assert theirs("vault_index").read().result().tolist() == [rows] and theirs("actions.").shape[:3] == (
        1,
        10**13,
        agents,
    )
    seen = theirs("observations.")[0, :rows].read().result()
    horizon = 1000 if "cheetah" in name else 25
    for marks in (theirs("terminals."), theirs("truncations.")):
        marks = marks[0, :rows].read().result()
        assert (
            marks.dtype == bool
            and marks.shape == (rows, agents)
            and np.flatnonzero(marks[:, 0]).tolist() == [*range(horizon - 1, rows, horizon)]
        )
    assert theirs("infos.state.").shape[2] == (
        17 if "cheetah" in name else sum(len(obs_i) for obs_i in make_env(name.partition("-")[0]).obs_mask)
    )
    if agents == 4:
        assert np.isneginf(seen[:, 3, 14:]).all()  # the prey sees less
    assert (
        converted(monkeypatch, capsys, "from-vault", vault, "--env-id", name.partition("-")[0], "--out", back)[0] == 0
    )
    before, after = arrays(folder), arrays(back)
    assert set(before) == set(after)
    horizon = 1000 if "cheetah" in name else 25
    last = np.arange(rows) % horizon == horizon - 1
    for key, array in before.items():
        if key.startswith("next_"):
            np.testing.assert_array_equal(after[key][~last], array[~last])
            np.testing.assert_array_equal(after[key][last], after[key.removeprefix("next_")][last])
        else:
            np.testing.assert_array_equal(after[key], array)
    data = load_dataset(str(back))
    np.testing.assert_array_equal(data.next_known, ~last)
    code, _, err = converted(
        monkeypatch, capsys, "from-vault", vault, "--env-id", "omar_simple_world", "--out", tmp_path / "wrong"
    )
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "wrong").exists()


@needs_tensorstore
def test_other_vaults(made, tmp_path, monkeypatch, capsys):
    """A copy of the joint state for each agent, as some systems keep it; and a vault without rows."""
    folder, rows = made("omar_halfcheetah_2x3-random", 2000), 2000
    assert converted(monkeypatch, capsys, "to-vault", folder, "--out", tmp_path / "a.vlt/Good")[0] == 0
    for kind, same in (("copies", True), ("differ", False)):
        vault = tmp_path / f"{kind}.vlt"
        shutil.copytree(tmp_path / "a.vlt/Good", vault)
        states = np.repeat(np.load(folder / "states_0.npy")[:, None], 2, 1)
        states[5, 1] += 0.0 if same else 1.0
        shutil.rmtree(vault)
        arrays = {"infos.state.": states}
        for name in ("observations.", "actions.", "rewards.", "terminals.", "truncations."):
            arrays[name] = convert.store(tmp_path / "a.vlt/Good", name)[0, :rows].read().result()
        vault.mkdir()
        for name, array in arrays.items():
            how = dict(shape=(1, convert.LENGTH, *array.shape[1:]), dtype=array.dtype.name, create=True)
            convert.store(vault, name, **how)[:, :rows].write(array[None]).result()
        shutil.copy(tmp_path / "a.vlt/Good/metadata.json", vault)
        for count in (rows, 0):
            index = convert.store(vault, "vault_index", shape=(1,), dtype="int32", create=True, delete_existing=True)
            index.write(np.array([count], np.int32)).result()
            out = tmp_path / f"{kind}-{count}"
            code, told, err = converted(
                monkeypatch, capsys, "from-vault", vault, "--env-id", "omar_halfcheetah_2x3", "--out", out
            )
            if count:
                assert code == 0 and ("left out: states, which differ from agent to agent" in told) != same, err
                assert (load_dataset(out).state is not None) == same
            else:
                assert code == 2 and "vault_index says 0 rows" in err and not out.exists()


def test_without_tensorstore_vaults_are_refused_in_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    folder = made("omar_simple_spread-random", 1000)
    (tmp_path / "metadata.json").write_text('{"version": 1.2, "structure_shape": {}}')
    for argv in (["to-vault", folder], ["from-vault", tmp_path, "--env-id", "omar_simple_spread"]):
        code, out, err = converted(monkeypatch, capsys, *argv, "--out", tmp_path / "new")
        assert (
            code == 2
            and err == "convert.py: error: vaults need the package tensorstore: pip install tensorstore\n"
            and not out
        )
    assert not (tmp_path / "new").exists()


@needs_tensorstore
def test_what_is_no_vault_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for content in (None, "{", '{"version": 1.2}', '{"version": 7.0, "structure_shape": {}}', '{"version": NaN, "structure_shape": {}}',
                    '{"version": Infinity, "structure_shape": {}}', "[" * 100_000):  # fmt: skip
        if content:
            (tmp_path / "metadata.json").write_text(content)
        code, _, err = converted(
            monkeypatch, capsys, "from-vault", tmp_path, "--env-id", "omar_simple_spread", "--out", tmp_path / "new"
        )
        assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path) in err and not (tmp_path / "new").exists()


def madiff(folder, lengths, agents=2, size=13, actions=3):
    """Data as MADiff keeps them."""
    rows, rng = sum(lengths), np.random.default_rng(0)
    obs = np.concatenate([np.tile(np.eye(agents), (rows, 1, 1)), rng.normal(size=(rows, agents, size))], 2).astype(
        np.float32
    )
    folder.mkdir(exist_ok=True)
    np.save(folder / "obs.npy", obs), np.save(folder / "path_lengths.npy", np.array(lengths))
    np.save(folder / "actions.npy", rng.uniform(-1, 1, (rows, agents, actions)).astype(np.float32))
    np.save(folder / "rewards.npy", np.repeat(rng.normal(size=(rows, 1, 1)), agents, 1).astype(np.float32))
    return obs


def test_from_madiff(tmp_path, monkeypatch, capsys):
    obs = madiff(tmp_path / "theirs", [1000, 1000])
    new = tmp_path / "cheetah"
    code, out, err = converted(
        monkeypatch, capsys, "from-madiff", tmp_path / "theirs", "--env-id", "mamujoco_halfcheetah_2x3", "--out", new
    )
    assert code == 0, err
    data = load_dataset(str(new))
    np.testing.assert_array_equal(np.asarray(data.obs), obs[:, :, 2:])
    np.testing.assert_array_equal(data.actions[:], np.load(tmp_path / "theirs/actions.npy"))
    np.testing.assert_array_equal(data.rewards[:], np.load(tmp_path / "theirs/rewards.npy")[:, :, 0])
    assert data.episodes.tolist() == [[0, 1000], [1000, 2000]] and np.flatnonzero(~data.next_known).tolist() == [
        999,
        1999,
    ]
    madiff(tmp_path / "ants", [1000, 37, 411], actions=4)  # an ant can fall
    code, _, err = converted(
        monkeypatch, capsys, "from-madiff", tmp_path / "ants", "--env-id", "mamujoco_ant_2x4", "--out", tmp_path / "ant"
    )
    assert code == 0, err
    data = load_dataset(str(tmp_path / "ant"))
    assert data.episodes.tolist() == [[0, 1000], [1000, 1037], [1037, 1448]]
    assert np.flatnonzero(data.terminations).tolist() == [1036, 1447] and np.flatnonzero(data.truncations).tolist() == [
        999
    ]
    assert np.flatnonzero(~data.next_known).tolist() == [999]  # after a fall nobody needs it


@pytest.mark.parametrize(
    "lengths, extra, reason",
    [
        ([1000, 500], {}, "its episodes end elsewhere than those of mamujoco_halfcheetah_2x3"),
        ([1500], {}, "path_lengths.npy: not the lengths of the episodes in 1,500 rows, of at most 1000 steps"),
        ([1000], dict(agents=3), "has 3 agents"),
        ([1000], dict(actions=2), "2 actions"),
        ([1000], dict(actions=4), "4 actions of an agent; in mamujoco_halfcheetah_2x3"),
        ([1000, 0], {}, "path_lengths.npy: not the lengths"),
        ([1000], dict(damage="reward"), "reward of agent 1 in row 9 is not finite"),
        ([1000], dict(damage="flat"), "do not belong together"),
        (
            [1000],
            dict(damage="unshared"),
            "rews_1.npy, row 9: not as for agent 0",
        ),  # found by the loader, when all is written
        ([1000], dict(damage="one-hot"), "do not begin with the agent's number"),
        ([1000], dict(damage="nan"), "obs_1.npy, row 70, number 3: nan is not finite"),
        ([1000], dict(damage="missing"), "actions.npy: missing"),
    ],
)
def test_bad_files_of_madiff_are_refused_in_one_line(lengths, extra, reason, tmp_path, monkeypatch, capsys):
    damage = extra.pop("damage", "") if extra else ""
    obs, folder = madiff(tmp_path / "theirs", lengths, **extra), tmp_path / "theirs"
    if damage == "one-hot":
        np.save(folder / "obs.npy", obs[:, ::-1])
    elif damage == "nan":
        obs[70, 1, 5] = np.nan
        np.save(folder / "obs.npy", obs)
    elif damage == "missing":
        (folder / "actions.npy").unlink()
    elif damage == "reward":
        put("rewards", (9, 1), np.nan)(folder)
    elif damage == "unshared":
        put("rewards", (9, 1), 5.0)(folder)
    elif damage == "flat":
        change("actions", lambda a: a[:, 0])(folder)
    code, _, err = converted(
        monkeypatch, capsys, "from-madiff", folder, "--env-id", "mamujoco_halfcheetah_2x3", "--out", tmp_path / "new"
    )
    assert (
        code == 2
        and reason in err
        and str(folder) in err
        and len(err.splitlines()) == 1
        and not [*tmp_path.glob("*new*")]
    )
    assert str(tmp_path / "new") not in err  # which is gone again


@pytest.mark.parametrize(
    "name, damaged",
    [
        ("rewards", lambda a: a[:-1]), ("rewards", lambda a: np.float32(0)), ("obs", lambda a: a[:, 0, 0]),
        ("obs", lambda a: a[:, :, :1]), ("path_lengths", lambda a: a.astype(float)), ("path_lengths", lambda a: a[:0]),
    ],
)  # fmt: skip
def test_arrays_of_madiff_that_do_not_fit_are_refused_in_one_line(name, damaged, tmp_path, monkeypatch, capsys):
    madiff(tmp_path / "theirs", [1000])
    path = tmp_path / "theirs" / f"{name}.npy"
    np.save(path, damaged(np.load(path)))
    flags = ["--env-id", "mamujoco_halfcheetah_2x3", "--out", tmp_path / "new"]
    code, _, err = converted(monkeypatch, capsys, "from-madiff", tmp_path / "theirs", *flags)
    assert code == 2 and str(tmp_path / "theirs") in err and len(err.splitlines()) == 1


def test_wild_actions_of_others_are_clipped_and_counted(tmp_path, monkeypatch, capsys):
    madiff(tmp_path / "theirs", [1000])
    put("actions", (4, 0, 2), -1.5)(tmp_path / "theirs")
    argv = ["from-madiff", tmp_path / "theirs", "--env-id", "mamujoco_halfcheetah_2x3", "--out", tmp_path / "new"]
    code, out, err = converted(monkeypatch, capsys, *argv)
    assert code == 0 and "clipped: 1 of 6,000 actions, the largest 1.5" in out, err
    assert load_dataset(tmp_path / "new").actions[4, 0][2] == -1
    code, out, err = converted(monkeypatch, capsys, *argv)
    assert code == 2 and "is there already" in err and len(err.splitlines()) == 1


@needs_tensorstore
def test_an_interrupted_vault_can_be_made_again(made, tmp_path, monkeypatch, capsys):
    folder, vault = made("omar_simple_spread-random", 1000), tmp_path / "some.vlt" / "Random"
    with monkeypatch.context() as patch:
        interrupted(patch, convert, "store", 3)
        assert converted(patch, capsys, "to-vault", folder, "--out", vault)[0] == 130
    assert not vault.exists() and converted(monkeypatch, capsys, "to-vault", folder, "--out", vault)[0] == 0
    code, _, err = converted(
        monkeypatch, capsys, "from-vault", vault.parent, "--env-id", "omar_simple_spread", "--out", tmp_path / "new"
    )
    assert code == 2 and "but the vaults Random: give one" in err


# --- the cards ---


def test_tables_are_made_of_cards(made, tmp_path, monkeypatch, capsys):
    root, here = tmp_path / "data", tmp_path / "datasets"
    for name in ("omar_simple_spread-random", "omar_simple_spread-medium-replay"):
        shutil.copytree(made(name, 800).parents[2], root, dirs_exist_ok=True)
    (here / "cards").mkdir(parents=True)
    monkeypatch.setattr(cards, "HERE", here)
    monkeypatch.setattr(sys, "argv", ["cards.py", "--data", str(root)])
    capsys.readouterr()
    cards.main()
    names = ["omar_simple_spread-medium-replay", "omar_simple_spread-random"]
    assert (
        sorted(path.stem for path in (here / "cards").glob("*.json"))
        == names
        == sorted(capsys.readouterr().out.split())
    )
    card = json.loads((here / "cards" / "omar_simple_spread-random.json").read_text())
    head, _, first, second = cards.dataset_table().splitlines()
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[:2] == ["`omar_simple_spread-random`", "800"] and len(head.split("|")) == len(first.split("|"))
    assert cells[2] == f"{card['return']['mean']:,.0f} ± {card['return']['std']:,.0f}" and cells[5] == "160 ± 60"
    assert "medium-replay" in second and "97,500" in second
    first = cards.draw().axes[0]
    assert [line.get_xdata()[0] for line in first.lines] == [card["return"]["mean"], 160]
    values, edges, _ = first.patches[0].get_data()
    counts = card["histogram"]["counts"]
    assert (edges[0], edges[-1]) == (card["histogram"]["first"], card["histogram"]["last"]) and len(values) == len(
        counts
    )
    assert values.argmax() == np.argmax(counts) and (values * np.diff(edges)).sum() == pytest.approx(1)
