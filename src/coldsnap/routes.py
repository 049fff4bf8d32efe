"""Which of vLLM's HTTP routes a job may call: those that serve a model, none that administer it.

vLLM decides which of them exist for the model at hand; this table only keeps the others out of reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coldsnap.errors import MethodNotAllowed, RouteNotFound, RouteRefused

ALLOWED: Mapping[str, str] = {
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/responses/{id}": "GET",
    "/v1/responses/{id}/cancel": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/embeddings": "POST",
    "/v1/score": "POST",
    "/v1/rerank": "POST",
    "/v2/rerank": "POST",
    "/score": "POST",
    "/rerank": "POST",
    "/classify": "POST",
    "/pooling": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/version": "GET",
    "/health": "GET",
}

_REFUSED = re.compile(
    r"/(metrics|docs|redoc|openapi\.json|load|ping|invocations|sleep|wake_up|is_sleeping|start_profile|"
    r"stop_profile|reset_\w+|collective_rpc|scale_elastic_ep|is_scaling_elastic_ep|server_info|kv_event_sources|"
    r"pause|resume|is_paused|init_weight\w*|update_weight\w*|abort_requests|tokenizer_info|"
    r"v1/(un)?load_lora_adapter|inference/.*)(/.*)?"
)
"""Routes that vLLM has and that must not be reached from outside; any other path is simply not known."""

_PATTERNS = [
    (re.compile(re.sub(r"\{\w+\}", r"[A-Za-z0-9_-]+", route)), method) for route, method in ALLOWED.items()
]


def check(path: str, method: str) -> None:
    """Raise an error that says why, unless a job may call `path` with `method`."""
    for pattern, allowed in _PATTERNS:
        if pattern.fullmatch(path):
            if method != allowed:
                raise MethodNotAllowed(f"{method} {path}: expected {allowed}", param="method")
            return
    if _REFUSED.fullmatch(path):
        raise RouteRefused(f"{path}: an administrative route, not open to jobs", param="route")
    raise RouteNotFound(f"{path[:200]}: no such route; known: {', '.join(ALLOWED)}", param="route")
