"""Writes the tables of the README and of the pages beside it from the files in `results`, which make's targets write.

A table stands between two marks, such as `<!-- cost: make cost -->` and `<!-- /cost -->`. They give its name and the
command that measures it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from composer_se.compare.arms import Arm
from composer_se.compare.judgement import judge_pilot
from composer_se.compare.outcomes import Outcome
from composer_se.compare.run import PILOT_SEEDS
from composer_se.measure.machine import Machine
from composer_se.measure.uncertainty import Interval, mean_difference, ratio_of_means
from composer_se.show.text import markdown_table
from composer_se.slim.table import sentences, summary_rows

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
SLIM = RESULTS / "slim-fashion-mnist.json"
TRAINABLE = RESULTS / "trainable-resnet50.json"
THREADS = RESULTS / "threads.json"
PAPER = RESULTS / "cost-resnet50-paper.json"
COST = RESULTS / "cost-resnet50-against-composer.json"
FINETUNING = RESULTS / "finetuning"
PLACEMENT = RESULTS / "placement"
SE_BESIDE = (
    ("SE, head", "head"),
    ("SE, norms, head", "norms, head"),
    ("everything, SE", "everything"),
    ("SE, head", "everything"),
)
CODE = {"plain": "plain", "composer-se": "**composer-se**", "composer": "Composer's built-in"}
KINDS = ("training step", "inference, batch 1", "inference, batch 16")
CLAIMS = (  # folder below results/claims/, the algorithm beside SE, the row's name
    ("randaugment-data-bound", "RandAugment", "RandAugment, digits, ResNet-8: loader slower than network"),
    ("randaugment-compute-bound", "RandAugment", "RandAugment, digits, ResNet-20: network slower than loader"),
    ("selective-backprop-speed", "SelectiveBackprop", "SelectiveBackprop, Fashion-MNIST, ResNet-8"),
    ("selective-backprop", "SelectiveBackprop", "SelectiveBackprop, digits, ResNet-20"),
)


def short_cost_table(found: dict[str, Any]) -> str:
    """Memory and time of each variant, for the README."""
    rows = [[CODE[row["code"]], f"{row['ratios']['saved_bytes']:.4f}", *_times(row)] for row in found["rows"]]
    lines = markdown_table(["", "saved for backward", *KINDS], rows)
    layers = max(len(row["layers"]) for row in found["rows"])
    machine = Machine(**found["machine"])
    where = machine.gpu or f"{machine.cpu}, {machine.threads} threads"
    return "\n".join([*lines, "", f"ResNet-50 with SE on {layers} convs, relative to plain; {where}."])


def cost_table(found: dict[str, Any]) -> str:
    """All costs of each variant, with the conditions below the table."""
    heads = ["", "SE layers", "parameters", "multiply-adds", "saved for backward", "full-size passes", *KINDS]
    lines = markdown_table(heads, [_row(row) for row in found["rows"]])
    (against,) = found["against_composer"]
    lines.append("")
    lines.append(
        "Ours over Composer's built-in, overhead over plain: "
        + "; ".join(f"{kind} {_ratio(against[kind]['overhead'])}" for kind in KINDS)
        + ". Time: "
        + "; ".join(f"{kind} {_ratio(against[kind]['time'])}" for kind in KINDS)
        + "."
    )
    settings = found["settings"]
    lines.append("")
    lines.append(
        f"ResNet-50, batch {settings['batch_size']}, {settings['image_size']}², {settings['precision']}, "
        f"latent_channels {settings['squeeze_excite']['latent_channels']}, min_channels {against['min_channels']} of "
        f"{settings['squeeze_excite']['min_channels_of']}; {settings['instances']} instances of each, "
        f"{settings['rounds']} rounds; {Machine(**found['machine'])}."
    )
    return "\n".join(lines)


def layers_table(layers: dict[str, Any]) -> str:
    """The norm alone and what SE adds to it, per different layer, and the sums over the network."""
    variants = [("norm", "norm"), ("composer", "+ built-in"), ("composer-se", "+ ours")]
    columns = [(mode, variant, f"{mode}: {head}") for mode in layers["modes"] for variant, head in variants]
    rows = []
    for i, kind in enumerate(layers["kinds"]):
        shape = f"{kind['channels']}×{kind['height']}×{kind['width']}"
        shape += ", no norm" if kind["norm"] == "none" else ""
        numbers = [f"{layers['modes'][mode]['milliseconds'][variant][i]:.2f}" for mode, variant, _ in columns]
        rows.append([shape, str(kind["count"]), *numbers])
    counts = [kind["count"] for kind in layers["kinds"]]
    sums = []
    for mode, variant, _ in columns:
        milliseconds = layers["modes"][mode]["milliseconds"][variant]
        sums.append(f"**{sum(n * t for n, t in zip(counts, milliseconds, strict=True)):.1f}**")
    rows.append(["**sum**", f"**{sum(counts)}**", *sums])
    lines = markdown_table(["map", "×", *(head for *_, head in columns)], rows)
    shares = {mode: _ratio(found["share"]) for mode, found in layers["modes"].items() if found["share"]}
    if shares:
        lines += ["", "Ours over the built-in: " + "; ".join(f"{mode} {share}" for mode, share in shares.items()) + "."]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> list[str]:
    passes = "/".join(str(count) for count in sorted(set(row["passes"]))) or "–"
    ratios = row["ratios"]
    return [
        CODE[row["code"]],
        str(len(row["layers"]) or "–"),
        f"{ratios['parameters']:.3f}",
        f"{ratios['multiply_adds']:.4f}",
        f"{ratios['saved_bytes']:.4f}",
        passes,
        *_times(row),
    ]


def _times(row: dict[str, Any]) -> list[str]:
    return [_ratio(row["times"][kind]["ratio"]) if "ratio" in row["times"][kind] else "1" for kind in KINDS]


def _ratio(ratio: dict[str, Any]) -> str:
    values: dict[str, Any] = {field.name: ratio[field.name] for field in fields(Interval)}
    values |= {name: math.nan for name, value in values.items() if value is None}  # JSON knows no NaN
    return str(Interval(**values))


def pages() -> dict[Path, str]:
    """The pages that hold such tables, with their tables as the results have them."""
    cost = json.loads(COST.read_text())
    tables = {
        README: {"cost": short_cost_table(cost)},
        DOCS / "cost.md": {"cost": cost_table(cost)},
        DOCS / "comparing.md": {"claims": claims_table(RESULTS / "claims")},
    }
    tables[DOCS / "does-it-pay.md"] = {
        "pays": recommendations(),
        "finetuning": finetuning_table(FINETUNING),
        "rates": rates_table(FINETUNING),
        "choices": choices(PLACEMENT),
        "placement": comparison_table((PLACEMENT / "results.md").read_text(), beside_random_start(PLACEMENT)),
        "slimmed": slimmed_table(PLACEMENT / "slim"),
    }
    if "layers" in cost:
        tables[DOCS / "cost.md"]["layers"] = layers_table(cost["layers"])
    if PAPER.is_file():
        paper = json.loads(PAPER.read_text())
        where = f"SE-ResNet-50, batch {paper['settings']['batch_size']}; {Machine(**paper['machine'])}."
        tables[DOCS / "placement.md"] = {"placement": f"{layers_table(paper['layers'])}\n\n{where}"}
    if TRAINABLE.is_file():
        tables[DOCS / "pretrained.md"] = {"trainable": trainable_table(json.loads(TRAINABLE.read_text()))}
    if THREADS.is_file():
        tables[DOCS / "recipes.md"] = {"threads": threads_table(json.loads(THREADS.read_text()))}
    if SLIM.is_file():
        tables[DOCS / "slim.md"] = {"slim": slim_table(json.loads(SLIM.read_text()))}
    filled = {}
    for page, of_page in tables.items():
        filled[page] = page.read_text()
        for name, table in of_page.items():
            filled[page] = _replaced(filled[page], page, name, table)
    return filled


def recommendations() -> str:
    """What to do, by situation, and the measurement behind it."""
    tuned, scratch = (json.loads((folder / "results.json").read_text()) for folder in (FINETUNING, PLACEMENT))
    steps = json.loads((FINETUNING / "steps.json").read_text())
    judged = {arm["arm"]: arm for arm in tuned["judgements"]}
    blocks = judged["SE, head"]
    memory = steps["SE, head"]["saved_bytes"] / steps["everything"]["saved_bytes"]
    from_scratch = {arm["arm"]: _points(arm["equal_epochs"]) for arm in scratch["judgements"]}
    cost, slim = json.loads(COST.read_text()), json.loads(SLIM.read_text())
    layers = cost["layers"]
    added = dict(zip(((k["channels"], k["height"]) for k in layers["kinds"]), _added_in_batches(layers), strict=True))
    network = next(row for row in cost["rows"] if row["code"] == "composer-se")
    fewer = slim["latency"]["1"]
    slimmed = ratio_of_means(fewer[str(slim["chosen"])], fewer["0"]).with_spread()
    rows = [
        (
            "Fine-tuning, the rest frozen",
            "SE at identity: `trainable: [se, head]`",
            f"{_points(blocks['equal_epochs'])} points over the classifier alone, {_points(blocks['equal_time'])} at "
            "equal training time",
        ),
        (
            "Fine-tuning with little memory",
            "the same, in place of training everything",
            f"{_paired(tuned, 'SE, head', 'everything')} points against everything; {memory:.2f} of the memory for "
            f"backward, {_step_time(tuned, 'SE, head', 'everything')} of the time",
        ),
        (
            "Fine-tuning everything",
            "no SE, unless a comparison on your data shows a gain",
            f"{_paired(tuned, 'everything, SE', 'everything')} points with SE, which takes "
            f"{_step_time(tuned, 'everything, SE', 'everything')} of the time",
        ),
        (
            "Pretrained weights",
            "never random blocks: set `init: identity`",
            f"{_paired(tuned, 'random SE, head', 'SE, head')} points with random blocks",
        ),
        (
            "From scratch",
            "no SE, unless a comparison on your data shows a gain; then begin with the last stage",
            f"{from_scratch['last stage']} points with SE on the last stage, {from_scratch['all convs']} on all convs, "
            f"{from_scratch['end of each branch']} at the end of each branch",
        ),
        (
            "After the last norm of a branch",
            "set `init: identity`, from scratch too",
            f"{_paired(scratch, 'end of each branch, identity', 'end of each branch')} points over gates that start at "
            "about one half",
        ),
        (
            "Large maps",
            "leave them alone, or expect slower inference",
            f"for 16 images SE adds {added[512, 28]:.1f} ms after a conv of 512×28×28, {added[512, 7]:.1f} ms after "
            "one of 512×7×7",
        ),
        (
            "Served at batch 1",
            "few blocks; `composer-se slim` removes the others",
            f"latency {Interval(**blocks['latency']).with_spread()} with 34 blocks; {slimmed} after slim has removed "
            f"{slim['chosen']} of {slim['blocks']}",
        ),
        (
            "Served in batches",
            "as many blocks as pay",
            f"{_ratio(network['times']['inference, batch 16']['ratio'])} of plain inference, 42 blocks in a ResNet-50",
        ),
    ]
    return "\n".join(markdown_table(["situation", "recommendation", "measured"], rows))


def _added_in_batches(layers: dict[str, Any]) -> list[float]:
    """Milliseconds that SE adds to each kind of layer in inference in batches."""
    mode = next(mode for mode in layers["modes"] if mode.startswith("inference") and not mode.endswith("batch 1"))
    return layers["modes"][mode]["milliseconds"]["composer-se"]


def _paired(found: dict[str, Any], ours: str, theirs: str) -> str:
    runs = found["runs"]
    accuracies = ([run["accuracies"][-1][1] for run in runs[arm]] for arm in (ours, theirs))
    difference = mean_difference(*accuracies)
    return _points({"value": difference.value, "low": difference.low, "high": difference.high})


def _step_time(found: dict[str, Any], ours: str, theirs: str) -> str:
    return ratio_of_means(*(found["speeds"][arm]["step"] for arm in (ours, theirs))).with_spread()


def rates_table(folder: Path) -> str:
    """The accuracies that the learning rates were chosen by."""
    chosen = json.loads((folder / "chosen.json").read_text())
    rates = sorted({rate for of_arm in chosen.values() for rate in of_arm}, key=float)
    rows = []
    for arm, of_arm in chosen.items():
        cells = [f"{100 * of_arm[rate]:.1f}" if rate in of_arm else "" for rate in rates]
        best = rates.index(max(of_arm, key=of_arm.__getitem__))
        cells[best] = f"**{cells[best]}**"
        rows.append([arm, *cells])
    return "\n".join(markdown_table(["trains", *rates], rows))


def finetuning_table(folder: Path) -> str:
    """What each arm trains, costs and reaches, the difference that SE makes, and the conditions."""
    found, steps, chosen = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("results", "steps", "chosen")
    )
    rows = []
    for judged in found["judgements"]:
        arm = judged["arm"]
        accuracies = [100 * accuracy for accuracy in judged["accuracies"]]
        rows.append(
            [
                arm,
                max(chosen[arm], key=chosen[arm].__getitem__),
                f"{steps[arm]['trained_parameters'] / 1e6:.2f} million",
                f"{steps[arm]['saved_bytes'] / 1e6:.0f} MB",
                Interval(**judged["step_time"]).with_spread() if judged["equal_epochs"] else "1",
                f"{mean(accuracies):.2f} ±{stdev(accuracies):.2f}",
                *(_points(judged[kind]) for kind in ("equal_epochs", "equal_time")),
            ]
        )
    heads = ["trains", "learning rate", "trained parameters", "saved for backward", "step time", "accuracy, %"]
    heads += ["beside `head`", "beside `head` at equal time"]
    statistics = json.loads((folder / "statistics.json").read_text())
    seeds = len(found["judgements"][0]["accuracies"])
    pairs = "; ".join(f"`{ours}` beside `{theirs}`: {_paired(found, ours, theirs)}" for ours, theirs in SE_BESIDE)
    return "\n".join(
        [
            *markdown_table(heads, rows),
            "",
            f"Accuracy on the 10,000 test images, mean ± standard deviation over {seeds} seeds. Differences in points, "
            f"paired by seed, with 95 % intervals. {pairs}.",
            "",
            f"Step times measured in turns, as ratios; {Machine(**found['machine'])}.",
            "",
            "A linear classifier on the pretrained features reaches "
            f"{100 * statistics['ImageNet']:.1f} % with the norms' statistics of ImageNet, and "
            f"{100 * statistics['Fashion-MNIST']:.1f} % with those of Fashion-MNIST.",
        ]
    )


def choices(folder: Path) -> str:
    """The accuracies that learning rate and epochs were chosen by, and what the pilot said."""
    chosen = json.loads((folder / "chosen.json").read_text())
    rates = {f"{float(rate):g}": [accuracy] for rate, accuracy in sorted(chosen["learning rate"].items())}
    epochs: dict[str, list[float]] = {}
    for words, accuracy in chosen["epochs"].items():
        epochs.setdefault(f"{words.partition(',')[0]} epochs", []).append(accuracy)
    seeds = len(next(iter(epochs.values())))
    runs: dict[str, list[Outcome]] = {}
    for arm in json.loads((folder / "results.json").read_text())["arms"]:
        outcomes = [folder / "outcomes" / f"{Arm(**arm).slug}-seed{17 + index}.json" for index in PILOT_SEEDS]
        if outcomes[0].is_file():  # arms that were added later have no pilot
            runs[arm["name"]] = [Outcome(**json.loads(path.read_text())["outcome"]) for path in outcomes]
    needed, _, _ = judge_pilot(runs, next(iter(runs)), 0.002).partition(" Each takes")
    return (
        f"Learning rate, after 10 epochs: {_with_best(rates)}. Epochs, mean of {seeds} seeds: {_with_best(epochs)}.\n\n"
        f"{needed}"
    )


def _with_best(accuracies: Mapping[str, list[float]]) -> str:
    means = {value: mean(found) for value, found in accuracies.items()}
    best = max(means, key=means.__getitem__)
    shown = {value: f"{value}: {100 * accuracy:.1f} %" for value, accuracy in means.items()}
    return ", ".join(f"**{text}**" if value == best else text for value, text in shown.items())


def slimmed_table(folder: Path) -> str:
    """What each further block costs and saves, in the mean over the seeds, and how many `slim` removed."""
    slimmed = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = []
    for removed in range(1, slimmed[0]["blocks"] + 1):
        changes = [found["points"][removed]["reporting"]["change"]["value"] for found in slimmed]
        change = mean_difference(changes, [0.0] * len(changes))
        row = [str(removed), _points(asdict(change))]
        for size in ("1", "16"):
            after, before = (
                [seconds for found in slimmed for seconds in found["latency"][size][str(left)]] for left in (removed, 0)
            )
            row.append(ratio_of_means(after, before).with_spread())
        rows.append(row)
    chosen = ", ".join(str(found["chosen"]) for found in slimmed)
    return "\n".join(
        [
            *markdown_table(["blocks removed", "accuracy, points", "latency, batch 1", "latency, batch 16"], rows),
            "",
            f"With the tolerance of {slimmed[0]['tolerance']:g} points `slim` removed {chosen} blocks, by seed. "
            f"{Machine(**slimmed[0]['machine'])}.",
        ]
    )


def beside_random_start(folder: Path) -> str:
    """The arms whose blocks start at identity, compared with the same arms without that."""
    found = json.loads((folder / "results.json").read_text())
    pairs = ((name, name.removesuffix(", identity")) for name in (arm["name"] for arm in found["arms"]))
    shown = (f"`{ours}` beside `{theirs}`: {_paired(found, ours, theirs)}" for ours, theirs in pairs if ours != theirs)
    return f"Points at equal epochs: {'; '.join(shown)}."


def comparison_table(report: str, remark: str) -> str:
    """The table of a comparison's report, its sentences, a remark and its conditions."""
    table = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)[0]
    sentences = re.findall(r"^- .*\n", report, re.MULTILINE)
    decided = [sentence for sentence in sentences if "the most accurate of the arms" not in sentence]
    conditions = re.findall(r"^Recipe .*$", report, re.MULTILINE)[0]
    return f"{table}\n{''.join(decided)}\n{remark}\n\n{conditions}"


