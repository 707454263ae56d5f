"""One command comes through a night of bad answers; `tests/faulty_night.py` takes as many prompts as are wanted."""

import pytest

pytest.importorskip("openai")


@pytest.mark.slow
def test_all_that_can_be_sampled_is_and_the_rest_is_named(talkative_model, capsys):
    import faulty_night

    assert faulty_night.main(["--prompts", "200", "--model", talkative_model]) == 0
    assert "exit status 0" in capsys.readouterr().out
