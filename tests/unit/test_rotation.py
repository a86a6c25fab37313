"""The Hadamard rotation of keys, queries and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvzip.quantization import rotate, rotate_back
from vllm_kvzip.quantization.rotation import hadamard_matrix

HEAD_DIMS = st.sampled_from([64, 96, 128, 256])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_the_rotation_is_orthonormal_and_fast(head_dim):
    matrix = hadamard_matrix(head_dim)
    identity = torch.eye(head_dim, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity)
    assert matrix.abs().amax() - matrix.abs().amin() < 1e-12  # every outlier is spread evenly
    x = torch.randn(3, 5, head_dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ matrix.T)
    torch.testing.assert_close(rotate_back(rotate(x)), x)


@settings(deadline=None, max_examples=30)
@given(head_dim=HEAD_DIMS, dtype=DTYPES, seed=st.integers(0, 999))
def test_rotated_attention_is_attention(head_dim, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(9, head_dim, generator=random).to(dtype) for _ in range(3))
    weights = (q.float() @ k.float().T).softmax(dim=-1)
    rotated = (rotate(q) @ rotate(k).T).softmax(dim=-1)
    torch.testing.assert_close(rotated, weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        rotate_back(weights @ rotate(v)), weights @ v.float(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("head_dim", [80, 20, 36])
def test_head_sizes_without_a_rotation_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"head size of {head_dim} has no rotation"):
        rotate(torch.zeros(2, head_dim))
