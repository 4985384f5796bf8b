"""policy.pt of both programs: what somebody does with a policy who did not train it."""

import re

import numpy as np
import pytest
import torch
from torch.export import Dim, export

import dom2
import omad
from common.envs import make_env, make_vec
from conftest import ROOT, equal, load, rows

# The policies' kinds, with the dimension of the batch in the observations that they take.
KINDS = {
    "omad diffusion": (omad, 0),
    "omad dime": (omad, 0),
    "omad gaussian": (omad, 0),
    "dom2 diffusion": (dom2, 1),
    "dom2 deterministic": (dom2, 1),
}


def test_a_policy_of_the_default_size_is_small(program, tmp_path, monkeypatch):
    """The whole file of a run with the networks of the preset, but hardly any training: below a megabyte."""
    name = ["--env-id", "mpe_simple_spread"] if program.name == "omad" else program.flags[:2]
    short = "--total-timesteps 200 --num-envs 4 --learning-starts 199 --eval-every 100 --updates-per-step 0.25"
    short = short if program.name == "omad" else "--total-updates 1"
    code, _, err = program.call(*name, *short.split(), "--eval-episodes", 1, "--device", "cpu")
    assert code == 0, err
    (run,) = program.runs()
    args = load(run / "policy.pt")["args"]
    preset = program.module.preset(name[1])
    assert args["policy_hidden"] == preset.policy_hidden and 50_000 < (run / "policy.pt").stat().st_size < 1_000_000


def test_a_policy_file_says_whose_and_how_good_it_is(program):
    saved, last = load(program.whole / "policy.pt"), rows(program.whole)[-1]
    assert saved["step"] == program.length and saved["return_mean"] == float(last["return_mean"])
    assert saved["args"]["policy_hidden"] == 16 and len(saved["obs_sizes"]) == len(saved["action_sizes"]) == 3
    agent = load(program.whole / "checkpoint.pt")["agent"]
    part = {"omad": "policy", "dom2": "slow_policy"}[program.name]  # those that act
    assert equal(saved["policy"], {n.removeprefix(f"{part}."): x for n, x in agent.items() if n.startswith(f"{part}.")})


def test_a_saved_policy_acts_in_five_lines(program):
    """As the last policy of the run does: its actions are those of the run's own agent."""
    module, env_id = program.module, {"omad": "mpe_simple_spread", "dom2": "omar_simple_spread"}[program.name]
    envs = make_vec(env_id, 5)
    obs, _ = envs.reset(seed=0)

    policy, saved = module.load_policy(program.whole / "policy.pt")
    act = module.make_act(policy, module.Args(**saved["args"]))
    torch.manual_seed(0)
    action = act(obs)

    kind, args = {"omad": omad.OMAD, "dom2": dom2.DOM2}[program.name], module.Args(**saved["args"])
    agent = kind(make_env(env_id), args, torch.device("cpu"))
    agent.load_state_dict(load(program.whole / "checkpoint.pt")["agent"])
    own = module.make_act(agent.policy if program.name == "omad" else agent.slow_policy, args)
    torch.manual_seed(0)
    assert np.array_equal(own(obs), action)
    assert action.shape == (5, 3, 2) and action.dtype == np.float32 and 0 < np.abs(action).max() <= 1
    assert not np.array_equal(act(obs), action)  # sampled
    envs.step(action)


@pytest.mark.parametrize("kind", KINDS)
def test_acting_can_be_exported_for_any_number_of_observations(kind):
    """torch.export, as for a robot without this project: the exported chain does what the policy does."""
    (module, in_obs), name = KINDS[kind], kind.split()[1]
    torch.manual_seed(0)
    policy = module.POLICIES[name]([3, 5, 2], [2, 1, 3], module.Args(policy=name, policy_hidden=16), 2)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    seen = lambda batch: torch.randn(*((batch, 3, 5) if in_obs == 0 else (3, batch, 5)))
    shapes = ({in_obs: Dim("batch")}, {1: Dim("batch")})
    exported = export(policy, (seen(4), policy.noise(4)), dynamic_shapes=shapes).module()
    for batch in (4, 2, 33):
        inputs = seen(batch), policy.noise(batch)
        got, want = exported(*inputs), policy(*inputs)
        torch.testing.assert_close(got, want)
        action = want[0] if isinstance(want, tuple) else want
        assert action.shape == ((batch, 3, 3) if in_obs == 0 else (3, batch, 3)) and action.std() > 0.1


@pytest.mark.parametrize(
    "module, name, episodes, level",
    [
        (omad, "mpe_simple_spread", 100, -10.0),  # random policies: -27
        (omad, "mamujoco_halfcheetah_2x3", 5, 4000.0),  # -490; in one episode of twenty it falls, and earns 2000
        (omad, "doors_blind", 400, 0.8),  # 0.1; with one mode at most 0.5
        (dom2, "omar_simple_spread-medium", 100, 420.0),  # 156
    ],
)
def test_the_policies_in_this_repository_do_what_they_were_trained_for(module, name, episodes, level, capsys):
    """With the packages of requirements.txt, on start states that they have not seen."""
    file = ROOT / "runs/policies" / f"{name}.pt"
    assert file.stat().st_size < 1_000_000
    assert load(file)["args"]["run_dir"].split("/")[0] == "runs"  # no machine's path
    assert module.main(["--evaluate", str(file), "--seed", "77", "--eval-episodes", str(episodes)]) == 0
    assert float(re.search(r"return (\S+) ±", capsys.readouterr().out)[1]) > level
