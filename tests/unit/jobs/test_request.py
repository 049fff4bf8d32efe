"""How many completions a job asks for, looked up before anybody has checked it."""

from __future__ import annotations

from typing import Any

import pytest

from coldsnap.jobs.request import sequences

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("job_input", "count"),
    [
        ({"prompt": "hi"}, 1),
        ({"prompt": "hi", "sampling_params": {"n": 7}}, 7),
        ({"openai_input": {"messages": HI, "n": 7}}, 7),
        ({"openai_input": {"prompt": ["a", "b", "c"], "n": 2}}, 6),
        ({"openai_input": {"prompt": [[1, 2], [3]]}}, 2),
        ({"openai_input": {"prompt": [1, 2, 3]}}, 1),
        ({"route": "/v1/chat/completions/batch", "body": {"messages": [HI, HI]}}, 2),
        ({"openai_input": {"prompt": [], "n": 0}}, 1),
        ({"openai_input": {"n": "many"}}, 1),
        ({"openai_input": "{"}, 1),
        ({"sampling_params": []}, 1),
        ([], 1),
        (None, 1),
    ],
)
def test_a_job_asks_for_n_completions_of_each_prompt(job_input: Any, count: int) -> None:
    assert sequences({"id": "a", "input": job_input}) == count
