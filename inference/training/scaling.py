r"""What the numbers in a data tensor mean: levels, scaling, binarisation.

Quantised data are the numbers $k \in \{0, ..., K-1\}$ of $K$ levels (17 for the digits, 256 for 8-bit images). A scaling
says on which grid they reach the likelihood:

    "none"       k              the level numbers themselves, as floating point numbers
    "unit"       k / (K - 1)    in [0, 1]
    "symmetric"  (2k - (K - 1)) / (K - 1) = -1 + 2k / (K - 1)    in [-1, 1], the grid of a discretised normal
    "classes"    k              as int64, for a categorical likelihood

Continuous data have "none", the values as they are, or "standard", see `standardizing`. Numbers of things counted, 0, 1, 2, ...
with no largest, have "counts": as they are, as floating point numbers.

A likelihood is valid on one of them only, so nothing here guesses. Convention: **integers are level numbers, and are
converted; floating point numbers are already scaled as stated, and are checked.** Binarisation reads a grey value in
[0, 1] as a probability: $x \sim \mathrm{Bernoulli}(x)$, once ("fixed") or anew at each use ("dynamic"; Burda, Grosse
and Salakhutdinov, 2016, arXiv:1509.00519, say which they use because the bounds are not comparable across the two).

The one constraint: every refusal is a `DataError` that names the tensor, the first bad index and the remedy.
"""

import numpy as np
import torch
from torch import Tensor

SCALINGS = ("none", "unit", "symmetric", "classes", "standard", "counts")
BINARIZATIONS = ("none", "dynamic", "fixed")
COUNT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
RANGES = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "counts": (0.0, float("inf"))}


class DataError(ValueError):
    """Data that no training step should see; one sentence: the tensor, the index, what was expected and the remedy."""


