"""The quantity by which a task judges networks: its name, unit and direction; values in words.

Data only, for reports, pages and budgets. How it is measured is in `metrics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PERCENT = "%"


@dataclass(frozen=True)
class Quantity:
    """A metric as reports show it.

    Attributes:
        name: such as "error", "RMSE" or "mIoU".
        unit: "%" for percent, "" where it has none, or any other.
        higher_is_better: its direction.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = False

    def text(self, value: float) -> str:
        """A value with its unit.

        >>> Quantity("error", "%").text(1.2345), Quantity("RMSE").text(1.23456)
        ('1.23 %', '1.235')
        """
        if self.unit == PERCENT:
            return f"{value:.2f} %"
        return f"{value:.4g} {self.unit}".rstrip()

    def change(self, before: float, after: float) -> str:
        """The difference of two values, signed, without its unit.

        >>> Quantity("error", "%").change(2.0, 1.5), Quantity("RMSE").change(1.0, 1.234567)
        ('-0.50', '+0.2346')
        """
        return f"{after - before:+.2f}" if self.unit == PERCENT else f"{after - before:+.4g}"

    def drop(self, dense: float, value: float) -> float:
        """How much worse a value is than that of the dense network; negative if it is better."""
        return dense - value if self.higher_is_better else value - dense

    def badness(self, value: float) -> float:
        """The value with the sign that makes less of it better."""
        return -value if self.higher_is_better else value

    def point(self, dense: float) -> float:
        """The unit of small tolerances: a percentage point, or 1 % of the dense network's value."""
        return 1.0 if self.unit == PERCENT else abs(dense) / 100

    def amount(self, difference: float) -> str:
        """A difference with its unit: '0.5 points' where values are percent, else '0.5'.

        >>> Quantity("error", "%").amount(1.0), Quantity("RMSE", "kg").amount(0.25)
        ('1 point', '0.25 kg')
        """
        number = f"{difference:.3g}"
        if self.unit == PERCENT:
            return f"{number} point" if number in ("1", "-1") else f"{number} points"
        return f"{number} {self.unit}".rstrip()


def amount(value: float | str, name: str) -> float | str:
    """A number from 0, or a text such as "5%", which is relative to another.

    Raises:
        ValueError: neither.
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} is {value!r}, expected a number such as 0.5, or 5%")
    return f"{number:g}%" if text.endswith("%") else number


def absolute(value: float | str, dense: float) -> float:
    """An `amount` in the metric's unit, where that of the dense network has this value."""
    if isinstance(value, str):
        return float(value.removesuffix("%")) / 100 * abs(dense)
    return value


ERROR = Quantity("error", PERCENT)
"""The metric of classification: percent of the examples with a wrong label."""
