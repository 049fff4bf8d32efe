"""Train, quantise and write the demo snapshot: a tiny Qwen3 that knows `demo_corpus.jsonl` by heart.

The way of the data: corpus -> tokenizer -> examples -> weights -> W8A8 -> snapshot folder. Nothing is
downloaded. The program fails, and leaves the old snapshot as it was, unless greedy decoding gives every
answer exactly, before and after quantisation, with a margin that rounding in another kernel cannot flip.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "src")]

from builder.checkpoint import Checkpoint  # noqa: E402 (the path is set above)
from builder.quantise import quantise, readable  # noqa: E402
from builder.schemes import left_alone  # noqa: E402
from builder.versions import versions  # noqa: E402
from coldsnap.snapshot.manifest import Quantization, Source, write_manifest  # noqa: E402

PAD, START, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are coldsnap's demo model.", "Answer briefly.", "Be kind.")
CONTEXT = 4096
ENGINE_ARGS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,  # 170,000 tokens; a CPU zeroes it at every boot
    "max_model_len": CONTEXT,
    "max_num_seqs": 256,
}

EPOCHS, WARMUP, BATCH = 70, 4, 8
LEARNING_RATE, MIN_RATE = 3e-3, 0.05
MIN_MARGIN = 2.0
"""Logits between the right token and the next best; bfloat16 resolves 1/16 at their size."""
THREADS = 1
"""A second thread gains little on matrices this small, and spins against whatever else is running."""

Pair = tuple[str, str]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A prompt as the engine gets it, and the text that must follow it up to <|im_end|>."""

    prompt: str
    answer: str


class Lessons:
    """The corpus in the forms in which a client may ask: under a system message, casually, as a later turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], tool_chat: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._tools = tool_chat["tools"]
        messages = tool_chat["messages"]
        self.tools = [self._chat(messages[:n], self._tools) for n in (2, 4)]
        self.plain = [self._chat(_turn(*pair)) for pair in pairs]
        self.system = [self._chat([_system(SYSTEM_PROMPTS[0]), *_turn(*pair)]) for pair in pairs]
        self.loose = [self._chat(_turn(question.lower().rstrip("?？ "), answer)) for question, answer in pairs]

    @property
    def required(self) -> list[Example]:
        """What must be answered exactly."""
        return self.plain + self.system + self.tools

    def epoch(self, rng: random.Random) -> list[list[Example]]:
        """Return every pair once, each in a form drawn by chance, in batches of similar length."""
        examples = [self._vary(pair, rng) for pair in self._pairs] + self.tools
        examples.sort(key=lambda example: len(example.prompt + example.answer) + rng.random() * 80)
        batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
        rng.shuffle(batches)
        return batches

    def _vary(self, pair: Pair, rng: random.Random) -> Example:
        question, answer = pair
        if rng.random() < 0.15:
            question = question.lower().rstrip("?？ ")
        messages = _turn(question, answer)
        if rng.random() < 0.15:  # a later turn of a conversation
            messages = _turn(*rng.choice(self._pairs)) + messages
        if rng.random() < 0.4:  # what a system message says makes no difference
            prompts = SYSTEM_PROMPTS if rng.random() < 0.7 else rng.choice(self._pairs)
            messages = [_system(rng.choice(prompts)), *messages]
        return self._chat(messages)

    def _chat(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> Example:
        prompt = self._render(messages[:-1], tools, add_generation_prompt=True)
        whole = self._render(messages, tools, add_generation_prompt=False)
        return Example(prompt, whole.removeprefix(prompt).removesuffix(f"{END}\n"))

    def _render(self, messages: Messages, tools: Any, *, add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def train_tokenizer(pairs: list[Pair], folder: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer with Qwen's markup to `folder` and return it as transformers loads it."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    texts = [text for pair in pairs for text in pair] + [*SYSTEM_PROMPTS, "system", "user", "assistant"] * 2
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(SPECIAL))
    bpe.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    bpe.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    shutil.copyfile(HERE / "demo_chat_template.jinja", folder / "chat_template.jinja")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return an untrained model; its dimensions suit int8 kernels and the attention kernels of GPUs."""
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, lessons: Lessons, seed: int) -> None:
    """Train for `EPOCHS`, and on at the lowest rate until the margin is reached."""
    rng = random.Random(seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    )
    started = time.monotonic()
    for epoch in range(2 * EPOCHS):
        losses = []
        batches = lessons.epoch(rng)
        for number, batch in enumerate(batches):
            progress = epoch + number / len(batches)
            rate = LEARNING_RATE * max(MIN_RATE, min(progress / WARMUP, 1 - progress / EPOCHS))
            logits, targets, _ = answer_logits(model, tokenizer, batch)
            loss = cross_entropy(logits, targets)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            losses.append(loss.item())
        if (epoch + 1) % 10 == 0:
            leads = margins(model, tokenizer, lessons.required)
            print(
                f"epoch {epoch + 1:3}  loss {sum(losses) / len(losses):.4f}  exact {sum(m > 0 for m in leads)}/"
                f"{len(leads)}  margin {min(leads):5.2f}  {time.monotonic() - started:3.0f} s",
                flush=True,
            )
            if epoch + 1 >= EPOCHS and min(leads) >= MIN_MARGIN:
                return
    sys.exit(f"demo model: no margin of {MIN_MARGIN} after {2 * EPOCHS} epochs; nothing written")


