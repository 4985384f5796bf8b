"""The scripts that make and compare the offline results."""

import csv
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.datasets import SPLITS, load_dataset
from common.envs import BadInput, evaluate, make_env, make_vec
from conftest import ROOT, SHORT_OFFLINE, the_run

sys.path.insert(0, str(ROOT / "runs"))
import assignments
import belief
import data_efficiency
import dom2
import generalization
import offline
import sweep


def test_a_search_changes_one_value_at_a_time_and_treats_both_kinds_alike():
    for dataset in sweep.Options().datasets:
        found = sweep.trials(dataset, "mlp")
        assert len({sweep.key(dataset, trial) for trial in found}) == len(found)
        ours, baseline = (
            [trial for trial in found if trial["policy"] == kind] for kind in ("diffusion", "deterministic")
        )
        for group in (ours, baseline):
            changed = [{name for name in sweep.FLAGS if trial[name] != group[0][name]} for trial in group[1:]]
            # Other critics take another time.
            assert all(
                len(names - {"total_updates"}) == 1 and ("total_updates" not in names or "critic_hidden" in names)
                for names in changed
            )
        tried = lambda group: {(t["gamma"], t["cql_weight"], t["thresholds"], t["critic_hidden"]) for t in group}
        assert tried(ours) == tried(baseline) and len(ours) == len(baseline)
        cost = offline.COST_ROBOT if "cheetah" in dataset else offline.COST
        for method, group in (("dom2", ours), ("deterministic", baseline)):
            took = [trial["total_updates"] * cost[method][trial["critic_hidden"]] for trial in group]
            assert took == pytest.approx(
                [ours[0]["total_updates"] * cost["dom2"][ours[0]["critic_hidden"]]] * len(took), rel=1e-2
            )
        assert len({t["q_weight"] for t in ours}) == 3 == len({t["policy_lr"] for t in baseline})
        assert all(trial["seed"] not in offline.Options().seeds for trial in found)


def test_values_become_flags():
    assert offline.as_flags(dict(cql_own=True, reweight=False, q_lr=0.1)) == [
        "--cql-own",
        "--no-reweight",
        "--q-lr",
        "0.1",
    ]


SEARCHED = {f"omar_simple_{task}-{split}" for task in ("spread", "tag", "world") for split in SPLITS}
SEARCHED |= {f"omar_halfcheetah_2x3-{split}" for split in SPLITS}
SEARCHED.add(assignments.NAME)


@pytest.mark.parametrize("dataset", sweep.Options().datasets)
@pytest.mark.parametrize("policy", ["diffusion", "deterministic"])
def test_presets_are_trials_of_the_search_and_none_is_clearly_worse_than_the_best(dataset, policy):
    found = sweep.star(dataset, policy, "unet")
    assert bool(found) == (dataset in SEARCHED)
    if found:
        if dataset == assignments.NAME:  # as flags there
            values = vars(dom2.Args()) | dict(gamma=0.9, q_weight=0.1, cql_weight=8.0, thresholds=0)
        else:
            values = vars(dom2.preset(dataset))
        values |= offline.baseline(dataset) if policy == "deterministic" else {}
        names = set(sweep.FLAGS) - {"policy", "network", "total_updates", "seed"}
        names -= {"q_weight"} if policy == "deterministic" else set()
        mine = [row for row in found if all(sweep.short(row[name]) == sweep.short(str(values[name])) for name in names)]
        assert len(mine) == 1
        best = sweep.best_of(found)
        if len(sweep.returns(best)) > 1:
            assert mine[0] is best
        else:
            error = sum(float(row["return_std"]) ** 2 / float(row["episodes"]) for row in (best, mine[0])) ** 0.5
            assert float(best["return_mean"]) - float(mine[0]["return_mean"]) <= 2 * error


def test_results_were_made_with_the_presets_of_today():
    found = [p for p in offline.RESULT.glob("*/*/*/config.json") if p.parts[-3].partition("-")[0] != "cloning"]
    assert len(found) > 100
    for path in found:
        dataset, method = path.parts[-4], path.parts[-3].partition("-")[0]
        wanted = vars(dom2.preset(dataset)) | (offline.baseline(dataset) if method == "deterministic" else {})
        if (dataset, method) == ("omar_simple_spread-random", "deterministic"):
            wanted |= dict(thresholds=3)  # from before its search; README.md says so
        used = json.loads(path.read_text())["args"]
        names = "gamma cql_weight cql_own thresholds top_quantile critic_hidden policy_hidden policy_lr q_lr".split()
        for name in (*names, *(["q_weight", "total_updates"] if method == "dom2" else [])):
            assert used[name] == pytest.approx(wanted[name]), (path, name)


