"""Swapping modules and mending optimizers, with no Squeeze-and-Excitation in sight."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adam

from composer_se.surgery import count_module_instances, replace_module_classes, update_params_in_optimizer


class Scaled(nn.Module):
    """A linear layer with a scale of its own, as a stand-in for any wrapper."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features) * self.scale


def wrap(module: nn.Module, index: int) -> nn.Module | None:
    assert isinstance(module, nn.Linear)
    return Scaled(module)


def anew(module: nn.Module, index: int) -> nn.Module | None:
    assert isinstance(module, nn.Linear)
    return nn.Linear(module.in_features, module.out_features)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 2)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_signatures_are_those_of_composer() -> None:
    theirs = pytest.importorskip("composer.utils.module_surgery")
    for ours in (replace_module_classes, count_module_instances, update_params_in_optimizer):
        parameters = inspect.signature(ours).parameters.values()
        expected = inspect.signature(getattr(theirs, ours.__name__)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in parameters] == [(p.name, p.default, p.kind) for p in expected]


def test_policies_choose_by_module_and_index() -> None:
    model = net()
    seen: list[int] = []

    def second_only(module: nn.Module, index: int) -> nn.Module | None:
        seen.append(index)
        return nn.Identity() if index == 1 else None

    old = model[2]
    replaced = replace_module_classes(model, {nn.Linear: second_only})
    assert seen == [0, 1]
    assert list(replaced) == [old]
    assert isinstance(model[2], nn.Identity)
    assert isinstance(model[0], nn.Linear)


def test_indices_go_on_from_those_given() -> None:
    indices = {nn.Linear: 5}
    seen: list[int] = []
    replace_module_classes(net(), {nn.Linear: lambda module, index: seen.append(index)}, indices=indices)
    assert seen == [5, 6]
    assert indices == {nn.Linear: 7}


def test_module_with_several_parents_is_replaced_once_in_all() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, shared)})
    replaced = replace_module_classes(model, {nn.Linear: wrap})
    assert len(replaced) == 1
    assert len({id(module) for module in model.modules() if isinstance(module, Scaled)}) == 1
    assert count_module_instances(model, Scaled) == count_module_instances(model, nn.Linear) == 1


def test_replacements_are_looked_at_only_on_request() -> None:
    class Growing(nn.Linear):
        def __init__(self, features: int) -> None:
            super().__init__(features, features)
            self.inner = nn.Linear(features - 1, features - 1)

    def grow(module: nn.Module, index: int) -> nn.Module | None:
        assert isinstance(module, nn.Linear)
        return Growing(module.in_features) if module.in_features > 1 and not isinstance(module, Growing) else None

    once, deep = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    replace_module_classes(once, {nn.Linear: grow})
    replace_module_classes(deep, {nn.Linear: grow}, recurse_on_replacements=True)
    assert count_module_instances(once, Growing) == 1
    assert count_module_instances(deep, Growing) == 2


def test_a_wrapper_around_the_old_module_is_not_wrapped_again_in_recursion() -> None:
    model = net()
    replace_module_classes(model, {nn.Linear: wrap}, recurse_on_replacements=True)
    assert count_module_instances(model, Scaled) == 2


