"""Bytes that are fetched ahead are given out once."""

import os

import pytest

from scheduler_svc.entropy import Entropy


def test_no_byte_is_given_out_twice_and_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[bytes] = []

    def urandom(num_bytes: int) -> bytes:
        fetched.append(bytes([len(fetched)]) * num_bytes)
        return fetched[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    reserve = Entropy()
    taken = [reserve.take(18 if number % 2 else 8) for number in range(2_000)]
    assert [len(one) for one in taken] == [18 if number % 2 else 8 for number in range(2_000)]
    for number, whole in enumerate(fetched[:-1]):
        given = [one for one in taken if one[0] == number]
        assert all(len(set(one)) == 1 for one in given), "no piece is of two fetches"
        assert len(whole) - 18 < sum(map(len, given)) <= len(whole)