def test_where_trials_were_repeated_the_best_has_the_highest_mean_over_seeds(monkeypatch):
    dataset = "omar_halfcheetah_2x3-expert"
    ours = [trial for trial in sweep.trials(dataset, "unet") if trial["policy"] == "diffusion"]
    row = lambda trial, value: {
        "dataset": dataset,
        **{name: str(trial[name]) for name in sweep.FLAGS},
        "return_mean": str(value),
    }
    found = [row(trial, value) for trial, value in zip(ours, (5, 0, 8, 7, 0, 6, 0), strict=True)]
    monkeypatch.setattr(sweep, "rows", lambda: found)
    assert sweep.best_of(found[:7]) is found[2]
    repeats = sweep.again(dataset, "unet", 2)
    assert [(t["cql_weight"], t["q_weight"], t["seed"]) for t in repeats] == [
        (32.0, 0.5, 102), (32.0, 0.5, 103), (8.0, 0.125, 102), (8.0, 0.125, 103)
    ]  # fmt: skip
    found += [row(trial, value) for trial, value in zip(repeats, (3, 4, 4, 5))]
    assert sweep.returns(found[2]) == [8, 3, 4] and sweep.returns(found[0]) == [5]
    assert sweep.best_of(found[:7]) is found[3]  # not those of one seed, nor the luckiest
    assert sweep.tell(found[3]) == "5.3 ± 1.5 (3)"
    assert sweep.best_of(found[:4]) is found[3]
    found[1]["return_mean"] = "9"
    assert sweep.best_of([found[1], found[3]]) is found[1]  # one with all seeds has no rival yet
    base = [trial for trial in sweep.trials(dataset, "unet") if trial["policy"] == "deterministic"]
    found = [row(trial, value) for trial, value in zip(base, (-20, 100, 9, 0, 0, 0, 0), strict=True)]
    assert {(t["cql_weight"], t["policy"]) for t in sweep.again(dataset, "unet", 1)} == {(2.0, "deterministic")}
    assert sweep.again(dataset, "unet", 0) == sweep.again(dataset, "unet", -1) == []


def test_a_search_runs_what_is_missing_and_then_its_best_again(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "RESULT", tmp_path / "sweep.csv")
    monkeypatch.setattr(sweep, "make", lambda _: None)
    done = []

    def run(dataset, trial):
        done.append(trial)
        value = trial["cql_weight"] + (trial["policy"] == "diffusion") * trial["q_weight"]
        return (
            {"dataset": dataset}
            | trial
            | dict(return_mean=value, return_std=1.0, episodes=20, seconds=1.0, git_revision="")
        )

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["sweep.py", "--datasets", *["omar_halfcheetah_2x3-medium"] * 2, "--repeat", "1", "--jobs", "1"]
    )
    sweep.main()
    assert [trial["seed"] for trial in done] == [101] * 14 + [102, 103] * 2
    assert {(t["policy"], t["cql_weight"]) for t in done[14:]} == {("diffusion", 32.0), ("deterministic", 32.0)}
    sweep.main()  # all rows are there
    assert len(done) == 18


def test_the_data_of_a_machine_come_before_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "RESULT", tmp_path)
    dataset = "omar_halfcheetah_2x3-medium-replay"
    card = json.loads((ROOT / "datasets" / "cards" / f"{dataset}.json").read_text())
    assert offline.data_return(dataset) == card["return"]["mean"]
    offline.note_data(dataset, np.array([1.0, 4.0]))
    assert offline.data_return(dataset) == 2.5 and np.isnan(offline.data_return("unheard-of"))
    (tmp_path / dataset / "dom2" / "run").mkdir(parents=True)
    (tmp_path / dataset / "dom2" / "run" / "fresh.csv").touch()
    offline.note_data(dataset, np.array([1.0, 4.0]))  # the same
    with pytest.raises(SystemExit, match="other data"):
        offline.note_data(dataset, np.array([1.0, 5.0]))


