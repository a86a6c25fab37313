"""What `vllm serve` would run with, or say, short of starting an engine."""

import pytest
from engine_job import MODEL
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

ON = ["--kv-compression", "kvzip"]


def engine_config(*flags, model=MODEL):
    """The configuration `vllm serve MODEL FLAGS` would run with."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = ["--model", str(model), "--dtype", "float32", "--enforce-eager", *flags]
    return AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()


def refusal(capsys, *flags, model=MODEL):
    """The one sentence a user of `vllm serve` gets; checks that there is exactly one."""
    with pytest.raises(SystemExit) as stopped:
        engine_config(*flags, model=model)
    lines = [line for line in capsys.readouterr().err.splitlines() if "vllm-kvzip: error:" in line]
    assert stopped.value.code == 2
    assert len(lines) == 1
    return lines[0]