def _points(difference: dict[str, float] | None) -> str:
    if difference is None:
        return "–"
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def claims_table(folder: Path) -> str:
    """The time of a training step with SE, with another algorithm and with both, and the accuracies with both."""
    heads = [
        "time of a training step, over that of the plain network",
        "SE",
        "the other",
        "both",
        "both over the other",
    ]
    rows = []
    machine = None
    for name, other, title in CLAIMS:
        kept = json.loads((folder / name / "speeds.json").read_text())
        machine = Machine(**kept["no SE"]["machine"])
        where = f"{machine.threads} torch {'thread' if machine.threads == 1 else 'threads'}, load {machine.load:.1f}"
        steps = {arm: entry["speed"]["step"] for arm, entry in kept.items()}
        pairs = [("SE", "no SE"), (other, "no SE"), (f"SE and {other}", "no SE"), (f"SE and {other}", other)]
        ratios = [ratio_of_means(steps[ours], steps[theirs]) for ours, theirs in pairs]
        rows.append([f"{title} ({where})", *(ratio.with_spread() for ratio in ratios)])
    assert machine is not None
    runs = json.loads((folder / "selective-backprop" / "results.json").read_text())["runs"]
    accuracies = {arm: [100 * run["accuracies"][-1][1] for run in of_arm] for arm, of_arm in runs.items()}
    gain = mean_difference(accuracies["SE and SelectiveBackprop"], accuracies["SelectiveBackprop"])
    return "\n".join(
        [
            *markdown_table(heads, rows),
            "",
            "Accuracy of the last row, %: "
            + "; ".join(f"{arm} {mean(values):.2f} ±{stdev(values):.2f}" for arm, values in accuracies.items())
            + f". SE beside SelectiveBackprop: {gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] points over "
            f"{len(accuracies['SE'])} seeds.",
            "",
            f"SE on all convs; {machine.cpu}, {machine.cpus} CPUs; torch {machine.torch}; {machine.system}.",
        ]
    )


