"""Weights from a file: a state dict, safetensors, or a checkpoint of Composer, timm or torchvision.

Only tensors and plain values come out of a file. Objects of other classes, which a checkpoint holds beside the
weights, are not made: unpickling them could run any code.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from composer_se.errors import UserError, one_line

__all__ = ["LoadedWeights", "load_weights", "read_plain_weights", "read_weights"]

log = logging.getLogger(__name__)


def read_weights(path: str, key: str) -> Mapping[str, Tensor]:
    """Reads the weights of a network from a file of any kind.

    Args:
        path: The file.
        key: The recipe's key that names the file, for the messages.

    Raises:
        UserError: If the file can't be read, or holds no weights.
    """
    return _weights_in(_read(path, key), path, key)


def read_plain_weights(load_path: str | None) -> Mapping[str, Tensor] | None:
    """Reads the weights of `load_path`. Returns None for what the Trainer loads itself: checkpoints and remote files.

    Raises:
        UserError: If the file can't be read, or holds no weights.
    """
    if not load_path or not os.path.isfile(load_path):  # noqa: PTH113 - a folder, an object store, a pattern
        return None
    content = _read(load_path, "load_path")
    return None if _is_checkpoint(content) else _weights_in(content, load_path, "load_path")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads pretrained weights into a network, all but a classifier for another number of classes.

    The last weight of a network shows its number of classes. Weights that differ from the file's in this number alone
    are its classifiers, auxiliary ones included. Auxiliary classifiers that the network lacks are left out.

    Args:
        network: The network, before any algorithm has changed it.
        weights: The tensors by name.
        source: The name or the file of the weights, for the messages.

    Raises:
        UserError: If the weights are of another network, or of one with SE.
    """
    ours, theirs = network.state_dict(), _under_its_names(weights, network)
    classifier = _other_classifier(ours, theirs)
    differences = [(name, fault) for name, fault in _differences(ours, theirs) if name not in classifier]
    if any(_is_in_a_block(name, network) for name, _ in differences):
        raise UserError(
            f"model.weights: {source}: holds Squeeze-and-Excitation blocks, which the network gets later; "
            "name it in load_path instead"
        )
    if differences:
        raise UserError(f"model.weights: {source}: is not of this network: {_first_three(differences)}")
    for name in classifier:
        del theirs[name]
    network.load_state_dict(theirs, strict=False)


