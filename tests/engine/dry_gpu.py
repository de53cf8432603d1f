"""A GPU without a GPU: the engine's CUDA path runs, and nothing is computed.

Tensors are torch's fakes: they have a device, a shape and a type, so an operation that mixes
devices, types or shapes raises as it would on a GPU, and one that asks for a value on the host
raises too. Streams, events and graphs are stand-ins that write down what is done with them. Kernels
are compiled for a Hopper GPU with just the arguments that they are launched with, and not run.

What it cannot say is what comes out: every token drawn is number 0.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from executor_svc.torch_engine import engine, exactness, rank, runner, staging
from executor_svc.torch_engine.host_weights import HostBlock
from executor_svc.torch_engine.loader import Checkpoint, Read

NUM_PROCESSORS = 132
NUM_BYTES = 80 << 30
MAX_SHARED_BYTES = 227 << 10  # of a block of threads, on a Hopper GPU


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel of ours, with what was compiled for it."""

    name: str
    grid: tuple[int, ...]
    compiled: Any


@dataclass(slots=True)
class DryGpu:
    """What has happened so far."""

    launches: list[Launch] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)  # of torch's on the device, views left out
    # Where the host waited for the device, or would have: torch's word for what it asked for.
    waits: list[str] = field(default_factory=list)
    num_captures: int = 0
    num_replays: int = 0
    is_capturing: bool = False
    largest_bytes: int = 0  # of a tensor made on the device

    def clear(self) -> None:
        """Forget launches, operations, waits and replays."""
        self.launches.clear()
        self.operations.clear()
        self.waits.clear()
        self.num_replays = 0

    @property
    def kernels(self) -> dict[str, Any]:
        """Each thing that was compiled, by a name that says what for."""
        return {f"{one.name} {one.compiled.hash[:8]}": one.compiled for one in self.launches}

    def count(self, name: str) -> int:
        """How often a kernel was launched."""
        return sum(one.name == name for one in self.launches)


@contextmanager
def dry_gpu(
    patch: pytest.MonkeyPatch, *, capability: int = 90, has_answers: bool = False
) -> Iterator[DryGpu]:
    """Inside, ``cuda:0`` is a device with nothing on it.

    Who asks it for a value gets an error, or, if it has answers, 0.
    """
    gpu = DryGpu()
    _stand_in_for_cuda(patch, gpu)
    _stand_in_for_pinned_memory(patch)
    _stand_in_for_launches(patch, gpu, capability)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fakes_of_numbers(patch, fakes)
    with _device_guard(), fakes, _Watch(gpu, has_answers=has_answers):
        yield gpu


