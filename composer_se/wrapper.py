"""A layer of a network together with the Squeeze-and-Excitation block that scales its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["SqueezeExcited", "is_plain", "mark_as_squeeze_excited"]


class SqueezeExcited(nn.Module):
    """A layer of a network whose output is scaled by a Squeeze-and-Excitation block.

    This wrapper reads and sets attributes that it lacks (``stride``, ``padding``, ...) on the wrapped layer. It also
    reads the layer's parameters, but can't set them: assigning to the wrapper's ``weight`` raises a TypeError. Assign
    to the layer's ``weight``. A state dict of the bare layer loads into the wrapper, and the block keeps its weights.

    Attributes:
        inner: The name of the layer in this module.
        se: The layer's `composer_se.SqueezeExcite2d`.
    """

    inner: ClassVar[str]
    __jit_unused_properties__ = ("layer",)
    if TYPE_CHECKING:  # TorchScript would look up the annotation
        se: Any

    def _wrap(self, layer: nn.Module, se: nn.Module) -> None:
        setattr(self, self.inner, layer)
        self.se = se
        self.train(layer.training)

    @property
    def layer(self) -> nn.Module:
        """The bare layer."""
        return getattr(self, self.inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not self.layer, which would come back here while the module is being unpickled.
            layer = self.__dict__.get("_modules", {}).get(self.inner)
            if layer is None or name.startswith("__"):  # its own __deepcopy__, which parametrised modules have
                raise
            return getattr(layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        layer = self.__dict__.get("_modules", {}).get(self.inner)
        if layer is None or name.startswith("_") or name in self.__dict__ or name in self._modules:
            super().__setattr__(name, value)
        elif name in layer._parameters:
            # Folding a batch norm into the conv does this, and the gate stands between the two.
            raise TypeError(
                f"{name} belongs to the {self.inner} inside this {type(self).__name__}. Assign to its "
                f".{self.inner}.{name} if the gate shall scale what the {self.inner} makes of it; a norm that follows "
                "the gate can't be folded into the conv."
            )
        elif name in layer.__dict__ and not hasattr(type(self), name):
            setattr(layer, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = (f"{prefix}{self.inner}.", f"{prefix}se.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}{self.inner}.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def mark_as_squeeze_excited(conv: nn.Module, marked: bool = True) -> None:
    """Sets or removes the mark by which Composer's built-in algorithm knows a conv that has SE already."""
    if marked:
        conv.__dict__["_already_squeeze_excited"] = True
    else:
        conv.__dict__.pop("_already_squeeze_excited", None)


def is_plain(module: nn.Module, module_class: type[nn.Module], *methods: str) -> bool:
    """True if a call of ``module`` runs only these methods of ``module_class``, so that nobody else holds the result.

    Hooks on the backward pass also hold a view of the result. Parametrised modules are plain in this respect.
    """
    # torch has no public test for hooks, of one module or of all modules.
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    hooks = hooks or _module._global_forward_hooks or _module._global_forward_pre_hooks
    hooks = hooks or _module._global_backward_hooks or _module._global_backward_pre_hooks
    if hooks or not module.__dict__.keys().isdisjoint(methods) or not isinstance(module, module_class):
        return False
    return type(module) is module_class or all(
        getattr(type(module), method) is getattr(module_class, method) for method in methods
    )
