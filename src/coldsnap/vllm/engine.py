"""The engine of `coldsnap.engine` on vLLM: generates, calls vLLM's own HTTP application, and translates its errors.

`start` makes it; what it uses of vLLM is `AsyncLLM.generate`/`encode`, the renderer, and the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from coldsnap import processes
from coldsnap.engine import Delta, EngineInfo, Generation, HttpRequest, HttpResponse, Meter, Usage
from coldsnap.errors import ColdsnapError, EngineBootError, EngineDead, InvalidInput, Unavailable
from coldsnap.vllm import asgi, calls, moved, translation
from coldsnap.vllm.bodies import Bodies
from coldsnap.vllm.grammar import Grammars
from coldsnap.vllm.sampling import Sampling
from coldsnap.vllm.stall import Watchdog

if TYPE_CHECKING:
    from coldsnap.cost.accounts import Accounts

_LOOK_SECONDS = 1.0
"""How often the engine is checked for being alive while its first answer is waited for."""
_TEMPLATE_RESERVED = frozenset({
    "chat_template", "conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of `apply_chat_template` that a job may not give: its own template is code, as vLLM's server knows."""


class VllmEngine:
    """The `Engine` of `coldsnap.engine`, on an `AsyncLLM` in this process and its core in a forked child."""

    def __init__(
        self, llm: Any, args: Any, info: EngineInfo, accounts: Accounts, *, grammars: Grammars, watchdog: Watchdog
    ) -> None:
        from vllm.renderers.params import ChatParams
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.info = info
        self._llm = llm
        self._args = args
        self._accounts = accounts
        self._grammars = grammars
        self._watchdog = watchdog
        self._warm = False
        self._app: asyncio.Future[tuple[Any, Bodies]] | None = None
        self._delta = RequestOutputKind.DELTA
        self._sampling = Sampling(SamplingParams, llm.model_config.get_diff_sampling_param(), translate)
        self._chat_params = ChatParams

    async def generate(self, request: Generation, meter: Meter) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`. `max_tokens` is bounded by the context that the prompt leaves."""
        field = "prompt" if request.messages is None else "messages"
        rendered = f"{field}, chat_template_kwargs" if request.template else field
        with _translated({"input_text": field, "input_tokens": field}, rendered):
            sampling = self._sampling.read(request.sampling)
            prompt = await self._render(request)
            left = self.info.max_model_len - len(prompt["prompt_token_ids"])
            if left < 1:
                raise InvalidInput(
                    f"{field}: {len(prompt['prompt_token_ids'])} tokens leave no room for a completion in "
                    f"the context of {self.info.max_model_len} tokens; send a shorter one",
                    param=field,
                )
            if sampling.max_tokens is not None and sampling.max_tokens > left:
                meter.warnings.append(
                    f"sampling_params.max_tokens: {sampling.max_tokens} asked for; the prompt leaves {left} in the "
                    f"context of {self.info.max_model_len} tokens"
                )
            sampling.max_tokens = min(sampling.max_tokens or left, left)
            sampling.output_kind = self._delta
            calls.METER.set(meter)
        constraint = "sampling_params.structured_outputs"
        unnamed = constraint if "structured_outputs" in request.sampling else "sampling_params"
        with _translated({"structured_outputs": constraint}, unnamed):
            async with contextlib.aclosing(self._llm.generate(prompt, sampling, request.id)) as outputs:
                async for output in outputs:
                    for part in output.outputs:
                        if part.finish_reason == "error":
                            raise Unavailable("the engine gave this request up; its reason is in the worker's log")
                        if part.text or part.finish_reason:
                            yield Delta(part.text, part.index, part.finish_reason)

    @contextlib.asynccontextmanager
    async def http(self, request: HttpRequest, meter: Meter) -> AsyncIterator[HttpResponse]:
        """See `Engine.http`. The first call builds the application if `warm_up` has not yet."""
        app, bodies = await self._application()
        calls.METER.set(meter)
        made: list[Any] = []
        calls.MADE.set(made)
        try:
            with _translated():
                bodies.check(request)
                async with asgi.request(app, request) as response:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            # An application that is stopped while it sends drops the engine's generator without closing it: the
            # request would run on until the garbage collector comes by.
            for call in made:
                if not call.ag_running:
                    await call.aclose()
            raise

    async def warm_up(self) -> None:
        """See `Engine.warm_up`: one token, over the chat template if the model has one.

        vLLM tells nobody of an engine that has died before its first request, which would wait for ever.
        """
        sampling = {"max_tokens": 1, "temperature": 0.0}
        if self._args.chat_template or getattr(self._llm.get_tokenizer(), "chat_template", None):
            request = Generation("warm-up", messages=[{"role": "user", "content": "a"}], sampling=sampling)
        else:
            request = Generation("warm-up", prompt="a", sampling=sampling)

        async def answer() -> None:
            async for _ in self.generate(request, Meter()):
                pass

        answered = asyncio.create_task(answer())
        try:
            while not (await asyncio.wait([answered], timeout=_LOOK_SECONDS))[0]:
                self.check()
            answered.result()
            self._warm = True
        except ColdsnapError as error:
            raise EngineBootError(f"the engine started but cannot answer: {error.message}") from error
        finally:
            answered.cancel()
        self._grammars.prepare(self._llm.vllm_config)

    def usage(self) -> Usage:
        """See `Engine.usage`."""
        return self._accounts.usage()

    def check(self) -> None:
        """See `Engine.check`."""
        if self._llm.errored:
            raise EngineDead("the engine process is gone")
        self._grammars.alive()
        # The first step may compile. What cannot be metered cannot be watched.
        if self._warm and (steps := self._accounts.steps) is not None:
            self._watchdog.look(steps, busy=self._accounts.busy)

    def close(self) -> None:
        """See `Engine.close`: killed, because vLLM would collect garbage for a next engine in two processes, 1.4 s."""
        logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)  # it warns that it has to kill
        with processes.without_leaks():
            self._llm.shutdown(timeout=0.0)
        self._accounts.end()
        self._grammars.close()

    async def _application(self) -> tuple[Any, Bodies]:
        if self._app is None:
            self._app = asyncio.ensure_future(self._build_application())
        return await asyncio.shield(self._app)

    async def _build_application(self) -> tuple[Any, Bodies]:
        build, init = moved.builders()
        tasks = await self._llm.get_supported_tasks()
        app = build(self._args, tasks, self._llm.model_config)
        await init(self._llm, app.state, self._args, tasks)
        app.state.server = SimpleNamespace()  # what vLLM's handler of errors tells when its engine is dead
        gc.freeze()  # see `worker`: it stays as long as the worker does
        return app, Bodies(app)

    async def _render(self, request: Generation) -> Any:
        renderer = self._llm.renderer
        if request.messages is None:
            (prompt,) = await renderer.render_cmpl_async([{"prompt": request.prompt}])
            return prompt
        for name in request.template:
            if name in _TEMPLATE_RESERVED:
                where = f"chat_template_kwargs.{name}"
                raise InvalidInput(f"{where}: not open to jobs", param=where)
        if len(request.messages) > self.info.max_model_len:
            raise InvalidInput(
                f"messages: {len(request.messages)} messages cannot fit into the context of "
                f"{self.info.max_model_len} tokens",
                param="messages",
            )
        chat = self._chat_params(
            chat_template=moved.chat_template(self._args.chat_template),
            chat_template_content_format=self._args.chat_template_content_format,
            # Not tokenized by the template: only text is measured before it is turned into tokens.
            chat_template_kwargs={"add_generation_prompt": True, **request.template, "tokenize": False},
        )
        _, (prompt,) = await renderer.render_chat_async([request.messages], chat)
        return prompt


@contextlib.contextmanager
def _translated(fields: Mapping[str, str] | None = None, unnamed: str | None = None) -> Iterator[None]:
    """Raise vLLM's exceptions as ours; `fields` names the job's field for a parameter of vLLM's.

    `unnamed` is the job's field where vLLM names none.
    """
    try:
        yield
    except ColdsnapError:
        raise
    except Exception as error:
        ours = translate(error)
        where = (fields or {}).get(ours.param) if ours.param else unnamed
        if where and isinstance(ours, InvalidInput):
            ours.param = where
            ours.message = f"{where}: {ours.message}"
        raise ours from error


def translate(error: Exception) -> ColdsnapError:
    """Return our error for one of vLLM's."""
    from vllm import exceptions
    from vllm.v1.engine import exceptions as of_engine

    return translation.ours(error, {**vars(exceptions), **vars(of_engine)})