def to_tensor(x: object, name: str = "train") -> Tensor:
    """A tensor of the same values; an ndarray's floating point numbers come in torch's default dtype.

    Args:
        x: a Tensor, returned as it is, or an ndarray of floating point numbers or integers.
        name: the tensor's name in messages.

    Returns:
        Tensor of the same shape; uint8 stays uint8, other integers become int64.

    Raises:
        DataError: for anything else: strings, objects, booleans, complex numbers, lists.

    >>> to_tensor(np.array([[1, 2]], dtype=np.int16)).dtype
    torch.int64
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise DataError(
            f"{name}: expected a torch Tensor or a numpy array of numbers, got {type(x).__name__}; convert it"
        )
    floating = x.dtype.kind == "f"
    if not floating and not (x.dtype.kind in "ui" and np.can_cast(x.dtype, np.int64)):
        raise DataError(
            f"{name}: expected floating point numbers or integers up to int64, got an array of dtype {x.dtype}; "
            "convert it to float32 or uint8"
        )
    if floating:
        default = torch.empty(0).numpy().dtype
        with np.errstate(over="ignore"):
            converted = np.array(x, dtype=default)
        lost = np.isfinite(x) & ~np.isfinite(converted)
        if lost.any():
            index = [int(i) for i in np.argwhere(lost)[0]]
            raise DataError(
                f"{name}: expected values that fit into {default}, got {x[tuple(index)]:g} at {index}; rescale the data"
            )
        return torch.from_numpy(converted)
    return torch.from_numpy(np.array(x, dtype=np.uint8 if x.dtype == np.uint8 else np.int64))


def check_data(x: object, name: str = "train", data_shape: tuple[int, ...] | None = None) -> None:
    """Refuses what cannot be data for any likelihood.

    Args:
        x: what should be a Tensor of shape [N, *data_shape] with N >= 1, floating point, or int64 for classes.
        name: the tensor's name in messages.
        data_shape: the shape of one datum, where it is known.

    Raises:
        DataError: not a tensor, no rows, another dtype, another shape, NaN or an infinity (with its first index).

    >>> try:
    ...     check_data(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
    ... except DataError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    train[1, 0] = nan: expected finite numbers; drop or repair that datum, ...
    """
    if not isinstance(x, Tensor):
        to_tensor(x, name)
        raise DataError(f"{name}: expected a torch Tensor, got {type(x).__name__}; pass it through torch.as_tensor")
    if x.dim() == 0 or x.numel() == 0:
        raise DataError(f"{name}: expected data [N, *data_shape] with N >= 1, got shape {list(x.shape)}; provide rows")
    if not (x.is_floating_point() or x.dtype == torch.int64):
        raise DataError(
            f"{name}: expected floating point numbers, or int64 for classes, got {x.dtype}; "
            "convert with .float() and state the scaling"
        )
    if data_shape is not None and tuple(x.shape[1:]) != tuple(data_shape):
        raise DataError(
            f"{name}: expected data of shape {list(data_shape)}, got {list(x.shape[1:])} "
            f"(the whole is {list(x.shape)}, first dimension the data); reshape the data or change the model"
        )
    _check_finite(x, name)


def grid(levels: int, scaling: str, dtype: torch.dtype | None = None) -> Tensor:
    """The values that quantised data take under a scaling, in increasing order.

    Args:
        levels: K >= 2, the number of levels.
        scaling: one of `SCALINGS`.
        dtype: of the result; default: torch's default dtype, int64 for "classes".

    Returns:
        Tensor [levels]; each value is the float64 one, rounded once.

    >>> grid(5, "symmetric").tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if scaling not in SCALINGS:
        raise DataError(f"scaling: expected one of {', '.join(SCALINGS)}, got {scaling!r}; state one of these")
    if scaling == "standard":
        raise DataError(
            f"scaling: 'standard' is for continuous data, got data of {levels} levels; use 'symmetric' or 'unit'"
        )
    if scaling == "counts":
        raise DataError(
            f"scaling: 'counts' is for numbers of things counted, got data of {levels} levels; use 'symmetric' or 'unit', or "
            "leave the number of levels out"
        )
    if levels < 2:
        raise DataError(f"levels: expected the number of grey levels or classes, at least 2, got {levels}")
    k = torch.arange(levels, dtype=torch.float64)
    if scaling == "classes":
        return k.long()
    values = {"none": k, "unit": k / (levels - 1), "symmetric": (2 * k - (levels - 1)) / (levels - 1)}[scaling]
    return values.to(dtype or torch.get_default_dtype())


def scale(x: Tensor, name: str, *, levels: int | None, scaling: str) -> Tensor:
    """The data on the grid of a scaling: integers are counts and are converted, floating point numbers are checked.

    Args:
        x: counts 0..levels-1 of an integer dtype, or floating point numbers that are already scaled; any shape.
        name: the tensor's name in messages.
        levels: the number of levels, or None for continuous data.
        scaling: one of `SCALINGS`.

    Returns:
        Tensor of x's shape: int64 for "classes", else floating point: x's own dtype, or for counts torch's default.

    Raises:
        DataError: another dtype, NaN or an infinity, counts outside 0..levels-1, counts above 1 without `levels`,
            values outside the range or off the grid.

    >>> scale(torch.tensor([0, 8, 16]), "train", levels=17, scaling="symmetric").tolist()
    [-1.0, 0.0, 1.0]
    """
    if x.is_floating_point():
        _check_finite(x, name)
        check_scaled(x, name, levels=levels, scaling=scaling)
        return x.long() if scaling == "classes" else x
    if x.dtype not in COUNT_DTYPES:
        raise DataError(
            f"{name}: expected floating point numbers or integer counts, got {x.dtype}; convert with .float()"
        )
    if levels is None:
        if scaling in ("none", "counts"):
            x = x.to(torch.get_default_dtype())
            check_scaled(x, name, levels=None, scaling=scaling)
            return x
        if bool((above := x > 1).any()):
            example = "levels=3 for three classes" if scaling == "classes" else "levels=256 for 8-bit pixels"
            raise DataError(
                f"{_entry(name, x, _first_index(above))}: integers are counts, and scaling {scaling!r} needs the "
                f"number of levels; state it, such as {example}"
            )
        levels = 2
    values = grid(levels, scaling).to(x.device)
    if bool((bad := (x < 0) | (x > levels - 1)).any()):
        raise DataError(
            f"{_entry(name, x, _first_index(bad))}: expected counts in 0..{levels - 1}; "
            f"correct levels={levels} or the data"
        )
    return values.index_select(0, x.flatten().int()).reshape(x.shape)


def counts(x: Tensor, levels: int, scaling: str) -> Tensor:
    """The level 0..levels-1 nearest to each value under a scaling: what :func:`scale` made values of, int64.

    >>> counts(torch.tensor([-1.0, 0.1, 1.0]), levels=17, scaling="symmetric").tolist()
    [0, 9, 16]
    """
    values = grid(levels, scaling, torch.float64)
    steps = (x.double() - values[0]) * ((levels - 1) / (values[-1] - values[0]))
    return steps.round().clamp(0, levels - 1).long()


def check_scaled(x: Tensor, name: str, *, levels: int | None, scaling: str) -> None:
    """Refuses floating point data, or int64 classes, that are not what their scaling and levels state.

    Args:
        x: Tensor of finite numbers, any shape.
        name: the tensor's name in messages.
        levels: the number of levels, or None for continuous data, of which only the range is checked.
        scaling: one of `SCALINGS`.

    Raises:
        DataError: outside the range, or off the grid by more than 1e-3 of a level and the dtype's own rounding.
    """
    if levels is None:
        if scaling == "classes":
            raise DataError(f"{name}: scaling 'classes' needs the number of classes; state levels")
        low, high = RANGES.get(scaling, (-float("inf"), float("inf")))
    else:
        values = grid(levels, scaling, torch.float64)
        low, high = float(values[0]), float(values[-1])
    if bool((bad := ~((x >= low) & (x <= high))).any()):
        raise DataError(
            f"{_entry(name, x, _first_index(bad))}: scaling {scaling!r} states values in [{low:g}, {high:g}]; "
            "scale the data so, or pass integer counts with their levels to have them scaled"
        )
    if scaling == "counts" and bool((bad := x != x.round()).any()):
        raise DataError(
            f"{_entry(name, x, _first_index(bad))}: scaling 'counts' states whole numbers; numbers that are no counts take "
            "'none' or 'standard'"
        )
    if levels is not None:
        k = x.sub(low).mul_((levels - 1) / (high - low))
        tolerance = 1e-3 + (levels - 1) * torch.finfo(k.dtype).eps
        if bool((off := k.sub_(k.round()).abs_() > tolerance).any()):
            raise DataError(
                f"{_entry(name, x, _first_index(off))}: not on the grid of {levels} levels from {low:g} to {high:g}; "
                "correct levels, or leave it out for continuous data"
            )


def refuse_unscaled(x: Tensor, name: str) -> None:
    """Refuses data that look like unscaled pixel counts, or classes, where nobody has stated their scaling.

    Args:
        x: Tensor, any shape and real dtype.
        name: the tensor's name in messages.

    Raises:
        DataError: if all are integers in 0..255 and one is above 1, or the dtype is an integer one and one is above 1.
    """
    if not bool((above := x > 1).any()):
        return
    whole = not x.is_floating_point() or bool(((x >= 0) & (x <= 255) & (x == x.round())).all())
    if whole:
        raise DataError(
            f"{_entry(name, x, _first_index(above))}: the data look like unscaled counts such as pixels in 0..255; "
            "state scaling='unit' or 'symmetric' and levels=256 to have integers scaled, scaling='none' to keep them, "
            "'standard' to standardise them, 'counts' if they are numbers of things, "
            "scaling='classes' and levels=K (or, for a categorical likelihood, pass "
            "x.long()) if they are K classes"
        )


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws $b \sim \mathrm{Bernoulli}(x)$ for grey values in [0, 1]; values that are 0 or 1 stay as they are.

    Args:
        x: Tensor of probabilities, any shape, floating point.
        generator: where the draw comes from; None: torch's default generator of x's device.

    Returns:
        Tensor of x's shape and dtype, each value exactly 0 or 1. The draw does not depend on x's dtype.

    Raises:
        DataError: a value outside [0, 1].

    >>> binarize(torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)).tolist()
    [0.0, 1.0]
    """
    check_scaled(x, "x", levels=None, scaling="unit")
    device = x.device if generator is None else generator.device
    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=device)  # in [0, 1), so 0 < 1 always
    return (uniform.to(x.device) < x).to(x.dtype)


def binarize_fixed(x: Tensor, *seed: int) -> Tensor:
    """One binarisation for good: the same values for the same seed, on every machine, and no global state is touched.

    Args:
        x: Tensor of probabilities in [0, 1].
        *seed: one integer, or several (split, index of the datum) that are mixed into one.

    Returns:
        Tensor of x's shape and dtype, values 0 and 1.
    """
    number = seed[0] if len(seed) == 1 else int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    return binarize(x, torch.Generator().manual_seed(number))


def _check_finite(x: Tensor, name: str) -> None:
    if x.is_floating_point() and not bool((finite := torch.isfinite(x)).all()):
        raise DataError(
            f"{_entry(name, x, _first_index(~finite))}: expected finite numbers; drop or repair that datum, or, for programs "
            "that mask what is missing, fill it in and say where in entries of their own"
        )


def _first_index(bad: Tensor) -> tuple[int, ...]:
    flat = int(bad.flatten().to(torch.uint8).argmax())
    return tuple(int(i) for i in np.unravel_index(flat, tuple(bad.shape)))


def _entry(name: str, x: Tensor, index: tuple[int, ...]) -> str:
    return f"{name}{list(index) if index else ''} = {x[index].item():.6g}"
