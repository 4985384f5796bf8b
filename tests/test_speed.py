"""What an update dispatches: counts are exact on any machine, and the time of small networks on a GPU is about their number."""

import dataclasses

import campaign
import pytest
import speed
import torch

import dom2
import omad
from common.envs import make_env

# What is counted -> at most so many operations: those of today, and room for a torch that splits one differently.
MOST = {
    ("omad", "diffusion", "full update"): 615,
    ("omad", "diffusion", "critic update"): 293,
    ("omad", "diffusion", "act in 1"): 91,
    ("dom2", "unet", "update"): 1300,
    ("dom2", "deterministic", "update"): 215,
    ("dom2", "unet", "act in 1"): 240,
}


@pytest.mark.parametrize("program, network, what", MOST)
def test_no_operation_is_for_nothing(program, network, what):
    if program == "omad":
        args, steps, env_id = omad.preset("mpe_simple_spread"), speed.omad_steps, "mpe_simple_spread"
    else:
        args = dataclasses.replace(dom2.preset("omar_simple_spread-medium"), **speed.OFFLINE[network])
        steps, env_id = speed.dom2_steps, "omar_simple_spread"
    found = speed.count_operations(steps(make_env(env_id), args, torch.device("cpu"))[what].run)
    assert 0.9 * MOST[program, network, what] < found <= MOST[program, network, what]
    rows = campaign.rows_of(campaign.RESULTS / "speed_cpu.csv")  # measured with code like today's
    task = env_id if program == "omad" else speed.Options.dataset
    measured = [
        float(row["operations"]) for row in rows if (row["label"], row["what"]) == (f"{program} {task} {network}", what)
    ]
    assert measured == [pytest.approx(found, rel=0.1)]
    assert speed.count_operations(lambda: torch.ones(3).view(3, 1)[0] + 1) == 2  # views cost nothing
