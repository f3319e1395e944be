"""What the pages say is so: links, commands, generated references."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gateway import cli
from storage.kernel.settings import Settings, load_settings
from tests.support import dcmtk
from tests.support.datasets import ct_slice, part10
from tests.support.node import RunningNode
from tests.support.reference import FOLDER, PAGES

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
EVERY_PAGE = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part == "build" for part in page.relative_to(ROOT).parts
    )
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TOML = re.compile(r"```toml\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the commands of the shell blocks of a page, as words."""
    for block in BLOCK.findall(page.read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [
        target.partition("#")[0]
        for target in LINK.findall(page.read_text("utf-8"))
        if "://" not in target
    ]

    assert not [one for one in targets if one and not (page.parent / one).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_says_what_the_program_does(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PAGES[name](), "run `make docs`"


ROW = re.compile(r"^\| ([A-D][0-9]{2}) \| .* \| (.*) \|$", re.MULTILINE)


def rows_with_tests() -> set[str]:
    """Return the rows of the bad-input table that tests are named after."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text("utf-8")
        for name in re.findall(r"def test_([a-d][0-9]{2}\w*)", text):
            found.update(re.findall(r"(?:^|_)([a-d][0-9]{2})(?=_)", name))
            for letter, first, last in re.findall(
                r"([a-d])([0-9]{2})_to_\1([0-9]{2})_", name
            ):
                numbers = range(int(first), int(last) + 1)
                found.update(f"{letter}{number:02}" for number in numbers)
    cases = (ROOT / "tests" / "fault" / "cases.py").read_text("utf-8")
    found.update(re.findall(r'"([a-d][0-9]{2})_', cases))
    return {row.upper() for row in found}


def test_the_page_of_bad_input_says_which_rows_are_tested() -> None:
    page = (ROOT / "docs" / "reference" / "bad-input.md").read_text("utf-8")
    states = dict(ROW.findall(page))

    assert {
        row for row, state in states.items() if state == "tested"
    } == rows_with_tests()
    assert len(states) == 50 + 32 + 32 + 18


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_make_targets_of_a_page_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {words[1] for words in commands(page) if words[0] == "make"}

    assert named <= targets


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        if Path(words[0]).name == "huying":
            assert_command(words[1:])


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_commands_of_the_table_exist_with_their_options(page: Path) -> None:
    rows = re.findall(r"^\| (`huying.*?) \|", page.read_text("utf-8"), re.MULTILINE)
    named = [text for row in rows for text in re.findall(r"`huying (.*?)`", row)]

    assert len(named) >= 10
    for text in named:
        assert_command(text.split())


def assert_command(words: list[str]) -> None:
    """Fail unless the command line knows the command and every option."""
    group: typer.core.TyperGroup = typer.main.get_command(cli.app)  # type: ignore[assignment]
    path = [words[0]]
    assert words[0] in group.commands, words
    if isinstance(group.commands[words[0]], typer.core.TyperGroup) and words[1:]:
        path.append(words[1])
    shown = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    for word in words:
        if word.startswith("--"):
            assert word in shown.output, words


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_settings_of_the_readme_are_accepted(page: Path) -> None:
    environ: dict[str, str] = {}
    for words in commands(page):
        if words[0] == "export":
            environ |= dict(word.split("=", 1) for word in words[1:])

    settings = load_settings(environ=environ)

    assert settings.objects.kind == "s3"
    assert not settings.embedded


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_settings_files_of_a_page_are_accepted(page: Path) -> None:
    for block in TOML.findall(page.read_text("utf-8")):
        Settings.model_validate(tomllib.loads(block))


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_modules_that_the_readme_runs_exist(page: Path) -> None:
    named = [
        words[words.index("-m") + 1].replace(".", "/") + ".py"
        for words in commands(page)
        if "-m" in words
    ]

    assert named
    assert all((ROOT / path).exists() for path in named)


@pytest.mark.slow
@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_the_five_commands_store_and_show_a_study(
    page: Path, shared_node: RunningNode, tmp_path: Path
) -> None:
    """The addresses are those of a node of ours, everything else is as printed."""
    image = tmp_path / "image.dcm"
    image.write_bytes(part10(ct_slice(seed=4711)))
    first = BLOCK.search(page.read_text("utf-8"))
    assert first is not None
    there = {
        "127.0.0.1 11112": f"127.0.0.1 {shared_node.dimse_port}",
        "127.0.0.1:8080": f"127.0.0.1:{shared_node.http_port}",
        "image.dcm": str(image),
    }
    text = first[1]
    for printed, ours in there.items():
        text = text.replace(printed, ours)
    clone, run, store, find, show = [
        shlex.split(line, comments=True) for line in text.splitlines()
    ]

    assert clone[:2] == ["git", "clone"]
    assert run == ["make", "run"]
    dcmtk.run(*store)
    found = shared_node.get(find[1].removeprefix(shared_node.http))
    assert str(ct_slice(seed=4711).StudyInstanceUID) in found.text
    page_shown = shared_node.get(show[1].removeprefix(shared_node.http))
    assert page_shown.status == 200
    assert os.fspath(image) in store
