"""A platform that stands in for an NVIDIA card, for what a configuration on one would be."""

from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from vllm_kvzip.vllm_bridge import platforms
from vllm_kvzip.vllm_bridge.start import checks, gpu_backend


class Hopper(Platform):
    """vLLM's platform of a card; its own class for those needs CUDA to be imported."""

    _enum = PlatformEnum.CUDA
    device_name = "a card that is not there"

    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(9, 0)


def pretend_a_card(monkeypatch):
    """Let the checks of a configuration believe that there is one."""
    for module in (platforms, checks, gpu_backend):
        monkeypatch.setattr(module, "current_platform", Hopper())
