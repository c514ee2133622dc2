"""The options: what they take, what they refuse, and what becomes of `inplace`."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from composer_se import SqueezeExciteOptions
from composer_se.options import latent_width


@pytest.mark.parametrize("latent_channels", [0, -1, -0.5, 3.5, float("nan"), float("inf"), 0.0])
def test_hidden_width_out_of_range_is_refused(latent_channels) -> None:
    with pytest.raises(ValueError, match="latent_channels is .*whole number >= 1.*fraction"):
        SqueezeExciteOptions(latent_channels)


@pytest.mark.parametrize("latent_channels", [True, "64", None, [64]])
def test_hidden_width_that_is_no_number_is_refused(latent_channels) -> None:
    with pytest.raises(TypeError, match="latent_channels is .* of type .*whole number >= 1"):
        SqueezeExciteOptions(latent_channels)


@pytest.mark.parametrize("min_channels", [0, -3, 2.5, float("nan"), float("inf")])
def test_threshold_out_of_range_is_refused(min_channels) -> None:
    with pytest.raises(ValueError, match="min_channels is .*whole number >= 1"):
        SqueezeExciteOptions(min_channels=min_channels)


@pytest.mark.parametrize("min_channels", [True, "128", "all", None])
def test_threshold_that_is_no_number_is_refused(min_channels) -> None:
    with pytest.raises(TypeError, match="min_channels is .* of type .*whole number >= 1"):
        SqueezeExciteOptions(min_channels=min_channels)


def test_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="min_channels_of is 'input'.*output.*both"):
        SqueezeExciteOptions(min_channels_of="input")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_is_no_string_is_refused(option) -> None:
    with pytest.raises(TypeError, match=f"{option} holds 3; give glob patterns"):
        SqueezeExciteOptions(**{option: ["layer4", 3]})


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("layer4", ("layer4",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], None), ((), None), (None, None)],
)
def test_patterns_become_a_tuple_or_none(option, given, kept) -> None:
    assert getattr(SqueezeExciteOptions(**{option: given}), option) == kept


def test_numbers_become_pythons_own_so_that_the_repr_can_be_evaluated() -> None:
    options = SqueezeExciteOptions(np.int64(32), np.int32(16))
    assert (type(options.latent_channels), type(options.min_channels)) == (int, int)
    assert options == SqueezeExciteOptions(32.0, 16.0)
    assert type(SqueezeExciteOptions(np.float32(0.25)).latent_channels) is float
    assert repr(options) == repr(eval(repr(options), {"SqueezeExciteOptions": SqueezeExciteOptions}))


def test_changed_options_are_checked_again() -> None:
    with pytest.raises(ValueError, match="min_channels is 0"):
        replace(SqueezeExciteOptions(), min_channels=0)


@pytest.mark.parametrize(
    ("latent_channels", "num_features", "width"), [(5, 16, 5), (64, 16, 64), (0.25, 18, 4), (0.01, 16, 1), (1, 16, 1)]
)
def test_hidden_width_is_absolute_or_a_share_that_is_never_nothing(latent_channels, num_features, width) -> None:
    assert latent_width(latent_channels, num_features) == width


@pytest.mark.parametrize("inplace", ["auto", True, False, "maybe"])
def test_inplace_of_earlier_versions_is_answered_by_one_warning_and_changes_nothing(inplace, caplog) -> None:
    options = SqueezeExciteOptions(inplace=inplace)
    assert caplog.messages == [f"inplace={inplace!r} is not needed any more and does nothing: leave it out."]
    assert options == SqueezeExciteOptions()
    assert asdict(options) == asdict(SqueezeExciteOptions())
    assert "inplace" not in repr(options)


def test_options_without_inplace_warn_of_nothing(caplog) -> None:
    replace(SqueezeExciteOptions(0.5, "auto", "both", "a", ["b"]), min_channels=3)
    assert caplog.messages == []
