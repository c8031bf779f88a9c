# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages that need another machine: their names and signatures, pentad's kernels.

``import pentad.compat.flash_attn`` works as it is; `install` makes them importable under the
peers' own names, for programs that cannot be changed.
"""

import importlib
import importlib.util
import pkgutil
import sys

# The name of a peer: the package that stands in for it.
_STAND_INS = {
    name: f"pentad.compat.{name}" for name in ("flash_attn", "mamba_ssm", "causal_conv1d", "fla")
}


def install() -> list[str]:
    """Register the stand-ins in ``sys.modules`` under the names of packages that are absent.

    A package that is installed, or already imported, stays as it is. A further call changes
    nothing. Call it before the programs that use them are imported: transformers, for one, looks
    for mamba_ssm, causal_conv1d and fla once, when a model's module is loaded.

    Returns
    -------
    list of str
        The names for which pentad stands in, now or since an earlier call.

    Examples
    --------
    >>> import pentad.compat
    >>> pentad.compat.install()  # doctest: +SKIP
    ['flash_attn', 'mamba_ssm', 'causal_conv1d', 'fla']
    >>> from flash_attn import flash_attn_func  # doctest: +SKIP
    """
    names = []
    for name, stand_in in _STAND_INS.items():
        if name in sys.modules:
            ours = getattr(sys.modules[name], "__name__", None) == stand_in
        else:
            ours = importlib.util.find_spec(name) is None
            if ours:
                _register(name, stand_in)
        if ours:
            names.append(name)
    return names


def _register(name, stand_in):
    """The package and all of its submodules, so that ``import name.x`` finds the same objects."""
    package = importlib.import_module(stand_in)
    sys.modules[name] = package
    for module in pkgutil.walk_packages(package.__path__, stand_in + "."):
        sys.modules[name + module.name[len(stand_in) :]] = importlib.import_module(module.name)


__all__ = ["install"]