class _Watch(TorchDispatchMode):
    """Looks at every operation of torch beside its fake."""

    def __init__(self, gpu: DryGpu, *, has_answers: bool) -> None:
        super().__init__()
        self._gpu, self._has_answers = gpu, has_answers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket).removeprefix("aten.")
        if self._has_answers and name in _ANSWERS:
            self._wait(name)
            return _ANSWERS[name]
        out = func(*args, **kwargs)
        made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if _is_tensor(x)]
        sources = [x for x in args if _is_tensor(x)]
        # Its word for a copy to elsewhere says that it may be a view, of what is there already.
        is_view = func.is_view and name != "to"
        if made and not is_view and any(x.is_cuda for x in made + sources):
            self._gpu.largest_bytes = max(
                self._gpu.largest_bytes, *(x.numel() * x.element_size() for x in made)
            )
            if not name.startswith(("empty", "new_empty", "detach")):
                self._gpu.operations.append(name)
            self._look_for_waits(name, args, kwargs, made[0])
        return out

    def _look_for_waits(self, name: str, args: Any, kwargs: Any, made: Tensor) -> None:
        if name in ("to", "_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.is_cuda == made.is_cuda or source.dim() == 0:
                return
            assert not self._gpu.is_capturing, f"a graph captures a copy of {source.shape}"
            is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
            if not is_asynchronous or (made.is_cuda and not _is_pinned(source)):
                self._wait("copy to the device" if made.is_cuda else "copy from the device")
        elif name.startswith("index") and isinstance(args[1], list | tuple):
            for index in args[1]:
                if index is not None and index.dtype is torch.bool:
                    self._wait("mask")  # how many it keeps is asked
                elif index is not None and not index.is_cuda:
                    self._wait("copy to the device")

    def _wait(self, what: str) -> None:
        assert not self._gpu.is_capturing, f"a graph captures a wait: {what}"
        self._gpu.waits.append(what)


# What the host is told that asks, where it may.
_ANSWERS = {"_local_scalar_dense": 0, "item": 0, "is_nonzero": False, "equal": True}


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_pinned(x: Tensor) -> bool:
    return x.untyped_storage()._cdata in _pinned_storages


_pinned_storages: set[int] = set()


class _Event:
    def __init__(self, **_: Any) -> None:
        self.is_recorded = False

    def record(self, *_: Any) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        assert self.is_recorded


def _stand_in_for_cuda(patch: pytest.MonkeyPatch, gpu: DryGpu) -> None:
    current = SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def on(_: Any) -> Iterator[None]:
        yield

    class Graph:
        def replay(self) -> None:
            assert not gpu.is_capturing
            gpu.num_replays += 1

    @contextmanager
    def graph(_: Graph, *, pool: object) -> Iterator[None]:
        assert pool is handle
        gpu.is_capturing = True
        yield
        gpu.is_capturing = False
        gpu.num_captures += 1

    handle = object()
    properties = SimpleNamespace(
        multi_processor_count=NUM_PROCESSORS, total_memory=NUM_BYTES, name="dry"
    )
    for name, value in {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (NUM_BYTES - (1 << 30), NUM_BYTES),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "dry",
        "Event": _Event,
        "Stream": lambda **_: current,
        "current_stream": lambda *_: current,
        "stream": on,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: handle,
    }.items():
        patch.setattr(torch.cuda, name, value)
    # What it sets is the whole process's.
    for module in (engine, exactness, rank):
        patch.setattr(module, "prepare", lambda _: None)


@contextmanager
def _device_guard() -> Iterator[None]:
    """torch switches to a tensor's device to slice it; without CUDA it knows no such switch.

    That of the device "meta" does nothing, and serves; there is no other way in than its table.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    kept = table[cuda]
    table[cuda] = kept or table[meta]
    yield
    table[cuda] = kept


def _stand_in_for_pinned_memory(patch: pytest.MonkeyPatch) -> None:
    kept = staging.PinnedSet

    def allocate(num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    patch.setattr(staging, "PinnedSet", lambda: kept(allocate))
    hold = kept.hold

    def held(self: Any, tensor: Tensor) -> Tensor:
        pinned = hold(self, tensor)
        _pinned_storages.add(pinned.untyped_storage()._cdata)
        return pinned

    patch.setattr(kept, "hold", held)

    def lock_pages(self: HostBlock) -> None:
        _pinned_storages.add(self._memory.untyped_storage()._cdata)

    patch.setattr(HostBlock, "lock_pages", lock_pages)

    def to_host(x: Tensor) -> Any:
        copy = x.to("cpu", non_blocking=True, copy=True)
        return copy.numpy()

    patch.setattr(runner, "_to_host", to_host)

    def numpy(self: Tensor) -> np.ndarray:
        assert not self.is_cuda
        return np.zeros(self.shape, dtype=str(self.dtype)[6:])

    patch.setattr(torch.Tensor, "numpy", numpy)


def _make_fakes_of_numbers(patch: pytest.MonkeyPatch, fakes: FakeTensorMode) -> None:
    """Of arrays, and of files, which are read as ever."""
    kept, from_numpy = Checkpoint.open, torch.from_numpy
    patch.setattr(torch, "from_numpy", lambda array: fakes.from_tensor(from_numpy(array)))

    @contextmanager
    def opened(self: Checkpoint) -> Iterator[Read]:
        with kept(self) as read:

            def read_outside(name: str, part: tuple[slice, ...] = ()) -> Tensor:
                with _disable_current_modes():
                    tensor = read(name, part)
                return fakes.from_tensor(tensor)

            yield read_outside

    patch.setattr(Checkpoint, "open", opened)


class _Driver:
    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _Pointer:
    """What Triton looks at in a tensor: its type, and whether its address is a multiple of 16."""

    def __init__(self, tensor: Tensor) -> None:
        assert isinstance(tensor, FakeTensor)
        assert tensor.is_cuda, f"a kernel gets a tensor on {tensor.device}"
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def _stand_in_for_launches(patch: pytest.MonkeyPatch, gpu: DryGpu, capability: int) -> None:
    compile_for: Callable[..., Any] = JITFunction.run
    patch.setattr(driver, "_active", _Driver(capability))

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(0 < n < 1 << (31 if i == 0 else 16) for i, n in enumerate(grid)), grid
        args = tuple(_Pointer(x) if isinstance(x, Tensor) else x for x in args)
        for x in (*args, *kwargs.values()):
            assert type(x) in (_Pointer, int, float, bool), f"{self.__name__} gets a {type(x)}"
        compiled = compile_for(self, *args, grid=grid, warmup=True, **kwargs)
        gpu.launches.append(Launch(self.__name__, tuple(grid), compiled))
        return compiled

    patch.setattr(JITFunction, "run", run)
