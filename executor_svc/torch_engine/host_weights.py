"""A model's weights in host memory, where they stay while other models have the device.

On a CPU they are the model itself. For a GPU they lie in one piece of page-locked memory, from
which they are copied at the full speed of the bus. torch's own pinned memory would round each
tensor up to a power of two, and keep for itself what a model gives back.
"""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.known_model import KnownModel
from executor_svc.torch_engine.models.collectives import Collectives
from executor_svc.torch_engine.models.decoder import Decoder
from executor_svc.torch_engine.models.sharding import Shard
from executor_svc.torch_engine.models.tensors import Shape, Take, tensor_shapes

_ALIGNMENT = 256  # bytes


class WeightSource:
    """Makes decoders of this rank's part of a model."""

    def __init__(
        self,
        model: KnownModel,
        device: torch.device,
        config: EngineConfig,
        collectives: Collectives,
    ) -> None:
        self.model, self.device = model, device
        self._quantization, self._collectives = config.quantization, collectives
        self._shard = Shard(collectives.rank, collectives.size)
        self._shapes = tensor_shapes(model.whole_spec)

    def from_files(self) -> Decoder:
        """A decoder whose tensors go straight from the files to the device."""
        with self.open() as read:
            # A copy even where it is in place already: see loader.py for what happens to files.
            return self.make(lambda name: read(name).to(self.device, copy=True))

    def make(self, take: Take) -> Decoder:
        """A decoder of the tensors that ``take`` gives in whatever float dtype."""
        spec = self.model.spec
        decoder = Decoder(
            spec,
            lambda name: take(name).to(spec.dtype),
            self.device,
            collectives=self._collectives,
            quantization=self._quantization,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # it is here, and the time it took is told
        return decoder

    @contextmanager
    def open(self) -> Iterator[Take]:
        """Gives a function that reads the rank's part of a tensor."""
        with self.model.checkpoint.open() as read:
            yield lambda name: read(name, self._shard.part(name, self._shapes[name]))

    @property
    def part_shapes(self) -> dict[str, Shape]:
        """Of the rank's part of each tensor."""
        return {name: self._shard.part_shape(name, shape) for name, shape in self._shapes.items()}


class HostWeights:
    """A model's weights in host memory; building it reads the files."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._decoder: Decoder | None = None
        if source.device.type == "cpu":
            self._decoder = source.from_files()
            return
        self._block = HostBlock(source.part_shapes, source.model.spec.dtype)
        self._block.lock_pages()
        with source.open() as read:
            for name, tensor in self._block.tensors.items():
                tensor.copy_(read(name))

    def on_device(self) -> Decoder:
        """The model, ready to run."""
        if self._decoder is not None:
            return self._decoder
        tensors, device = self._block.tensors, self._source.device
        return self._source.make(lambda name: tensors[name].to(device, non_blocking=True))


class HostBlock:
    """Tensors of one dtype in one piece of host memory, not filled yet."""

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        starts, end = {}, 0
        for name, shape in shapes.items():
            starts[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty(end, dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            num_bytes = math.prod(shape) * dtype.itemsize
            piece = self._memory[starts[name] : starts[name] + num_bytes]
            self.tensors[name] = piece.view(dtype).view(shape)

    def lock_pages(self) -> None:
        """Let a GPU copy from it directly, until the block is dropped."""
        cudart = torch.cuda.cudart()
        address = self._memory.data_ptr()
        status = cudart.cudaHostRegister(address, self._memory.nbytes, 0)
        torch.cuda.check_error(int(status))
        weakref.finalize(self, cudart.cudaHostUnregister, address)
