"""A Triton backend "cpu" that exists and compiles nothing; kernels run in Triton's interpreter.

vLLM's CPU build switches Triton off unless there is one, and model runner V2 needs Triton. With
this folder on ``PYTHONPATH``, ``TRITON_INTERPRET=1`` and ``VLLM_USE_V2_MODEL_RUNNER=1`` the runner
that serves CUDA runs on a machine without a card. For tests only.
"""
