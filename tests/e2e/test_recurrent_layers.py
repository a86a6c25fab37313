"""Models of which some layers keep a state: they are left alone, full attention is compressed."""

import pytest
from mixed_load import check_freed, check_identity, check_pool, check_reuse, run_mixed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    return run_mixed("lfm2", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def linear_attention(tmp_path_factory):
    """Its states are so large that vLLM makes blocks of 160 tokens."""
    return run_mixed("qwen3-next", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=["granite4-h", "nemotron-h"])
def state_space(request, tmp_path_factory):
    return run_mixed(request.param, tmp_path_factory.mktemp("models"))


def test_short_convolutions(convolutions):
    check_identity(convolutions)
    check_pool(convolutions)
    check_freed(convolutions)


def test_a_compressed_prefix_is_found_again_with_its_states(convolutions):
    check_reuse(convolutions)


def test_linear_attention(linear_attention):
    check_identity(linear_attention)
    check_pool(linear_attention)


def test_a_compressed_prefix_of_large_blocks_is_found_again(linear_attention):
    check_reuse(linear_attention, block=160)


def test_state_space_layers_without_prefix_caching(state_space):
    check_identity(state_space)
    check_pool(state_space)
