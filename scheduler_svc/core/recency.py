"""Things in the order of their last use.

Rule: the longest unused is first. The list goes through the things themselves: a use moves one with
no lookup, and what is at hand can be taken out wherever it stands.
"""


class Link:
    """A thing that can stand in one such list."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        # its neighbours; itself while it stands nowhere
        self.newer: Link = self
        self.older: Link = self


class Recency:
    """A list of links, longest unused first."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        # stands between the newest and the oldest
        self._ends = Link()

    @property
    def oldest(self) -> Link | None:
        """The one longest unused; None if there is none."""
        return None if self._ends.newer is self._ends else self._ends.newer

    def used(self, link: Link) -> None:
        """It is the newest now, whether it stood there before or not."""
        ends = self._ends
        if ends.older is not link:
            self.remove(link)
            self.put_after(link, ends.older)

    def put_after(self, link: Link, older: Link) -> None:
        """Enter one that stands nowhere as if it had been used right after another."""
        newer = older.newer
        link.older, link.newer = older, newer
        older.newer = newer.older = link

    def remove(self, link: Link) -> None:
        """Take one out, if it is there."""
        link.older.newer, link.newer.older = link.newer, link.older
        link.older = link.newer = link

    def all(self) -> list[Link]:
        """Everything, longest unused first."""
        found, link = [], self._ends.newer
        while link is not self._ends:
            found.append(link)
            link = link.newer
        return found
