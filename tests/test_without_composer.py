"""The package without Composer; for the environment that has torch alone."""

from __future__ import annotations

import importlib.util

import pytest

import composer_se

pytestmark = pytest.mark.skipif(importlib.util.find_spec("composer") is not None, reason="Composer is installed")


def test_touching_the_algorithm_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"SqueezeExcite needs MosaicML Composer.*pip install mosaicml"):
        composer_se.SqueezeExcite  # noqa: B018


def test_the_rest_is_there() -> None:
    for name in ("apply_squeeze_excite", "remove_squeeze_excite", "SqueezeExcite2d", "SqueezeExciteConv2d", "surgery"):
        assert getattr(composer_se, name) is not None
