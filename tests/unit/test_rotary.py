"""Rotation taken off again, against transformers' and against one pair of numbers at a time."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_kvzip.model.rotary import RotaryTables

POSITIONS, DIM, ROTATED = 40, 10, 8


def angles():
    return torch.arange(POSITIONS)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_unrotate_is_the_inverse_of_a_literal_rotation(interleaved, scale):
    tables = RotaryTables(angles().cos() * scale, angles().sin() * scale, interleaved)
    torch.manual_seed(0)
    plain = torch.randn(2, 5, DIM)
    positions = torch.tensor([3, 4, 11, 39, 0])
    rotated = plain.clone()
    for head in range(2):
        for row, position in enumerate(positions.tolist()):
            for pair in range(4):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
                angle = float(angles()[position, pair])
                x, y = plain[head, row, i], plain[head, row, j]
                rotated[head, row, i] = scale * (x * math.cos(angle) - y * math.sin(angle))
                rotated[head, row, j] = scale * (y * math.cos(angle) + x * math.sin(angle))
    torch.testing.assert_close(tables.unrotate(rotated, positions), plain, atol=1e-5, rtol=1e-5)


def test_it_undoes_what_transformers_does():
    tables = RotaryTables(angles().cos(), angles().sin())
    plain = torch.randn(1, 3, POSITIONS, ROTATED)
    cos, sin = (torch.cat([part, part], dim=-1)[None] for part in (tables.cos, tables.sin))
    rotated, _ = apply_rotary_pos_emb(plain, plain, cos, sin)
    got = tables.unrotate(rotated, torch.arange(POSITIONS))
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


def test_the_mean_rotation_is_the_mean_of_the_rotations():
    tables = RotaryTables(angles().cos(), angles().sin())
    plain = torch.randn(3, DIM)
    turned = []
    for position in range(30, POSITIONS):  # 10 of the 15 asked for exist
        turned.append(
            RotaryTables(tables.cos, -tables.sin).unrotate(plain[:, None], torch.tensor([position]))
        )
    wanted = torch.stack(turned).mean(0)[:, 0]
    torch.testing.assert_close(tables.rotate_to_mean(plain, 30, 15), wanted, atol=1e-5, rtol=1e-5)
    beyond = tables.rotate_to_mean(plain, POSITIONS, 15)  # nothing of it exists: the last one
    torch.testing.assert_close(beyond, turned[-1][:, 0], atol=1e-5, rtol=1e-5)
