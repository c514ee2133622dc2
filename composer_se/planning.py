"""Predicts `apply_squeeze_excite`: every conv of a model, the decision on it, its reason, and the added cost."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from composer_se.options import RECOMMENDED_LATENT_CHANNELS, SqueezeExciteOptions
from composer_se.selection import ConvChoice, select_convs

__all__ = ["ConvPlan", "Plan", "plan"]


@dataclass(frozen=True)
class ConvPlan:
    """The decision on one conv, and the cost that it adds.

    Attributes:
        map_size: Height and width of the conv's output at its first call, or None if unknown.
        reason: The reason of the choice, in a few words.
        latent_channels: Hidden width of the block that the conv has or gets; 0 for none.
        added_parameters: Weights of the new block.
        added_multiply_adds: Multiply-adds of the new block's two matrix products, for one image, as
            `composer-se cost` counts them. Squeeze and scaling are memory-bound.
        num_convs: The number of convs in this entry: more than one only in `Plan.grouped`. The other numbers are per
            conv.
    """

    name: str
    in_channels: int
    out_channels: int
    map_size: tuple[int, int] | None
    chosen: bool
    reason: str
    latent_channels: int
    added_parameters: int
    added_multiply_adds: int
    num_convs: int = 1


@dataclass(frozen=True, repr=False)
class Plan:
    """The decision on every conv of a model, in model order.

    Attributes:
        options: The options of SE.
        threshold: The threshold in force: ``options.min_channels``, or the number chosen for ``"auto"``.
        image_size: Height and width of the image that the map sizes belong to, or None.
        parameters: The number of parameters of the model as it is.
        multiply_adds: Multiply-adds of the model as it is, for one image, in convs and matrix products, or None
            if no image size was given or the forward pass failed.
        notes: Warnings: narrow blocks, no conv chosen, map sizes that could not be found.
    """

    convs: tuple[ConvPlan, ...]
    options: SqueezeExciteOptions
    threshold: int
    image_size: tuple[int, int] | None
    parameters: int
    multiply_adds: int | None
    notes: tuple[str, ...]

    @property
    def chosen(self) -> tuple[ConvPlan, ...]:
        """The convs that get a block."""
        return tuple(conv for conv in self.convs if conv.chosen)

    @property
    def added_parameters(self) -> int:
        """Weights of all new blocks."""
        return sum(conv.added_parameters for conv in self.convs)

    @property
    def added_multiply_adds(self) -> int:
        """Multiply-adds of all new blocks, for one image, in their matrix products."""
        return sum(conv.added_multiply_adds for conv in self.convs)

    @property
    def gated_share(self) -> float | None:
        """Share of all elements of conv outputs that new blocks read and scale, or None. SE's time grows with it."""
        sizes = [
            (conv, conv.out_channels * conv.map_size[0] * conv.map_size[1]) for conv in self.convs if conv.map_size
        ]
        total = sum(size for _, size in sizes)
        return sum(size for conv, size in sizes if conv.chosen) / total if total else None

    def grouped(self) -> tuple[ConvPlan, ...]:
        """The same convs; equal ones whose names differ only in numbers share an entry: ``layer3.{1..5}.conv2``."""
        return tuple(_grouped(self.convs))

    def summary(self) -> tuple[str, ...]:
        """The totals, in a few lines."""
        options = self.options
        lines = [
            f"SE on {len(self.chosen)} of {len(self.convs)} convs, min_channels={options.min_channels}"
            + (f" (resolves to {self.threshold})" if options.min_channels == "auto" else ""),
            f"blocks after the {options.placement}, init={options.init}"
            + (": the network computes what it did before" if options.init == "identity" else ""),
            f"parameters: {self.parameters:,} + {self.added_parameters:,}"
            + _percent(self.added_parameters, self.parameters),
        ]
        if self.multiply_adds is not None and self.image_size is not None:
            height, width = self.image_size
            lines.append(
                f"multiply-adds of a {height}×{width} image: {self.multiply_adds:,} + {self.added_multiply_adds:,}"
                + _percent(self.added_multiply_adds, self.multiply_adds)
            )
        if self.chosen and self.gated_share is not None:
            lines.append(f"SE reads and scales {self.gated_share:.1%} of all conv outputs")
        return tuple(lines)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dictionary per conv, for ``pandas.DataFrame(plan.to_dicts())`` and for JSON."""
        rows = []
        for conv in self.convs:
            row = asdict(conv)
            del row["num_convs"]
            height, width = row.pop("map_size") or (None, None)
            rows.append(row | {"map_height": height, "map_width": width})
        return rows

    def rows(self) -> list[tuple[str, ...]]:
        """The table: its head, and a row for each of `grouped`, without the maps where their sizes are not known."""
        with_maps = self.multiply_adds is not None
        # One column for the cost of chosen convs and the reason for the others, so that the table fits 80 characters.
        gets = f"{'width':>5} {'+weights':>9}" + f" {'+mult-adds':>10}" * with_maps
        rows: list[tuple[str, ...]] = [("conv", "×", "channels", *["map"] * with_maps, gets)]
        for conv in self.grouped():
            cells = [conv.name, str(conv.num_convs), f"{conv.in_channels}→{conv.out_channels}"]
            gets = f"{conv.latent_channels:>5} {conv.added_parameters:>9,}"
            if with_maps:
                cells.append("×".join(map(str, conv.map_size or ())))
                gets += f" {conv.added_multiply_adds:>10,}"
            rows.append((*cells, gets if conv.chosen else conv.reason))
        return rows

    def __repr__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = []
        for name, *numbers, last in rows:
            aligned = (cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))
            table.append("  ".join([name.ljust(widths[0]), *aligned, last]))
        return "\n".join([*table, "", *self.summary(), *(f"note: {note}" for note in self.notes)])


def plan(
    model: nn.Module,
    latent_channels: float = SqueezeExciteOptions.latent_channels,
    min_channels: int | str = SqueezeExciteOptions.min_channels,
    *,
    min_channels_of: str = SqueezeExciteOptions.min_channels_of,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = SqueezeExciteOptions.init,
    placement: str = SqueezeExciteOptions.placement,
    image_size: int | tuple[int, int] | None = None,
) -> Plan:
    """Predicts `composer_se.apply_squeeze_excite` with the same arguments. Changes nothing.

    Both functions use the same selection. The sizes of the maps come from a forward pass of shapes on the meta device:
    no arithmetic, no memory.

    Args:
        model: The model, not wrapped in DDP or FSDP.
        latent_channels: As in `composer_se.SqueezeExciteOptions`. Default: ``64``.
        min_channels: As there. Default: ``128``.
        min_channels_of: As there. Default: ``"output"``.
        include: As there. Default: all.
        exclude: As there. Default: none.
        init: As there. Default: ``"default"``.
        placement: As there. Default: ``"conv"``.
        image_size: Height and width of the input in pixels, one number for a square. Default: map sizes are left out.

    Returns:
        The plan. Its ``repr`` is a table; ``pandas.DataFrame(plan.to_dicts())`` has one row per conv.

    Raises:
        TypeError: If an argument has the wrong type, or the model is wrapped in DDP or FSDP.
        ValueError: If an argument is out of range, an ``include`` pattern matches no conv, or the model is a conv.

    Example:
        >>> from torchvision.models import resnet50
        >>> composer_se.plan(resnet50(), min_channels=512, image_size=224).added_parameters
        2686976
    """
    options = SqueezeExciteOptions(
        latent_channels=latent_channels,
        min_channels=min_channels,
        min_channels_of=min_channels_of,
        include=include,
        exclude=exclude,
        init=init,
        placement=placement,
    )
    selection = select_convs(model, options)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"image_size is {image_size!r}; give a height and a width in pixels, each at least 1.")
    notes = []
    maps, multiply_adds = {}, None
    if size is not None and selection.choices:
        try:
            maps, multiply_adds = _trace_shapes(model, size)
        except Exception as error:  # the user's forward may raise anything, and the choice stands without it
            reason = (str(error).strip() or "no message").splitlines()[0]
            notes.append(
                f"map sizes are unknown: the model does not run on a {size[0]}×{size[1]} image of shapes only "
                f"({type(error).__name__}: {reason})"
            )
    first = {choice.norm: choice for choice in reversed(selection.choices) if choice.chosen}  # convs may share a norm
    convs = tuple(
        _plan_conv(choice, maps, shares_block=options.placement == "norm" and first.get(choice.norm) is not choice)
        for choice in selection.choices
    )
    if narrow := [conv for conv in convs if conv.chosen and conv.latent_channels < RECOMMENDED_LATENT_CHANNELS]:
        notes.append(
            f"{len(narrow)} of the blocks are narrower than the recommended {RECOMMENDED_LATENT_CHANNELS} latent "
            f"channels, the narrowest ({min(narrow, key=lambda conv: conv.latent_channels).name}) has "
            f"{min(conv.latent_channels for conv in narrow)}"
        )
    if not any(conv.chosen for conv in convs):
        notes.append("no conv is chosen")
    return Plan(
        convs=convs,
        options=options,
        threshold=selection.min_channels,
        image_size=size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=multiply_adds,
        notes=tuple(notes),
    )


def _plan_conv(
    choice: ConvChoice, all_maps: Mapping[nn.Module, list[tuple[int, int]]], *, shares_block: bool
) -> ConvPlan:
    channels = choice.conv.out_channels
    weights = 2 * channels * choice.latent_channels if choice.chosen and not shares_block else 0
    maps = all_maps.get(choice.conv, [])
    num_calls = len(maps) if all_maps else 1
    return ConvPlan(
        name=choice.name,
        in_channels=choice.conv.in_channels,
        out_channels=channels,
        map_size=maps[0] if maps else None,
        chosen=choice.chosen,
        reason=choice.reason,
        latent_channels=choice.latent_channels,
        added_parameters=weights,
        added_multiply_adds=weights * num_calls,
    )


def _trace_shapes(model: nn.Module, image_size: tuple[int, int]) -> tuple[dict[nn.Module, list[tuple[int, int]]], int]:
    """The output sizes of every conv, call by call, and the multiply-adds of the whole forward pass."""
    # Tensors go into the memo as meta tensors already, so the copy takes no memory for weights.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    shapes_only = copy.deepcopy(model, memo).eval()
    original = dict(zip(shapes_only.modules(), model.modules(), strict=True))
    maps: dict[nn.Module, list[tuple[int, int]]] = {}

    def record(conv: nn.Module, _: Any, output: Tensor) -> None:
        maps.setdefault(original[conv], []).append((output.shape[-2], output.shape[-1]))

    convs = [module for module in shapes_only.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(record)
    image = torch.empty(1, convs[0].in_channels, *image_size, dtype=convs[0].weight.dtype, device="meta")
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        shapes_only(_as_input(shapes_only, image))
    return maps, counter.get_total_flops() // 2


def _as_input(model: nn.Module, image: Tensor) -> Any:
    """The input of the model's forward: the image, or for a Composer model a batch with a label."""
    # Looked up, not imported: a model can't be Composer's if nobody imported that.
    composer_models = sys.modules.get("composer.models.base")
    is_composers = composer_models is not None and isinstance(model, composer_models.ComposerModel)
    return (image, torch.zeros(1, dtype=torch.long, device="meta")) if is_composers else image


