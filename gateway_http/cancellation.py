"""Who a CancelledError is meant for.

grpc.aio raises it also for a call whose channel was closed, where nobody asked the task to end.
"""

import asyncio


def is_cancelled() -> bool:
    """Whether somebody wants the current task to end."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
