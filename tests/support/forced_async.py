"""Asynchronous scheduling on the CPU, for tests.

vLLM's CPU platform switches it off ("not required on CPU"), so a stock CPU engine never runs it.
Scheduler, engine core and model runner have no other reason to refuse. What the CPU lacks are CUDA
streams and events, which the runner creates to overlap a copy; vLLM's own CPU runner replaces them
by placeholders while it starts, and the same placeholders serve here for as long as it runs.
"""


def force_async_scheduling():
    """Let engines that this process makes from now on schedule a step ahead."""
    import contextlib

    import torch
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    class Placeholder:
        device = torch.device("cpu")

        def __init__(self, *args, **kwargs):
            pass

        def record(self, *args):
            pass

        def synchronize(self):
            pass

        def wait_stream(self, *args):
            pass

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    torch.cuda.Event = torch.cuda.Stream = Placeholder
    torch.cuda.current_stream = Placeholder
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
