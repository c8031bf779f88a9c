# SPDX-License-Identifier: Apache-2.0
"""What functions of this family refuse, besides what all do."""


def check_number(op, name, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"[{op}] {name} is {value!r}, expected a number") from None
