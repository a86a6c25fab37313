"""Which KV connectors go together with compression, said at start-up.

A connector must store and load raw blocks under hashes of their tokens, and nothing else, and it
must take what it knows of rows from vLLM's messages. What is shown to it then decides what it
stores: see :mod:`~vllm_kvzip.vllm_bridge.connectors.raw_rows`. A connector that hands requests on
to other servers, or reads vLLM's block pool by itself, cannot be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.vllm_bridge.symbols import KVConnectorFactory

if TYPE_CHECKING:
    from vllm_kvzip.config import KVzipConfig
    from vllm_kvzip.vllm_bridge.symbols import KVTransferConfig, VllmConfig

OFFLOADING, EXAMPLE = "OffloadingConnector", "ExampleConnector"
DECLARATION = "kvzip_stores_raw_blocks"
"""Attribute of a connector's class that is True where its author promises what follows.

1. It stores and loads whole blocks, under keys that tell the tokens before a block's end apart, and
   does nothing else with a request's blocks.
2. It knows a request's blocks from ``build_connector_meta`` alone. A request in
   ``resumed_req_ids`` starts over with the blocks that are named then, which can be none.
3. Stores that are still under way for a request in ``preempted_req_ids``, or of a block that is the
   target of one of ``kv_cache_block_copies``, end in ``handle_preemptions`` of that step.
4. Loads come after all work that the worker's device has been given before ``start_load_kv``.
5. No load that runs inside a step fails.
"""


def connector_problems(vllm_config: VllmConfig, is_mixed: bool) -> list[tuple[bool, str]]:
    """What is refused of KV connectors: whether it is there, and the words for it.

    Args:
        vllm_config: of the engine.
        is_mixed: whether some layers of the model are compressed and others are left alone.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return []
    name = transfer.kv_connector
    remove = "remove --kv-transfer-config and --kv-offloading-size"
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return [
        (
            not _stores_raw_blocks(transfer),
            f"the KV connector {name}; use {OFFLOADING} (--kv-offloading-size with the backend "
            f"native), {EXAMPLE}, or a connector of your own whose class declares {DECLARATION}",
        ),
        (
            transfer.kv_role != "kv_both",
            f"kv_role {transfer.kv_role}, which hands requests on to other servers; set kv_role to "
            f"kv_both",
        ),
        (
            name == EXAMPLE and vllm_config.scheduler_config.enable_chunked_prefill,
            f"{EXAMPLE} with chunked prefill, where it stores a part of a prompt under the name of "
            f"the whole; add --no-enable-chunked-prefill",
        ),
        (
            name == EXAMPLE and vllm_config.lora_config is not None,
            f"{EXAMPLE} with --enable-lora, whose adapters it does not tell apart; remove one of "
            f"them",
        ),
        (is_mixed, f"the KV connector {name} for models whose layers differ yet; {remove}"),
        (
            stages > 1,
            f"the KV connector {name} with --pipeline-parallel-size {stages} yet; {remove}",
        ),
        (
            vllm_config.speculative_config is not None,
            f"the KV connector {name} with speculative decoding yet; {remove}",
        ),
    ]


def check_connector(vllm_config: VllmConfig, config: KVzipConfig, repeats: bool) -> None:
    """Refuse settings that do not go together with a KV connector.

    Args:
        vllm_config: of the engine.
        config: of compression.
        repeats: whether the scorer lets the model repeat contexts.

    Raises:
        ConfigError: naming the setting.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    settings = {
        "prefill_budget": config.prefill_budget is not None,
        "decode_budget": config.decode_budget is not None,
        "quality_loss": config.quality_loss is not None,
        "contexts_dir": config.contexts_dir is not None,
        f"mode {config.mode}": config.mode != "evict",
        "scorer kvzip": repeats,
    }
    for setting, is_there in settings.items():
        if is_there:
            raise ConfigError(
                f"{setting} does not work with the KV connector {transfer.kv_connector} yet; "
                f"remove one of them."
            )


def _stores_raw_blocks(transfer: KVTransferConfig) -> bool:
    """Whether the connector is one of vLLM's that are known to, or its class says that it does."""
    if not transfer.kv_connector_module_path:
        return transfer.kv_connector in (OFFLOADING, EXAMPLE)
    connector = KVConnectorFactory.get_connector_class(transfer)
    return getattr(connector, DECLARATION, False) is True
