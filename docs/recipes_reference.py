"""Prints the reference page of recipes: every key, every data set, every shipped recipe (`make reference`)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from composer_se.parts.data import DATASETS
from composer_se.recipe.load import load_recipe, shipped_recipes
from composer_se.recipe.schema import READING, Recipe

INTRODUCTION = """\
# Recipes: reference

Written by `make reference`. `key=value` on the command line sets a key by its dotted path; `composer_se/yamls` of an
installed package (`yamls` in the repository) holds the shipped recipes as examples.
"""

KEYS = """\
## Keys

Durations and intervals are `90ep` (epochs), `1000ba` (batches), `100000sp` (samples) or a number of epochs. A resumed
run may change a key marked **r**, and where and how fast images are read: {reading} of a data set. All arms of a
comparison must have a key marked **c** in common. A comparison sets the keys marked **s** itself.
"""

SECTIONS = """\
`model.name` is a classification model of torchvision (`resnet50`), of timm (`timm/convnext_tiny`), one of
`cifar_resnet8`, `20`, `32`, `44`, `56`, `110`, or `efficientnet_lite0`. `model.weights` names pretrained weights or a
file of them. The other arguments of `model` are the network's. If you leave out `num_classes`, it is the number of the
data's classes. Optimizers, schedulers, algorithms, callbacks and loggers are Composer's (and torch's optimizers) by
their names in snake_case, with the arguments of their constructors. `package.module:name` in place of a name is
[a part of your own](recipes.md#your-own-parts).
"""

DATA = """\
## Data sets

`train_dataset` and `eval_dataset` take `name`, the data set's arguments, and `num_workers`: processes that read images;
null leaves the choice to the data set.
"""


def page() -> str:
    """The page in Markdown."""
    recipes = "\n".join(["## Shipped recipes", "", "| recipe | what it is |", "|---|---|", *_recipes()])
    keys = "\n".join(["| key | type | default | meaning | |", "|---|---|---|---|---|", *_keys()])
    reading = ", ".join(f"`{argument}`" for argument in READING)
    return "\n".join([INTRODUCTION, KEYS.format(reading=reading), keys, "", SECTIONS, DATA, *_datasets(), recipes, ""])


def _keys() -> Iterator[str]:
    for key in dataclasses.fields(Recipe):
        facts = key.metadata["facts"]
        marks = [mark for mark, which in (("r", {"resume", "free"}), ("c", {"same"}), ("s", {"set"})) if facts & which]
        cells = [f"`{key.name}`", _type(str(key.type)), _default(key), key.metadata["meaning"], ", ".join(marks)]
        yield "| " + " | ".join(cells) + " |"


def _default(key: dataclasses.Field[Any]) -> str:
    if key.default == MISSING:
        return "required" if key.name != "run_name" else "the recipe's name"
    return f"`{_yaml(key.default if key.default is not dataclasses.MISSING else {})}`"


def _datasets() -> Iterator[str]:
    for name, dataset in DATASETS.items():
        documentation = inspect.getdoc(dataset.open) or ""
        summary = documentation.partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]
        described = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", documentation, re.MULTILINE))
        yield f"### `{name}`\n\n{summary}\n\nFiles: {dataset.layout}.\n"
        arguments = [p for p in inspect.signature(dataset.open).parameters.values() if p.name != "train"]
        for argument in arguments:
            meaning = " ".join(described[argument.name].split()).replace("None:", "null:")
            default = "required" if argument.default is argument.empty else f"`{_yaml(argument.default)}`"
            yield f"- `{argument.name}` ({_type(str(argument.annotation))}, {default}): {meaning}"
        if arguments:
            yield ""


def _recipes() -> Iterator[str]:
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        about = path.read_text().partition("\n")[0].lstrip("# ")
        yield f"| `{name}` | {about} (`{recipe.model['name']}` on `{recipe.train_dataset['name']}`) |"


def _type(annotation: str) -> str:
    names = {"dict[str, Any]": "mapping", "list[str]": "list", "int": "integer", "float": "number", "str": "string"}
    annotation = re.sub(r"Literal\[(.*)\]", lambda match: match[1].replace(", ", " | "), annotation)
    parts = [part for part in annotation.split(" | ") if part != "None"]
    return " or ".join({"bool": "true or false"}.get(part, names.get(part, part)) for part in parts)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(page(), end="")
