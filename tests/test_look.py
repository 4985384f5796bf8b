"""runs/look.py: what critics believe beside what their policies earn, and how noisy policies are."""

import csv
import json
import shutil
from functools import partial

import look
import numpy as np
import pytest
import torch

import dom2
import omad
from common.envs import evaluate, make_vec
from conftest import SHORT_OFFLINE, one_line, the_run


@pytest.fixture(scope="module", params=["diffusion", "deterministic"])
def run(request, data, tmp_path_factory):
    """A short run."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--dataset", str(data), *SHORT_OFFLINE, "--policy", request.param, "--seed", "2", "--gamma", "0.5"]
    assert dom2.main([*flags, "--run-dir", str(folder / "runs")]) == 0
    return the_run(folder)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "RESULTS", tmp_path)
    return tmp_path / "belief.csv"


def test_what_is_earned_counts_what_follows_and_the_belief_behind_the_end():
    rewards = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    assert look.to_go(rewards, 0.5, np.array([16.0, 8.0])).tolist() == [[5.0, 1.0], [8.0, 2.0], [12.0, 4.0]]


def test_the_row_of_a_run(run, data, results, monkeypatch):
    def critic(self, obs, action):  # two that differ, of what they are told and whose they are
        value = obs.sum(-1) + 3 * action.sum(-1) + 100 * next(self.parameters()).mean()
        return torch.stack([value, 3 - value])

    seen, make_act = [], dom2.make_act

    def watched(slow, args):  # the averaged policies
        act = make_act(slow, args)
        return lambda obs: seen.append((obs.copy(), act(obs))) or seen[-1][1]

    monkeypatch.setattr(dom2.Critic, "forward", critic)
    monkeypatch.setattr(dom2, "make_act", watched)
    columns = "dataset,policy,seed,return_mean,believed,earned,edge"
    slow, saved = dom2.load_policy(run)
    policy = saved["args"]["policy"]
    other, old = (f"{name},{policy},2,1,2,3,4" for name in ("other", "-".join(data.parts[-3:])))
    results.write_text("\n".join([columns, old, other, ""]))
    assert look.main((run,)) == 0
    lines = results.read_text().splitlines()
    assert lines[0] == columns and lines[2] == other and len(lines) == 3  # it took the place of the old one
    row = next(csv.DictReader(results.open()))
    assert list(row.values())[:3] == old.split(",")[:3]
    row = {name: float(value) for name, value in list(row.items())[3:]}

    gamma, weights = saved["args"]["gamma"], dom2.load(run / "checkpoint.pt")["agent"]
    own = next(value for name, value in weights.items() if name.startswith("slow_critic.") and value.ndim > 2)
    mean, std = (x.numpy() for x in (slow.obs_mean, slow.obs_std))

    def believed(obs, action):
        value = ((obs - mean) / std).sum(-1) + 3 * action.sum(-1) + 100 * float(own.mean())
        return np.minimum(value, 3 - value)

    close = lambda value: pytest.approx(value, abs=2e-3, rel=1e-4)
    played, (end, last) = seen[:25], seen[25]
    assert row["believed"] == close(np.mean([believed(*step).mean() for step in played]))
    actions = np.abs([action for _, action in played])
    assert row["edge"] == close((actions > 0.99).mean())
    assert row["return_mean"] == close(
        evaluate(make_act(slow, dom2.Args(**saved["args"])), make_vec("omar_simple_spread", 200), look.FRESH).mean()
    )
    envs = make_vec("omar_simple_spread", 200)
    envs.reset(seed=look.FRESH)
    rewards = [envs.step(action)[4]["agent_rewards"].mean() for _, action in played]
    behind = believed(end, last).mean()
    left = range(25, 0, -1)
    follows = [sum(gamma**k * x for k, x in enumerate(rewards[-n:])) + gamma**n * behind for n in left]
    assert row["earned"] == close(np.mean(follows))


@pytest.mark.parametrize("damage", ["no checkpoint", "no critics", "falls"])
def test_bad_input_is_one_line(damage, run, tmp_path, results, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    if damage == "no checkpoint":
        (run / "checkpoint.pt").unlink()
    elif damage == "no critics":
        config["args"]["q_weight"] = 0.0
    elif damage == "falls":
        config["env_id"] = "mamujoco_ant_2x4"
    (run / "config.json").write_text(json.dumps(config))
    word = {"no checkpoint": "missing"}.get(damage, "give runs")
    assert look.main((run,)) == 2
    out, err = capsys.readouterr()
    assert one_line(err, "look") and word in err and not out and not results.exists()


def test_entropy_from_distances():
    rng, gauss = np.random.default_rng(0), 0.5 * np.log(2 * np.pi * np.e)
    for d in (1, 3):
        assert look.estimate(0.1 * rng.normal(size=(4000, d))) == pytest.approx(d * (gauss + np.log(0.1)), abs=0.1)
    apart = rng.normal(size=(4000, 2)) + 50 * rng.integers(4, size=(4000, 1))  # four modes: log 4 more
    assert look.estimate(apart) == pytest.approx(2 * gauss + np.log(4), abs=0.1)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_entropy_of_an_online_run(policy, results, tmp_path, monkeypatch):
    """A Gaussian's bound is its entropy; a chain's is below it. Both lose by the tanh what saturates."""
    flags = f"--policy {policy} --total-timesteps 320 --learning-starts 300 --eval-every 800 --eval-episodes 1"
    assert omad.main([*flags.split(), "--device", "cpu", "--seed", "3", "--run-dir", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    saved = torch.load(run / "policy.pt", weights_only=True)
    saved["policy"]["out.bias"] += 1.5
    torch.save(saved, run / "policy.pt")
    np.save(run / "torso_xy.npy", np.float32([[0.2, 0.9], [0.9, 0.1], [-0.1, 0.1], [1.5, 0.0], [1.5, 1.0]]))
    monkeypatch.setattr(look, "noise", partial(look.noise, states=3, samples=2000))
    assert look.main((run,)) == 0
    (row,) = csv.DictReader(results.with_name("entropy.csv").open())
    assert list(row.values())[:6] == ["mpe_simple_spread", "own", policy, "4", "320", "3"] and not results.exists()
    bound, entropy = float(row["bound"]), float(row["entropy"])
    assert row["squares"] == "4"
    assert -0.2 < entropy - bound < (0.2 if policy == "gaussian" else 0.6) and bound < -6