def slim_table(found: dict[str, Any]) -> str:
    """What slimming brought, what half of the blocks would cost, the conditions, and the picture."""
    half = (found["blocks"] + 1) // 2
    change = Interval(**found["points"][half]["reporting"]["change"])
    return "\n".join(
        [
            *markdown_table(["", "before", "after", "change"], summary_rows(found)),
            "",
            " ".join(sentences(found)),
            "",
            f"With {half} of the {found['blocks']} blocks gone, the accuracy on the images that decided nothing "
            f"changes by {100 * change.value:+.2f} ± {100 * change.half_width:.2f} points.",
            "",
            "ResNet-20 with SE on all convs, blocks started at identity, 5 epochs of Fashion-MNIST; "
            f"{Machine(**found['machine'])}.",
            "",
            "![Accuracy and latency against the number of blocks left](slim-fashion-mnist.png)",
        ]
    )


def trainable_table(found: dict[str, Any]) -> str:
    """What a training step costs when a part of the network trains, and the conditions."""
    full = found["rows"][0]
    rows = []
    for row in found["rows"]:
        words = ", ".join(f"`{word}`" for word in row["patterns"].split(", "))
        time = ratio_of_means(row["seconds"], full["seconds"]).with_spread() if row is not full else "1"
        rows.append([words, f"{row['parameters'] / 1e6:.1f} million", f"{row['saved_bytes'] / 1e6:,.1f} MB", time])
    return "\n".join(
        [
            *markdown_table(["patterns", "trained parameters", "saved for backward", "time of a step"], rows),
            "",
            f"ResNet-50 with {found['layers']} blocks, {found['batch_size']} images of 224 × 224 pixels. Bytes are "
            f"counted. Times are relative to a full step, measured in random order; {Machine(**found['machine'])}.",
        ]
    )


