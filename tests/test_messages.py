"""Both programs: mistakes that are easily made, and what is said to them."""

import pytest

import dom2
import omad
from conftest import ROOT, caller, one_line, the_run

MAIN = {"omad": omad.main, "dom2": dom2.main}


def test_the_citation_file_has_the_papers_of_both_programs():
    text = (ROOT / "CITATION.cff").read_text()
    assert "Improving Generalization and Data Efficiency with Diffusion in Offline Multi-agent RL" in text
    assert all(f"https://arxiv.org/abs/{number}" in text for number in ("2602.18291", "2502.02316", "2307.01472"))


@pytest.mark.parametrize("parts", ["all", "no checkpoint", "checkpoint only"])
def test_a_run_of_the_other_program(program, tmp_path, capsys, parts):
    call, name, flags = program
    assert call(*flags)[0] == 0
    run = the_run(tmp_path)
    for path in run.iterdir():
        if path.name == "checkpoint.pt" if parts == "no checkpoint" else parts != "all" and path.name != "checkpoint.pt":
            path.unlink()
    other = next(program for program in MAIN if program != name)
    other_call = caller(MAIN[other], tmp_path, capsys)
    for flag in ("--evaluate", "--resume"):
        code, out, err = other_call(flag, run, run_dir=False)
        assert code == 2 and one_line(err, other) and f"{name}.py" in err and str(run) in err and not out, err


@pytest.mark.parametrize("name, flag", [("omad", "--total-timesteps"), ("dom2", "--total-updates")])
def test_whole_numbers_that_are_written_with_an_exponent(name, flag, tmp_path, capsys):
    call = caller(MAIN[name], tmp_path, capsys)
    for argv in ([flag, "1e6"], [f"{flag}=1e6"], [flag.replace("-", "_").replace("__", "--"), "1e6"]):
        code, out, err = call(*argv)
        assert code == 2 and one_line(err, name) and flag in err and "1e6" in err and "write 1000000" in err and not out, err
    for value in ("1.5", "inf", "nan", "1e-3", "x"):
        code, out, err = call(flag, value)
        assert code == 2 and one_line(err, name) and f"'{value}'" in err and "write" not in err, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, word, flag", [("omad", "mpe_simple_spread", "--env-id"), ("dom2", "omar_simple_spread-medium", "--dataset")]
)
def test_a_task_or_a_data_set_without_its_flag(name, word, flag, tmp_path, capsys):
    code, out, err = caller(MAIN[name], tmp_path, capsys)(word)
    assert code == 2 and one_line(err, name) and f"{flag} {word}" in err and not out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "env_id, near", [("mamujoco_halfcheetah_", "mamujoco_halfcheetah_2x3"), ("mamujoco_ant", "mamujoco_ant_2x4"),
                     ("mamujoco_manysegmentswimmer_", "mamujoco_manysegmentswimmer_10x2")],
)  # fmt: skip
def test_a_robot_without_its_partition(env_id, near, tmp_path, capsys):
    code, _, err = caller(omad.main, tmp_path, capsys)("--env-id", env_id)
    assert code == 2 and one_line(err, "omad") and near in err


def test_the_start_says_where_the_run_is_whatever_the_folder(program, tmp_path, monkeypatch):
    call, name, flags = program
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*flags, run_dir=False)  # lands in ./runs
    (line,) = (line for line in out.splitlines() if line.startswith("logs "))
    assert code == 0 and line.split()[1] == str(the_run(tmp_path)) and f"--logdir {tmp_path / 'runs'})" in line, err
