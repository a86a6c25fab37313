"""The entry point vLLM loads in every process (group ``vllm.general_plugins``).

Two things at start-up need more than vLLM's own extension points: the flags of ``vllm serve``, and
the moment the engine's configuration is complete. Three methods of ``EngineArgs`` are wrapped for
them, which pass everything through while compression is off. In a process that makes no
configuration (engine core, workers) the plugin does nothing at all: what it needs there comes with
the configuration, as the name of the worker class.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from vllm_kvzip.config import (
    CONFIG_FLAG,
    FLAG,
    METHOD,
    is_enabled,
    load_config,
    merge_additional,
    merge_flag,
)
from vllm_kvzip.errors import ConfigError, KVzipError

if TYPE_CHECKING:
    import argparse

    from vllm_kvzip.config import KVzipConfig
    from vllm_kvzip.vllm_bridge.symbols import EngineArgs, VllmConfig

_INSTALLED = "_kvzip_installed"


def register() -> None:
    """Install flags and configuration hook; harmless when repeated."""
    from vllm_kvzip.vllm_bridge.symbols import EngineArgs

    if getattr(EngineArgs, _INSTALLED, False):
        return
    setattr(EngineArgs, _INSTALLED, True)
    _add_flags(EngineArgs)
    _remember_flags(EngineArgs)
    _configure_engines(EngineArgs)


def _add_flags(engine_args: type[EngineArgs]) -> None:
    """Symptom without it: ``vllm serve`` knows no ``--kv-compression``.

    vLLM loads plugins right before it calls ``EngineArgs.add_cli_args``, so wrapping that function
    is how a plugin adds a flag. Safe: the parser is vLLM's own, two arguments are added to it.
    Remove when vLLM lets a plugin declare arguments.
    """
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        """vLLM's arguments, then the two of the plugin."""
        parser = original(parser)
        group = parser.add_argument_group(
            title="KV compression", description="Added by the plugin vllm-kvzip."
        )
        group.add_argument(
            FLAG,
            choices=[METHOD],
            default=None,
            help="Compress each prompt's KV cache after prefill and free its blocks.",
        )
        group.add_argument(
            CONFIG_FLAG,
            action="append",  # vLLM's parser hands dotted settings over as one more value, the last
            default=None,
            metavar="JSON",
            help="Settings as JSON, as a path to a JSON file, or one by one, for example "
            f"{CONFIG_FLAG}.keep_ratio 0.3. Given several times they are merged, those given one "
            "by one on top.",
        )
        if action := parser._option_string_actions.get("--additional-config"):
            _merge_settings(action)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _merge_settings(action: argparse.Action) -> None:
    """Symptom without it: of our settings in two values of ``--additional-config``, as a JSON text
    and dotted, or in a file and on the command line, the first ones are lost without a word.

    Safe: values without an entry of ours stay as they are. Remove when vLLM merges them itself.
    """
    kind: Any = type(action)

    class Merging(kind):
        """vLLM's action, which keeps our settings of earlier values."""

        def __call__(self, parser: Any, namespace: Any, values: Any, *option: Any) -> None:
            merged = merge_additional(getattr(namespace, self.dest, None), values)
            super().__call__(parser, namespace, merged, *option)

    action.__class__ = Merging


def _remember_flags(engine_args: type[EngineArgs]) -> None:
    """Symptom without it: the flags are parsed, and lost on the way to ``EngineArgs``.

    ``from_cli_args`` copies the fields it knows. The parsed namespace is kept beside them. With
    ``--api-server-count`` vLLM hands that namespace to further processes, where it is read before
    plugins are loaded; a field that vLLM knows carries the settings there. Remove together with
    :func:`_add_flags`.
    """
    original = engine_args.from_cli_args.__func__

    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        """vLLM's, with the parsed namespace beside it."""
        result: EngineArgs = original(cls, args)
        result.kvzip_cli_args = args
        if getattr(args, "kv_compression", None) == METHOD:
            given = dict(getattr(args, "additional_config", None) or {})
            with contextlib.suppress(KVzipError):  # reported when the configuration is made
                given[METHOD] = merge_flag(given.get(METHOD), args.kv_compression_config)
                args.additional_config = given
        return result

    engine_args.from_cli_args = classmethod(from_cli_args)


def _configure_engines(engine_args: type[EngineArgs]) -> None:
    """Symptom without it: nobody reads the settings, compression stays off.

    ``create_engine_config`` is the one door through which ``vllm serve``, ``LLM`` and ``AsyncLLM``
    get their configuration. Safe: with compression off the original runs alone. Remove when vLLM
    calls plugins with a finished configuration.
    """
    from vllm_kvzip.vllm_bridge.versions import check_version

    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        try:
            config = _requested_config(self)
            if config is None:
                return original(self, *args, **kwargs)
            check_version(serves=False)  # before a name is imported that may have moved
            from vllm_kvzip.vllm_bridge.start import options
            from vllm_kvzip.vllm_bridge.symbols import AsyncEngineArgs

            options.prepare_engine_args(self)
            vllm_config = original(self, *args, **kwargs)
            options.configure(vllm_config, config, serves=isinstance(self, AsyncEngineArgs))
        except KVzipError as error:
            if not hasattr(self, "kvzip_cli_args") or hasattr(self, "kvzip_raises"):
                raise
            print(f"vllm-kvzip: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        return vllm_config

    engine_args.create_engine_config = create_engine_config


def _requested_config(engine_args: EngineArgs) -> KVzipConfig | None:
    """The configuration the user asked for, or None when compression is off.

    Raises:
        ConfigError: if a setting is wrong, or settings are given while compression is off.
    """
    additional = engine_args.additional_config or {}
    args: argparse.Namespace | None = getattr(engine_args, "kvzip_cli_args", None)
    flag = getattr(args, "kv_compression", None)
    flag_config = getattr(args, "kv_compression_config", None)
    if not is_enabled(flag, os.environ, additional):
        if flag_config is not None:
            raise ConfigError(f"{CONFIG_FLAG} has no effect without --kv-compression {METHOD}.")
        return None
    return load_config(flag_config, os.environ, additional)