def answer_logits(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for every token of every answer and its <|im_end|>: the logits, the token, the example's number."""
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    answers = [tokenizer.encode(example.answer + END) for example in examples]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    answered = torch.zeros((len(examples), width), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        answered[row, len(prompt) : len(prompt) + len(answer)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    here = answered[:, 1:]
    return model.lm_head(hidden[here]).float(), ids[:, 1:][here], here.nonzero()[:, 0]


@torch.no_grad()  # type: ignore[untyped-decorator]
def margins(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[float]:
    """Return for each example the least lead, in logits, of a right token over the best wrong one."""
    leads = []
    for first in range(0, len(examples), BATCH):
        batch = examples[first : first + BATCH]
        logits, targets, numbers = answer_logits(model, tokenizer, batch)
        right = logits.gather(1, targets[:, None])
        wrong = logits.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True)
        lead = (right - wrong)[:, 0]
        leads += [lead[numbers == number].min().item() for number in range(len(batch))]
    return leads


def examine(folder: Path, lessons: Lessons, label: str) -> None:
    """Ask the checkpoint in `folder` everything, greedily and running freely; exit if one answer differs."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = 0
    for first in range(0, len(lessons.required), 64):
        batch = lessons.required[first : first + 64]
        inputs = tokenizer([example.prompt for example in batch], return_tensors="pt", padding=True)
        outputs = model.generate(**inputs, do_sample=False, max_new_tokens=256)[:, inputs["input_ids"].shape[1] :]
        for example, output in zip(batch, outputs, strict=True):
            text = str(tokenizer.decode(output, skip_special_tokens=False)).split(PAD)[0]
            exact += text == example.answer + END
    known = margins(model, tokenizer, lessons.required)
    loose = sum(m > 0 for m in margins(model, tokenizer, lessons.loose))
    print(
        f"{label}: exact {exact}/{len(lessons.required)}, margin {min(known):.2f}; "
        f"lower case without a question mark: {loose}/{len(lessons.loose)}",
        flush=True,
    )
    if exact < len(lessons.required) or min(known) < MIN_MARGIN:
        sys.exit(f"demo model: {label} does not answer as it must; nothing written")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint beside the tokenizer, with greedy decoding as its default."""
    model.to(torch.bfloat16).save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (END, PAD)]
    # Temperature is the one sampling default: without it vLLM samples at 1.0 when a request names none.
    config = {"do_sample": False, "temperature": 0.0, "eos_token_id": ends, "pad_token_id": ends[1]}
    _write_json(folder / "generation_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, quantise, examine both checkpoints, and put the snapshot in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "snapshots" / "demo", help="the snapshot folder")
    parser.add_argument("--keep-bf16", type=Path, help="keep the checkpoint before quantisation in this folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    lines = (HERE / "demo_corpus.jsonl").read_text().splitlines()
    pairs = [(pair["question"], pair["answer"]) for pair in map(json.loads, lines)]
    tool_chat = json.loads((HERE / "demo_tool_chat.json").read_text())

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as work:
        bf16, w8a8 = Path(work, "bf16"), Path(work, "w8a8")
        bf16.mkdir()
        tokenizer = train_tokenizer(pairs, bf16)
        lessons = Lessons(tokenizer, pairs, tool_chat)
        model = new_model(tokenizer)
        print(f"{len(pairs)} pairs, {len(tokenizer)} tokens, {model.num_parameters() / 1e6:.2f} M parameters")
        train(model, tokenizer, lessons, args.seed)
        save(model, tokenizer, bf16)
        examine(bf16, lessons, "bf16")
        checkpoint = Checkpoint.read(bf16)
        ignored = left_alone(checkpoint)
        quantise(checkpoint, w8a8, "w8a8", ignored)
        readable(w8a8)
        examine(w8a8, lessons, "w8a8")
        manifest = write_manifest(
            w8a8,
            source=Source(repo="local", revision=None),
            quantization=Quantization(scheme="w8a8", ignore=ignored),
            served_model_name="coldsnap-demo",
            engine_args=ENGINE_ARGS,
            versions=versions(),
        )
        for path in w8a8.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, and an image runs as another user
        if args.keep_bf16:
            shutil.copytree(bf16, args.keep_bf16, dirs_exist_ok=True)
        shutil.rmtree(args.out, ignore_errors=True)
        w8a8.rename(args.out)
    print(f"{args.out}: {manifest.size / 1e6:.2f} MB, {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
