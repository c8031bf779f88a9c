# SPDX-License-Identifier: Apache-2.0
"""What functions and indexes refuse, in one wording: op, argument, what came, what is accepted."""

import operator

from pentad._arrays import dtype_name

FLOATS = ("float32", "float16", "bfloat16", "float64")


def check_choice(op, name, value, choices):
    if value not in choices:
        raise ValueError(f"[{op}] {name} is {value!r}, expected one of {', '.join(choices)}")


def check_dtype(op, name, array, accepted):
    if dtype_name(array) not in accepted:
        raise TypeError(
            f"[{op}] {name} has dtype {dtype_name(array)}, expected {', '.join(accepted)}"
        )


def check_floats(op, **arrays):
    for name, array in arrays.items():
        check_dtype(op, name, array, FLOATS)


def check_counts(op, name, values, lowest=0):
    """`values` as a list."""
    return [check_count(op, name, value, lowest) for value in check_sequence(op, name, values)]


def check_sequence(op, name, values):
    """`values` as a list."""
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"[{op}] {name} is {values!r}, expected a sequence of integers") from None


def check_count(op, name, value, lowest=0):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"[{op}] {name} is {value!r}, expected an integer") from None
    if value < lowest:
        raise ValueError(f"[{op}] {name} is {value}, expected at least {lowest}")
    return value
