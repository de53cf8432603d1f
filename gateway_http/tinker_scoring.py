"""Scores of prompts and of alternatives between Tinker's tensors and the scheduler's lists.

Tinker asks for named tokens in a tensor, dense or in compressed sparse rows (CSR), in which -1 is
an empty cell, and wants the answer in the same shape. The scheduler knows neither: it is sent the
named tokens alone, and the shape travels in the request's note and comes back with the result.
"""

import math
import sys
import zlib
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway_http.http_errors import invalid
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.tinker.v1 import sample_pb2
from headway.v1 import generation_pb2

_FIELD = "target_prompt_logprobs"
_NO_TOKEN = 0
_NO_LOGPROB = -99_999.0
_MAX_NOTE_BYTES = 1 << 26  # unpacked; ours are smaller by the limit on a request's body

_Cell = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
_Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class TargetTensor(msgspec.Struct, frozen=True):
    """int64 token ids, [prompt length - 1, K]: row i is scored at prompt position i + 1."""

    data: list[_Cell]
    dtype: Literal["int64"]
    shape: tuple[_Index, _Index] | None = None
    sparse_crow_indices: list[_Index] | None = None
    sparse_col_indices: list[_Index] | None = None


class _Layout(msgspec.Struct, frozen=True):
    """Where the answers go: ``named`` are the numbers of the cells in ``data`` that ask (int32)."""

    shape: tuple[int, int]
    num_cells: int
    named: bytes
    crow_indices: bytes | None = None  # int64
    col_indices: bytes | None = None  # int64


def set_targets(
    request: generation_pb2.GenerationRequest, tensor: TargetTensor, num_prompt_tokens: int
) -> None:
    """Ask for the named tokens, and note where their answers belong. Raises INVALID_REQUEST."""
    num_rows = num_prompt_tokens - 1
    if tensor.shape is None or tensor.shape[0] != num_rows:
        raise invalid(f"{_FIELD}.shape must be [{num_rows}, K] for this prompt.", f"{_FIELD}.shape")
    crow = _row_starts(tensor, num_rows, tensor.shape[1])
    named = array("i", (at for at, token_id in enumerate(tensor.data) if token_id >= 0))
    if not named:
        raise invalid(f"{_FIELD} names no token.", _FIELD)
    offsets = [0]
    at = 0
    for end in crow[1:]:
        while at < len(named) and named[at] < end:
            at += 1
        offsets.append(at)
    scoring = request.prompt_scoring
    scoring.target_offsets.extend(offsets)
    scoring.target_token_ids.extend(tensor.data[cell] for cell in named)
    is_sparse = tensor.sparse_crow_indices is not None
    layout = _Layout(
        tensor.shape,
        len(tensor.data),
        named.tobytes(),
        array("q", crow).tobytes() if is_sparse else None,
        array("q", tensor.sparse_col_indices or ()).tobytes() if is_sparse else None,
    )
    request.note = zlib.compress(msgspec.msgpack.encode(layout))


def _row_starts(tensor: TargetTensor, num_rows: int, num_columns: int) -> Sequence[int]:
    """For each row the number of its first cell in ``data``, and the number of all cells."""
    crow, columns = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if crow is None and columns is None:
        if len(tensor.data) != num_rows * num_columns:
            raise invalid(f"{_FIELD}.data does not fill its shape.", f"{_FIELD}.data")
        return range(0, len(tensor.data) + 1, num_columns) if num_columns else [0] * (num_rows + 1)
    if crow is None or columns is None:
        message = f"{_FIELD} needs both sparse_crow_indices and sparse_col_indices, or neither."
        raise invalid(message, f"{_FIELD}.sparse_crow_indices")
    is_rising = all(a <= b for a, b in pairwise(crow))
    if len(crow) != num_rows + 1 or crow[0] != 0 or crow[-1] != len(tensor.data) or not is_rising:
        message = f"{_FIELD}.sparse_crow_indices does not cut data into {num_rows} rows."
        raise invalid(message, f"{_FIELD}.sparse_crow_indices")
    if len(columns) != len(tensor.data) or any(column >= num_columns for column in columns):
        message = f"{_FIELD}.sparse_col_indices must name a column for each value."
        raise invalid(message, f"{_FIELD}.sparse_col_indices")
    return crow


