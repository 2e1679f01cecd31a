"""Token ids of prompts and completions: against TRL's own code, against whole sequences, and at awkward boundaries."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import DPOTrainer

from prefopt.data import BadRow, prepare_tokenizer, tokenizer_fingerprint
from prefopt.data.encoding import EncodedGroup, TextGroup, encode_groups
from tests.tiny import CHAT_TEMPLATES, tiny_tokenizer

STYLES = sorted(CHAT_TEMPLATES)


def turns(*contents, system=None):
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def answer(text):
    return [{"role": "assistant", "content": text}]


MESSAGE_ROWS = [
    {"prompt": turns("What is two plus three?"), "chosen": answer("The answer is five."), "rejected": answer("Two.")},
    {"prompt": turns("Hi", "Hello!", "A colour?"), "chosen": answer("Blue"), "rejected": answer("Bluest of all")},
    {"prompt": turns("Grüße 🙂\n\n"), "chosen": answer("  你好 "), "rejected": answer("\n\nnaïve café")},
    {"prompt": turns("a"), "chosen": answer("b") + turns("c") + answer("d"), "rejected": answer("e")},
    {"prompt": turns("None <|im_end|> </s> [INST]"), "chosen": answer("None"), "rejected": answer("True </s>")},
]
STRING_ROWS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "The sky is bl", "chosen": "ue today", "rejected": "ack tonight"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " Go."},
    {"prompt": "x ", "chosen": "already ended</s>", "rejected": "y"},
]


def trls(rows, tokenizer):
    """The ids that TRL's own preparation gives the rows."""
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    logging.getLogger("trl").setLevel(logging.ERROR)
    prepared = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, "train")
    return [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in prepared]


def ours(rows, tokenizer, **context):
    groups = encode_groups(
        [TextGroup(row["prompt"], [row["chosen"], row["rejected"]], **context) for row in rows], tokenizer
    )
    return [(group.prompt_ids, group.completion_ids) for group in groups]


@pytest.mark.parametrize("style", STYLES)
def test_messages_get_trls_ids(style):
    tokenizer = tiny_tokenizer(style)
    assert ours(MESSAGE_ROWS, tokenizer) == trls(MESSAGE_ROWS, tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_strings_get_trls_ids(adds_bos):
    tokenizer = tiny_tokenizer(None, adds_bos=adds_bos)
    assert ours(STRING_ROWS, tokenizer) == trls(STRING_ROWS, tokenizer)


def test_tools_and_template_settings_reach_the_template():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}" + CHAT_TEMPLATES["chatml"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    group = TextGroup(turns("a"), [answer("b"), answer("c")], tools, {"mood": "calm"})
    (encoded,) = encode_groups([group], tokenizer)
    rows = [
        {
            **MESSAGE_ROWS[0],
            "prompt": turns("a"),
            "chosen": answer("b"),
            "rejected": answer("c"),
            "tools": tools,
            "chat_template_kwargs": {"mood": "calm"},
        }
    ]
    assert [(encoded.prompt_ids, encoded.completion_ids)] == trls(rows, tokenizer)
    assert tokenizer.decode(encoded.prompt_ids).startswith('[{"type": "function", "function": {"name": "f"}}]calm')


