# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention's delta rules on pentad's kernels, see `ops` and `modules`.

`__version__` is that of the interface. What is absent is absent, so that programs which ask for it
take their own way without it.
"""

__version__ = "0.6.0+pentad"