def test_what_is_earned_counts_what_follows_and_the_belief_behind_the_end():
    rewards = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    assert belief.to_go(rewards, 0.5, np.array([16.0, 8.0])).tolist() == [[5.0, 1.0], [8.0, 2.0], [12.0, 4.0]]


@pytest.mark.parametrize("kind", ["diffusion", "deterministic"])
def test_what_critics_believe_beside_what_their_policies_earn(kind, tmp_path, monkeypatch, capsys):
    env_id, dataset, method = "omar_simple_spread", "omar_simple_spread-medium", "dom2" if kind == "diffusion" else kind
    agent = dom2.DOM2(make_env(env_id), dom2.Args(policy=kind, gamma=0.5), torch.device("cpu"))
    agent.slow_policy.obs_mean += 0.5
    agent.slow_policy.obs_std *= 2

    def critic(obs, action):  # two that differ, of what they are told
        value = obs.sum(-1) + 3 * action.sum(-1)
        return torch.stack([value, -value])

    agent.slow_critic.forward = critic
    rng = np.random.default_rng(0)
    data = SimpleNamespace(
        obs=rng.normal(size=(50, 3, 18)), actions=rng.normal(size=(50, 3, 2)), returns=np.array([1.0, 3.0])
    )
    believed = lambda obs, action: -abs(((obs - 0.5) / 2).sum(-1) + 3 * action.sum(-1))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    monkeypatch.setattr(belief, "RESULT", tmp_path / "belief.csv")
    monkeypatch.setattr(offline, "RESULT", tmp_path)
    monkeypatch.setattr(
        offline, "find_run", lambda d, m, f, seed: tmp_path / "run" if m == method and seed == 2 else None
    )
    monkeypatch.setattr(belief, "trained", lambda _: (agent, env_id))
    monkeypatch.setattr(belief, "open_dataset", lambda _: data)
    seen, act = [], dom2.make_act(agent.slow_policy)
    spy = lambda obs: seen.append((obs.copy(), act(obs))) or seen[-1][1]
    monkeypatch.setattr(dom2, "make_act", lambda policy: {agent.slow_policy: spy}[policy])
    for _ in range(2):  # the second row replaces the first
        monkeypatch.setattr(sys, "argv", ["belief.py", "--datasets", dataset])
        belief.main()
    rows = list(csv.DictReader((tmp_path / "belief.csv").open()))
    assert len(rows) == 1 and (rows[0]["method"], rows[0]["seed"]) == (method, "2")
    row = {name: float(value) for name, value in list(rows[0].items())[3:]}

    played, (end, last), (_, at_data) = seen[-27:-2], seen[-2], seen[-1]
    assert row["believed"] == pytest.approx(np.mean([believed(*step).mean() for step in played]), abs=2e-3)
    actions = np.abs([action for _, action in played])
    assert row["action"] == pytest.approx(actions.mean(), abs=1e-3)
    assert row["edge"] == pytest.approx((actions > 0.99).mean(), abs=1e-3)
    assert row["data"] == pytest.approx(believed(data.obs, data.actions.clip(-1, 1)).mean(), abs=1e-3)
    assert (
        row["own"] == pytest.approx(believed(data.obs, at_data).mean(), abs=1e-3)
        and at_data.shape == data.actions.shape
    )
    returns = evaluate(act, make_vec(env_id, 200), offline.FRESH)
    assert row["return_mean"] == pytest.approx(returns.mean(), abs=1e-2)
    envs = make_vec(env_id, 200)
    envs.reset(seed=offline.FRESH)
    rewards = [envs.step(action)[4]["agent_rewards"].mean() for _, action in played]
    behind = believed(end, last).mean()
    follows = [sum(0.5 ** (k - t) * rewards[k] for k in range(t, 25)) + 0.5 ** (25 - t) * behind for t in range(25)]
    assert row["earned"] == pytest.approx(np.mean(follows), abs=2e-3)
    assert row["end"] == pytest.approx(np.mean([0.5 ** (25 - t) for t in range(25)]), abs=1e-3)

    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "belief.csv").unlink()
    capsys.readouterr()
    belief.main()
    assert "no finished run" in capsys.readouterr().out and not (tmp_path / "belief.csv").exists()


