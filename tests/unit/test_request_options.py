"""What a request may ask for, and what its client is told otherwise."""

import pytest

from vllm_kvzip.errors import RequestError
from vllm_kvzip.request_options import RequestOptions, check_request


@pytest.mark.parametrize(
    "extra_args", [None, {}, {"other": "x"}, *({"kvzip_context_tokens": n} for n in (0, 7, 10))]
)
def test_good_options_pass(extra_args):
    check_request(extra_args, num_prompt_tokens=10)
    assert RequestOptions.read(extra_args).context_tokens in (None, 0, 7, 10)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"kvzip_context_tokens": 11}, "between 0 and the prompt's length, which is 10 tokens"),
        ({"kvzip_context_tokens": -1}, "=-1 must lie between 0"),
        ({"kvzip_context_tokens": "7"}, "='7' must be a whole number of tokens"),
        ({"kvzip_context_tokens": 7.5}, "must be a whole number of tokens"),
        ({"kvzip_context_tokens": True}, "=True must be a whole number of tokens"),
        ({"kvzip_context_tokens": [7]}, "must be a whole number of tokens"),
        ({"kvzip_context_token": 7}, "no option kvzip_context_token; did you mean kvzip_context_t"),
        ({"kvzip_xyz": 7}, "no option kvzip_xyz; known are kvzip_context_tokens"),
    ],
)
def test_wrong_options_are_one_sentence(extra_args, message):
    with pytest.raises(RequestError, match=message):
        check_request(extra_args, num_prompt_tokens=10)
    past_the_check = RequestOptions.read(extra_args).context_tokens
    assert past_the_check in (None, 11)  # the rule takes 11 of 10 tokens for the whole prompt
