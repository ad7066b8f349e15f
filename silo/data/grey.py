"""Measured values (Hounsfield units, say) as eight bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

PERCENTILES = (0.5, 99.5)


def window(values: Values, centre: float, width: float, function: str = "LINEAR") -> Values:
    """The window of `width` around `centre` as [0, 1], by DICOM's functions (PS3.3 C.11.2.1.2)."""
    match function:
        case "SIGMOID":
            with np.errstate(over="ignore"):
                return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width)))
        case "LINEAR_EXACT":
            return (values - centre) / width + 0.5
        case _:
            return (values - (centre - 0.5)) / max(width - 1.0, 1e-9) + 0.5


def stretch(values: Values, all_values: Values) -> Values:
    """The 0.5th to the 99.5th percentile of `all_values` as [0, 1]: where nothing says what the
    values mean. Zeros where they are all one value."""
    low, high = np.percentile(all_values, PERCENTILES)
    if high <= low:
        low, high = float(all_values.min()), float(all_values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def eight_bits(values: Values) -> NDArray[np.uint8]:
    """255·values, rounded, clipped to [0, 255]."""
    return np.round(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)
