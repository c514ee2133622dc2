"""Measures what a training step costs when only a part of a ResNet-50 with SE trains.

    make trainable

Writes `results/trainable-resnet50.json`: for each choice of patterns the parameters that train, the bytes that autograd
keeps for the backward pass, and the seconds of a training step, in random order. Run `write_tables.py` afterwards.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torchvision.models import resnet50

from composer_se import apply_squeeze_excite, train_only
from composer_se.cost.counts import saved_bytes
from composer_se.measure.machine import describe_machine
from composer_se.measure.steps import image_batch, loss_of, training_step
from composer_se.measure.timing import time_in_turns
from composer_se.show.text import to_json

RESULT = Path(__file__).parent / "results" / "trainable-resnet50.json"
CHOICES = (("*",), ("norms", "head"), ("se", "norms", "head"), ("se", "head"), ("head",))
ROUNDS = 4


def main() -> None:
    """Measures all choices in one run."""
    device = torch.device("cpu")
    machine = describe_machine(device)
    torch.manual_seed(0)
    network = resnet50()
    layers = len(apply_squeeze_excite(network, min_channels=512, init="identity"))
    images, targets = image_batch(network, 16, 224, device, channels_last=False)
    steps, rows = {}, []
    for patterns in CHOICES:
        part = copy.deepcopy(network).train()
        optimizer = torch.optim.SGD(part.parameters(), lr=0.0, momentum=0.9)
        trained = train_only(part, patterns, optimizer)
        saved = saved_bytes(lambda part=part: loss_of(part(images), targets), (*part.parameters(), *part.buffers()))
        name = ", ".join(patterns)
        rows.append({"patterns": name, "parameters": sum(p.numel() for p in trained.values()), "saved_bytes": saved})
        steps[name] = [partial(training_step, part, optimizer, images, targets, nullcontext)]
    seconds = time_in_turns(steps, rounds=ROUNDS, device=device, seed=0, visited=lambda: None)
    for row in rows:
        (row["seconds"],) = seconds[row["patterns"]]
    RESULT.write_text(to_json({"layers": layers, "batch_size": 16, "machine": vars(machine), "rows": rows}))


if __name__ == "__main__":
    main()