def test_what_a_run_leaves_is_enough(tmp_path, data):
    """For the fresh episodes its policy.pt alone; for what its critics believe its checkpoint too."""
    assert dom2.main(["--dataset", str(data), *SHORT_OFFLINE, "--run-dir", str(tmp_path / "runs")]) == 0
    run = the_run(tmp_path)
    agent, env_id = belief.trained(run)
    policy, saved = dom2.load_policy(run)
    assert env_id == "omar_simple_spread" and agent.args.policy_hidden == 16
    assert all(torch.equal(x, agent.slow_policy.state_dict()[name]) for name, x in policy.state_dict().items())
    critics = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.equal(x, critics[f"slow_critic.{name}"]) for name, x in agent.slow_critic.state_dict().items())
    (run / "checkpoint.pt").unlink()
    rows = offline.fresh(run)
    assert [(row["shift"], row["episodes"]) for row in rows] == [("usual", 1000), ("speed", 1000)]
    returns = evaluate(dom2.make_act(policy), make_vec(env_id, 1000), offline.FRESH)
    assert rows[0]["return_mean"] == returns.mean() != rows[1]["return_mean"] and rows[0]["return_std"] == returns.std()


def test_the_share_of_data_at_which_a_level_is_passed():
    shares = [0.01, 0.1, 1.0]
    assert data_efficiency.passing(shares, [0, 10, 20], 5) == pytest.approx(10**-1.5)  # half way on a logarithmic axis
    assert data_efficiency.passing(shares, [7, 10, 20], 5) == 0.01
    assert data_efficiency.passing(shares, [7, 1, 20], 20) == pytest.approx(
        1.0
    )  # a level that is lost again does not count
    assert data_efficiency.passing(shares, [0, 10, 20], 21) is None
    assert data_efficiency.passing([], [], 1) is None


def test_a_win_is_two_standard_errors():
    compare = offline.compare
    assert (
        compare({1: 10.0, 2: 12.0}, {1: 5.0, 2: 7.0}) == "win"
        and compare({1: 5.0, 2: 7.0}, {1: 10.0, 2: 12.0}) == "loss"
    )
    assert compare({1: 10.0, 2: 12.0}, {1: 9.0, 2: 11.0}) == "tie"  # a difference of 1 with a standard error of 1.4
    assert compare({1: 10.0, 2: 12.0}, {1: 8.0, 2: 10.0}) == "tie"  # 1.4 standard errors
    assert compare({1: 10.0, 2: 12.0}, {1: 7.0, 2: 9.0}) == "win"  # 2.1
    assert compare({1: 10.0}, {1: 5.0, 2: 7.0}) == "" == compare({}, {})
    assert (
        offline.tally(["win", "loss", "", "win"]) == "2 wins, 1 loss" and offline.tally(["loss", "loss"]) == "2 losses"
    )
    assert offline.tally(["", ""]) == "none"
    assert len(generalization.SETTINGS) == 30 == len(set(generalization.SETTINGS))


def test_an_interrupted_run_is_gone_on_with_and_only_then_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "RESULT", tmp_path)
    place = offline.folder("omar_simple_spread-medium", "deterministic", 0.05)
    assert place == tmp_path / "omar_simple_spread-medium" / "deterministic-5"
    commands = []

    def pretend(command, **_):
        """A run that leaves its files; the first time it is killed before it has finished."""
        commands.append(command)
        run = place / "omar_simple_spread-medium__dom2__2__20260101-000000-123456"
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(
            json.dumps({"args": {"run_dir": "/home/somebody", "resume": "x", "dataset": "y"}})
        )
        (run / "eval.csv").write_text("step,wall_time_s\n10,60\n")
        return SimpleNamespace(
            returncode=1 if len(commands) == 1 else 0, stdout="done in 1 min: there", stderr="killed"
        )

    monkeypatch.setattr(offline.subprocess, "run", pretend)
    monkeypatch.setattr(
        offline, "fresh", lambda run: [dict(shift="usual", return_mean=7.0, return_std=1.0, episodes=3)]
    )
    job = ("omar_simple_spread-medium", "deterministic", 0.05, 2, 1000)
    with pytest.raises(SystemExit):
        offline.train(*job)
    assert offline.read(*job[:3]) == {} and not offline.find_run(*job[:4])
    offline.train(*job)
    first, second = commands
    assert (
        first[first.index("--total-updates") + 1] == "3000" and "--resume" not in first
    )  # three times as many, in the same time
    assert second[-2] == "--resume" and second[-1].endswith("20260101-000000-123456")
    assert (
        offline.read(*job[:3]) == {2: 7.0}
        and "somebody" not in (offline.find_run(*job[:4]) / "config.json").read_text()
    )
    offline.train(*job)
    assert len(commands) == 2  # it is there already


