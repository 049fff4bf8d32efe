"""Extracts a job's question and its text so far, whatever the shape of its input and output.

Native jobs yield `{"text": …}`; OpenAI's and Anthropic's streams come as SSE text, their answers as one object.
A job of another shape has no text here, which is no error.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from coldsnap.desk.serve.job import Job

SHOWN = 480
"""Characters of a question or of a text's end that are kept."""
_PARSED_BYTES = 100_000
"""Of a job's input, a chunk, a result: longer ones would hold up the endpoint for a preview."""


class Transcript:
    """One job's text, read on from chunk to chunk; a job that starts again starts it again."""

    def __init__(self, job: Job) -> None:
        self.route, self.question = _asked(job.payload)
        self.text = ""
        """The end of the job's text."""
        self.characters = 0
        self._seen = 0
        self._attempt = job.attempts
        self._ended = False

    def follow(self, job: Job) -> None:
        """Read what has come since the last call."""
        if self._attempt != job.attempts or self._seen > len(job.chunks):
            self.text, self.characters, self._seen, self._ended = "", 0, 0, False
            self._attempt = job.attempts
        for chunk in job.chunks[self._seen :]:
            self._add(_text(chunk))
        self._seen = len(job.chunks)
        if job.done and not self._ended:
            self._ended = True
            if not self.characters and job.output is not None:
                self._add(_text(job.output))

    def _add(self, text: str) -> None:
        self.characters += len(text)
        self.text = (self.text + _printable(text))[-SHOWN:]


def _asked(payload: bytes) -> tuple[str, str]:
    """Return what kind of job it is and the end of what it asks."""
    if len(payload) > _PARSED_BYTES:
        return "", f"({len(payload) / 1e6:.1f} MB)"
    try:
        job_input = json.loads(payload).get("input")  # a client may send what orjson refuses
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(job_input, dict):
        return "", ""
    route = job_input.get("openai_route") or job_input.get("route") or "native"
    body = job_input.get("openai_input") or job_input.get("body") or job_input
    if not isinstance(body, dict):
        return _printable(str(route)[:100]), ""
    messages = body.get("messages") or body.get("input")
    last = messages[-1] if isinstance(messages, list) and messages else messages
    content = last.get("content") if isinstance(last, dict) else last
    question = _words(content) or _words(body.get("prompt"))
    return _printable(str(route)[:100]), _printable(question[-SHOWN:])


def _text(chunk: Any) -> str:
    """Return the text of one output of a worker."""
    if isinstance(chunk, dict):
        return _words(chunk.get("text")) or _delta(chunk)
    if isinstance(chunk, list):
        return "".join(_text(each) for each in chunk)
    if not isinstance(chunk, str) or len(chunk) > _PARSED_BYTES:
        return ""
    if "data: {" not in chunk:
        return ""
    texts = []
    for line in chunk.splitlines():
        if line.startswith("data: {"):
            try:
                texts.append(_delta(orjson.loads(line[6:])))
            except ValueError:  # part of an event, from another handler than ours
                continue
    return "".join(texts)


def _delta(event: Any) -> str:
    """Return the text of an event, or of an answer: chat, completion, response, message."""
    if not isinstance(event, dict):
        return ""
    if choices := event.get("choices"):
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, dict) or choice.get("index"):
            return ""  # of several choices the first one is shown
        part = choice.get("delta") or choice.get("message") or choice
        if not isinstance(part, dict):
            return ""
        words = (part.get(name) for name in ("reasoning", "reasoning_content", "content", "text"))
        return "".join(_words(each) for each in words)
    match event.get("type"):
        case "response.output_text.delta":
            return _words(event.get("delta"))
        case "content_block_delta" if isinstance(event.get("delta"), dict):
            return _words(event["delta"].get("text"))
        case "message":
            return _words(event.get("content"))
    return ""


def _words(content: Any) -> str:
    """Return a content that is a text, or a list of parts of which some are."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(_words(part.get("text")) if isinstance(part, dict) else _words(part) for part in content)
    return ""


def _printable(text: str) -> str:
    """Return a text without lone surrogates, which no UTF-8 can carry."""
    return text.encode(errors="replace").decode()
