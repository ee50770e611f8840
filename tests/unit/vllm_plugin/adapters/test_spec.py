"""Requests share blocks only if their adapter, its content and their client salt are the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_plugin.adapters.spec import PrefixSpec

DIGESTS = st.sampled_from(["0" * 64, "0" * 63 + "1"])
NAMES = st.text("a:0", min_size=1, max_size=70)
CLIENT_SALTS = st.none() | st.text("a:0", min_size=1, max_size=140)


def salt(name: str, digest: str, client_salt: str | None) -> str:
    return PrefixSpec(name=name, source="", path="", num_virtual_tokens=1, digest=digest).salt(client_salt)


@given(st.tuples(NAMES, DIGESTS, CLIENT_SALTS), st.tuples(NAMES, DIGESTS, CLIENT_SALTS))
def test_salts_are_equal_only_for_equal_parts(one, other):
    assert (salt(*one) == salt(*other)) == (one == other)


def test_salts_differ_if_a_name_contains_a_digest():
    digest = "0" * 64
    assert salt("a", digest, f"{digest}:s") != salt(f"a:{digest}", digest, "s")
