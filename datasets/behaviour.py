"""Behaviour policies: the ones in `datasets/policies/` that made the data sets, and how a training run becomes one.

    python datasets/behaviour.py RUN_DIR --level expert      # keeps the policy of a finished run, and measures it

A policy is two files: `<task>-<level>.pt` holds the network, `<task>-<level>.json` says which command trained it, with which
versions, and what it scores. `bash datasets/policies.sh` makes all that are committed.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import omad
from common.datasets import sha256
from common.envs import find_task, make_env, make_vec
from omad import make_policy

POLICIES = Path(__file__).parent / "policies"
FORMAT = "omad-policy-1"
Act = Callable[[np.ndarray], np.ndarray]  # observations [E, N, O] -> actions [E, N, A]


class BehaviourError(ValueError):
    """A behaviour policy that is not there or cannot be read: what is wrong and what to do."""


@dataclass(frozen=True)
class Behaviour:
    """A trained policy and how it came about (the contents of its .json file)."""

    policy: torch.nn.Module
    about: dict

    def act(self, generator: torch.Generator) -> Act:
        """Sampled actions whose noise comes from `generator`."""

        @torch.no_grad()
        def act(obs: np.ndarray) -> np.ndarray:
            return self.policy(torch.from_numpy(obs), self.policy.noise(len(obs), generator))[0].numpy()

        return act


def load_behaviour(env_id: str, level: str, folder: Path = POLICIES) -> Behaviour:
    """The policy of that task and level. Nothing in its files is executed. Raises `BehaviourError`."""
    path = folder / f"{env_id}-{level}.pt"
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        if about["format"] != FORMAT or about["args"]["env_id"] != env_id:
            raise ValueError(f"of format {about['format']} and task {about['args']['env_id']}, not {FORMAT} and {env_id}")
        args = omad.Args(**about["args"])
        policy = make_policy(make_env(env_id), args)
        policy.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        about["sha256"] = sha256(path)
        for key in ("command", "seed", "steps", "return", "git_revision"):
            about[key]
    except FileNotFoundError as error:
        raise BehaviourError(
            f"{error.filename}: no such behaviour policy; datasets/policies.sh has the commands that make them"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BehaviourError(f"{path}: no behaviour policy of this version ({type(error).__name__}: {reason})") from error
    return Behaviour(policy, about)


def command(args: omad.Args) -> str:
    """The command line that gives these arguments: what differs from the task's defaults, without what does not change the result."""
    words = ["python", "omad.py", "--env-id", args.env_id]
    default = dataclasses.asdict(omad.preset(args.env_id))
    for name, value in dataclasses.asdict(args).items():
        if name in ("seed", "total_timesteps") or value != default[name] and name not in ("run_dir", "resume", "evaluate"):
            flag = "--" + name.replace("_", "-")
            words += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Options:
    """Keeps the policy of a finished run as a behaviour policy."""

    run_dir: tyro.conf.Positional[str]
    """directory of a run of omad.py"""
    level: Literal["medium", "expert"] = "expert"
    """what it will be called"""
    episodes: int = 1000
    """episodes over which it is measured, with start states that no run evaluated on"""
    out: Path = POLICIES
    """folder that gets the two files"""


def main() -> int:
    torch.set_num_threads(1)
    try:
        options = omad.read_flags(Options, sys.argv[1:], prog="behaviour.py")
        if options.episodes < 1:
            raise omad.BadInput(f"--episodes {options.episodes} must be at least 1")
        args, saved = omad.load(options.run_dir)
        if saved is None:
            raise omad.BadInput(f"{options.run_dir}: no checkpoint.pt there yet")
        whole = args.num_envs * find_task(args.env_id).horizon
        if options.level == "medium" and (args.eval_every % whole or saved["step"] % whole):
            raise omad.BadInput(
                f"{options.run_dir}: cannot be recorded as medium-replay: evaluations must come every multiple of {whole}"
            )
    except omad.BadInput as error:
        print(f"behaviour.py: error: {error}", file=sys.stderr)
        return 2
    agent = omad.OMAD(make_env(args.env_id, args.observation, prey=args.prey), args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    copies = min(options.episodes, 1000 if find_task(args.env_id).horizon <= 100 else 50)
    envs = make_vec(args.env_id, copies, args.observation, prey=args.prey)
    rounds = -(-options.episodes // copies)
    returns = np.concatenate([omad.evaluate(agent, envs, omad.mix_seed(2000, i)) for i in range(rounds)])
    config = json.loads((Path(options.run_dir) / "config.json").read_bytes())
    done = dataclasses.replace(args, total_timesteps=saved["step"], run_dir="runs")
    about = {
        "format": FORMAT, "task": args.env_id, "level": options.level, "command": command(done), "seed": args.seed,
        "steps": saved["step"], "minutes": round(saved["seconds"] / 60, 1),
        "return": {"mean": round(returns.mean(), 2), "std": round(returns.std(), 2), "episodes": len(returns)},
        "git_revision": config["git_revision"], "python": config["python"], "packages": config["packages"],
        "args": dataclasses.asdict(done),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{args.env_id}-{options.level}.pt"
    omad.write(path, lambda file: torch.save(agent.policy.state_dict(), file))
    omad.write(path.with_suffix(".json"), lambda file: file.write(json.dumps(about, indent=1).encode()))
    print(f"{path}: return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
