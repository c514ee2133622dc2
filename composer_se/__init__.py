"""Squeeze-and-Excitation for any CNN: a MosaicML Composer algorithm and a plain PyTorch function."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from composer_se.registration import register_algorithm

if TYPE_CHECKING:
    from composer_se import functional, surgery
    from composer_se.algorithm import SqueezeExcite
    from composer_se.folding import fold_constant_gates
    from composer_se.functional import apply_squeeze_excite, remove_squeeze_excite
    from composer_se.gate_monitor import GateMonitor
    from composer_se.modules import SqueezeExcite2d, SqueezeExciteConv2d
    from composer_se.norm_module import SqueezeExciteNorm2d
    from composer_se.options import SqueezeExciteOptions
    from composer_se.planning import Plan, plan
    from composer_se.trainable import train_only

__all__ = [
    "GateMonitor",
    "Plan",
    "SqueezeExcite",
    "SqueezeExcite2d",
    "SqueezeExciteConv2d",
    "SqueezeExciteNorm2d",
    "SqueezeExciteOptions",
    "apply_squeeze_excite",
    "fold_constant_gates",
    "functional",
    "plan",
    "remove_squeeze_excite",
    "surgery",
    "train_only",
]

__version__ = "0.1.0"

register_algorithm()

# Imported when first used, because importing torch takes seconds. Before that, the commands refuse wrong recipes and
# set OpenMP's variables, which torch reads when it is imported.
_MODULES = {
    "GateMonitor": "composer_se.gate_monitor",
    "Plan": "composer_se.planning",
    "SqueezeExcite": "composer_se.algorithm",
    "SqueezeExcite2d": "composer_se.modules",
    "SqueezeExciteConv2d": "composer_se.modules",
    "SqueezeExciteNorm2d": "composer_se.norm_module",
    "SqueezeExciteOptions": "composer_se.options",
    "apply_squeeze_excite": "composer_se.functional",
    "fold_constant_gates": "composer_se.folding",
    "plan": "composer_se.planning",
    "remove_squeeze_excite": "composer_se.functional",
    "train_only": "composer_se.trainable",
}


def __getattr__(name: str) -> Any:
    if name in ("functional", "surgery"):
        return importlib.import_module(f"composer_se.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("GateMonitor", "SqueezeExcite") and importlib.util.find_spec("composer") is None:
        raise ImportError(
            f"composer_se.{name} needs MosaicML Composer, which is not installed: pip install 'composer-se[composer]'. "
            "composer_se.apply_squeeze_excite works without it."
        )
    return getattr(importlib.import_module(_MODULES[name]), name)
