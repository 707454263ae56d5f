"""Numbers as a person reads them."""

import math
from collections.abc import Mapping

_DECIMALS = 3  # at least
_MAX_DECIMALS = 8  # beyond, powers of ten
_ROUNDING = 1e-12  # an error that is smaller, as a share of the mean, is none


def with_error(value: Mapping[str, float | None], sign: str = "") -> str:
    """
    A mean and its standard error as text, with at least two digits of the error that are not zero.

    Args:
        value: `mean` and `standard_error`, as far as they are known.
        sign: `"+"` shows the sign of a positive mean.
    """
    mean, error = value["mean"], value.get("standard_error")
    if mean is None:
        return "unknown"
    smallest = error if error and error > _ROUNDING * abs(mean) else abs(mean)
    has_digits = 0 < smallest < math.inf  # a divergence may be NaN, or infinite
    decimals = max(_DECIMALS, 1 - math.floor(math.log10(smallest))) if has_digits else _DECIMALS
    form = f".{decimals}f" if decimals <= _MAX_DECIMALS else ".1e"
    return f"{mean:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")
