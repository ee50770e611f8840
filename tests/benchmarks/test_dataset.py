"""Reading of the challenge's files, and held-out rows that share no facts with the training rows."""

import pytest

from benchmarks.quality.dataset import Item, Pair, group, hold_out, read_pairs


def test_read_pairs_and_group(e2e):
    pairs = read_pairs(e2e / "testset_w_refs.csv")
    assert pairs[1] == Pair("name[Cotto 0], eatType[pub]", 'A pub, "Cotto 0".')
    assert len(pairs) == 6
    items = group(pairs)
    assert len(items) == 3
    assert items[2] == Item("name[Cotto 2], eatType[pub]", ("Cotto 2 is a pub.", 'A pub, "Cotto 2".'))


def test_read_pairs_refuses_another_file(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns `mr` and `ref`, got \['a', 'b'\]"):
        read_pairs(tmp_path / "x.csv")


def test_hold_out_shares_no_facts(e2e):
    pairs = read_pairs(e2e / "devset.csv")
    left, held = hold_out(pairs, 5)
    assert (len(left), len(held)) == (30, 10)
    assert not {pair.meaning for pair in left} & {pair.meaning for pair in held}