class Node(nn.Module):
    """A module of a random graph, with a parameter of its own in front of its children's."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        for i, child in enumerate(children):
            self.add_module(f"child{i}", child)


class Root(Node):
    pass


REPLACEMENTS = {
    "keep": lambda node: None,
    "drop": lambda node: Node(),
    "wrap": lambda node: Node(node),
    "wrap twice": lambda node: Node(Node(), Node(node, node)),
    "take over": lambda node: Node(*node.children()),
    "take over deep": lambda node: Node(Node(*node.children()), *list(node.children())[1:]),
}


@st.composite
def graphs(draw: st.DrawFn) -> Root:
    nodes: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 6))):
        nodes.append(Node(*draw(st.lists(st.sampled_from(nodes), max_size=3)) if nodes else ()))
    return Root(*draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=4)))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(graphs(), st.lists(st.sampled_from(list(REPLACEMENTS)), max_size=8), st.booleans(), st.data())
def test_any_graph_is_replaced_everywhere_and_each_module_asked_once(root, actions, recurse, data) -> None:
    before = [module for module in root.modules() if module is not root]
    group_of = {module: data.draw(st.integers(0, 1)) for module in before}
    optimizer = SGD([{"params": [n.weight for n in before if group_of[n] == i] + [root.weight] * i} for i in (0, 1)])
    asked: list[nn.Module] = []
    children: dict[nn.Module, list[nn.Module]] = {}

    def policy(node: nn.Module, index: int) -> nn.Module | None:
        assert index == len(asked)
        asked.append(node)
        new = REPLACEMENTS[actions[index]](node) if index < len(actions) else None
        for module in new.modules() if new is not None else ():
            group_of.setdefault(module, group_of[node])
            children[module] = list(module._modules.values())
        return new

    for module in root.modules():
        children[module] = list(module._modules.values())
    replaced = replace_module_classes(root, {Node: policy}, optimizer, recurse_on_replacements=recurse)

    def expected(module: nn.Module, inside_of: frozenset[nn.Module]) -> Any:
        """The graph as it should be: replaced everywhere but inside of the module's own replacement."""
        if module in replaced and module not in inside_of:
            inside_of |= {module}
            module = replaced[module]
            while recurse and module in replaced:
                inside_of |= {module}
                module = replaced[module]
        return module, [expected(child, inside_of) for child in children[module]]

    def actual(module: nn.Module) -> Any:
        return module, [actual(child) for child in module._modules.values() if child is not None]

    assert actual(root) == expected(root, frozenset())
    assert len(asked) == len(set(asked))
    assert set(before) <= set(asked)
    for i, group in enumerate(optimizer.param_groups):
        in_group = [n.weight for n in root.modules() if group_of.get(n, 1) == i]
        assert sorted(map(id, group["params"])) == sorted(map(id, in_group))


def test_child_that_a_replacement_takes_over_is_replaced_in_its_other_parents_too() -> None:
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, other), "b": nn.ModuleList([shared])})
    declined: list[nn.Module] = []
    policies = {
        nn.Sequential: lambda module, index: nn.ModuleList(module),
        nn.Linear: lambda module, index: declined.append(module) if module is other else nn.Identity(),
    }
    replace_module_classes(model, policies, recurse_on_replacements=True)
    assert declined == [other]
    assert model["a"][0] is model["b"][0]
    assert model["a"][0] is not shared


def test_shared_module_is_replaced_inside_a_later_replacement_that_took_it_over() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    replace_module_classes(model, {nn.Linear: anew, nn.Sequential: lambda module, index: nn.ModuleList(module)})
    assert model["b"][0] is model["a"]
    assert model["a"] is not shared


def test_error_in_a_policy_changes_nothing() -> None:
    model = net()
    before, optimizer = list(model.modules()), SGD(model.parameters(), lr=0.1)

    def fail_at_second(module: nn.Module, index: int) -> nn.Module | None:
        if index == 1:
            raise RuntimeError("no")
        return anew(module, index)

    with pytest.raises(RuntimeError, match="no"):
        replace_module_classes(model, {nn.Linear: fail_at_second}, optimizer)
    assert list(model.modules()) == before
    assert names_in(optimizer, model) == [["0.weight", "0.bias", "2.weight", "2.bias"]]


def test_replacement_moves_to_the_device_of_the_replaced() -> None:
    model = net().to("meta")
    replace_module_classes(model, {nn.Linear: anew})
    assert all(parameter.is_meta for parameter in model.parameters())


def test_ddp_is_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="bare model"):
            replace_module_classes(DistributedDataParallel(net()), {nn.Linear: wrap})
    finally:
        torch.distributed.destroy_process_group()


def test_added_parameters_join_the_group_and_optimizer_of_the_first_old_one() -> None:
    model = net()
    first = SGD([{"params": [model[0].bias, model[2].bias], "lr": 0.5}, {"params": [model[0].weight]}], lr=0.1)
    second = Adam([model[2].weight])
    replace_module_classes(model, {nn.Linear: wrap}, [first, second])
    assert names_in(first, model) == [["0.linear.bias", "2.linear.bias"], ["0.linear.weight", "0.scale"]]
    assert names_in(second, model) == [["2.linear.weight", "2.scale"]]


