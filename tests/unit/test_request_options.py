"""What a request may ask for, and what its client is told otherwise."""

import pytest

from vllm_kvzip.errors import RequestError
from vllm_kvzip.planning.request_options import RequestOptions, check_request, has_options


@pytest.mark.parametrize(
    ("extra_args", "options"),
    [
        (None, RequestOptions()),
        ({"other": "x"}, RequestOptions()),
        ({"kvzip_context_tokens": 0}, RequestOptions(context_tokens=0)),
        ({"kvzip_context_tokens": 10}, RequestOptions(context_tokens=10)),
        ({"kvzip_keep_ratio": 0.3}, RequestOptions(keep_ratio=0.3)),
        ({"kvzip_keep_ratio": 1}, RequestOptions(keep_ratio=1)),
        ({"kvzip": "off"}, RequestOptions(is_off=True)),
        ({"kvzip_decode_budget": 640}, RequestOptions(decode_budget=640)),
        ({"kvzip_decode_budget": "off"}, RequestOptions(decode_budget=0)),
        ({"kvzip_quality_loss": 0.1}, RequestOptions(quality_loss=0.1)),
        ({"kvzip_quality_loss": "off"}, RequestOptions(quality_loss=0.0)),
        ({"kvzip": "on", "kvzip_keep_ratio": None}, RequestOptions()),
    ],
)
def test_good_options_pass(extra_args, options):
    check_request(extra_args, num_prompt_tokens=10)
    assert RequestOptions.read(extra_args) == options
    assert has_options(extra_args) == ("kvzip" in str(extra_args))


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
        ({"kvzip_xyz": 7}, "no option kvzip_xyz; did you mean kvzip?"),
        ({"kvzip_decode_budget": 0}, "kvzip_decode_budget=0 must be a number of tokens"),
        ({"kvzip_decode_budget": "no"}, "kvzip_decode_budget='no' must be a number of tokens"),
        ({"kvzip_quality_loss": 0}, "kvzip_quality_loss=0 must be a number of nats above 0"),
        ({"kvzip_quality_loss": "no"}, "kvzip_quality_loss='no' must be a number of nats"),
        ({"kvzip": "no"}, 'kvzip=\'no\' must be "on" or "off"'),
        ({"kvzip": 0}, "kvzip=0 must be"),
        ({"kvzip": ["off"]}, 'must be "on" or "off"'),
        ({"kvzip_keep_ratio": 0}, "kvzip_keep_ratio=0 must be a number above 0 and up to 1"),
        ({"kvzip_keep_ratio": 1.5}, "=1.5 must be a number above 0"),
        ({"kvzip_keep_ratio": float("nan")}, "=nan must be a number"),
        ({"kvzip_keep_ratio": "0.5"}, "='0.5' must be a number"),
        ({"kvzip_keep_ratio": True}, "=True must be a number"),
        ({"kvzip_keep_ratio": [0.5]}, "must be a number"),
        ({"kvzip_keep_ratios": 0.5}, "did you mean kvzip_keep_ratio"),
    ],
)
def test_wrong_options_are_one_sentence(extra_args, message):
    with pytest.raises(RequestError, match=message):
        check_request(extra_args, num_prompt_tokens=10)
    past_the_check = RequestOptions.read(extra_args)
    # The rule takes 11 of 10 tokens for the whole prompt.
    assert past_the_check in (RequestOptions(), RequestOptions(context_tokens=11))
