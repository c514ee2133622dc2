"""The README is true: its Python runs, its commands exist, its table is the one that was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_commands() -> list[list[str]]:
    lines = (line for block in blocks("bash") for line in block.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_runs_and_prints_what_its_comment_says(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert result.stdout.splitlines() == promised


def test_make_targets_exist() -> None:
    named = {words[1] for words in shell_commands() if words[0] == "make"} | set(
        re.findall(r"`make ([a-z-]+)`", README)
    )
    assert {"train", "test"} <= named <= make_targets()


def test_commands_are_ones_that_the_command_line_accepts() -> None:
    from composer_se.cli import make_parser

    commands = [words[1:] for words in shell_commands() if words[0] == "composer-se"]
    launched = [words[words.index("composer_se.cli") + 1 :] for words in shell_commands() if "composer_se.cli" in words]
    assert commands
    assert launched
    for words in commands + launched:
        make_parser().parse_args(words)


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


def test_every_shipped_recipe_is_described_and_no_other() -> None:
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `\w+`.*? \| .*$", README, re.MULTILINE))))
    shipped = {path.stem for path in (ROOT / "yamls").glob("*.yaml")}
    assert shipped <= described


def test_yaml_block_is_a_part_of_a_recipe() -> None:
    from composer_se.recipe.load import load_recipe

    for block in blocks("yaml"):
        section = yaml.safe_load(block)
        overrides = [
            f"algorithms.{name}.{key}={value}"
            for name, arguments in section["algorithms"].items()
            for key, value in arguments.items()
        ]
        assert overrides
        load_recipe("digits", overrides)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def load_update_readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    update_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_readme)
    return update_readme


def test_cost_table_spells_ratios_as_the_command_does() -> None:
    from composer_se.cost import tables
    from composer_se.measure.machine import describe_machine
    from composer_se.measure.uncertainty import Interval

    update_readme = load_update_readme()
    shown = (
        Interval(1.0123, 1.0103, 1.0143),
        Interval(1.012, 0.982, 1.042),
        Interval(math.nan, math.nan, math.nan),
    )
    ratios = dict(zip(update_readme.KINDS, map(tables._ratio, shown), strict=True))
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
    table = update_readme.cost_table(json.loads(json.dumps(found)))
    assert " | ".join(map(str, shown)) in table
    for kind, ratio in zip(update_readme.KINDS, shown, strict=True):
        assert table.count(f"{kind} {ratio}") == 2


def test_tables_are_those_of_the_results() -> None:
    update_readme = load_update_readme()
    assert update_readme.with_tables(README) == README
