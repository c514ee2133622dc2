"""`report.html` tells what is in a run's folder, in one file that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import final_accuracy

from composer_se.cli import main
from composer_se.parts.data import image_size
from composer_se.report.write import write_report

VOID = {"meta", "img", "path", "use", "rect", "stop", "br"}


class Balance(HTMLParser):
    """Checks that tags are closed in the order they were opened, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_a_run_leaves_a_report_of_its_own(digits_run: Path) -> None:
    page = (digits_run / "report.html").read_text()
    parsed = parse(page)
    assert all(reference.startswith(("#", "data:")) for reference in parsed.references)
    assert "@import" not in page
    assert "url(http" not in page
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Outcome", "Curves", "Gates while training", "Plan", "Recipe"]
    assert f"<dd>{final_accuracy(digits_run):.2%}</dd>" in page
    assert "stage3.{0..2}.conv2" in page
    assert "4×4" in page
    assert "name: cifar_resnet20" in page


def test_the_run_logged_every_layer(digits_run: Path) -> None:
    lines = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    observed = [line for line in lines if any(key.startswith("gates/") for key in line)]
    assert [line["batch"] for line in observed] == [1, 11, 21]
    layers = {f"stage3.{block}.conv{conv}" for block in range(3) for conv in (1, 2)}
    for line in observed:
        assert {key.removeprefix("gates/mean/") for key in line if key.startswith("gates/mean/")} == layers


def test_reads_on_light_and_dark_and_on_a_phone(digits_run: Path) -> None:
    page = (digits_run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    plots = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 5
    for plot in plots:
        assert "currentColor" in plot
        assert "#010203" not in plot
        assert not re.search(r"fill: #0{6}|stroke: #0{6}|fill: #ffffff", plot)


def test_cost_is_told_where_it_was_measured(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    small = ["--batch-size", "2", "--image-size", "8", "--repeats", "2", "--instances", "2"]
    factory = ["two_process_gates:small_cost_network", "--min-channels", "8"]
    assert main(["cost", *factory, *small, "--json", str(run / "cost.json")]) == 0
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (run / "report.html").read_text()
    parse(page)
    assert "<h2>Cost</h2>" in page
    assert "ours 8" in page


def test_an_unfinished_run_without_metrics_has_a_report(digits_run: Path, tmp_path: Path) -> None:
    shutil.copy(digits_run / "recipe.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "batch": 1, "loss/train/total": 2.0}\n{"epo')
    page = write_report(tmp_path).read_text()
    parse(page)
    assert "not complete yet" in page
    assert "Training loss" in page


def test_what_the_user_wrote_is_escaped(digits_run: Path, tmp_path: Path) -> None:
    recipe = (digits_run / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(re.sub("run_name: .*", "run_name: <script>alert(1)</script>", recipe))
    statistics = ("mean", "std_over_samples", "std_over_channels", "share_near_0", "share_near_1")
    layers = {f"gates/{statistic}/{layer}": 0.5 for statistic in statistics for layer in ("<script>", "other")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"batch": 1, **layers}))
    page = write_report(tmp_path).read_text()
    parse(page)
    assert page.count("&lt;script&gt;") >= 4  # title, heading, table, plots
    assert "<script" not in page


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "size"),
    [
        ({"name": "digits"}, 8),
        ({"name": "imagenet", "image_size": 160}, 160),
        ({"name": "synthetic"}, 224),
    ],
)
def test_image_size_of_a_data_set(section: dict[str, object], size: int) -> None:
    assert image_size(section) == size


def test_a_network_that_reads_tensors_while_it_is_built_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: regnet_x_400mf}\ntrain_dataset: {name: synthetic}\noptimizer: {name: sgd, lr: 0.1}\n"
        "max_duration: 1ba\ntrain_batch_size: 2\nrun_name: regnet\nalgorithms: {squeeze_excite: {min_channels: auto}}\n"
    )
    assert "trunk_output.block4" in write_report(tmp_path).read_text()