def target_logprobs(note: bytes, scores: generation_pb2.PromptScores) -> sample_pb2.Tensor:
    """The answers in the shape of the question; 0 in cells that asked for nothing."""
    layout = _unpack(note)
    values = array("f", bytes(4 * layout.num_cells))
    named = array("i", layout.named)
    if len(named) != len(scores.target_logprob):
        raise HeadwayError(Reason.INTERNAL, "The scores do not fit the request.")
    for cell, logprob in zip(named, scores.target_logprob, strict=True):
        values[cell] = logprob
    tensor = sample_pb2.Tensor(dtype=sample_pb2.ELEMENT_TYPE_FLOAT32, shape=layout.shape)
    if layout.crow_indices is None or layout.col_indices is None:
        tensor.dense = _little(values)
    else:
        tensor.sparse_csr.values = _little(values)
        tensor.sparse_csr.crow_indices = _little(array("q", layout.crow_indices))
        tensor.sparse_csr.col_indices = _little(array("q", layout.col_indices))
    return tensor


def _unpack(note: bytes) -> _Layout:
    unpacked = zlib.decompressobj().decompress(note, _MAX_NOTE_BYTES)
    return msgspec.msgpack.decode(unpacked, type=_Layout)


def alternatives(
    scores: generation_pb2.PromptScores, num_prompt_tokens: int
) -> sample_pb2.PromptAltTokens:
    """Drawn tokens, [prompt length - 1, k]."""
    num_rows = num_prompt_tokens - 1
    shape = [num_rows, len(scores.alternative_token_id) // num_rows]
    return sample_pb2.PromptAltTokens(
        tokens=sample_pb2.Tensor(
            dense=int32(scores.alternative_token_id),
            dtype=sample_pb2.ELEMENT_TYPE_INT32,
            shape=shape,
        ),
        logprobs=sample_pb2.Tensor(
            dense=float32(scores.alternative_logprob),
            dtype=sample_pb2.ELEMENT_TYPE_FLOAT32,
            shape=shape,
        ),
    )


def sampled_table(sample: generation_pb2.SampleResult) -> sample_pb2.TopkLogprobs:
    """The alternatives of a sample's tokens, one row for each."""
    num_rows = len(sample.token_ids)
    return sample_pb2.TopkLogprobs(
        token_ids=int32(sample.top_token_ids),
        logprobs=float32(sample.top_logprobs),
        k=len(sample.top_token_ids) // num_rows if num_rows else 0,
        length=num_rows,
    )


def prompt_table(
    scores: generation_pb2.PromptScores, num_prompt_tokens: int
) -> sample_pb2.TopkLogprobs:
    """The likeliest tokens at each prompt position; rows that were not scored are empty."""
    k = _prompt_k(scores, num_prompt_tokens)
    num_empty = num_prompt_tokens * k - len(scores.top_token_id)
    return sample_pb2.TopkLogprobs(
        token_ids=int32([_NO_TOKEN] * num_empty) + int32(scores.top_token_id),
        logprobs=float32([_NO_LOGPROB] * num_empty) + float32(scores.top_logprob),
        k=k,
        length=num_prompt_tokens,
    )


def prompt_rows(scores: generation_pb2.PromptScores, num_prompt_tokens: int) -> list[Any]:
    """As ``prompt_table``, in JSON: a list of [token id, logprob] for each position, or null."""
    k = _prompt_k(scores, num_prompt_tokens)
    cells = [list(cell) for cell in zip(scores.top_token_id, scores.top_logprob, strict=True)]
    rows: list[Any] = [cells[start : start + k] for start in range(0, len(cells), k)]
    return [None] * (num_prompt_tokens - len(rows)) + rows


def prompt_logprobs(scores: generation_pb2.PromptScores) -> list[float | None]:
    """In JSON: null where there is none."""
    return [None if math.isnan(logprob) else logprob for logprob in scores.logprob]


def _prompt_k(scores: generation_pb2.PromptScores, num_prompt_tokens: int) -> int:
    """How many tokens a row has. Rows are there where logprobs are, or for all but the first."""
    num_rows = num_prompt_tokens - 1
    if scores.logprob:
        num_rows = sum(not math.isnan(logprob) for logprob in scores.logprob)
    return len(scores.top_token_id) // num_rows if num_rows else 0


def int32(values: Sequence[int]) -> bytes:
    """As Tinker's arrays are: little-endian."""
    return _little(array("i", values))


def float32(values: Sequence[float]) -> bytes:
    """As Tinker's arrays are: little-endian."""
    return _little(array("f", values))


def _little(values: "array[Any]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
