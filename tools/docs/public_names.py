# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe: a family's function stands under its public name.

`pentad.scan.ssd` is a function for who imports it, but also the file that defines it; griffe, which
reads files and imports nothing, would take the file.
"""

import griffe


class PublicNames(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for family in pkg.modules.values():
            for name in family.exports or ():
                file = family.members.get(str(name))
                if (
                    file is not None
                    and not file.is_alias
                    and file.is_module
                    and str(name) in file.members
                ):
                    family.members[str(name)] = griffe.Alias(
                        str(name), file.members[str(name)], parent=family
                    )