class LoadedWeights(Algorithm):
    """Loads a state dict once the other algorithms have changed the network, and before the network is distributed.

    An algorithm, because Composer's callbacks run before the network is changed or after it is distributed.

    Args:
        weights: The state dict, saved before or after the surgery.
        path: The file of the state dict, for the messages.
        strict: True refuses a state dict that lacks weights of the network or holds others.
        ignored: Glob patterns over names of weights that are not loaded.

    Raises:
        UserError: When it runs, if the state dict does not fit the network.
    """

    def __init__(self, weights: Mapping[str, Tensor], path: str, strict: bool, ignored: Sequence[str]) -> None:
        self.weights = weights
        self.path = path
        self.strict = strict
        self.ignored = ignored

    def match(self, event: Event, state: State) -> bool:
        """True for `Event.INIT`."""
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Loads the weights into the network."""
        network: Any = state.model
        module: nn.Module = network.module
        kept = _under_its_names(self.weights, module)
        for name in [*kept]:
            if any(fnmatchcase(name, pattern) for pattern in self.ignored):
                del kept[name]
        ours = module.state_dict()
        misfits = [(name, fault) for name, fault in _differences(ours, kept) if name in kept and name in ours]
        if misfits:
            raise UserError(
                f"load_path: {self.path}: is not of this network: {_first_three(misfits)}; leave weights out with "
                "load_ignore_keys=[...]"
            )
        try:
            missing, unexpected = module.load_state_dict(kept, strict=False)
        except RuntimeError as error:  # blocks with another start
            raise UserError(
                f"load_path: {self.path}: {one_line(error)} Set algorithms.squeeze_excite.init to that of the weights."
            ) from error
        if self.strict and (missing or unexpected):
            raise UserError(
                f"load_path: {self.path}: lacks {len(missing)} of the network's weights and holds {len(unexpected)} "
                f"others ({', '.join([*missing, *unexpected][:3])}, …); load_strict_model_weights=false loads what fits"
            )
        if len(unexpected) == len(kept):
            raise UserError(f"load_path: {self.path}: holds none of the network's weights")
        if missing or unexpected:
            log.info(
                "load_path: %s: loaded %d of the network's %d weights; it holds %d others.",
                self.path,
                len(ours) - len(missing),
                len(ours),
                len(unexpected),
            )


class _Ignored:
    """Takes the place of the objects in a file that are not loaded."""

    def __init__(self, *_: Any) -> None:
        """Takes the arguments of any class."""

    def __setstate__(self, _: Any) -> None:
        """Ignores the state."""


def _read(path: str, key: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if not zipfile.is_zipfile(path):  # as torch.save wrote before version 1.6
            return torch.load(path, map_location="cpu", weights_only=True)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ignored: list[Any] = [(type(name.rpartition(".")[2], (_Ignored,), {}), name) for name in others]
        with torch.serialization.safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: {path}: needs safetensors; install it with pip install safetensors") from error
    except Exception as error:  # unpickling may raise any
        raise UserError(f"{key}: {path}: can't be read ({one_line(error)[:300] or type(error).__name__})") from error


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get("state"), Mapping)


def _weights_in(content: Any, path: str, key: str) -> Mapping[str, Tensor]:
    found = content["state"] if _is_checkpoint(content) else content
    if isinstance(found, Mapping):
        found = next((found[name] for name in ("state_dict", "model") if isinstance(found.get(name), Mapping)), found)
    entries = found.items() if isinstance(found, Mapping) else ()
    if entries and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        return found
    raise UserError(
        f"{key}: {path}: is neither a checkpoint nor a state dict, but holds a {type(content).__name__}; "
        "write one with torch.save(model.state_dict(), ...)"
    )


def _under_its_names(weights: Mapping[str, Tensor], network: nn.Module) -> OrderedDict[str, Tensor]:
    """The weights under the network's names, with the versions of its layers' formats."""
    named: Any = OrderedDict(weights)
    ours: Any = network.state_dict()
    named._metadata = copy(getattr(weights, "_metadata", ours._metadata))
    wrapped = "module" not in dict(network.named_children())  # DDP and ComposerClassifier put `module.` before each
    while wrapped and all(name.startswith("module.") for name in named):
        consume_prefix_in_state_dict_if_present(named, "module.")
    for name in weights:  # the files of torchvision's DenseNets are older than its names: norm.1 for norm1
        if old := re.search(r"denselayer\d+\.(?:norm|conv)(\.)\d\.", name):
            named[name[: old.start(1)] + name[old.end(1) :]] = named.pop(name)
    return named


def _other_classifier(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> set[str]:
    """The names of the classifier's weights, if the two differ in their numbers of classes."""
    last = next((name for name in reversed([*ours]) if ours[name].dim() > 1), "")
    if last not in theirs or len(ours[last]) == len(theirs[last]):
        return set()
    return {
        name
        for name in ours.keys() & theirs.keys()
        if (ours[name].shape[:1], theirs[name].shape[:1]) == (ours[last].shape[:1], theirs[last].shape[:1])
        and ours[name].shape[1:] == theirs[name].shape[1:]
    }


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names that are missing, left over or of another shape, each with the fault."""
    for name, weight in ours.items():
        if name not in theirs:
            if not name.endswith("num_batches_tracked"):  # batch norm has it since torch 0.4.1 only
                yield name, "is missing"
        elif weight.shape != theirs[name].shape:
            yield name, f"is {_shape(theirs[name])} instead of {_shape(weight)}"
    for name in theirs:
        if name not in ours and not re.match("aux", name, re.IGNORECASE):
            yield name, "is left over"


def _first_three(differences: Sequence[tuple[str, str]]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(f"{name} {fault}" for name, fault in differences[:3]) + more


def _is_in_a_block(name: str, network: nn.Module) -> bool:
    """True for a weight of an SE block of ours whose conv, in this network, has none."""
    conv, block, _ = name.partition(".se.")
    return bool(block) and any(name == conv and not [*module.children()] for name, module in network.named_modules())


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