def test_data_of_another_script_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "DATA", tmp_path / "simple_spread_6" / "assignments" / "seed_0_data")
    monkeypatch.setattr(assignments, "EPISODES", 20)
    told = lambda: (assignments.make_data(), capsys.readouterr().out.count("data "))[1]
    assert [told(), told()] == [1, 0]  # the second time they are there
    before = np.load(assignments.DATA / "acs_1.npy")
    assert before.shape == (500, 2) and before.dtype == np.float32
    monkeypatch.setattr(assignments, "NOISE", 0.05)
    assert [told(), told()] == [1, 0] and (np.load(assignments.DATA / "acs_1.npy") != before).any()
    (assignments.DATA / "rews_2.npy").unlink()
    assert [told(), told()] == [1, 0]


@pytest.mark.parametrize("wrong", ["", "in the order of the ring", "one of them twice"])
def test_landmarks_are_listed_nearest_first(tmp_path, monkeypatch, wrong):
    folder = tmp_path / "simple_spread_6" / "assignments" / "seed_0_data"
    monkeypatch.setattr(assignments, "DATA", folder)
    monkeypatch.setattr(assignments, "EPISODES", 40)
    assignments.make_data()
    for name in ("obs_1", "next_obs_1") if wrong else ():
        rows = np.load(folder / f"{name}.npy")
        places = rows[:, 4:16].reshape(-1, 6, 2)
        if wrong == "one of them twice":
            places[:, 5] = places[:, 4]
        else:
            turn = np.argsort(np.arctan2(*(places + rows[:, None, 2:4]).T).T, 1)
            places[:] = np.take_along_axis(places, turn[..., None], 1)
        np.save(folder / f"{name}.npy", rows)
    if wrong:
        with pytest.raises(BadInput, match="sees landmark"):
            load_dataset(str(folder), 1.0, 1, assignments.TASK, 0)
    else:
        assert len(load_dataset(str(folder), 1.0, 1, assignments.TASK, 0).obs) == 1000


def test_assignments():
    """Against brute force; the script reaches what it walks to."""
    envs, rng = make_vec(assignments.TASK, 60), np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    places, gone = assignments.landmarks(envs)
    assert places.shape == (60, 6, 2) and not gone.any()
    index = lambda goal: (places[:, None] == goal[:, :, None]).all(-1).argmax(-1)  # of each agent's landmark [60, 3]
    goal = assignments.choose(obs, places, gone, rng, 1)
    best = index(goal)
    for e in range(60):
        far = np.linalg.norm(places[e] - obs[e, :, None, 2:4], axis=-1)
        totals = {order: sum(far[i, k] for i, k in enumerate(order)) for order in itertools.permutations(range(6), 3)}
        assert totals[tuple(best[e])] == pytest.approx(min(totals.values()))
        assert len(set(best[e])) == 3
        ten = sorted(totals.values())[9]
        for _ in range(3):
            assert totals[tuple(index(assignments.choose(obs, places, gone, rng, 10))[e])] <= ten + 1e-6
    many = np.array([index(assignments.choose(obs, places, gone, rng, 10)) for _ in range(40)])
    assert np.mean([len({tuple(x) for x in many[:, e]}) for e in range(60)]) > 8  # several good ways from one start
    gone = np.tile([True, False, True, False, True, False], (60, 1))
    assert (index(assignments.choose(obs, places, gone, rng, 6)) % 2 == 1).all()
    for _ in range(25):
        obs, _, _, _, info = envs.step(assignments.script(obs, goal))
    assert (np.linalg.norm(goal - obs[..., 2:4], axis=-1) < 0.1).mean() > 0.95 and info["episode"]["r"].mean() > 680
    joint, alone = (assignments.script_returns(10, "", alone).mean() for alone in (False, True))
    assert joint - alone > 30  # who decides for itself goes where another goes
    few = make_vec(assignments.TASK, 8, shift="fewer")
    few.reset(seed=0)
    assert (assignments.landmarks(few)[1].sum(1) == 3).all()
