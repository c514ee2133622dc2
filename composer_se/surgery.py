"""Replaces modules in a live model and updates its optimizers. Knows nothing of Squeeze-and-Excitation.

The functions take the arguments of those in `composer.utils.module_surgery` and can replace them. They also handle
several parameter groups, several optimizers and groups with ``param_names``. Their run time is linear in the size of
the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = [
    "ReplacementFunction",
    "count_module_instances",
    "replace_module_classes",
    "update_params_in_optimizer",
]

log = logging.getLogger(__name__)

ReplacementFunction = Callable[[nn.Module, int], nn.Module | None]
"""Given a module and how many of its class came before it, returns its replacement, or None to keep it."""


def replace_module_classes(
    module: nn.Module,
    policies: Mapping[type[nn.Module], ReplacementFunction],
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    recurse_on_replacements: bool = False,
    indices: dict[Any, int] | None = None,
) -> dict[nn.Module, nn.Module]:
    """Replaces the submodules of a model for which a policy returns a replacement, in place.

    All policies are asked before anything is replaced, so an error in one leaves the model as it was. A module with
    several parents is replaced by one module in all of them. Replacements are moved to the device of what they replace.

    Args:
        module: The model. It can't be replaced itself.
        policies: Replacement functions by module class, subclasses included. The first module that one returns is used.
        optimizers: Optimizers that hold the model's parameters. Parameters of replaced modules are replaced in them
            too, as `update_params_in_optimizer` does it. Default: none.
        recurse_on_replacements: True asks the policies about replacements and their children too. A policy that always
            matches its own replacement never ends. Default: ``False``.
        indices: By class, the number of modules that were asked about before. Updated in place. Default: none.

    Returns:
        The replacement of every replaced module, in the order of replacement.

    Raises:
        TypeError: If the model is wrapped in DistributedDataParallel.
    """
    if isinstance(module, DistributedDataParallel):
        raise TypeError(
            "The model is wrapped in DistributedDataParallel, which has registered its parameters already. "
            "Do the surgery on the bare model, then wrap it."
        )
    if indices is None:
        indices = dict.fromkeys(policies, 0)
    names_before = _parameter_names(module)
    replacements = _ask_policies(module, policies, recurse_on_replacements, indices)
    swaps = [(list(old.parameters()), list(new.parameters())) for old, new in replacements.items()]
    _put_in_place(module, replacements, recurse_on_replacements)
    if optimizers is not None:
        optimizers = _as_sequence(optimizers)
        names_after = _parameter_names(module)
        _update_optimizers(swaps, optimizers, in_use=names_after)
        _rename_in_optimizers(optimizers, names_before, names_after)
    elif replacements:
        log.debug("No optimizer was given. Build it from the model's parameters after this.")
    return replacements


def count_module_instances(module: nn.Module, module_class: type[nn.Module] | tuple[type[nn.Module], ...]) -> int:
    """Counts the submodules of a class, each once however many parents it has.

    Args:
        module: The model, which is not counted itself.
        module_class: The class, or several.

    Returns:
        The number of distinct submodules that are instances.
    """
    return sum(isinstance(child, module_class) for child in module.modules() if child is not module)


def update_params_in_optimizer(
    old_params: Iterable[Parameter],
    new_params: Iterable[Parameter],
    optimizers: Optimizer | Sequence[Optimizer],
) -> None:
    """Replaces the parameters of a module by those of its replacement, in optimizers.

    Parameters on both sides keep their place and their state. The optimizers drop parameters that are only in
    ``old_params``, together with their state. Parameters that are only in ``new_params`` join the end of the parameter
    group that holds the first of ``old_params``; if no optimizer holds any, the first group of the first optimizer.

    Args:
        old_params: Parameters of the replaced module.
        new_params: Parameters of the replacement.
        optimizers: One optimizer or several.
    """
    _update_optimizers([(old_params, new_params)], _as_sequence(optimizers))


def limit_optimizers(
    model: nn.Module, trained: Container[Parameter], optimizers: Optimizer | Sequence[Optimizer]
) -> None:
    """Removes a model's frozen parameters from optimizers, and adds the trained ones that are missing.

    Optimizers drop the parameters that don't train, together with their state. A trained parameter that no optimizer
    holds joins the first group of the first optimizer.

    Args:
        model: The model. Parameters of other models stay where they are.
        trained: The parameters that train.
        optimizers: One optimizer or several.
    """
    optimizers = _as_sequence(optimizers)
    names = _parameter_names(model)
    frozen = [parameter for parameter in names if parameter not in trained]
    _update_optimizers([(frozen, ()), ((), [p for p in names if p in trained])], optimizers)
    _rename_in_optimizers(optimizers, names, names)


def check_optimizers(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] | None) -> None:
    """Checks that each optimizer holds a parameter of the model, or no parameter at all.

    Raises:
        TypeError: If one is no optimizer.
        ValueError: If one holds none of the model's parameters.
    """
    if optimizers is None:
        return
    parameters = set(model.parameters())
    for optimizer in _as_sequence(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers holds a {type(optimizer).__name__}; give the torch optimizers of the model's parameters."
            )
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if held and parameters.isdisjoint(held):
            raise ValueError(
                f"{type(optimizer).__name__} holds none of the model's parameters. "
                "Give the optimizer that was built from this model, or none and build it afterwards."
            )


def _ask_policies(
    root: nn.Module,
    policies: Mapping[type[nn.Module], ReplacementFunction],
    recurse_on_replacements: bool,
    indices: dict[Any, int],
) -> dict[nn.Module, nn.Module]:
    decided: dict[nn.Module, nn.Module] = {}
    asked = {root}
    pending = list(root.modules())
    for module in pending:  # grows while replacements are to be looked at too
        if module in asked:
            continue
        asked.add(module)
        replacement = _first_replacement(module, policies, indices)
        if replacement is None:
            continue
        device = _device_of(module) or _device_of(root)
        decided[module] = replacement if device is None else replacement.to(device)
        if recurse_on_replacements:
            pending.extend(replacement.modules())
    return decided


def _first_replacement(
    module: nn.Module, policies: Mapping[type[nn.Module], ReplacementFunction], indices: dict[Any, int]
) -> nn.Module | None:
    for module_class, policy in policies.items():
        if isinstance(module, module_class):
            index = indices[module_class]
            indices[module_class] += 1
            if (replacement := policy(module, index)) is not None:
                return replacement
    return None


def _put_in_place(root: nn.Module, replacements: Mapping[Any, nn.Module], replaced_again: bool) -> None:
    """Puts replacements in the place of the modules, also inside other replacements.

    A module stays inside its own replacement, which wraps it.
    """
    for parent in root.modules():  # goes on to the children when this is done with the parent
        for name, child in list(parent._modules.items()):
            if child not in replacements:
                continue
            steps = [child, replacements[child]]
            while replaced_again and steps[-1] in replacements and steps[-1] not in steps[:-1]:
                steps.append(replacements[steps[-1]])
            if parent not in steps[-1].modules():
                setattr(parent, name, steps[-1])


def _device_of(module: nn.Module) -> torch.device | None:
    tensor = next(module.parameters(), next(module.buffers(), None))
    return None if tensor is None else tensor.device


def _as_sequence(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def _update_optimizers(
    swaps: Iterable[tuple[Iterable[Parameter], Iterable[Parameter]]],
    optimizers: Sequence[Optimizer],
    in_use: Container[Parameter] | None = None,
) -> None:
    """Makes the swaps in turn. If ``in_use`` is given, its parameters are not removed and no others are added."""
    if not optimizers:
        return
    homes = {
        parameter: (optimizer, group)
        for optimizer in reversed(optimizers)
        for group in reversed(optimizer.param_groups)
        for parameter in group["params"]
    }
    removed: set[Parameter] = set()
    without_home = 0
    for old_params, new_params in swaps:
        old, new = dict.fromkeys(old_params), dict.fromkeys(new_params)
        removed.update(p for p in old if p not in new and (in_use is None or p not in in_use))
        added = [parameter for parameter in new if parameter not in old and parameter not in homes]
        if not added:
            continue
        home = next((homes[parameter] for parameter in old if parameter in homes), None)
        if home is None:
            without_home += len(added)
            home = (optimizers[0], optimizers[0].param_groups[0])
        _append(home[1], [p for p in added if in_use is None or p in in_use])
        homes.update(dict.fromkeys(added, home))
    if without_home:
        log.info(
            "No optimizer holds what %d new parameters belong to (frozen layers, for instance): "
            "they joined the first parameter group of the first optimizer.",
            without_home,
        )
    _remove(removed, optimizers)


def _append(group: dict[str, Any], parameters: list[Parameter]) -> None:
    # In place: LBFGS holds on to the list.
    group["params"].extend(parameters)
    if "param_names" in group:
        first = len(group["param_names"])
        group["param_names"].extend(f"new_parameter_{first + i}" for i in range(len(parameters)))


def _remove(parameters: set[Parameter], optimizers: Sequence[Optimizer]) -> None:
    if not parameters:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [i for i, parameter in enumerate(group["params"]) if parameter not in parameters]
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][i] for i in kept]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def _parameter_names(module: nn.Module) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def _rename_in_optimizers(
    optimizers: Sequence[Optimizer], names_before: dict[Parameter, str], names_after: dict[Parameter, str]
) -> None:
    """Gives the entries of ``param_names`` their names in the changed model.

    The optimizer may know the parameters by longer names than the model does, when it was made from an outer module.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups if "param_names" in group):
        known = zip(group["params"], group["param_names"], strict=True)
        prefixes = {
            recorded.removesuffix(names_before[parameter])
            for parameter, recorded in known
            if parameter in names_before and recorded.endswith(names_before[parameter])
        }
        if len(prefixes) == 1:
            prefix = prefixes.pop()
            group["param_names"][:] = [
                prefix + names_after[parameter] if parameter in names_after else recorded
                for parameter, recorded in zip(group["params"], group["param_names"], strict=True)
            ]


def _find_param_in_optimizer(param: Parameter, optimizer: Optimizer) -> int:
    """The index of the parameter group that holds ``param``, or -1. Composer's tests import it by this name."""
    groups = enumerate(optimizer.param_groups)
    return next((i for i, group in groups if any(param is other for other in group["params"])), -1)
