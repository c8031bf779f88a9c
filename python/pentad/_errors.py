# SPDX-License-Identifier: Apache-2.0
from pentad._C import DeviceError


class FormatError(ValueError):
    """A file that is not what it should be: truncated, altered, of another kind or version."""


__all__ = ["DeviceError", "FormatError"]
