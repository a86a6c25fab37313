"""How important is each KV pair? One scorer a file; ``base.py`` has the contract."""

from vllm_kvzip.scoring.base import (
    Scorer,
    ScorerSettings,
    available_scorers,
    create_scorer,
    register_scorer,
    scorer_class,
)

__all__ = [
    "Scorer",
    "ScorerSettings",
    "available_scorers",
    "create_scorer",
    "register_scorer",
    "scorer_class",
]
