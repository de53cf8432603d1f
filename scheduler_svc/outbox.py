"""What gathered for one executor while the last write was under way."""

from collections import deque

from headway.v1 import fleet_pb2 as fleet


class Outbox:
    """First the welcome, then orders. The session adds, its writer takes.

    What is added goes into the last message that waits, in place: nothing is copied when it is
    taken, and a revoke cannot overtake its grant. Grants are cut at ``max_bytes``, but never
    below one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.has_welcomed = False
        self.welcome: fleet.ExecutorWelcome | None = None
        self._max_bytes = max_bytes
        self._waiting: deque[fleet.AttachResponse] = deque()
        # of the grants in the last one
        self._num_bytes = 0

    @property
    def num_answers(self) -> int:
        """Acknowledgements and revokes that wait."""
        return sum(
            len(waiting.orders.acknowledged) + len(waiting.orders.revokes)
            for waiting in self._waiting
        )

    def orders(self) -> fleet.ExecutorOrders:
        """What to add acknowledgements and revokes to."""
        return self._waiting[-1].orders if self._waiting else self._open()

    def orders_for_grant(self, num_bytes: int) -> fleet.ExecutorOrders:
        """What to add one grant of this size to."""
        orders = self.orders()
        if orders.grants and self._num_bytes + num_bytes > self._max_bytes:
            orders = self._open()
        self._num_bytes += num_bytes
        return orders

    def take(self) -> fleet.AttachResponse | None:
        """The next message."""
        if self.welcome is not None:
            welcome, self.welcome = self.welcome, None
            self.has_welcomed = True
            return fleet.AttachResponse(welcome=welcome)
        return self._waiting.popleft() if self._waiting else None

    def _open(self) -> fleet.ExecutorOrders:
        self._num_bytes = 0
        self._waiting.append(fleet.AttachResponse())
        return self._waiting[-1].orders
