"""Signatures of messages, and the setting that has the keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallq import ClientSettings, ConfigurationError
from recallq.signing import Signer

OLD, NEW = "o" * 32, "n" * 32
PARTS = ("recallq.add", "id", "recallq.live", "{}")


def test_each_part_counts() -> None:
    signer = Signer([OLD])
    signature = signer.sign(*PARTS)
    assert signer.is_signed(signature, *PARTS)
    for place in range(len(PARTS)):
        parts = list(PARTS)
        parts[place] += " "
        assert not signer.is_signed(signature, *parts)


def test_no_part_passes_for_another() -> None:
    signer = Signer([OLD])
    assert signer.sign("a", "bc", "q", "p") != signer.sign("ab", "c", "q", "p")


def test_keys_are_exchanged_one_after_the_other() -> None:
    before, both, after = Signer([OLD]), Signer([NEW, OLD]), Signer([NEW])
    assert both.is_signed(before.sign(*PARTS), *PARTS)
    assert after.is_signed(both.sign(*PARTS), *PARTS)
    assert not after.is_signed(before.sign(*PARTS), *PARTS)


@given(st.none() | st.integers() | st.text() | st.lists(st.text()))
def test_anything_else_is_no_signature(signature: object) -> None:
    assert not Signer([OLD]).is_signed(signature, *PARTS)


def test_the_setting() -> None:
    assert Signer.of("") is None
    assert Signer.of(f" {NEW} ,{OLD},") is not None
    settings = ClientSettings.load(signing_keys=f"{NEW},{OLD}")
    assert NEW not in repr(settings)
    with pytest.raises(ConfigurationError, match=r"RECALLQ_SIGNING_KEYS.*openssl") as caught:
        ClientSettings.load(signing_keys="guessable")
    assert "guessable" not in str(caught.value)


@pytest.mark.parametrize("setting", [" ", ",", "\n", " , "])
def test_signatures_are_not_off_by_mistake(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=r"RECALLQ_SIGNING_KEYS.*holds no key"):
        ClientSettings.load(signing_keys=setting)