# what the scored part of an answer " Yes. " looks like in each family, and how often the BOS stands in the prompt
ENDS = {
    "llama3": ("Yes.<|eot_id|>", 1),
    "mistral": (" Yes.</s>", 1),
    "gemma2": ("Yes.<end_of_turn>\n", 1),
    "chatml": (" Yes. <|im_end|>\n", 0),
    "zephyr": (" Yes. </s>\n", 0),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_message_rows_end_as_their_template_ends(style, adds_bos):
    """Special tokens are the template's alone, whatever plain encoding adds."""
    tokenizer = tiny_tokenizer(style, adds_bos=adds_bos)
    (group,) = encode_groups([TextGroup(turns("Is it?"), [answer(" Yes. "), answer("No")])], tokenizer)
    end, count = ENDS[style]
    assert (
        tokenizer.decode(group.completion_ids[0]).lstrip("\n") == end
    )  # llama3: the header's line ends merge, see below
    assert group.prompt_ids.count(tokenizer.bos_token_id) == count
    assert group.prompt_ids[0] == tokenizer.bos_token_id or count == 0
    assert tokenizer.bos_token_id not in group.completion_ids[0]


def test_the_default_system_prompt_stays_in_the_prompt():
    tokenizer = tiny_tokenizer("chatml")
    (group,) = encode_groups([TextGroup(turns("Is it?"), [answer("Yes"), answer("No")])], tokenizer)
    assert "You are a helpful assistant." in tokenizer.decode(group.prompt_ids)
    assert tokenizer.decode(group.completion_ids[0]) == "Yes<|im_end|>\n"


@pytest.mark.parametrize("adds_bos, bos", [(True, [1]), (False, [])])
def test_strings_get_one_bos_and_one_end(adds_bos, bos):
    tokenizer = tiny_tokenizer(None, adds_bos=adds_bos)
    assert tokenizer.bos_token_id == 1

    def plain(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for prompt in ("Name a colour.", *(["<s>Name a colour.", "<s><s>Name a colour."] if adds_bos else [])):
        (group,) = encode_groups([TextGroup(prompt, [" Blue.", " Red.</s>"])], tokenizer)
        assert group.prompt_ids == [*bos, *plain("Name a colour.")]
        assert group.completion_ids == [[*plain(" Blue."), 2], [*plain(" Red."), 2]]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled():
    from tokenizers import processors

    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("Name")["input_ids"][-1] == 2
    (group,) = encode_groups([TextGroup("Name a colour.", [" Blue.", " Red."])], tokenizer)
    assert group.prompt_ids[0] == 1 and 2 not in group.prompt_ids
    assert [ids.count(2) for ids in group.completion_ids] == [1, 1]
    assert group.prompt_is_prefix


def test_tokens_that_merge_across_the_boundary():
    """ "bl" + "ue" is one token in context: the split goes back to where all agree, and the row is marked."""
    tokenizer = tiny_tokenizer(None, adds_bos=False, corpus=["The sky is blue, is blue, is black"])
    (merged,) = encode_groups([TextGroup("The sky is bl", ["ue", "ack"])], tokenizer)
    assert not merged.prompt_is_prefix
    assert tokenizer.decode(merged.prompt_ids) == "The sky is"
    assert tokenizer.decode(merged.completion_ids[0]) == " blue</s>"
    (clean,) = encode_groups([TextGroup("The sky is", [" blue", " black"])], tokenizer)
    assert clean.prompt_is_prefix
    # a template's line ends before the answer, in a tokenizer that pairs them only when nothing follows
    (header,) = encode_groups([TextGroup(turns("Is it?"), [answer("Yes"), answer("No")])], tiny_tokenizer("llama3"))
    assert not header.prompt_is_prefix


def test_groups_of_any_size_and_prompts_alone_share_their_prompt_ids():
    for style in ("mistral", "gemma2", "chatml", "zephyr"):
        tokenizer = tiny_tokenizer(style)
        prompt = turns("Is it?")
        three, none = encode_groups(
            [TextGroup(prompt, [answer("a"), answer("b"), answer("c")]), TextGroup(prompt)], tokenizer
        )
        assert len(three.completion_ids) == 3
        assert none == EncodedGroup(three.prompt_ids, [], True)


@pytest.mark.parametrize("style", ["mistral", "gemma2"])
def test_a_row_that_the_template_refuses_leaves_the_others_alone(style):
    tokenizer = tiny_tokenizer(style)
    good = TextGroup(turns("Is it?"), [answer("Yes"), answer("No")])
    bad = TextGroup(turns("Is it?", system="Be brief."), [answer("Yes"), answer("No")])
    first, fault, last = encode_groups([good, bad, good], tokenizer)
    assert first == last and isinstance(first, EncodedGroup)
    assert isinstance(fault, BadRow) and fault.reason == "refused by the chat template"
    assert "ole" in fault.detail and "TemplateError" in fault.detail


def test_an_empty_prompt_is_a_fault_unless_a_bos_stands_there():
    with_bos, without = tiny_tokenizer(None), tiny_tokenizer(None, adds_bos=False)
    (group,) = encode_groups([TextGroup("", ["a", "b"])], with_bos)
    assert group.prompt_ids == [1]
    (fault,) = encode_groups([TextGroup("", ["a", "b"])], without)
    assert isinstance(fault, BadRow) and fault.reason == "empty prompt"


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="lists of messages, but the tokenizer of this model has no chat template"):
        encode_groups([TextGroup(turns("a"), [answer("b"), answer("c")])], tiny_tokenizer(None))


def test_pad_and_end_tokens():
    tokenizer = tiny_tokenizer(None)
    assert prepare_tokenizer(tokenizer).pad_token == "<pad>"
    tokenizer.pad_token = None
    assert prepare_tokenizer(tokenizer).pad_token_id == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        prepare_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="no end token"):
        encode_groups([TextGroup("a", ["b", "c"])], tokenizer)


def test_the_fingerprint_follows_what_decides_ids_and_nothing_else():
    tokenizer = tiny_tokenizer("chatml")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenizer.pad_token = "</s>"
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer("chatml"))
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before
    assert len({tokenizer_fingerprint(tiny_tokenizer(None, adds_bos=bos)) for bos in (True, False)}) == 2
    assert tokenizer_fingerprint(tiny_tokenizer("chatml", vocab_size=380)) != before


TOKENIZERS = {style: tiny_tokenizer(style) for style in (None, *STYLES)}
TEXT = st.text(st.sampled_from("ab \n.你é<|>"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([None, *STYLES]), TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_prompt_and_completion_ids_are_the_whole_sequence(style, prompt, completions):
    """prompt_ids + completion_ids is exactly what the tokenizer gives the whole text or conversation."""
    tokenizer = TOKENIZERS[style]
    if style is None:
        (group,) = encode_groups([TextGroup(prompt, completions)], tokenizer)
        wholes = [[*tokenizer(prompt + completion)["input_ids"], 2] for completion in completions]
    else:
        (group,) = encode_groups([TextGroup(turns(prompt), [answer(text) for text in completions])], tokenizer)
        wholes = [tokenizer.apply_chat_template(turns(prompt, text))["input_ids"] for text in completions]
    assert [[*group.prompt_ids, *ids] for ids in group.completion_ids] == wholes
    assert all(group.completion_ids) and group.prompt_ids
