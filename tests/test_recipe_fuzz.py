"""Whatever a recipe file or an override holds: it is a valid recipe, or it is refused with exit code 2 and one line.

CI tries 300 random cases per property; SE_SOAK=N in the environment tries N new ones instead (`make soak`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_se.commands import train as train_command
from composer_se.recipe.schema import Recipe
from composer_se.recipe.validate import make_plan
from composer_se.train import main

CASES = int(os.environ.get("SE_SOAK", "300"))
cases = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="SE_SOAK" not in os.environ,  # the same cases in every CI run
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

GOOD = {
    "model": "{name: cifar_resnet20, in_channels: 1}",
    "train_dataset": "{name: digits}",
    "optimizer": "{name: sgd, lr: 0.1}",
    "max_duration": "1ba",
    "train_batch_size": "16",
}

SENSIBLE = ["1", "16", "0.1", "1e-4", "true", "null", "1ep", "0.5dur", "digits", "adam", "norm", "[0.9, 0.99]", "{}"]
NUMBERS = ["-1", "0", "1e400", ".nan", "-.inf", "1_0", "0x1F", "0o17", "0b2", "1:30:00", "9" * 30, "9" * 5000, "-0.0"]
NUMBERS += ["0x" + "f" * 5000, "1e999ep", "nanep", "-3ba", "1.5ep", "1h2m3s", "²ep"]
ODD = ["", "~", "''", "' '", "no", "on", "2024-01-31", "2024-13-45", "2024-01-31 25:00:00", "é", "a b"]
ODD += ['"\\0"', '"\\ud800"', '"a\\nb"', '"\\u2028\\e[31m"', "..", "/", "~nobody/x", "x" * 300, "a/" * 3000, "\t"]
ODD += ["@", "`", "%", "!", "日本語", "a.b", "a\tb"]
ODD += ["? x", "- x", "|\n  text", ">-\n  text\n", "x: y", "#", "a #b", "'", '"', "[", "]", "{", "}", ","]
TAGS = ["!!binary aGVsbG8=", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]", "!!int x", "!!float ''"]
TAGS += ["!!bool maybe", "!!timestamp x", "!!null x", "!!str 1", "!!seq a", "!!map a", "!own x", "!!python/tuple [1]"]
TAGS += ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!python/object/apply:pathlib.Path [x]"]
ALIASES = ["&a 1", "*a", "&a [*a]", "&a {b: *a}", "{<<: *a}", "{<<: [1]}", "{<<: {name: sgd}}", "&a", "{a: 1, a: 2}"]
HOLES = ["${seed}", "${nothing}", "${", "${}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.decode:'['}", "${a.b:${seed}}", "$"]
HOLES += ["${model}", "${model.name}", "${.name}", "${..seed}", "${seed}${", "???", "\\${seed}", "${run_name}"]
NESTED = ["[" * 40 + "]" * 40, "[" * 400 + "]" * 400, "{a: " * 60 + "}" * 60, "{[1]: 2}", "{{a: 1}: 2}"]
NESTED += ["{1: 2}", "{null: 1}"]

scalars = st.one_of(*map(st.sampled_from, (SENSIBLE, SENSIBLE, NUMBERS, ODD, TAGS, ALIASES, HOLES, NESTED)))
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    st.dictionaries(scalars, scalars, max_size=3).map(
        lambda content: "{" + ", ".join(f"{key}: {value}" for key, value in content.items()) + "}"
    ),
)

# `%` stands for any value. Most leave the rest of the recipe as it should be, so that the value is what is judged.
ENTRIES = [f"{field.name}: %" for field in dataclasses.fields(Recipe)]
ENTRIES += [
    "model: {name: %}",
    "model: {name: cifar_resnet20, num_classes: %}",
    "model: {name: resnet18, %: %}",
    "model: {name: resnet18, weights: %, norm_layer: %}",
    "train_dataset: {name: digits, num_workers: %}",
    "train_dataset: {name: synthetic, %: 1}",
    "train_dataset: {name: imagenet, root: %}",
    "eval_dataset: {name: %}",
    "optimizer: {name: %, lr: %}",
    "optimizer: {name: adamw, betas: %, %: 1}",
    "optimizer: {name: decoupled_sgdw, lr: %}",
    "scheduler: {name: cosine_annealing, t_max: %}",
    "scheduler: {name: multi_step, milestones: %}",
    "scheduler: {name: %}",
    "algorithms: {squeeze_excite: {latent_channels: %, include: %}}",
    "algorithms: {squeeze_excite: {%: %}}",
    "algorithms: {gradient_clipping: {clipping_type: %, clipping_threshold: %}}",
    "algorithms: {blurpool: %, %: {}}",
    "callbacks: {lr_monitor: %, %: null}",
    "callbacks: {speed_monitor: {window_size: %}}",
    "loggers: {tensorboard: {%: %}}",
    "%: %",
    "seed: 1\n%",
    "\tseed: %",
    "  seed: %",
    "? %\n: %",
    "<<: %",
]


@st.composite
def entries(draw: st.DrawFn) -> str:
    first, *rest = draw(st.sampled_from(ENTRIES)).split("%")
    return first + "".join(draw(values) + part for part in rest)


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    changed = draw(st.lists(entries(), min_size=1, max_size=2))
    lines = [] if draw(st.integers(0, 9)) == 0 else [f"{key}: {value}" for key, value in GOOD.items()]
    for entry in changed:
        key = entry.partition(":")[0]
        if draw(st.integers(0, 9)):  # else the key is there twice
            lines = [line for line in lines if line.partition(":")[0] != key]
        lines.insert(draw(st.integers(0, len(lines))), entry)
    heads = ["", "---\n", "%YAML 1.1\n---\n", "%x\n", "\ufeff", "- ", "!!map\n", "&a\n"]
    head = draw(st.sampled_from(heads))
    tail = draw(st.sampled_from(["\n", "", "\n...\n", "\n---\n", "\n---\nseed: 1\n", "\r\n", "\n\t\n"]))
    junk = draw(st.sampled_from([b"", b"\xff", b"\0", b"\xed\xa0\x80", b"\x1b"]))
    if draw(st.integers(0, 4)):  # mostly, the frame is as it should be
        head, tail, junk = "", "\n", b""
    content = (head + "\n".join(lines) + tail).encode(errors="surrogatepass")
    place = draw(st.integers(0, len(content))) if junk else 0
    return content[:place] + junk + content[place:]


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key, _, value = draw(entries()).partition(": ")
    below = [f"{key}.name", f"{key}.a.b", f"{key}[0]", f"{key}.", f".{key}", f"{key}[", f"{key}..a"]
    path = draw(st.sampled_from([key, *below]))
    return draw(st.sampled_from([f"{path}={value}", f"{key}={value}", f"{key}={value}", key, f"+{key}={value}"]))


def judge(*arguments: str) -> int:
    """The exit code of the train command, which must have told its reason in one line and written nothing."""
    before = sorted(Path().iterdir())
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        code = main([argument for argument in arguments if not argument.startswith("-")])
    assert sorted(Path().iterdir()) == before
    if code == 0:
        assert output.getvalue() == ""
    else:
        assert code == 2
        message = output.getvalue()
        assert len(message.splitlines()) == 1, message
        assert message.startswith("composer_se.train: error: ")
        assert len(message) > len("composer_se.train: error: \n") + 10
    return code


@pytest.fixture(autouse=True)
def checks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The train command up to the point from which it builds and writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_command, "_train_and_show", make_plan)


def test_any_recipe_file_is_valid_or_refused_in_one_line() -> None:
    seen: Counter[int] = Counter()

    @cases
    @given(content=recipes())
    def try_one(content: bytes) -> None:
        Path("fuzz.yaml").write_bytes(content)
        seen[judge("fuzz.yaml")] += 1

    try_one()
    assert seen[0], "all cases were wrong, so none went through all checks"
    assert seen[2]


def test_any_override_is_valid_or_refused_in_one_line() -> None:
    seen: Counter[int] = Counter()
    Path("good.yaml").write_text("\n".join(f"{key}: {value}" for key, value in GOOD.items()))

    @cases
    @given(changes=st.lists(st.one_of(overrides(), overrides(), st.text(max_size=20)), min_size=1, max_size=2))
    def try_one(changes: list[str]) -> None:
        seen[judge("good.yaml", *changes)] += 1

    try_one()
    assert seen[0], "all cases were wrong, so none went through all checks"
    assert seen[2]
