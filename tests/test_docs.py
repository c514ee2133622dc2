"""README and docs are true: code blocks run, commands are accepted, links lead somewhere, tables are those measured."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS = {page.name: page.read_text() for page in PAGES}
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(language: str) -> list[tuple[str, str]]:
    """The code blocks of a language with the names of their pages."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, block) for page, text in TEXTS.items() for block in fenced.findall(text)]


def shell_commands() -> list[list[str]]:
    """The words of every command in a block, without the variables that it sets."""
    lines = [line for _, block in blocks("bash") for line in block.splitlines()]
    commands = (shlex.split(line, comments=True) for line in lines)
    without_variables = ([word for word in words if not ASSIGNMENT.fullmatch(word)] for words in commands)
    return [words for words in without_variables if words]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_readme_is_for_someone_who_has_two_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_block_runs_and_prints_what_its_comment_says(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert capfd.readouterr().out.splitlines() == promised


def test_make_targets_exist() -> None:
    in_text = {target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)`", text)}
    in_marks = {target for text in TEXTS.values() for target in re.findall(r"<!-- \w+: make ([a-z-]+) -->", text)}
    named = {words[1] for words in shell_commands() if words[0] == "make"} | in_text | in_marks
    assert {"train", "test"} <= named <= make_targets()


def test_extras_exist() -> None:
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {extra for text in TEXTS.values() for extra in re.findall(r"(?:\.|composer-se)\[(\w+)\]", text)}
    assert named <= declared


def test_commands_are_ones_that_the_command_line_accepts() -> None:
    from composer_se.cli import make_parser, parse

    commands = [words[1:] for words in shell_commands() if words[0] == "composer-se"]
    launched = [words[words.index("composer_se.cli") + 1 :] for words in shell_commands() if "composer_se.cli" in words]
    in_text = [
        words[1:]
        for text in TEXTS.values()
        for command in re.findall(r"`(composer-se [a-z]+ [^`]*)`", text)
        if "--help" not in (words := shlex.split(command))
    ]
    assert commands
    assert launched
    assert in_text
    incomplete = re.compile(r"[A-Z]+$|runs/NAME|--")
    for words in [*commands, *launched, *(words for words in in_text if not incomplete.match(words[1]))]:
        parse(make_parser(), words)


def test_recipes_in_launches_exist_and_their_overrides_are_accepted(tmp_path: Path) -> None:
    from composer_se.recipe.load import load_recipe

    (tmp_path / "my_recipe.yaml").write_text((ROOT / "yamls" / "digits.yaml").read_text())
    launches = [
        words[words.index("composer_se.train") + 1 :] for words in shell_commands() if "composer_se.train" in words
    ]
    launches += [words[2:] for words in shell_commands() if words[:2] == ["composer-se", "train"]]
    assert launches
    for recipe, *overrides in launches:
        load_recipe(str(tmp_path / recipe) if recipe.endswith(".yaml") else recipe, overrides)


def test_every_shipped_recipe_is_described() -> None:
    rows = re.findall(r"^\| `\w+`.*? \| .*$", TEXTS["recipes.md"], re.MULTILINE)
    described = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert {path.stem for path in (ROOT / "yamls").glob("*.yaml")} <= described


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_yaml_block_is_a_recipe_or_a_part_of_one(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer_se.recipe.load import load_recipe
    from composer_se.recipe.validate import make_plan

    monkeypatch.chdir(tmp_path)
    for image in ("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/2.jpg"):
        Path("photos", image).parent.mkdir(parents=True)
        Path("photos", image).touch()
    for _, code in blocks("python"):
        if file := re.match(r"# (\w+\.py)\n", code):
            Path(file[1]).write_text(code)
    sections = yaml.safe_load(block)
    assert sections
    if "max_duration" in sections:
        Path("recipe.yaml").write_text(block)
        make_plan(load_recipe("recipe.yaml"))
    else:
        make_plan(load_recipe("digits", [f"{section}={json.dumps(content)}" for section, content in sections.items()]))


def test_linked_files_and_headings_exist() -> None:
    links = [
        (page, *link.partition("#")[::2])
        for page in PAGES
        for link in re.findall(r'(?:\]\(|(?:src|srcset)=")(?!https?://)([^)"]+)', page.read_text())
    ]
    assert links
    for page, file, heading in links:
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((?:\.\./)?([\w-]+\.md)\)", TEXTS["index.md"]))
    assert listed == TEXTS.keys() - {"index.md"}


def test_named_files_and_folders_exist() -> None:
    named = {
        path
        for text in TEXTS.values()
        for path in re.findall(r"`((?:composer_se|docs|tests|yamls)/[\w./-]*)`", text)
        if path.rstrip("/") != "composer_se/yamls"  # of an installed package
    }
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def load_write_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "docs" / "write_tables.py")
    assert spec is not None
    assert spec.loader is not None
    write_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_tables)
    return write_tables


def test_cost_table_spells_ratios_as_the_command_does() -> None:
    from composer_se.cost import tables
    from composer_se.measure.machine import describe_machine
    from composer_se.measure.uncertainty import Interval

    write_tables = load_write_tables()
    shown = (
        Interval(1.0123, 1.0103, 1.0143),
        Interval(1.012, 0.982, 1.042),
        Interval(math.nan, math.nan, math.nan),
    )
    ratios = dict(zip(write_tables.KINDS, map(tables._ratio, shown), strict=True))
    found = {
        "rows": [
            {
                "code": "composer-se",
                "layers": ["conv"],
                "passes": [11],
                "ratios": {"parameters": 1, "multiply_adds": 1, "saved_bytes": 1},
                "times": {kind: {"ratio": ratio} for kind, ratio in ratios.items()},
            }
        ],
        "against_composer": [
            {"min_channels": "8", **{kind: {"time": ratio, "overhead": ratio} for kind, ratio in ratios.items()}}
        ],
        "settings": {
            "batch_size": 2,
            "image_size": 8,
            "precision": "fp32",
            "squeeze_excite": {"latent_channels": 4, "min_channels_of": "output"},
            "instances": 2,
            "rounds": 1,
        },
        "machine": asdict(describe_machine(torch.device("cpu"))),
    }
    table = write_tables.cost_table(json.loads(json.dumps(found)))
    assert " | ".join(map(str, shown)) in table
    for kind, ratio in zip(write_tables.KINDS, shown, strict=True):
        assert table.count(f"{kind} {ratio}") == 2


def test_table_of_layers_sums_over_the_network() -> None:
    def mode(norm: list[float]) -> dict[str, object]:
        milliseconds = {"norm": norm, "composer-se": [-0.5, 0.25], "composer": [1.0, 2.0]}
        return {"milliseconds": milliseconds, "share": {"value": 0.1, "low": 0.05, "high": 0.15}}

    kinds = [
        {"channels": 8, "height": 4, "width": 4, "latent_channels": 4, "norm": "BatchNorm2d", "count": 3},
        {"channels": 16, "height": 2, "width": 2, "latent_channels": 4, "norm": "none", "count": 1},
    ]
    layers = {"kinds": kinds, "modes": {"training": mode([2.0, 1.0]), "inference, batch 1": mode([0.5, 0.5])}}
    table = load_write_tables().layers_table(layers)
    assert "| 8×4×4 | 3 | 2.00 | 1.00 | -0.50 | 0.50 | 1.00 | -0.50 |" in table
    assert "| 16×2×2, no norm | 1 | 1.00 | 2.00 | 0.25 | 0.50 | 2.00 | 0.25 |" in table
    assert "| **sum** | **4** | **7.0** | **5.0** | **-1.2** | **2.0** | **5.0** | **-1.2** |" in table
    assert "Ours over the built-in: training 0.10 ±0.05; inference, batch 1 0.10 ±0.05." in table


def test_tables_are_those_of_the_results() -> None:
    for page, text in load_write_tables().pages().items():
        assert page.read_text() == text