def threads_table(found: dict[str, Any]) -> str:
    """How long a run takes with each setting, relative to the default, and the conditions."""
    seconds = {(row["run"], row["busy"], row["setting"]): row["seconds"] for row in found["rows"]}
    columns = list(dict.fromkeys((run, busy) for run, busy, _ in seconds))
    rows = []
    for setting in dict.fromkeys(setting for *_, setting in seconds):
        if setting == "default":
            cells = [f"1 ({mean(seconds[(*column, setting)]):.1f} s)" for column in columns]
        else:
            ratios = (ratio_of_means(seconds[(*column, setting)], seconds[(*column, "default")]) for column in columns)
            cells = [ratio.with_spread() for ratio in ratios]
        rows.append([setting, *cells])
    heads = ["the same, one core taken by another program" if busy else run for run, busy in columns]
    rounds, machine = len(next(iter(seconds.values()))), Machine(**found["machine"])
    return "\n".join(
        [
            *markdown_table(["", *heads], rows),
            "",
            f"Times of whole runs relative to the default, in {rounds} rounds, each in random order; {machine.cpu}, "
            f"{machine.cpus} CPUs; torch {machine.torch}; {machine.system}.",
        ]
    )


def _replaced(text: str, page: Path, name: str, table: str) -> str:
    marked = re.compile(rf"(<!-- {name}: make [a-z-]+ -->\n).*?<!-- /{name} -->", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{page.name}: expected the marks `<!-- {name}: make … -->` and `<!-- /{name} -->`.")
    return marked.sub(lambda match: f"{match[1]}{table}\n<!-- /{name} -->", text)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
