"""How many of each name: a plain dictionary, since a Counter costs several times as much here."""


def change(counts: dict[str, int], name: str, by: int) -> None:
    """Count up or down; a name that comes to zero is forgotten."""
    num = counts.get(name, 0) + by
    if num:
        counts[name] = num
    else:
        del counts[name]
