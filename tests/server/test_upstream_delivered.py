"""What of the tokens drawn is delivered is the same however they come in pieces."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.server.upstream.delivered import Delivered

END = 2


def run(pieces: list[bytes], stop: list[str]) -> tuple[bytes, Any, list[bytes]]:
    delivered = Delivered(frozenset({END}), stop, lambda ids: bytes(ids).decode("utf-8", "replace"))
    given = [bytes(delivered.feed(tuple(each))) for each in pieces]
    rest, ended = delivered.end("length")
    return b"".join(given) + bytes(rest), ended, given


def expected(whole: bytes, stop: list[str]) -> bytes:
    answer = whole.split(bytes([END]))[0]
    at = min((at for each in stop if (at := answer.find(each.encode())) >= 0), default=len(answer))
    return answer[:at]


@given(
    st.lists(st.text("ab\x02", max_size=4).map(str.encode), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_it_ends_before_the_first_end_token_and_before_a_stop_text(pieces: list[bytes], stop: list[str]) -> None:
    got, ended, _ = run(pieces, stop)
    whole = b"".join(pieces)
    assert got == expected(whole, stop)
    answer = whole.split(bytes([END]))[0]
    assert ended == ("stop_text" if got != answer else "stop" if END in whole else "length")


def test_what_may_become_a_stop_text_waits() -> None:
    _, _, given = run([b"one S", b"TO", b"P two"], ["STOP"])
    assert given == [b"one ", b"", b""]


def test_without_stop_texts_nothing_waits() -> None:
    _, _, given = run([b"one S", b"TO"], [])
    assert given == [b"one S", b"TO"]


def test_a_character_in_two_tokens_is_not_torn_by_a_stop_text() -> None:
    got, ended, _ = run(["a🙂b".encode()[:3], "a🙂b".encode()[3:]], ["b"])
    assert got.decode() == "a🙂"
    assert ended == "stop_text"
