"""What the documents say is so: tables and figures, commands, links, labels, sizes."""

import contextlib
import importlib
import re
import shlex
import sys

import pytest
import tyro
from matplotlib.figure import Figure

import dom2
import omad
from conftest import ROOT, SHORT

sys.path[:0] = [str(ROOT / "runs"), str(ROOT / "datasets")]
import report

DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "venv", ".git"} & set(path.parts))
TEXTS = {path: path.read_text() for path in DOCUMENTS}
FENCED = re.compile(r"^ {4,}(python .+?)(?<!\\)$", re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    """Every `python ...` of the documents: in indented blocks, where a line may go on behind a backslash, and in text."""
    found = set()
    for text in TEXTS.values():
        blocks = [match[1].replace("\\\n", " ") for match in FENCED.finditer(text)]
        blocks += re.findall(r"`(python [^`]+)`", text)
        found |= {" ".join(part.split()) for block in blocks for part in re.split(r"\s+#|&&", block)[:1]}
    return found


def test_there_are_documents_and_commands():
    assert len(DOCUMENTS) >= 7 and len(commands()) > 40


def test_tables_and_figures_are_those_of_the_raw_files(capsys):
    code = report.main(check=True)
    assert code == 0, capsys.readouterr().out


def test_a_table_that_differs_is_found(tmp_path, monkeypatch, capsys):
    for name in report.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXTS[ROOT / name])
    text = TEXTS[ROOT / "runs/omad.md"]
    (tmp_path / "runs/omad.md").write_text(
        text.replace("| spread | OMAD | 100,000 |", "| spread | OMAD | 200,000 |", 1)
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "FIGURES", {"x.png": (("runs/*.md",), Figure)})
    monkeypatch.setattr(report, "data_return", lambda dataset: 0.0)  # lies elsewhere, and is not what is looked at here
    monkeypatch.setattr(report, "DOCUMENTS", ("runs/omad.md",))
    assert report.main(check=True) == 1
    assert capsys.readouterr().out == "differs: runs/omad.md\ndiffers: x.png\n"
    assert report.main() == 0 and (tmp_path / "runs/omad.md").read_text() == text
    capsys.readouterr()
    monkeypatch.setattr(report, "FIGURES", {"x.png": (("runs/nothing",), Figure)})
    assert report.main() == 0 and report.main(check=True) == 0  # a picture knows what it shows
    (tmp_path / "runs" / "nothing").write_text("something")
    assert report.main(check=True) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folders runs/RUN of both programs, for the commands that name one."""
    folder = tmp_path_factory.mktemp("runs")
    assert omad.main([*SHORT, "--run-dir", str(folder / "runs")]) == 0
    return next((folder / "runs").glob("*__omad__*"))


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_parses(command, run, monkeypatch, tmp_path):
    words = shlex.split(command)[1:]
    if words[0] in ("omad.py", "dom2.py"):
        if words[0] == "dom2.py" and any("RUN" in word for word in words):  # the flags are what is looked at
            words = [word for word in words if word not in ("--evaluate", "--resume") and "RUN" not in word]
            words = [word for word in words if not {"--shift", "speed"} & {word}]
        words = [
            str(run) if "RUN" in word else word.replace("FILE", "x").replace("FOLDER", str(tmp_path)) for word in words
        ]
        monkeypatch.chdir(ROOT)
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            {"omad.py": omad, "dom2.py": dom2}[words[0]].parse(words[1:])
    elif words[0] == "-m":
        assert words[1] == "pytest" and all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/"))
    elif words[0].endswith(".py"):
        assert (ROOT / words[0]).exists()
        module = importlib.import_module((ROOT / words[0]).stem)
        if hasattr(module, "Options"):
            options = tyro.cli(module.Options, args=words[1:])
            if names := getattr(options, "experiments", ()):
                assert any(all(word in run.name for word in options.only) for run in module.declared(names))
    else:
        raise AssertionError(f"what is {command}?")


SMOKE = next(command for command in commands() if "--total-timesteps 3000" in command)


@pytest.mark.parametrize("command", [
    "python omad.py --list-tasks",
    "python dom2.py --evaluate runs/policies/omar_simple_spread-medium.pt --eval-episodes 10",
    pytest.param(SMOKE, marks=pytest.mark.slow),
])  # fmt: skip
def test_commands_that_take_seconds_run(command, tmp_path, monkeypatch, capsys):
    assert SMOKE in " ".join(TEXTS[ROOT / "README.md"].split())
    monkeypatch.chdir(ROOT)
    program, *flags = shlex.split(command)[1:]
    flags += ["--run-dir", str(tmp_path)] if command == SMOKE else []
    assert {"omad.py": omad, "dom2.py": dom2}[program].main(flags) == 0, capsys.readouterr().err


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """A new environment without editing files here, shortened, and a policy that is a file."""
    blocks = re.findall(r"\n\n((?: {6}.*\n| *\n)+)", TEXTS[ROOT / "README.md"])
    fork, policy = (re.sub(r"^ {6}", "", block, flags=re.MULTILINE) for block in blocks)
    monkeypatch.chdir(ROOT)
    exec(policy, {})
    main = omad.main
    monkeypatch.setattr(omad, "main", lambda flags: main([*flags, *SHORT, "--run-dir", str(tmp_path)]))
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    from common.envs import TASKS

    try:
        exec(fork, {})
    finally:
        task = TASKS.pop("mpe_mine")
    assert task.horizon == 25 and next(tmp_path.glob("mpe_mine__omad__*/eval.csv")).read_text().count("\n") > 2


def slugs(text: str) -> list[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(path):
    assert len(set(slugs(TEXTS[path]))) == len(slugs(TEXTS[path])), "two headings have one address"
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in slugs(target.read_text()), link


@pytest.mark.parametrize(
    "program, document, letter", [("omad.py", "runs/omad.md", "D"), ("dom2.py", "runs/dom2.md", "E")]
)
def test_every_deviation_is_listed_and_every_one_listed_is_there(program, document, letter):
    labels = lambda text: set(re.findall(rf"\[deviation ({letter}\d)\]", text))
    assert labels((ROOT / program).read_text()) == labels(TEXTS[ROOT / document]) != set()


def test_budgets():
    lines = lambda path: len((ROOT / path).read_text().splitlines())
    assert lines("README.md") <= 150 and len(TEXTS[ROOT / "README.md"].split()) <= 1500
    assert lines("datasets/README.md") <= 150
    assert sum(map(lines, (ROOT / "runs").glob("*.py"))) <= 1300
    pictures = [path for path in (ROOT / "runs" / "results").glob("*.*") if path.suffix in (".png", ".gif")]
    assert len(pictures) >= 6 and all(path.stat().st_size < 300_000 for path in pictures)
