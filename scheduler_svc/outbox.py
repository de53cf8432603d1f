"""What gathered for one executor while the last write was under way."""

from headway.v1 import fleet_pb2 as fleet


class Outbox:
    """First the welcome, then orders. The session appends, its writer takes."""

    def __init__(self) -> None:
        self.has_welcomed = False
        self.welcome: fleet.ExecutorWelcome | None = None
        self.grants: list[fleet.Grant] = []
        self.acknowledged: list[fleet.LeaseRef] = []
        self.revokes: list[fleet.LeaseRef] = []
        self.loads: list[fleet.LoadModel] = []

    def take(self, max_bytes: int) -> fleet.AttachResponse | None:
        """The next message; its grants are cut at ``max_bytes``, but never below one."""
        if self.welcome is not None:
            welcome, self.welcome = self.welcome, None
            self.has_welcomed = True
            return fleet.AttachResponse(welcome=welcome)
        if not (self.grants or self.acknowledged or self.revokes or self.loads):
            return None
        num_grants, num_bytes = 0, 0
        for grant in self.grants:
            num_bytes += grant.ByteSize()
            if num_grants and num_bytes > max_bytes:
                break
            num_grants += 1
        orders = fleet.ExecutorOrders(grants=self.grants[:num_grants])
        del self.grants[:num_grants]
        if not self.grants:  # neither a revoke nor a load must overtake a grant before it
            orders.acknowledged.extend(self.acknowledged)
            orders.revokes.extend(self.revokes)
            orders.loads.extend(self.loads)
            self.acknowledged, self.revokes, self.loads = [], [], []
        return fleet.AttachResponse(orders=orders)
