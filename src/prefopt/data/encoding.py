"""From texts and messages to token ids: prompt and prompt + completion are rendered whole, then split.

Pairs, comparisons and bare prompts (for generation) all go through `encode_groups`, so that a prompt has the same ids
everywhere.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.messages import ASSISTANT, BadRow, Fault, Message, TextOrMessages
from prefopt.files import content_hash

# the forms in which texts come: strings are encoded as they are, messages under the chat template
STRINGS, MESSAGES = "strings", "messages"
# see `TextMode`
CHAT_RENDERINGS, SPECIAL_TOKENS = ("joint", "handbook", "sppo"), ("template", "trl09", "sppo")
COMPLETION_TURNS = ("all", "last")
# a template that marks what the assistant writes
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
TRUNCATION_MODES = ("keep_start", "keep_end", "drop", "trl09")
_PROBE = "How many, 3 or 4?\n  Grüße an Zoë: 'yes' — 你好 🙂 <b>", " 7, I think.\n"
# rendering stops after so long: rows are data, and a template can loop over what they hold
RENDER_SECONDS = 10.0
# where an answer's text stands in a message: reasoning comes in a field beside the content, too
ANSWER_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class TextGroup:
    """A prompt and its R >= 0 completions, as texts or as messages."""

    prompt: TextOrMessages
    completions: list[TextOrMessages] = field(default_factory=list)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wholes(self) -> list[TextOrMessages]:
        """Prompt + completion, for each completion."""
        return [self.prompt + completion for completion in self.completions]  # type: ignore[operator]


@dataclass(frozen=True)
class TextMode:
    """How texts and messages become ids: as TRL does today by default, or as the code behind published figures did.

    Attributes:
        chat_rendering: what of a conversation is rendered. "joint": the prompt with the generation prompt, and prompt
            + completion as one conversation, so that a completion begins with the answer's text. "handbook"
            (alignment-handbook, SimPO, WPO): the prompt without generation prompt and behind an empty system turn
            where the template takes one, and each completion alone, so that its header is scored. "sppo": as "joint"
            without generation prompt, so that the header is scored.
        special_tokens: "template": those of the template, and for strings those of the tokenizer. "trl09" (TRL 0.9): a
            BOS before the prompt and an end token after each completion where there is none. "sppo": both in any case,
            so that there may be two.
        completion_turns: of a completion of several turns, "all" scores every assistant turn, "last" the last one;
            turns of others are read and not scored. With the two settings above as published code has them, every
            token is scored, as there.
    """

    chat_rendering: str = "joint"
    special_tokens: str = "template"
    completion_turns: str = "all"

    def __post_init__(self) -> None:
        for name, known in (
            ("chat_rendering", CHAT_RENDERINGS),
            ("special_tokens", SPECIAL_TOKENS),
            ("completion_turns", COMPLETION_TURNS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class EncodedGroup:
    """The token ids of a prompt and its completions.

    Attributes:
        prompt_ids: of the prompt, up to where the completions begin.
        completion_ids: of each completion.
        prompt_is_prefix: False where the prompt alone had other last tokens than in context.
        cut: the parts that truncation shortened: 0 is the prompt, r + 1 completion r.
        skipped: of each completion the ranges [begin, end) of its ids that are read and not scored; () where every id
            of every completion is scored.
        other_turns: whether turns of others are scored with the answers between which they stand.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    prompt_is_prefix: bool = True
    cut: tuple[int, ...] = ()
    skipped: tuple[Ranges, ...] = ()
    other_turns: bool = False


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set the pad token to the end token where there is none, as TRL does; return the tokenizer, changed in place.

    Padding is masked by position and never by id, so that an end token that is scored stays scored.

    Raises:
        ValueError: there is neither a pad token nor an end token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has neither a pad token nor an end token; set `tokenizer.pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Check that the tokenizer has an end token, which plain text needs, and give it a pad token.

    Raises:
        ValueError: there is no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {_name(tokenizer)} has no end token; set `tokenizer.eos_token`.")
    return with_pad_token(tokenizer)


def load_tokenizer(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model given by name or folder, with a pad token.

    Raises:
        ValueError: see `prepare_tokenizer`.
    """
    return prepare_tokenizer(
        AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer cannot render messages."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"The rows are lists of messages, but the tokenizer of {_name(tokenizer)} has no chat template: use that "
            "of an instruction-tuned model, set `tokenizer.chat_template`, or give the rows as plain strings."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides which ids a text or a conversation gets; the same before and after use."""
    return content_hash(*_vocabulary(tokenizer), tokenizer.chat_template, transformers.__version__)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash vocabulary, merges and special tokens, but not the chat template."""
    return content_hash(*_vocabulary(tokenizer))


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[str, Any, dict[str, str]]:
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        state: Any = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        state = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    return type(tokenizer).__name__, state, names


def text_record(tokenizer: PreTrainedTokenizerBase, form: str) -> dict[str, str]:
    """Describe how texts of a form become ids, to be stored with a model and compared later.

    Returns:
        `form`, and `digest`: a hash of the ids of a fixed text, and of the chat template where that is applied. Unlike
        `tokenizer_fingerprint` it stays the same when another release of transformers gives the same ids.
    """
    prompt, completion = _PROBE
    (encoded,) = encode_groups([TextGroup(prompt, [completion])], tokenizer)
    assert isinstance(encoded, EncodedGroup)
    template = tokenizer.chat_template if form == MESSAGES else None
    return {"form": form, "digest": content_hash(encoded.prompt_ids, encoded.completion_ids, template)[:16]}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "this model"


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the leading ids, or characters, that both sequences have."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def encode_groups(
    groups: Sequence[TextGroup | EncodedGroup | BadRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    strict: bool = False,
    mode: TextMode | None = None,
) -> list[EncodedGroup | BadRow]:
    """Encode the prompt and each completion of every group, uncut; a group that has a fault becomes that fault.

    Messages: the prompt is rendered with the generation prompt, prompt + completion as one conversation; special
    tokens are the template's. Strings: prompt and prompt + completion are encoded as one text behind the tokenizer's
    leading tokens, and one end token is added. The completion starts where the sequences part. `TextMode` has other
    ways. Groups that are encoded already, and faults, are returned unchanged.

    Args:
        groups: prompts with their completions.
        tokenizer: gives ids, chat template, BOS and end token.
        strict: messages that hold text of the template, and answers that the template does not show whole, are faults.
        mode: how; None for the default, with every token of a completion scored.
    """
    encoded: list[Any] = list(groups)
    for kind, encode in ((str, _encode_strings), (list, _encode_conversations)):
        texts = {
            place: group
            for place, group in enumerate(groups)
            if isinstance(group, TextGroup) and isinstance(group.prompt, kind)
        }
        results = encode(list(texts.values()), tokenizer, strict, mode) if texts else []
        for place, result in zip(texts, results):
            encoded[place] = result
    return encoded


def _encode_strings(
    groups: Sequence[TextGroup], tokenizer: PreTrainedTokenizerBase, strict: bool, mode: TextMode | None
) -> list[EncodedGroup | BadRow]:
    eos = tokenizer.eos_token_id
    if eos is None and any(group.completions for group in groups):
        raise ValueError(f"The tokenizer of {_name(tokenizer)} has no end token; set `tokenizer.eos_token`.")
    texts: list[Any] = [text for group in groups for text in (group.prompt, *group.wholes)]
    ids = iter(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    if mode is not None and mode.special_tokens != "template":
        return [
            _split(next(ids)[1], [next(ids)[1] for _ in group.completions], tokenizer, mode.special_tokens)
            for group in groups
        ]
    leading = _leading_special_ids(tokenizer)
    # a text that was templated before it came here ends with the end of a turn, and perhaps a line break
    ends = tuple({str(tokenizer.eos_token), *(TemplateMarks.of(tokenizer).ends if tokenizer.chat_template else ())})
    encoded: list[EncodedGroup | BadRow] = []
    for group in groups:
        prompt, *wholes = (
            (text, [*leading, *tokens]) for text, tokens in (next(ids) for _ in range(1 + len(group.completions)))
        )
        ended = [tokens if text.rstrip().endswith(ends) else [*tokens, eos] for text, tokens in wholes]
        encoded.append(_split(prompt[1], ended, tokenizer))
    return encoded


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what plain encoding puts before a text: a BOS for some tokenizers, nothing for others."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    raise AssertionError("plain encoding does not contain the encoding without special tokens")


def _encode_conversations(
    groups: Sequence[TextGroup], tokenizer: PreTrainedTokenizerBase, strict: bool, mode: TextMode | None
) -> list[EncodedGroup | BadRow]:
    check_chat_template(tokenizer)
    rendering, special = (mode.chat_rendering, mode.special_tokens) if mode is not None else ("joint", "template")
    marks = TemplateMarks.of(tokenizer) if strict else None
    rendered: list[list[str] | BadRow] = []
    render = _render_jointly if rendering == "joint" else partial(_render_as_published, rendering)
    for group, parts in zip(groups, render(groups, tokenizer)):
        fault = next((part for part in parts if isinstance(part, BadRow)), None)
        if fault is None and marks is not None:
            fault = marks.fault(group) or _lost_text(group, parts)
            if rendering == "joint":
                fault = fault or _changed_prompt(group, parts)
        rendered.append(fault or parts)
    texts = [text for parts in rendered if not isinstance(parts, BadRow) for text in parts]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    encoded = [
        parts if isinstance(parts, BadRow) else _split(next(ids), [next(ids) for _ in parts[1:]], tokenizer, special)
        for parts in rendered
    ]
    if any(len(turns) > 1 for group in groups for turns in group.completions):
        finds = mode is not None and (rendering, special) == ("joint", "template")
        encoded = [with_turns(*each, tokenizer, mode if finds else None) for each in zip(groups, encoded)]
    return encoded


def _render_jointly(groups: Sequence[TextGroup], tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    """Render each group's prompt with the generation prompt and, for each completion, prompt + completion.

    Returns:
        For each group the texts, prompt first; what a template raises stands as a `BadRow` in a text's place.
    """
    prompts = _render([(group, group.prompt) for group in groups], tokenizer, add_generation_prompt=True)
    pairs = [(group, whole) for group in groups for whole in group.wholes]
    wholes = iter(_render(pairs, tokenizer, add_generation_prompt=False))
    return [[prompt, *(next(wholes) for _ in group.completions)] for group, prompt in zip(groups, prompts)]


def _render_as_published(
    rendering: str, groups: Sequence[TextGroup], tokenizer: PreTrainedTokenizerBase
) -> list[list[Any]]:
    """Return the texts of `_render_jointly` as published code makes them; see `TextMode.chat_rendering`."""
    prompts: list[tuple[TextGroup, Any]] = [(group, group.prompt) for group in groups]
    turns: list[tuple[TextGroup, Any]] = [(group, whole) for group in groups for whole in group.wholes]
    if rendering == "handbook":
        system = _empty_system_turn(tokenizer)
        prompts = [(g, messages if messages[0]["role"] == "system" else system + messages) for g, messages in prompts]
        turns = [(group, completion) for group in groups for completion in group.completions]
    heads = _render(prompts, tokenizer, add_generation_prompt=False)
    texts = iter(_render(turns, tokenizer, add_generation_prompt=False))
    rendered: list[list[Any]] = []
    for group, head in zip(groups, heads):
        parts = [head, *(next(texts) for _ in group.completions)]
        if not any(isinstance(part, BadRow) for part in parts):
            bos, start = str(tokenizer.bos_token), len(str(head))
            own = [str(text).removeprefix(bos) if rendering == "handbook" else str(text)[start:] for text in parts[1:]]
            parts = [head, *(f"{head}{text}" for text in own)]
        rendered.append(parts)
    return rendered


def _empty_system_turn(tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """Return the empty system turn that the alignment handbook puts first, or nothing where the template has none."""
    turn = [{"role": "system", "content": ""}]
    template = str(tokenizer.chat_template)
    if "system" not in template and "<|im_start|>" not in template:
        return []
    try:
        tokenizer.apply_chat_template([*turn, {"role": "user", "content": "?"}], tokenize=False)
    except Exception:  # a template may speak of system turns only to raise at them
        return []
    return turn


def _lost_text(group: TextGroup, parts: Sequence[str]) -> BadRow | None:
    """Return a fault if a template leaves out tools, or of an answer its text or its calls of tools.

    Some do so with the reasoning of earlier turns, and many know no tools.
    """
    needed = [(parts[0], _tool_names([*(group.tools or []), *_calls(group.prompt)]))]
    for completion, whole in zip(group.completions, parts[1:]):
        answers: Any = [turn for turn in completion if turn["role"] == ASSISTANT]  # type: ignore[index]
        texts = [str(turn.get(name) or "") for turn in answers for name in ANSWER_TEXTS]
        needed.append((whole, [*texts, *_tool_names(_calls(completion))]))
    for part, texts in needed:
        shown = " ".join(part.split())
        for text in (" ".join(text.split()) for text in texts):
            if text not in shown:
                return BadRow(
                    Fault.TEXT_LOST,
                    f"the template does not show {text[:60]!r}: set a `chat_template` that does, or take out of the "
                    "row what the template leaves out",
                )
    return None


def _calls(turns: Any) -> list[Any]:
    return [call for turn in turns for call in turn.get("tool_calls") or []]


def _tool_names(tools: Iterable[Any]) -> list[str]:
    """Return the names of declared or called tools."""
    functions = (tool.get("function", tool) for tool in tools if isinstance(tool, dict))
    return [str(each["name"]) for each in functions if isinstance(each, dict) and each.get("name")]


def _changed_prompt(group: TextGroup, parts: Sequence[str]) -> BadRow | None:
    """Return a fault if the prompt and prompt + completion part before the prompt's last text, which would be scored.

    Templates do so that write the time, or move a system turn to the last question.
    """
    prompt, *wholes = parts
    if all(whole.startswith(prompt) for whole in wholes):
        return None
    shared = min(common_prefix_length(prompt, whole) for whole in wholes)
    for message in reversed(group.prompt):
        assert isinstance(message, dict)
        text = str(message.get("content") or "").strip()
        if text and (place := prompt.rfind(text)) >= 0:  # a template may write it in other words
            if place + len(text) <= shared:
                return None
            found = f"they part at {prompt[shared : shared + 40]!r}: set a `chat_template` that renders it alike"
            return BadRow(Fault.PROMPT_CHANGES, found)
    return None


def _render(
    conversations: Sequence[tuple[TextGroup, Any]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> list[str | BadRow]:
    """Render each conversation with the chat template, in one call where no group has its own tools or settings."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    if conversations and not any(group.tools or group.chat_template_kwargs for group, _ in conversations):
        # what a template raises depends on its content; each row is rendered alone then, to find out which it is
        with suppress(Exception), time_limit(RENDER_SECONDS):
            rendered: Any = tokenizer.apply_chat_template([messages for _, messages in conversations], **options)
            return list(rendered)
    return [_render_one(group, messages, tokenizer, options) for group, messages in conversations]


def _render_one(
    group: TextGroup, messages: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> str | BadRow:
    try:
        with time_limit(RENDER_SECONDS):
            settings = group.chat_template_kwargs or {}
            return str(tokenizer.apply_chat_template(messages, tools=group.tools, **options, **settings))
    except Exception as error:
        return BadRow(Fault.REFUSED_BY_TEMPLATE, f"{type(error).__name__}: {error}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the block once it has run so long. Only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@dataclass(frozen=True)
class TemplateMarks:
    """Texts by which a rendered conversation is known. A single special token is none: a question may be about it.

    Attributes:
        headers: what the template writes before a question, and between a question and its answer.
        ends: the special tokens that it writes after an answer.
        drops_system: whether it leaves out a system turn without a word.
    """

    headers: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    drops_system: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TemplateMarks:
        """Render a question and an answer, and see what stands around them; a template that cannot has no marks."""
        turns = [{"role": "user", "content": "QUESTION"}, {"role": ASSISTANT, "content": "ANSWER"}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:
            return cls()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        before, _, rest = text.partition("QUESTION")
        between, _, after = rest.partition("ANSWER")
        ends = tuple(token for token in sorted(special | set(tokenizer.all_special_tokens)) if token in after)
        for token in (*ends, str(tokenizer.bos_token)):
            before = before.split(token)[-1]  # a system turn that the template adds comes first
        opening, between = before.strip(), between.strip()
        headers = (between, *((opening,) if opening not in special else ()))
        drops_system = False
        with suppress(Exception):  # a template that takes no system turn raises for each row that has one
            system = {"role": "system", "content": "INSTRUCTION"}
            drops_system = "INSTRUCTION" not in str(tokenizer.apply_chat_template([system, *turns], tokenize=False))
        return cls(tuple(header for header in headers if "<" in header or "[" in header), ends, drops_system)

    def fault(self, group: TextGroup) -> BadRow | None:
        """Return a fault if a message holds a header, an answer ends with the end of a turn, or a turn is left out."""
        for message in (turn for turns in (group.prompt, *group.completions) for turn in turns):
            assert isinstance(message, dict)
            text = str(message.get("content") or "").rstrip()
            if self.drops_system and message["role"] == "system" and text:
                return BadRow(
                    Fault.TEXT_LOST,
                    f"the template leaves out system turns, such as {text[:60]!r}: set a `chat_template` that has "
                    "them, or put their text into the first question",
                )
            ends = [end for end in self.ends if message["role"] == ASSISTANT and text.endswith(end)]
            if found := [*(header for header in self.headers if header in text), *ends]:
                return BadRow(
                    Fault.TEMPLATED,
                    f"a {message['role']} turn holds {found[0]!r} of the chat template: give the text without it, or "
                    "(generate) take strings as they are with `prompt_format: text`",
                )
        return None


def _split(
    prompt: list[int], wholes: list[list[int]], tokenizer: PreTrainedTokenizerBase, special_tokens: str = "template"
) -> EncodedGroup | BadRow:
    """Split each whole sequence at the beginning that the prompt and all of them share."""
    if special_tokens == "template":
        prompt, wholes = _one_bos(prompt, tokenizer), [_one_bos(whole, tokenizer) for whole in wholes]
    length = min((common_prefix_length(prompt, whole) for whole in wholes), default=len(prompt))
    split = EncodedGroup(prompt[:length], [whole[length:] for whole in wholes], length == len(prompt))
    if special_tokens != "template":
        split = _with_special_tokens(split, tokenizer, always=special_tokens == "sppo")
    if not split.prompt_ids:
        return BadRow(Fault.EMPTY_PROMPT, "no token of the prompt is left before the completion")
    return split


def _with_special_tokens(group: EncodedGroup, tokenizer: PreTrainedTokenizerBase, *, always: bool) -> EncodedGroup:
    """Put a BOS first and an end token last, `always` or where there is none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt, completions = group.prompt_ids, group.completion_ids
    if bos is not None and (always or prompt[:1] != [bos]):
        prompt = [bos, *prompt]
    if eos is not None:
        completions = [[*ids, eos] if always or ids[-1:] != [eos] else ids for ids in completions]
    return replace(group, prompt_ids=prompt, completion_ids=completions)


def with_turns(
    group: TextGroup, encoded: EncodedGroup | BadRow, tokenizer: PreTrainedTokenizerBase, mode: TextMode | None
) -> EncodedGroup | BadRow:
    """Mark in completions of several turns what is not scored; without a mode, and of single turns, all is."""
    if isinstance(encoded, BadRow) or all(len(completion) == 1 for completion in group.completions):
        return encoded
    roles = {turn["role"] for completion in group.completions for turn in completion}  # type: ignore[index]
    whole_turns = replace(encoded, other_turns=roles != {ASSISTANT})
    if mode is None:
        return whole_turns
    skipped: list[Ranges] = []
    for completion, ids in zip(group.completions, encoded.completion_ids):
        scored: list[tuple[int, int]] | None = [(0, len(ids))]
        if len(completion) > 1:
            whole = [*encoded.prompt_ids, *ids]
            scored = _marked_turns(group, completion, whole, tokenizer) or _turns_apart(
                group, completion, whole, tokenizer
            )
        if scored is None:
            return whole_turns
        start = len(encoded.prompt_ids) if len(completion) > 1 else 0
        kept = [
            (begin - start, end - start) for begin, end in (scored if mode.completion_turns == "all" else scored[-1:])
        ]
        edges = [0, *(edge for each in kept for edge in each), len(ids)]
        skipped.append(tuple((begin, end) for begin, end in zip(edges[::2], edges[1::2]) if begin < end))
    return replace(encoded, skipped=tuple(skipped) if any(skipped) else ())


def _marked_turns(
    group: TextGroup, completion: Any, whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]] | None:
    """Return the ranges that a template with `{% generation %}` marks in a completion, or None where it has none."""
    if not _MARKS_ASSISTANT.search(str(tokenizer.chat_template)):
        return None
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        found: Any = tokenizer.apply_chat_template(
            group.prompt + completion, tools=group.tools, **options, **(group.chat_template_kwargs or {})
        )
    except Exception:  # a slow tokenizer has no offsets; the ids of the turns are compared then
        return None
    mask = list(found["assistant_masks"])
    offset = len(mask) - len(whole)  # a doubled BOS was dropped
    if offset < 0 or list(found["input_ids"])[offset:] != whole:
        return None
    mask = [0, *mask[offset:], 0]
    edges = [place for place in range(1, len(mask)) if mask[place] != mask[place - 1]]
    ranges = [(begin - 1, end - 1) for begin, end in zip(edges[::2], edges[1::2])]
    answers = sum(turn["role"] == ASSISTANT for turn in group.prompt)  # type: ignore[index]
    in_completion = sum(turn["role"] == ASSISTANT for turn in completion)
    return ranges[answers:] if len(ranges) == answers + in_completion else None


def _turns_apart(
    group: TextGroup, completion: Any, whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]] | None:
    """Return where the assistant's turns stand, by rendering the dialogue up to each; None where that is no prefix.

    Args:
        group: the prompt, tools and settings.
        completion: its turns.
        whole: ids of prompt and completion.
        tokenizer: gives the template.
    """
    answers = [place for place, turn in enumerate(completion) if turn["role"] == ASSISTANT]
    before = [(group, group.prompt + completion[:place]) for place in answers]
    until = [(group, group.prompt + completion[: place + 1]) for place in answers]
    texts = [
        *_render(before, tokenizer, add_generation_prompt=True),
        *_render([*until, (group, group.prompt + completion)], tokenizer, add_generation_prompt=False),
    ]
    if any(isinstance(text, BadRow) or not str(texts[-1]).startswith(str(text)) for text in texts):
        return None
    ids = tokenizer(texts[:-1], add_special_tokens=False, verbose=False)["input_ids"]
    places = [common_prefix_length(_one_bos(each, tokenizer), whole) for each in ids]
    ranges = list(zip(places[: len(answers)], places[len(answers) :]))
    return ranges if all(begin < end for begin, end in ranges) else None


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Drop the first of two BOS, as a text that brings its own gets from a tokenizer that adds one."""
    bos = tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


@dataclass(frozen=True)
class Truncation:
    """How a prompt and its R >= 1 completions are made to fit `max_length`.

    With `max_prompt_length`: nothing is cut while the prompt and the longest completion fit; otherwise the prompt
    keeps its last `max_prompt_length` tokens and then each completion its first `max_length - len(prompt)`.
    Without: "keep_start" keeps the first `max_length` tokens of prompt + completion, so a prompt of `max_length`
    tokens leaves no room; "keep_end" cuts the prompt's beginning until the longest completion fits, and a completion
    that is too long by itself keeps its last `max_length - 1` tokens behind one prompt token. A prompt that loses its
    beginning keeps its BOS, which counts. "drop" cuts nothing: a row that does not fit cannot be used.
    "trl09" is TRL 0.9's `DPOTrainer`: a prompt that loses its beginning loses its BOS with it, and completions that
    still do not fit keep their first `max_length - max_prompt_length` tokens, however short the prompt is.

    Args:
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of a cut prompt.
        mode: "keep_start", "keep_end" (both read only without `max_prompt_length`), "drop", or "trl09" (which needs
            both lengths).
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, not {self.mode!r}.")
        if self.mode == "trl09" and None in (self.max_length, self.max_prompt_length):
            raise ValueError(
                'truncation_mode "trl09" needs max_length and max_prompt_length; there they were 512 and 128.'
            )
        if self.mode == "drop" and self.max_prompt_length is not None:
            raise ValueError(
                'max_prompt_length says how to cut a prompt, and truncation_mode "drop" cuts none: set one of them.'
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a prompt token and a completion token), not {self.max_length}."
            )
        if self.max_prompt_length is None:
            return
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}.")
        if self.max_length is None:
            raise ValueError("max_prompt_length needs max_length: without it nothing is cut. Set both, or neither.")
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), "
                "or no room is left for completions."
            )

    def cut(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], bos_token_id: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """Return the kept ids of the prompt and of each completion; one may come out empty ("keep_start" only).

        Raises:
            BadRow: the row does not fit and must not be cut.
        """
        longest = max((len(completion) for completion in completions), default=0)
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return list(prompt), [list(completion) for completion in completions]
        if self.mode == "drop":
            raise BadRow(Fault.TOO_LONG, f"{len(prompt) + longest} tokens, max_length {self.max_length}")
        if self.max_prompt_length is None and self.mode == "keep_end":
            room = self.max_length - 1
            completions = [completion[max(len(completion) - room, 0) :] for completion in completions]
            kept = keep_last(prompt, self.max_length - min(longest, room), bos_token_id)
            return kept, [list(completion) for completion in completions]
        limit = len(prompt) if self.max_prompt_length is None else self.max_prompt_length
        if self.mode == "trl09":
            kept = list(prompt[-limit:])
            room = self.max_length - limit if len(kept) + longest > self.max_length else longest
        else:
            kept = keep_last(prompt, limit, bos_token_id)
            room = max(self.max_length - len(kept), 0)
        return kept, [list(completion[:room]) for completion in completions]


def keep_last(ids: Sequence[int], limit: int, bos_token_id: int | None) -> list[int]:
    """Return the last `limit` ids; a BOS in first place stays there and counts."""
    assert limit >= 1
    if len(ids) <= limit:
        return list(ids)
    if bos_token_id is not None and ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - (limit - 1) :]]
    return list(ids[len(ids) - limit :])


def fit(encoded: EncodedGroup, truncation: Truncation, bos_token_id: int | None) -> EncodedGroup:
    """Cut a group to the length that is trained on.

    Raises:
        BadRow: the prompt alone is too long (no completions), or nothing is left to tell the completions apart.
    """
    prompt, completions = encoded.prompt_ids, encoded.completion_ids
    if not completions:
        if truncation.max_length is not None and len(prompt) > truncation.max_length:
            raise BadRow(Fault.PROMPT_TOO_LONG, f"{len(prompt)} tokens, max_length {truncation.max_length}")
        return encoded
    if not all(completions):
        raise BadRow(Fault.EMPTY_COMPLETION, "a completion has no token of its own")
    if _all_same(completions):
        raise BadRow(Fault.IDENTICAL_COMPLETIONS, "all completions have the same tokens")
    prompt, completions = truncation.cut(prompt, completions, bos_token_id)
    if not all(completions):
        raise BadRow(Fault.NO_ROOM, f"{len(encoded.prompt_ids)} prompt tokens, max_length {truncation.max_length}")
    if _all_same(completions):
        raise BadRow(
            Fault.IDENTICAL_AFTER_CUT, f"the kept {len(completions[0])} tokens of all completions are the same"
        )
    lengths = zip([encoded.prompt_ids, *encoded.completion_ids], [prompt, *completions])
    cut = tuple(place for place, (whole, kept) in enumerate(lengths) if len(kept) < len(whole))
    fitted = replace(encoded, prompt_ids=prompt, completion_ids=completions, cut=cut)
    return fitted if not encoded.skipped else _cut_ranges(encoded, fitted, truncation)


def _cut_ranges(encoded: EncodedGroup, fitted: EncodedGroup, truncation: Truncation) -> EncodedGroup:
    """Move the ranges of what is not scored with the ids that were kept.

    Raises:
        BadRow: nothing of a completion is left to score.
    """
    from_end = truncation.mode == "keep_end" and truncation.max_prompt_length is None
    moved: list[Ranges] = []
    for ranges, whole, kept in zip(encoded.skipped, encoded.completion_ids, fitted.completion_ids):
        first = len(whole) - len(kept) if from_end else 0
        bounds = [(max(begin - first, 0), min(end - first, len(kept))) for begin, end in ranges]
        moved.append(tuple((begin, end) for begin, end in bounds if begin < end))
        if sum(end - begin for begin, end in moved[-1]) >= len(kept):
            raise BadRow(
                Fault.NO_ROOM, f"of a completion's answers none is left within {truncation.max_length} tokens"
            )
    return replace(fitted, skipped=tuple(moved) if any(moved) else ())


def _all_same(completions: Sequence[Sequence[int]]) -> bool:
    return len(completions) > 1 and all(list(ids) == list(completions[0]) for ids in completions[1:])
