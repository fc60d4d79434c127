"""Index maps in words: what kind of mistake turns the indices that were due into those that were read."""

from __future__ import annotations

from collections.abc import Callable

import torch

Indices = torch.Tensor  # [n, axes] int64
Map = Callable[[Indices], Indices]

NONE, SIGN, ZERO, INVERSE, UNSCALED = -1, -2, -3, -4, -5
UNREAD = {
    NONE: "no scale of this tensor is what was applied",
    SIGN: "the scale's sign is lost",
    ZERO: "nothing came through, as where gate turns negative",
    INVERSE: "it was divided by the scale",
    UNSCALED: "no scale was applied at all",
}
"""What a reading can be that is no index."""


def flat(index: Indices, shape: tuple[int, ...]) -> torch.Tensor:
    """[n, axes] -> [n]: the row-major number of each index."""
    number = torch.zeros(len(index), dtype=torch.int64, device=index.device)
    for axis, size in enumerate(shape):
        number = number * size + index[:, axis]
    return number


def along(axis: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Map:
    """The map that changes one axis."""

    def apply(index: Indices) -> Indices:
        result = index.clone()
        result[:, axis] = change(index[:, axis])
        return result

    return apply


def _transposed(shape: tuple[int, ...]) -> Map:
    """Strides of the last two axes exchanged: the number that (a, b) has in a [.., B, A] tensor."""
    rows, columns = shape[-2:]

    def apply(index: Indices) -> Indices:
        result = index.clone()
        number = index[:, -1] * rows + index[:, -2]
        result[:, -2], result[:, -1] = number // columns, number % columns
        return result

    return apply


def _changes(size: int, name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Mistakes along one axis."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        f"always {name} 0": torch.zeros_like,
        f"the {name} before, wrapping round": lambda i: (i - 1) % size,
        f"the {name} before, staying inside": lambda i: (i - 1).clamp(min=0),
        f"the {name} after, wrapping round": lambda i: (i + 1) % size,
        f"the {name} after, staying inside": lambda i: (i + 1).clamp(max=size - 1),
        f"always the last {name}": lambda i: torch.full_like(i, size - 1),
    }
    if size % 2 == 0:
        half = size // 2
        changes |= {
            f"{name}s with their halves swapped": lambda i: (i + half) % size,
            f"the first half of the {name}s for both halves": lambda i: i % half,
            f"{name}s of the two halves in turn": lambda i: i % 2 * half + i // 2,
        }
    return changes | {
        f"{name}s in reverse": lambda i: size - 1 - i,
        f"half the {name}'s number": lambda i: i // 2,
    }


def mistakes(shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, Map]:
    """Wrong index maps by their name."""
    maps: dict[str, Map] = {}
    for axis, (size, name) in enumerate(zip(shape, axes, strict=True)):
        for mistake, change in _changes(size, name).items():
            maps[mistake] = along(axis, change)
    maps["transposed (the last two axes' strides exchanged)"] = _transposed(shape)
    return maps


def describe(
    true: Indices,
    seen: torch.Tensor,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    predict: Callable[[Map], torch.Tensor] | None = None,
) -> str:
    """Empty where `seen` is what was due, else the mistake in words.

    true: [n, axes], what was due; seen: [n], row-major numbers, or below 0 one of UNREAD.

    predict: what would be seen under a map, [n], where that is not simply the mapped index.
    A named mistake must explain every reading, the right ones too, or else every wrong one.
    """
    due = flat(true, shape)
    wrong = seen != due
    if not bool(wrong.any()):
        return ""
    count = f"{int(wrong.sum())} of {len(due)} readings are wrong"
    candidates = {
        name: predict(apply) if predict else flat(apply(true), shape) for name, apply in mistakes(shape, axes).items()
    }
    for name, number in candidates.items():
        if bool(((number == seen) | ((number < 0) & (seen < 0))).all()):
            return f"{count}: it reads {name}"
    codes = torch.unique(seen[wrong])
    if len(codes) == 1 and int(codes[0]) in UNREAD:
        return f"{count}: {UNREAD[int(codes[0])]}{_where(true, wrong, axes)}"
    for name, number in candidates.items():
        if torch.equal(number[wrong], seen[wrong]):
            return f"{count}: there it reads {name}{_where(true, wrong, axes)}"
    pairs = torch.unique(torch.stack([due[wrong], seen[wrong]], 1), dim=0)[:3].tolist()
    return f"{count}: " + "; ".join(f"{_name(a, shape, axes)} read {_name(b, shape, axes)}" for a, b in pairs)


def _name(number: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> str:
    if number < 0:
        return f"nothing of this tensor ({UNREAD[number]})"
    parts = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        parts.append(place)
    return ", ".join(f"{name} {i}" for name, i in zip(axes, reversed(parts), strict=True))


def _where(true: Indices, wrong: torch.Tensor, axes: tuple[str, ...]) -> str:
    """' (only block 3)' where an axis has one value in all wrong readings and others in right ones."""
    parts = []
    for axis, name in enumerate(axes):
        values = torch.unique(true[wrong, axis])
        if len(values) == 1 and len(torch.unique(true[:, axis])) > 1:
            parts.append(f"{name} {int(values[0])}")
    return f" (only {', '.join(parts)})" if parts else ""
