"""Behaviour policies: the ones in `datasets/policies/` that made the data sets, and how a training run becomes one.

    python datasets/behaviour.py RUN_DIR --level expert      # keeps the policy of a finished run, and measures it

A policy is two files: `<task>-<level>.pt` holds the network, `<task>-<level>.json` says which command trained it, with
which versions, and what it scores. `bash datasets/policies.sh` makes all that are committed.
"""

import csv
import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import omad
from common.envs import BadInput, evaluate, make_env, make_vec, mix_seed, sha256

POLICIES = Path(__file__).parent / "policies"
FORMAT = "omad-policy-2"


def load_behaviour(env_id: str, level: str, folder: Path = POLICIES) -> tuple[torch.nn.Module, dict]:
    """The policy of that task and level, and what its .json says, with "args" as `omad.Args`, and its "sha256"."""
    path = folder / f"{env_id}-{level}.pt"
    if not path.exists():
        raise BadInput(f"{path}: no such behaviour policy; datasets/policies.sh has the commands that make them")
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        if about["format"] != FORMAT:
            raise ValueError(f"of format {about['format']}, not {FORMAT}")
        args = omad.Args(**about["args"])
        env = make_env(env_id, args.observation)
        policy = omad.POLICIES[args.policy](env.obs_sizes, env.action_sizes, args)
        policy.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # anything, in a file that is damaged
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: no behaviour policy of this version ({type(error).__name__}: {reason})") from error
    return policy, about | {"args": args, "sha256": sha256(path)}


def command(args: omad.Args) -> str:
    """The command line that gives these arguments: what differs from the task's defaults and changes the result."""
    words = ["python", "omad.py", "--env-id", args.env_id]
    default = dataclasses.asdict(omad.preset(args.env_id))
    for name, value in dataclasses.asdict(args).items():
        if name in ("seed", "total_timesteps") or value != default[name] and name not in ("run_dir", "resume"):
            flag = "--" + name.replace("_", "-")
            words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Options:
    """Keeps the policy of a finished run as a behaviour policy."""

    run_dir: tyro.conf.Positional[Path]
    """directory of a run of omad.py"""
    level: Literal["medium", "expert"] = "expert"
    """what it will be called"""
    episodes: int = 1000
    """episodes over which it is measured, all side by side (robots: 200 will do), from start states of their own"""
    out: Path = POLICIES
    """folder that gets the two files"""


def main() -> int:
    torch.set_num_threads(1)
    options = tyro.cli(Options)
    try:
        policy, saved = omad.load_policy(options.run_dir / "policy.pt")
    except BadInput as error:
        print(f"behaviour.py: error: {error}", file=sys.stderr)
        return 2
    args = dataclasses.replace(omad.Args(**saved["args"]), total_timesteps=saved["step"], run_dir="runs")
    envs = make_vec(args.env_id, options.episodes, args.observation, prey=args.prey)
    returns = evaluate(omad.make_act(policy), envs, mix_seed(2000, 0))
    config = json.loads((options.run_dir / "config.json").read_bytes())
    seconds = [float(row["wall_time_s"]) for row in csv.DictReader((options.run_dir / "eval.csv").open())]
    about = {
        "format": FORMAT, "task": args.env_id, "level": options.level, "command": command(args), "seed": args.seed,
        "steps": saved["step"], "minutes": round(seconds[-1] / 60, 1),
        "return": {"mean": round(returns.mean(), 2), "std": round(returns.std(), 2), "episodes": len(returns)},
        "git_revision": config["git_revision"], "python": config["python"], "packages": config["packages"],
        "args": dataclasses.asdict(args),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{args.env_id}-{options.level}.pt"
    torch.save(policy.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1))
    print(f"{path}: return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
