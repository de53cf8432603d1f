"""Which layers attend through a sliding window, and how wide it is.

A token at position i sees the positions j with i - window < j <= i. The fields are those of
transformers 5, and each family looks at those that its model there looks at. What such a model
would pass over although it contradicts what it does, is refused with a ``ModelError``.
"""

from enum import Enum, auto

from executor_svc.torch_engine.fields import Fields

Windows = tuple[int | None, ...]  # of each layer, in tokens; None: it sees everything before it

_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULT_WINDOW = 4096  # where sliding_window is missing; null is no window
_DEFAULT_FULL_LAYERS = 28  # where max_window_layers is missing


class WindowRule(Enum):
    """What decides in a family which layers have a window."""

    NONE = auto()
    ALL = auto()  # sliding_window alone
    ALL_IF_USED = auto()  # use_sliding_window turns it on
    BY_LAYER = auto()  # likewise; then layer_types, else max_window_layers, the number without one


def layer_windows(config: Fields, rule: WindowRule, *, num_layers: int, num_tokens: int) -> Windows:
    """The window of each layer; one that ``num_tokens``, the context served, fits in is none."""
    window = _window(config, rule)
    kinds = _layer_types(config, num_layers)
    if rule is WindowRule.BY_LAYER and kinds is None:
        num_full = config.count("max_window_layers", _DEFAULT_FULL_LAYERS)
        slides = [window is not None and layer >= num_full for layer in range(num_layers)]
    elif rule is WindowRule.BY_LAYER and kinds is not None:
        slides = [kind == _SLIDING for kind in kinds]
        if any(slides) and window is None:
            name = "sliding_window" if config.flag("use_sliding_window") else "use_sliding_window"
            value = config.get(name)
            raise config.error(name, f"{value!r} contradicts {_SLIDING!r} in layer_types")
    else:
        slides = [window is not None] * num_layers
        kind = _FULL if window is None else _SLIDING
        if kinds is not None and set(kinds) != {kind}:
            raise config.error("layer_types", f"in this family every layer has {kind!r} here")
    if window is None or window >= num_tokens:
        return (None,) * num_layers
    return tuple(window if is_sliding else None for is_sliding in slides)


def first_seen(position: int, window: int | None) -> int:
    """The first position that a token at ``position`` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _window(config: Fields, rule: WindowRule) -> int | None:
    if rule is WindowRule.NONE:
        return None
    if rule is not WindowRule.ALL and not config.flag("use_sliding_window"):
        return None
    if config.values.get("sliding_window", _DEFAULT_WINDOW) is None:
        return None
    return config.positive("sliding_window", _DEFAULT_WINDOW)


def _layer_types(config: Fields, num_layers: int) -> list[str] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise config.error("layer_types", f"{kinds!r} is not a list")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise config.error("layer_types", f"{kind!r} is not {_FULL} or {_SLIDING}")
    if len(kinds) != num_layers:
        raise config.error("layer_types", f"has {len(kinds)} entries for {num_layers} layers")
    return kinds