_NUMBER = re.compile(r"\d+")


def _grouped(convs: Sequence[ConvPlan]) -> Iterator[ConvPlan]:
    groups: dict[Any, list[ConvPlan]] = {}
    for conv in convs:
        anonymous = replace(conv, name="", reason=_without_own_name(conv))
        groups.setdefault((_NUMBER.sub("#", conv.name), anonymous), []).append(conv)
    for (_, anonymous), group in groups.items():
        for numbers in _products([tuple(map(int, _NUMBER.findall(conv.name))) for conv in group]):
            parts = iter(_span(choices) for choices in numbers)
            name = _NUMBER.sub(lambda _, parts=parts: next(parts), group[0].name)
            yield replace(anonymous, name=name, num_convs=math.prod(map(len, numbers)))


def _products(rows: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Splits distinct tuples into few sets that are each a product of the numbers in each place."""
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    if len(rows) == math.prod(map(len, columns)):
        return [columns]
    splits = (
        [product for value in column for product in _products([row for row in rows if row[place] == value])]
        for place, column in enumerate(columns)
        if len(column) > 1
    )
    return min(splits, key=len)


def _without_own_name(conv: ConvPlan) -> str:
    """The reason without the name of the module around the conv, which is part of the conv's name."""
    reason, _, last_word = conv.reason.rpartition(" ")
    return reason if reason and conv.name.startswith(f"{last_word}.") else conv.reason


def _span(numbers: list[int]) -> str:
    """`3`, or `{1..5}`, or `{0,2,7}`: no glob patterns, in which a range has one digit."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def _percent(added: int, before: int) -> str:
    return f" (+{added / before:.2%})" if before else ""