def test_replaced_parameters_leave_with_their_state_and_the_rest_keeps_its_own() -> None:
    model = net()
    optimizer = Adam(model.parameters())
    step(model, optimizer)
    old, kept = list(model[0].parameters()), list(model[2].parameters())
    state = copy.deepcopy([optimizer.state[parameter] for parameter in kept])
    replace_module_classes(model, {nn.Linear: lambda m, i: anew(m, i) if i == 0 else None}, optimizer)
    assert not any(parameter in optimizer.state for parameter in old)
    for parameter, before in zip(kept, state, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before["exp_avg"])
    assert names_in(optimizer, model) == [["2.weight", "2.bias", "0.weight", "0.bias"]]
    step(model, optimizer)


def test_parameter_that_stays_elsewhere_in_the_model_stays_in_the_optimizer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = SGD(model.parameters(), lr=0.1)
    replace_module_classes(model, {nn.Linear: lambda m, i: anew(m, i) if i == 0 else None}, optimizer)
    assert {name for group in names_in(optimizer, model) for name in group} == {"a.weight", "a.bias", "b.weight"}


def test_param_names_stay_in_step_with_names_of_an_outer_module() -> None:
    outer = nn.ModuleDict({"backbone": net(), "head": nn.Linear(2, 2)})
    decay = [(name, p) for name, p in outer.named_parameters() if name.endswith("weight")]
    rest = [(name, p) for name, p in outer.named_parameters() if name.endswith("bias")]
    optimizer = SGD([{"params": decay}, {"params": rest}], lr=0.1)
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch has no param_names")
    replace_module_classes(outer["backbone"], {nn.Linear: wrap}, optimizer)
    names = {parameter: name for name, parameter in outer.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[parameter] for parameter in group["params"]]
    assert "backbone.2.scale" in optimizer.param_groups[0]["param_names"]


def test_parameters_without_a_home_join_the_first_group(caplog) -> None:
    model = net()
    optimizer = SGD([{"params": [model[2].weight]}, {"params": [model[2].bias]}], lr=0.1)
    with caplog.at_level("INFO", "composer_se"):
        replace_module_classes(model, {nn.Linear: lambda m, i: wrap(m, i) if i == 0 else None}, optimizer)
    assert names_in(optimizer, model) == [["2.weight", "0.scale"], ["2.bias"]]
    assert "joined the first parameter group of the first optimizer" in caplog.text


def test_no_parameter_is_ever_held_twice() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    layer = model[0]
    for _ in range(2):
        update_params_in_optimizer(layer.parameters(), Scaled(layer).parameters(), optimizer)
        held = optimizer.param_groups[0]["params"]
        assert len(held) == len({id(parameter) for parameter in held})


@pytest.mark.parametrize(("policy", "count"), [(wrap, 6), (anew, 4)])
def test_optimizer_that_keeps_the_list_of_parameters_sees_the_change(policy, count) -> None:
    model = net()
    optimizer = LBFGS(model.parameters())
    replace_module_classes(model, {nn.Linear: policy}, optimizer)
    assert len(optimizer._params) == count
    assert set(optimizer._params) == set(model.parameters())


def test_work_grows_linearly_with_the_number_of_modules() -> None:
    """Counts how often a parameter is compared or hashed, which is what the built-in's list scans multiply."""

    class Counted(nn.Parameter):
        lookups = 0

        def __hash__(self) -> int:
            Counted.lookups += 1
            return id(self)

    def lookups(size: int) -> int:
        model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(size)))
        for layer in model:
            layer.weight = Counted(torch.ones(1, 1))
        optimizer = SGD(model.parameters(), lr=0.1)
        Counted.lookups = 0
        replace_module_classes(model, {nn.Linear: wrap}, optimizer)
        return Counted.lookups

    small, large = lookups(50), lookups(500)
    assert large <= 10 * small
