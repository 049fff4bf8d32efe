"""Writes the bodies of requests: native jobs, or one of two OpenAI formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from coldsnap.desk.bench.prompts import Prompt

Api = Literal["native", "completions", "chat"]
APIS: tuple[Api, ...] = ("native", "completions", "chat")


def route(body: Mapping[str, Any]) -> str:
    """Return the OpenAI route that takes a body."""
    return "chat/completions" if "messages" in body else "completions"


@dataclass(frozen=True, slots=True)
class Dialect:
    """Makes the bodies of requests. `extra` is put into them; natively, into the sampling parameters."""

    api: Api
    model: str | None = None
    exact: bool = True
    """Ask for the output tokens that are wished, also past the model's own end."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_ids(self) -> bool:
        """Whether a prompt may be a list of token ids."""
        return self.api == "completions"

    def body(self, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return what is POSTed, or a native job's input."""
        sampling = {"max_tokens": output_tokens} | ({"ignore_eos": True} if self.exact else {}) | dict(self.extra)
        model = {} if self.model is None else {"model": self.model}
        if self.api == "native":
            return {"prompt": prompt, "sampling_params": sampling, "stream": True} | model
        input_fields = (
            {"prompt": prompt} if self.api == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        )
        return model | input_fields | {"stream": True, "stream_options": {"include_usage": True}} | sampling

    def job(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a job's input for a body."""
        if self.api == "native":
            return body
        return {"openai_route": f"/v1/{route(body)}", "openai_input": body}
