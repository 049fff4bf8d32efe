"""A native job's sampling parameters, checked field by field and made into vLLM's. Nothing here imports vLLM."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from coldsnap.errors import ColdsnapError, InvalidInput

# fmt: off
INTERNAL = frozenset({
    "extra_args", "output_kind", "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache", "detokenize",
    "stream_interval", "routed_experts_prompt_start", "trace_decode_token_ids", "prompt_logprob_token_ids",
    "prompt_logprob_start",
})
# fmt: on
"""Fields of `SamplingParams` that are the engine's own business."""
OPENAI_ONLY = frozenset({"logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs"})
"""Fields whose result a native chunk has no place for."""


class Sampling:
    """Makes `parameters`, vLLM's `SamplingParams`, of what jobs give; `defaults` are the model's.

    `translate` makes vLLM's exceptions ours.
    """

    def __init__(
        self, parameters: Any, defaults: Mapping[str, Any], translate: Callable[[Exception], ColdsnapError]
    ) -> None:
        self._parameters = parameters
        self._defaults = {**defaults, "max_tokens": None}
        self._translate = translate
        self._fields = sorted(
            name for name in parameters.__struct_fields__ if not name.startswith("_") and name not in INTERNAL
        )

    def read(self, given: Mapping[str, Any]) -> Any:
        """Return the parameters of one job. Raises `InvalidInput` that names the field."""
        import msgspec

        for name in given:
            if name in OPENAI_ONLY:
                raise InvalidInput(
                    f"sampling_params.{name}: not in native jobs; an OpenAI request gets log probabilities",
                    param=f"sampling_params.{name}",
                )
            if name not in self._fields:
                near = difflib.get_close_matches(name, self._fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self._fields)}"
                raise InvalidInput(f"sampling_params.{name}: unknown; {hint}", param=f"sampling_params.{name}")
        values = self._defaults | {name: value for name, value in given.items() if value is not None}
        try:
            return msgspec.convert(values, self._parameters, str_keys=True)
        except Exception as error:
            # A wrong type has its path behind the message; a wrong value is vLLM's own error, wrapped or not.
            message, _, path = str(error).partition(" - at `")
            cause = error.__cause__ if isinstance(error, msgspec.ValidationError) else error
            message = self._translate(cause).message if isinstance(cause, Exception) else message
            named = path.rpartition("$.")[2].rstrip("`")
            name = named or next((word for word in re.findall(r"\w+", message) if word in self._fields), "")
            where = f"sampling_params.{name}" if name else "sampling_params"
            raise InvalidInput(f"{where}: {message}", param=where) from error
