"""A format of quantized pages of another package, for tests: 8 bits, one float32 scale a vector."""

import torch

from vllm_kvzip.quantization import Encoded, Format


class PlainEightBits(Format):
    name = "plain8"

    @classmethod
    def for_head_size(cls, head_dim):
        return cls()

    def block_values(self, head_dim):
        return head_dim

    def code_bytes(self, head_dim):
        return head_dim

    def scale_bytes(self, head_dim):
        return 4

    def encode(self, vectors):
        scale = vectors.float().abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-100) / 127
        codes = (vectors.float() / scale).round().to(torch.int8)
        return Encoded(codes.view(torch.uint8), scale.view(torch.uint8))

    def decode(self, encoded):
        scale = encoded.scales.contiguous().view(torch.float32)
        return encoded.codes.contiguous().view(torch.int8).float() * scale
