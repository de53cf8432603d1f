"""How a message of the core is made.

Rule: a message is a slotted dataclass, equal and hashable by value, that nobody changes. The type
checker sees to that, and not the class: a frozen one takes five times as long to make, and the
core makes several for each event.

To the type checker, and to mypyc (docs/adr/0011-compiled-core.md), ``message`` is ``dataclass``
itself, which is why it takes the same options. This file stays interpreted.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as message
else:
    from dataclasses import dataclass

    def message(*, frozen, slots):
        """A dataclass that only the type checker freezes."""
        assert frozen
        return dataclass(slots=slots, unsafe_hash=True)


__all__ = ["message"]
