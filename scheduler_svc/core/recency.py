"""Things in the order of their last use.

Rule: the longest unused is first. The list goes through the things themselves: a use moves one with
no lookup, and what is at hand can be taken out wherever it stands. What was taken out refers to
nothing, so that no cycle is left for the garbage collector.
"""


class Link:
    """A thing that can stand in one such list."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        # its neighbours; None while it stands nowhere
        self.newer: Link | None = None
        self.older: Link | None = None


class Recency:
    """A list of links, longest unused first."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        # stands between the newest and the oldest
        self._ends = Link()
        self._ends.newer = self._ends.older = self._ends

    @property
    def oldest(self) -> Link | None:
        """The one longest unused; None if there is none."""
        return None if self._ends.newer is self._ends else self._ends.newer

    def used(self, link: Link) -> None:
        """It is the newest now, whether it stood there before or not."""
        if self._ends.older is not link:
            if link.older is not None:
                self.remove(link)
            newest = self._ends.older
            assert newest is not None
            self.put_after(link, newest)

    def put_after(self, link: Link, older: Link) -> None:
        """Enter one that stands nowhere as if it had been used right after another."""
        newer = older.newer
        assert newer is not None
        link.older, link.newer = older, newer
        older.newer = newer.older = link

    def remove(self, link: Link) -> None:
        """Take one out that is there."""
        older, newer = link.older, link.newer
        assert older is not None
        assert newer is not None
        older.newer, newer.older = newer, older
        link.older = link.newer = None

    def all(self) -> list[Link]:
        """Everything, longest unused first."""
        found, link = list[Link](), self._ends.newer
        while link is not None and link is not self._ends:
            found.append(link)
            link = link.newer
        return found
