"""The table of what works with what names tests that there are, and its page is that table."""

import pytest
from supported import PAGE, proofs, written


def test_the_page_is_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text) and text.count("| yes |") > 30


def test_every_cell_is_proved(request):
    there = [item.nodeid for item in request.session.items]
    files = {nodeid.split("::")[0] for nodeid in there}
    if request.config.option.keyword or not files >= {name.split("::")[0] for name in proofs()}:
        pytest.skip("only a part of the tests was collected")
    assert [name for name in proofs() if not any(nodeid.startswith(name) for nodeid in there)] == []
