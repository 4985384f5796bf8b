"""The defaults of tasks and data sets."""

import csv

import campaign
import numpy as np
import pytest

import dom2
import omad
from common.envs import find_task, list_tasks
from conftest import ROOT


@pytest.mark.parametrize("name", ["lower_critic", "lr_decay"])
def test_what_robots_that_fall_have(name):
    falls = [env_id for env_id in list_tasks() if getattr(omad.preset(env_id), name)]
    assert falls == [env_id for env_id in list_tasks() if env_id[:8] == "mamujoco" and find_task(env_id).terminates]
    assert {env_id.split("_")[1] for env_id in falls} >= {"ant", "walker2d", "hopper", "humanoid", "manysegmentant"}


@pytest.mark.parametrize(
    "env_id, v_min, v_max",
    [
        ("mpe_simple_spread", -30, 10), ("mpe_simple_formation", -30, 10), ("mpe_simple_line", -30, 10),
        ("mpe_simple", -90, 10), ("mpe_simple_spread_n4", -60, 10), ("mpe_simple_reference", -60, 10),
        ("mpe_simple_speaker_listener", -90, 10), ("mpe_simple_adversary", -30, 30), ("mpe_collect_treasure", -60, 60),
        ("omar_simple_spread", -600, 600), ("omar_simple_spread_6", -600, 600), ("omar_simple_tag", -300, 300),
        ("omar_halfcheetah_2x3", -500, 500), ("mamujoco_halfcheetah_2x3", -2000, 2000),
        ("mamujoco_halfcheetah_6x1", -2000, 2000), ("mamujoco_ant_4x2", -1000, 1000),
        ("mamujoco_manysegmentswimmer_10x2", -100, 100), ("mamujoco_manysegmentswimmer_3x7", -100, 100),
        ("mamujoco_manysegmentant_4x4", -1000, 1000), ("mamujoco_humanoidstandup_9|8", -30_000, 30_000),
    ],
)  # fmt: skip
def test_supports(env_id, v_min, v_max):
    """A task's own, that of its robot whatever the partition, or that of its suite, but never that of a task with a shorter name."""
    args = omad.preset(env_id)
    assert (args.v_min, args.v_max) == (v_min, v_max)


def test_every_task_has_defaults():
    assert all(omad.preset(env_id).env_id == env_id for env_id in list_tasks())


def test_the_documents_have_the_small_variant():
    text = " ".join((ROOT / "runs" / "omad.md").read_text().replace("\\\n", " ").split())
    assert campaign.WORDS["small"] in text
    small = campaign.EXPERIMENTS["robots"][0].flags.format(**campaign.WORDS).split()
    assert omad.parse(["--env-id", "mamujoco_halfcheetah_2x3", *small]).v_max == 1000


SEARCH = list(csv.DictReader((ROOT / "runs" / "results" / "search.csv").open()))
UNUSED = ("q_weight", "time_power", "act_noise")  # by the baseline
SAME = [f"omar_simple_spread-{split}" for split in ("random-medium", "medium-replay", "medium-expert", "expert")]
# which have the preset that was searched on spread-medium


@pytest.mark.parametrize("dataset", sorted({row["dataset"] for row in SEARCH}))
@pytest.mark.parametrize("policy", ["diffusion", "deterministic"])
def test_presets_are_trials_of_the_search_and_none_is_clearly_worse_than_the_best(
    dataset, policy, tmp_path, monkeypatch
):
    """By two standard errors: over seeds where trials were repeated, else over episodes."""
    rows = [row for row in SEARCH if (row["dataset"], row["policy"]) == (dataset, policy) and float(row["q_weight"])]
    if policy == "diffusion" and dataset in SAME:
        assert not rows
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / campaign.SOURCES["omar_simple_spread_6-assignments"]["flags"].split()[1]).mkdir(parents=True)
    experiment = "assignments" if dataset in campaign.SOURCES else "offline"
    method = "dom2" if policy == "diffusion" else policy
    run = next(r for r in campaign.declared((experiment,)) if (r.on, r.variant) == (dataset, method))
    args = vars(dom2.parse(run.flags))
    args |= {} if args["reweight"] else dict(thresholds=0)
    names = [name for name in campaign.TRIED.split() if policy == "diffusion" or name not in UNUSED]
    trials = {}
    for row in rows:
        trials.setdefault(tuple(row[name] for name in names), []).append(row)
    number = lambda value: float({"True": 1, "False": 0}.get(str(value), value))
    same = lambda text, value: number(text) == pytest.approx(number(value), rel=1e-3)
    ours = [rows for key, rows in trials.items() if all(same(text, args[name]) for name, text in zip(names, key))]
    assert len(ours) == 1 and len(trials) >= 6
    most = max(map(len, trials.values()))
    returns = lambda rows: np.array([float(row["return_mean"]) for row in rows])
    best = max((returns(rows) for rows in trials.values() if len(rows) == most), key=np.mean)
    if most > 1:
        error = (best.var(ddof=1) / most + returns(ours[0]).var(ddof=1) / len(ours[0])) ** 0.5
    else:
        both = [row for row in rows if float(row["return_mean"]) in (best[0], returns(ours[0])[0])]
        error = sum(float(row["return_std"]) ** 2 / float(row["episodes"]) for row in both) ** 0.5
    assert best.mean() - returns(ours[0]).mean() <= 2 * error
