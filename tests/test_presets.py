"""The defaults of a task are those that its committed results were made with."""

import json
import re
from pathlib import Path

import pytest

import omad
from common.envs import list_tasks

RESULTS = Path(__file__).parent.parent / "runs" / "results"
OWN = {"seed", "run_dir", "resume", "evaluate", "device", "torch_threads", "cuda_graph", "compile", "list_tasks"}
OWN |= {"capture_video"}
SCRIPT = (RESULTS.parent / "mamujoco.sh").read_text()
small = re.search('small="(.+)"', SCRIPT)[1].split()
SMALL = {name.strip("-").replace("-", "_"): float(value) for name, value in zip(small[::2], small[1::2], strict=True)}
HALFCHEETAH = SMALL | dict(v_min=-1000.0, v_max=1000.0)
BATCH_128 = dict(batch_size=128, total_timesteps=120_000)
GAUSSIAN = dict(policy="gaussian")
FLAGS = {  # folder of runs/results -> the flags of its runs, see runs/simple_spread.sh and runs/mamujoco.sh
    "omad": {},
    "omad_gaussian": GAUSSIAN,
    "omad_long": dict(total_timesteps=700_000, eval_every=50_000, eval_episodes=400),
    "omad_batch_128": BATCH_128,
    "omad_batch_128_long": BATCH_128 | dict(total_timesteps=900_000, eval_every=30_000),
    "omad_gaussian_batch_128": BATCH_128 | GAUSSIAN,
    "omad_target_networks": BATCH_128 | dict(target_networks=True),
    "omad_lr_3e-4": BATCH_128 | dict(policy_lr=3e-4, q_lr=3e-4),
    "omad_alpha_1": BATCH_128 | dict(alpha=1.0),
    "simple_adversary_omad": {},
    "halfcheetah_2x3_omad": HALFCHEETAH | dict(total_timesteps=90_000),
    "halfcheetah_2x3_omad_gaussian": HALFCHEETAH | GAUSSIAN | dict(total_timesteps=90_000),
    "halfcheetah_2x3_omad_longer": HALFCHEETAH | dict(total_timesteps=120_000),
    "ant_2x4_omad": SMALL | dict(total_timesteps=120_000),
    "ant_2x4_omad_gaussian": SMALL | GAUSSIAN | dict(total_timesteps=120_000),
    "walker2d_2x3_omad": SMALL | dict(total_timesteps=135_000),
    "walker2d_2x3_omad_gaussian": SMALL | GAUSSIAN | dict(total_timesteps=135_000),
}


def test_every_committed_run_has_its_flags_in_the_table():
    assert {path.parent.parent.name for path in RESULTS.rglob("*__omad__*/eval.csv")} == set(FLAGS)


@pytest.mark.parametrize("folder", FLAGS)
def test_committed_runs_were_made_with_the_presets_of_today(folder):
    found = [path.read_text() for path in (RESULTS / folder).glob("*__omad__*/config.json")]
    configs = [json.loads(text.replace('"num_atoms"', '"n_atoms"'))["args"] for text in found]  # as the first runs said
    assert configs
    for made_with in configs:
        today = vars(omad.preset(made_with["env_id"])) | FLAGS[folder]
        names = made_with.keys() - OWN
        assert {name: made_with[name] for name in names} == {name: today[name] for name in names}


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


def test_the_readme_has_the_small_variant():
    readme = " ".join((RESULTS.parent.parent / "README.md").read_text().replace("\\\n", " ").split())
    own = re.search("halfcheetah_2x3 90000 (.+?) ;;", SCRIPT)[1]
    assert all(flags in readme for flags in (" ".join(small), own))
    assert "python omad.py --env-id mamujoco_halfcheetah_2x3" in readme
    assert omad.parse(["--env-id", "mamujoco_halfcheetah_2x3", *small, *own.split()]).v_max == 1000
