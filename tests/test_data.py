"""data.py and support/readers.py: rendering and masks against transformers and TRL, truncation and
the ledger by their properties, mistakes in files, rows and settings by their messages. Tokenizers
are built here; what needs the real ones skips without ../shared."""

import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import data
from data import Tokenizer, fit, load_examples, render_row, split_holdout
from model import IGNORE
from support.errors import UserError
from support.readers import read_rows
from support.settings import parse_config

SHARED = Path(__file__).parents[2] / "shared"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared folder beside the repository")

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"  # noqa: E501
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")  # fmt: skip
LLAMA = ("{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\\n\\n' + m['content'] | trim + '<|eot|>' }}"  # noqa: E501
         "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}")  # fmt: skip  # noqa: E501
THINK = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set c = m.content %}{% if m.role == 'assistant' %}"  # noqa: E501
         "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
         "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ c + '<|im_end|>\\n' }}{% endfor %}"  # noqa: E501
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if no_think %}{{ '<think>\\n\\n</think>\\n\\n' }}"  # noqa: E501
         "{% endif %}{% endif %}")  # fmt: skip
PLAIN = ("{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}")  # fmt: skip
MARKED = CHATML.replace("{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
                        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"  # noqa: E501
                        "{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}"  # noqa: E501
                        "{% endif %}")  # fmt: skip
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"  # noqa: E501
           "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|eos|>' }}{% else %}{{ raise_exception('no such role') }}"  # noqa: E501
           "{% endif %}{% endfor %}")  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "think": THINK,
    "plain": PLAIN,
    "marked": MARKED,
    "mistral": MISTRAL,
}
ENDS = {"llama": "<|eot|>", "plain": "<|eos|>", "mistral": "<|eos|>"}
SPECIAL = [
    "<|bos|>",
    "<|eos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|stop|>",
    "<|eot|>",
]
WORDS = "a cat sat on the mat and said: yes no <b> é 猫 12 maybe\n\n x  y".split(" ")


PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen's  # noqa: E501


def write_tokenizer(folder, template=None, bos=True, sentencepiece=False, **config):
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if sentencepiece else None))
    if sentencepiece:  # Llama 2's way: a space before every text
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
    alphabet = (
        sorted(set("▁\n[]/#:<>" + "".join(WORDS)))
        if sentencepiece
        else pre_tokenizers.ByteLevel.alphabet()
    )
    special = (["<unk>"] if sentencepiece else []) + SPECIAL
    text = [" ".join(random.Random(n).choices(WORDS, k=30)) for n in range(50)]
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=list(alphabet),
            special_tokens=special,
            show_progress=False,
        ),
    )
    if bos:
        at = backend.token_to_id("<|bos|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", at)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.enable_truncation(5)  # as files that were saved in use have it; it must not bite
    backend.save(str(folder / "tokenizer.json"))
    names = {
        "eos_token": "<|eos|>",
        "bos_token": {"content": "<|bos|>"} if bos else None,
        "unk_token": "<unk>" if sentencepiece else None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def styled(request, tmp_path_factory):
    """(style, tokenizer) for each way of writing a template."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, Tokenizer(write_tokenizer(folder, TEMPLATES[request.param]))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"), CHATML))


def reference(folder, template=None):
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {
        key: config[key]
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if isinstance(config.get(key), str)
    }
    found = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    found.chat_template = template or (folder / "chat_template.jinja").read_text()
    return found


def as_turn(*contents, system=None):
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]
    return ([{"role": "system", "content": system}] if system else []) + turns


def scored_text(tokenizer, segment):
    return tokenizer.decode(segment.labels[segment.labels != IGNORE], skip_special=False)


def masked_text(tokenizer, segment):
    return tokenizer.decode(segment.ids[segment.labels == IGNORE], skip_special=False)


def rows_of(examples):
    return [examples.row(n)[1] for n in range(len(examples))]


# --- tokenizer and template -----------------------------------------------------------------------

CHATS = {
    "single": as_turn("Hi there", "Hello  you"),
    "multi": as_turn("a", "bbb", "c", "ddd"),
    "system": as_turn("a", "b", "c", "d", system="Be brief. é 猫 😀"),
    "think": as_turn("a", "<think>\none\n</think>\n\nbbb", "c", "<think>\ntwo\n</think>\n\nddd"),
    "field": as_turn("a", "b")[:1]
    + [{"role": "assistant", "content": "b", "reasoning_content": "because"}],
    "reasoning": as_turn("a", "b")[:1]
    + [{"role": "assistant", "content": "b", "thinking": "because", "tool_calls": None}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "<é> & 'x'",
            "parameters": {"b": 1, "a": [1, 2.5, None]},
        },
    }
]


@real
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_real_templates_render_as_transformers_does(family):
    folder = SHARED / "tokenizers" / family
    ours, theirs = Tokenizer(folder), reference(folder)
    cases = [(chat, {}) for chat in CHATS.values()] + [
        (as_turn("q"), {"add_generation_prompt": True})
    ]
    cases += [
        (as_turn("q", "a", "r"), {"add_generation_prompt": True, "enable_thinking": False}),
        (CHATS["multi"], {"tools": TOOLS}),
    ]
    cases += [(CHATS["single"], {"date_string": "1 Jan 2030"})]
    for chat, options in cases:
        text = ours.render(chat, **options)
        assert text == theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.encode(text) == theirs.apply_chat_template(chat, return_dict=False, **options)
    for name, chat in CHATS.items():
        if family == "llama3" or name != "reasoning":
            segment = render_row({"messages": chat}, ours)[0]
            assert segment.ids.tolist() == theirs.apply_chat_template(chat, return_dict=False), (
                name
            )
    assert ours.encode("Hi", special=True) == theirs("Hi")["input_ids"] and len(ours) == len(
        theirs
    )
    assert ours.decode(ours.encode("<|im_end|>é", special=True)) == theirs.decode(
        theirs("<|im_end|>é")["input_ids"], skip_special_tokens=True
    )


def test_template_functions_are_those_of_transformers(tmp_path):
    template = ("{{ strftime_now('%d %b %Y') }}|{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ {'b': '<&>é', 'a': 1} | tojson }}"  # noqa: E501
                "|{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}|{{ documents is none }}"  # noqa: E501
                "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}\n  {% if true %}\nx\n  {% endif %}\n{{ m.content }}"  # noqa: E501
                "{% endfor %}\n")  # fmt: skip
    folder = write_tokenizer(tmp_path, template)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = reference(folder).apply_chat_template(as_turn("a", "b"), tools=TOOLS, tokenize=False)
    assert Tokenizer(folder).render(as_turn("a", "b"), tools=TOOLS) == theirs
    assert "17 May 1999" in Tokenizer(folder, now=datetime(1999, 5, 17)).render(as_turn("a"))


def test_where_templates_and_end_tokens_come_from(tmp_path):
    folder = write_tokenizer(
        tmp_path / "named",
        chat_template=[
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "D"},
        ],
    )
    tokenizer = Tokenizer(folder)
    assert (
        tokenizer.render(as_turn("a")) == "D"
        and tokenizer.render(as_turn("a"), tools=TOOLS) == "T"
    )
    assert (
        Tokenizer(write_tokenizer(tmp_path / "string", chat_template="S")).render(as_turn("a"))
        == "S"
    )
    (folder / "chat_template.jinja").write_text("F")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1, 6]}')
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    tokenizer = Tokenizer(folder)
    assert (
        tokenizer.render(as_turn("a")) == "F"
        and tokenizer.eos_ids == [1, 5, 6, 7]
        and tokenizer.bos_id == 0
        and tokenizer.pad_id is None
    )
    bare = Tokenizer(write_tokenizer(tmp_path / "bare"))
    assert not bare.has_template and bare.encode("a cat", special=True)[0] == bare.bos_id
    with pytest.raises(UserError, match="no chat template.*prompt/completion"):
        bare.render(as_turn("a"))


@pytest.mark.parametrize("files, message", [
    ({"tokenizer.json": None}, "no tokenizer.json in it"),
    ({"tokenizer.json": "{}"}, "tokenizer.json: not a tokenizer"),
    ({"tokenizer_config.json": "{broken"}, "tokenizer_config.json: not valid JSON"),
    ({"tokenizer_config.json": '{"chat_template": {"a": 1}}'}, "tokenizer_config.json: not a chat template"),  # noqa: E501
    ({"tokenizer_config.json": '{"chat_template": [{"name": "x", "template": "y"}]}'}, "no template is named 'default': x"),  # noqa: E501
])  # fmt: skip
def test_tokenizers_that_are_broken_are_named(tmp_path, files, message):
    folder = write_tokenizer(tmp_path)
    for name, text in files.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(folder).render(as_turn("a"))
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("template, message", [
    ("{% if %}", "chat_template.jinja: not a chat template.*Expected an expression"),
    ("{{ raise_exception('only user roles') }}", "chat_template.jinja: the chat template failed: line 1: only user roles"),  # noqa: E501
    ("{{ messages[7].content.x }}", "the chat template failed"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template failed.*unsafe"),
    ("{{ messages.append(1) }}", "the chat template failed.*unsafe"),
    ("{% for i in range(10000000) %}{% endfor %}", "the chat template failed.*[Rr]ange"),
])  # fmt: skip
def test_templates_that_fail_are_named(tmp_path, template, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(write_tokenizer(tmp_path, template)).render(as_turn("a"))
    assert len(str(caught.value).splitlines()) <= 2


# --- masks ----------------------------------------------------------------------------------------


def random_chat(rng):
    """Contents that try to mislead: repeated, empty inside, ending in space, holding headers of other templates."""  # noqa: E501

    def pick():
        return (
            " ".join(
                rng.choices(
                    [*WORDS, "###", "assistant:", "[INST]", "<think>"], k=rng.randint(1, 8)
                )
            ).strip()
            or "x"
        )

    pool = [pick() for _ in range(2)]
    return as_turn(
        *(
            rng.choice(pool) if rng.random() < 0.5 else pick()
            for _ in range(2 * rng.randint(1, 4))
        )
    )


def test_masks_hold_every_answer_and_its_end(styled):
    style, tokenizer = styled
    end, rng = ENDS.get(style, "<|im_end|>"), random.Random(1)
    for n in range(60):
        chat = random_chat(rng)
        answers = [
            m["content"].strip() if style == "llama" else m["content"]
            for m in chat
            if m["role"] == "assistant"
        ]
        if style == "mistral":
            answers = [
                " " + answer for answer in answers
            ]  # its generation prompt ends before the space
        parts = [answer + end for answer in answers]
        if style == "plain":  # nothing ends a turn but the last, where eos is added
            parts = answers[:-1] + [answers[-1] + end]
        if style == "think":
            parts[-1] = "<think>\n\n</think>\n\n" + parts[-1]
        if style == "marked":
            parts = [part + "\n" for part in parts]  # as the template says
        segment = render_row({"messages": chat}, tokenizer)[0]
        assert scored_text(tokenizer, segment) == "".join(parts), (style, n)
        assert segment.ids.dtype == segment.labels.dtype == np.int32
        last = render_row({"messages": chat}, tokenizer, completion_only_loss=True)[0]
        assert scored_text(tokenizer, last) == parts[-1]
        full = tokenizer.decode(segment.ids, skip_special=False)
        rendered = tokenizer.render(chat)
        assert (
            full == rendered[: rendered.rindex(answers[-1]) + len(answers[-1])] + end
            if style == "plain"
            else full == rendered
        )
        everything = render_row({"messages": chat}, tokenizer, assistant_only_loss=False)[0]
        assert (everything.labels[1:] == everything.ids[1:]).all() and everything.labels[
            0
        ] == IGNORE
        # the prompt has the ids it has at generation, and the whole goes on from there
        prompt = tokenizer.encode(tokenizer.render(chat[:-1], True))
        if style not in ("think", "marked") or len(chat) == 2:
            assert last.ids[: len(prompt)].tolist() == prompt or len(chat) > 2
        pair = render_row({"prompt": chat[:-1], "completion": chat[-1:]}, tokenizer)[0]
        assert scored_text(tokenizer, pair) == parts[-1]


def test_thoughts_that_a_later_turn_strips(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, THINK))
    chat = as_turn("q", "<think>\nx\n</think>\n\na", "<think> r", "<think>\ny\n</think>\n\nb")
    segment = render_row({"messages": chat}, tokenizer)[0]
    assert scored_text(tokenizer, segment) == "a<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    given = render_row({"messages": chat, "chat_template_kwargs": {"no_think": True}}, tokenizer)[
        0
    ]
    assert (
        scored_text(tokenizer, given) == "a<|im_end|>b<|im_end|>"
    )  # the prompt opens and closes the thought itself


def write_wild(folder, name):
    """A tokenizer with TRL's copy of a well-known template and every token that it names."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("this TRL has no such template")
    write_tokenizer(folder, path.read_text(), bos_token="<|bos|>")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(
        sorted(set(re.findall(r"<[|｜]?[A-Za-z_▁]+[|｜]?>", path.read_text())) | {"<|im_end|>"})
    )
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    return folder, path.with_name(f"{name}_training.jinja").read_text()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507", "llama3"])
def test_masks_equal_trl(tmp_path, name):
    """TRL's {% generation %} variants of templates, against ours from the templates as they are shipped. TRL's Qwen3
    also scores the newline that follows the end of a turn, which no model is ever asked for."""  # noqa: E501
    folder, training = write_wild(tmp_path, name)
    ours, theirs = Tokenizer(folder), reference(folder, training)
    for chat in (
        CHATS["single"],
        CHATS["system"][:3],
        CHATS["think"][-2:],
        *([CHATS["multi"]] if name != "qwen3" else []),
    ):
        found = theirs.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = np.array(found["input_ids"]), np.array(found["assistant_masks"], bool)
        segment = render_row({"messages": chat}, ours)[0]
        newline = np.append(False, np.isin(ids[:-1], ours.end_ids)) & (
            ids == ours.encode("\n")[0]
        )
        assert segment.ids.tolist() == ids.tolist()
        assert ((segment.labels != IGNORE) == (mask & ~newline)).all() and mask.any()


def test_generation_tags_give_transformers_masks(tmp_path):
    folder = write_tokenizer(tmp_path, MARKED)
    ours, theirs, rng = Tokenizer(folder), reference(folder), random.Random(2)
    for _ in range(20):
        chat = random_chat(rng)
        found = theirs.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        segment = render_row({"messages": chat}, ours)[0]
        if (
            segment.ids.tolist() == found["input_ids"]
        ):  # else a token straddles prompt and answer there
            assert (segment.labels != IGNORE).astype(int).tolist() == found["assistant_masks"]
    (folder / "chat_template.jinja").write_text(
        MARKED.replace(
            "+ '<|im_end|>\\n' }}{% endgeneration %}",
            "}}{% endgeneration %}{{ '<|im_end|>\\n' }}",
        )
    )
    segment = render_row({"messages": as_turn("q", "a", "r", "b")}, Tokenizer(folder))[0]
    assert (
        scored_text(Tokenizer(folder), segment) == "a<|im_end|>b<|im_end|>"
    )  # the tags leave the end out: never here


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen2_5", "llama3", "gemma", "phi3", "deepseekv3", "qwen3_5_think"]
)
def test_turns_are_found_in_templates_of_the_wild(tmp_path, name):
    tokenizer = Tokenizer(write_wild(tmp_path, name)[0])
    text, spans, is_open = tokenizer.turns(as_turn("x", "x", "and", "yes"))
    assert (
        text == tokenizer.render(as_turn("x", "x", "and", "yes"))
        and not is_open
        and len(spans) == 2
    )
    for (start, end), answer in zip(spans.values(), ("x", "yes")):
        assert re.fullmatch(
            r"(<think>)?\s*(</think>\s*)?" + answer + r"(\s*<[^<>]+>)+", text[start:end]
        ), text[start:end]


@real
def test_tool_calls_are_the_models_words():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat = [
        *as_turn("q"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        *as_turn("", "seven")[1:],
    ]
    row = {"messages": chat, "tools": json.dumps(TOOLS)}
    qwen, llama = (Tokenizer(SHARED / "tokenizers" / name) for name in ("qwen3", "llama3"))
    assert scored_text(qwen, render_row(row, qwen)[0]) == (
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|><think>\n\n</think>\n\nseven<|im_end|>'  # noqa: E501
    )
    assert (
        scored_text(llama, render_row(row, llama)[0])
        == '{"name": "f", "parameters": {"x": 1}}<|eot_id|>seven<|eot_id|>'
    )


# --- rows -----------------------------------------------------------------------------------------


def test_every_schema(chatml, tmp_path):
    def scored(row, **options):
        return scored_text(chatml, render_row(row, chatml, **options)[0])

    def whole(row):
        return chatml.decode(render_row(row, chatml)[0].ids, skip_special=False)

    row = {"prompt": "a cat", "completion": " sat"}
    assert scored(row) == " sat<|eos|>" and whole(row) == "<|bos|>a cat sat<|eos|>"
    assert scored(row, completion_only_loss=False) == "a cat sat<|eos|>"
    assert scored({**row, "completion": " sat<|eos|>"}) == " sat<|eos|>"
    assert scored({"text": "a cat"}) == "a cat<|eos|>"
    assert scored({"prompt": "a", "completion": as_turn("", "b")[1:]}) == "b<|im_end|>"
    assert scored({"prompt": as_turn("u", "v", "a"), "completion": "b"}) == "b<|im_end|>"
    assert (
        scored(
            {"prompt": as_turn("u", "v", "a"), "completion": "b"},
            completion_only_loss=False,
        )
        == "v<|im_end|>b<|im_end|>"
    )
    assert scored({"prompt": "p", "chosen": "c", "rejected": "r"}) == "c<|eos|>"
    chat = {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
        "weight": 0.5,
    }
    assert scored(chat) == "a<|im_end|>" and whole(chat).startswith(
        "<|im_start|>system\ns<|im_end|>"
    )
    assert render_row(chat, chatml)[0].weight == 0.5 and render_row(row, chatml)[0].weight == 1
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}],
        },
        *as_turn("", "a")[1:],
    ]
    assert whole({"messages": parts}).startswith("<|im_start|>user\nqr<|im_end|>")
    alpaca = {"instruction": "do", "input": "it", "output": "done", "text": "not this"}
    assert (
        whole(alpaca)
        == "<|im_start|>user\ndo\nit<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n"
    )
    bare = Tokenizer(write_tokenizer(tmp_path, bos=False))
    segment = render_row(alpaca, bare)[0]
    assert scored_text(bare, segment) == "done<|eos|>" and masked_text(bare, segment).endswith(
        "### Input:\nit\n\n### Response:"
    )
    with pytest.raises(UserError, match="no chat template"):
        render_row(chat, bare)


def test_preference_rows_share_their_prompt(chatml):
    pair = [as_turn("", "yes")[1:], as_turn("", "no way")[1:]]
    rows = [{"prompt": as_turn("q"), "chosen": pair[0], "rejected": pair[1]}, {"chosen": as_turn("q") + pair[0], "rejected": as_turn("q") + pair[1]},  # noqa: E501
            {"prompt": "q", "chosen": as_turn("q") + pair[0], "rejected": as_turn("q") + pair[1]}]  # fmt: skip  # noqa: E501
    for row in rows:
        prompt, chosen, rejected = render_row(row, chatml, preference=True)
        assert [(s.prefix, s.sequence) for s in (prompt, chosen, rejected)] == [
            (-1, 1),
            (0, 0),
            (0, 1),
        ]
        assert (
            prompt.ids.tolist() == chatml.encode(chatml.render(as_turn("q"), True))
            and (prompt.labels == IGNORE).all()
        )
        assert (
            scored_text(chatml, chosen) == "yes<|im_end|>"
            and scored_text(chatml, rejected) == "no way<|im_end|>"
        )
    prompt, chosen, rejected = render_row(
        {"chosen": "Q: a\nA: yes", "rejected": "Q: a\nA: no"}, chatml, preference=True
    )
    assert (
        masked_text(chatml, prompt) == "<|bos|>Q: a\nA:"
        and scored_text(chatml, chosen) == " yes<|eos|>"
    )
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    assert render_row(same, chatml, preference=True) == "chosen and rejected are the same"
    long = {"prompt": "a cat sat " * 20, "chosen": "yes", "rejected": "no no no no"}
    prompt, chosen, rejected = render_row(long, chatml, 12, preference=True)
    assert (
        len(prompt.ids) + max(len(chosen.ids), len(rejected.ids)) == 12
        and prompt.ids[0] == chatml.bos_id
    )
    assert render_row(long, chatml, 4, preference=True) == "answer longer than max_length"


def test_pieces_join_as_one_text_where_a_space_is_prepended(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, PLAIN, sentencepiece=True))
    assert tokenizer.prepends
    for prompt, completion in (
        ("a cat", " sat on"),
        ("a cat ", "sat"),
        ("x:\n", "yes"),
        ("a", "é"),
    ):
        segment = render_row({"prompt": prompt, "completion": completion}, tokenizer)[0]
        assert tokenizer.decode(segment.ids) == prompt + completion  # no second space
        assert (
            tokenizer.decode([tokenizer.bos_id, *segment.ids[segment.labels != IGNORE]]).strip()
            == completion.strip()
        )


@pytest.mark.parametrize("row, message", [
    ({}, "fits no schema: it has no keys"),
    ({"question": "q", "answer": "a"}, "fits no schema: it has answer, question; expected one of messages"),  # noqa: E501
    ({"prompt": "p", "completion": None}, "fits no schema: it has prompt"),
    ({"promt": "p", "completion": "c"}, r"it has completion, promt \(nearest: prompt\)"),
    ({"prompt": 3, "completion": "c"}, "'prompt' must be a string, found '3'"),
    ({"prompt": "p", "completion": {"a": 1}}, r"completion\[0\] has no role"),
    ({"text": ["a"]}, "'text' must be a string"),
    ({"messages": "hi"}, "'messages' must be a list of messages, found 'hi'"),
    ({"messages": []}, "'messages' must be a list of messages"),
    ({"messages": ["hi"]}, r"messages\[0\] must be a message"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) must have text as its content: 'null'"),  # noqa: E501
    ({"messages": as_turn("a") + [{"role": "assistant", "content": [{"type": "image"}]}]}, r"messages\[1\] \(assistant\) must have text"),  # noqa: E501
    ({"conversations": [{"from": 3, "value": "x"}]}, r"conversations\[0\] has no role"),
    ({"conversations": [{"from": [], "value": "x"}]}, r"conversations\[0\] has no role"),
    ({"messages": as_turn("a", "b"), "chat_template_kwargs": {"messages": 1}}, "'chat_template_kwargs' must be an object"),  # noqa: E501
    ({"instruction": "i", "output": 5}, "'output' must be a string"),
    ({"text": "a", "weight": "much"}, "'weight' must be a number"),
    ({"text": "a", "weight": -1}, "'weight' must be a number of at least 0"),
    ({"text": "cut \ud83d"}, "half a surrogate pair"),
    ({"messages": as_turn("a", "b"), "tools": "[broken"}, "'tools' must be"),
    ({"messages": as_turn("a", "b"), "chat_template_kwargs": 3}, "'chat_template_kwargs' must be an object"),  # noqa: E501
])  # fmt: skip
def test_rows_that_are_wrong_are_named(chatml, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{message}") as caught:
        load_examples(str(path), chatml)
    print(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


# --- what a row says reaches the model, or the row is refused -------------------------------------

BASE = as_turn("Capital of France?", "Paris.", "And of Spain?")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def share(*messages, **row):
    names = ("from", "value", "train")
    return {"conversations": [dict(zip(names, m)) for m in messages], **row}


def system(text, *turns):
    return [{"role": "system", "content": text}, *turns]


def tool(content):
    return {"role": "tool", "content": content}


def calls(**message):
    return [
        *as_turn("q"),
        {"role": "assistant", **message},
        tool("7"),
        *as_turn("", "so")[1:],
    ]


def pair(**row):
    return {"chosen": "A.", "rejected": "B."} | row


TALK = as_turn("Q?", "A.")
CALLED = calls(tool_calls=[CALL])
OPENAI = {"name": "f", "arguments": '{"x": 1}'}
SAME = {  # a row as other tools write it: the messages that the template must get
    "human, gpt": (share(("human", "Q?"), ("gpt", "A.")), TALK),
    "human in messages": ({"messages": [{"role": "human", "content": "Q?"}, TALK[1]]}, TALK),
    "any case": (share(("Human", "Q?"), (" ASSISTANT", "A.")), TALK),
    "chatgpt": (share(("prompter", "Q?"), ("ChatGPT", "A.")), TALK),
    "developer": ({"messages": [{"role": "developer", "content": "S."}, *TALK]}, system("S.", *TALK)),  # noqa: E501
    "ipython": ({"messages": [TALK[0], {"role": "ipython", "content": "7"}, TALK[1]]},
                [TALK[0], tool("7"), TALK[1]]),
    "role and value": ({"messages": [{"role": "user", "value": "Q?"}, {"from": "gpt", "content": "A."}]},  # noqa: E501
                       TALK),
    "parts with nulls": ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Q", "image": None}, {"type": "input_text", "text": "?"}]}, TALK[1]]}, TALK),  # noqa: E501
    "system beside messages": ({"system": "S.", "messages": TALK}, system("S.", *TALK)),
    "system twice": ({"system": "S.", "messages": system("S.", *TALK)}, system("S.", *TALK)),
    "system beside strings": ({"system": "S.", "prompt": "Q?", "completion": "A."}, system("S.", *TALK)),  # noqa: E501
    "system beside a prompt": ({"system": "S.", "prompt": TALK[:1], "completion": TALK[1]},
                               system("S.", *TALK)),
    "history": ({"instruction": "r", "input": "s", "output": "b", "history": [["q", "a"]], "system": "S."},  # noqa: E501
                system("S.", *as_turn("q", "a", "r\ns", "b"))),
    "history of messages": ({"prompt": "r", "completion": "b", "history": as_turn("q", "a")},
                            as_turn("q", "a", "r", "b")),
    "null history": ({"messages": TALK, "history": None, "system": ""}, TALK),
    "a copy of the question": ({"question": "Q?", "messages": TALK, "id": 7}, TALK),
    "function_call": (share(("human", "q"), ("function_call", json.dumps(CALL["function"])),
                            ("observation", "7"), ("gpt", "so")), CALLED),
    "function calls": (share(("human", "q"), ("function_call", json.dumps([CALL["function"]] * 2)),
                             ("observation", "7"), ("gpt", "so")), calls(tool_calls=[CALL, CALL])),
    "OpenAI's function_call": ({"messages": calls(content=None, function_call=OPENAI)}, CALLED),
    "arguments in JSON": ({"messages": calls(tool_calls=[{"function": OPENAI, "index": 0}])}, CALLED),  # noqa: E501
    "no arguments": ({"messages": calls(tool_calls=[{"name": "f", "arguments": ""}])},
                     calls(tool_calls=[{"function": {"name": "f", "arguments": {}}}])),
}  # fmt: skip
PAIRS = {  # a preference row: the turns before the answers, and those
    "spider": ({"system": "Be brief.", "question": "How many legs has a spider?",
                "chosen": "A spider has eight legs.", "rejected": "A spider has six legs."},
               system("Be brief.", *as_turn("How many legs has a spider?")),
               "A spider has eight legs.", "A spider has six legs."),
    "instruction": (pair(instruction="q", input="r"), as_turn("q\nr"), "A.", "B."),
    "conversations": (share(("human", "q"), chosen={"from": "gpt", "value": "A."},
                            rejected={"from": "gpt", "value": "B."}), as_turn("q"), "A.", "B."),
    "a prompt repeated": ({"prompt": "And of Spain?",
                           "chosen": [*BASE, *as_turn("", "Madrid.")[1:]],
                           "rejected": [*BASE, *as_turn("", "Lisbon.")[1:]]}, BASE, "Madrid.", "Lisbon."),  # noqa: E501
    "with a system turn": ({"prompt": "And of Spain?",
                            "chosen": system("S.", *BASE, *as_turn("", "Madrid.")[1:]),
                            "rejected": system("S.", *BASE, *as_turn("", "Lisbon.")[1:])},
                           system("S.", *BASE), "Madrid.", "Lisbon."),
    "the first question": ({"prompt": "Capital of France?",
                            "chosen": [*BASE, *as_turn("", "Madrid.")[1:]],
                            "rejected": [*BASE, *as_turn("", "Lisbon.")[1:]]}, BASE, "Madrid.", "Lisbon."),  # noqa: E501
    "a list repeated": ({"prompt": BASE[2:], "chosen": [*BASE, *as_turn("", "Madrid.")[1:]],
                         "rejected": [*BASE, *as_turn("", "Lisbon.")[1:]]}, BASE, "Madrid.", "Lisbon."),  # noqa: E501
    "a system beside answers": (pair(system="S.", prompt="q", chosen=as_turn("", "A.")[1:],
                                     rejected=as_turn("", "B.")[1:]),
                                system("S.", *as_turn("q")), "A.", "B."),
}  # fmt: skip


@pytest.fixture(scope="module", params=["qwen3", "llama3"])
def shipped(request):
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository")
    return Tokenizer(SHARED / "tokenizers" / request.param)


@pytest.mark.parametrize("case", SAME)
def test_rows_of_other_tools_reach_the_template(shipped, case):
    row, messages = SAME[case]
    if "llama3" in str(shipped.folder) and case == "function calls":
        with pytest.raises(UserError, match="only supports single tool-calls"):
            render_row(row, shipped)
        return
    theirs = reference(shipped.folder).apply_chat_template(messages, tokenize=False)
    segment = render_row(row, shipped)[0]
    assert shipped.decode(segment.ids, skip_special=False) == theirs
    answer = messages[-1]["content"]
    ends = f"{answer}<|im_end|>", f"{answer}<|eot_id|>"
    assert scored_text(shipped, segment).endswith(ends)


def test_answers_of_a_history_are_scored(shipped):
    """As in LLaMA-Factory; the last alone with completion_only_loss; in a pair they are context."""
    row = SAME["history"][0]
    end = shipped.decode(shipped.end_ids[:1], skip_special=False)
    thought = "<think>\n\n</think>\n\n" if "qwen3" in str(shipped.folder) else ""
    scored = scored_text(shipped, render_row(row, shipped)[0])
    assert scored == f"a{end}{thought}b{end}"
    last = render_row(row, shipped, completion_only_loss=True)[0]
    assert scored_text(shipped, last) == f"{thought}b{end}"
    answers = {"chosen": "b", "rejected": "c", "prompt": "r", "history": row["history"]}
    segments = render_row(answers, shipped, preference=True)
    assert scored_text(shipped, segments[0]) == ""


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_of_other_tools_reach_the_template(shipped, case):
    row, prompt, *answers = PAIRS[case]
    theirs = reference(shipped.folder)
    segments = render_row(row, shipped, preference=True)
    for segment, answer in zip(segments[1:], answers):
        messages = [*prompt, *as_turn("", answer)[1:]]
        ids = np.append(segments[0].ids, segment.ids)
        whole = theirs.apply_chat_template(messages, tokenize=False)
        assert shipped.decode(ids, skip_special=False) == whole
        end = shipped.decode(shipped.end_ids[:1], skip_special=False)
        thought = "<think>\n\n</think>\n\n" if "qwen3" in str(shipped.folder) else ""
        assert scored_text(shipped, segment) == thought + answer + end
    assert (segments[0].labels == IGNORE).all()


def test_common_prompts_are_trls():
    """TRL takes what the answers share for the prompt where that is a string beside messages."""
    trl = pytest.importorskip("trl.data_utils")
    for case in ("a prompt repeated", "with a system turn", "the first question"):
        row = PAIRS[case][0]
        theirs = trl.maybe_extract_prompt(row)
        prompt, answers = data.split_row(row, True, preference=True)
        assert [prompt, *answers] == [theirs[key] for key in ("prompt", "chosen", "rejected")]


@real
@pytest.mark.parametrize("row, message", [
    ({"messages": [TALK[0], {"role": "critic", "content": "hm"}, TALK[1]]}, "leaves out .*critic.*hm"),  # noqa: E501
    ({"messages": [{"role": "users", "content": "Paris."}, {"role": "assistant", "content": "Paris."}]}, "leaves out .*users"),  # noqa: E501
    ({"messages": as_turn(5, "A.")}, r"messages\[0\] \(user\) must have text as its content: '5'"),
    ({"messages": as_turn(True, "A.")}, r"messages\[0\] \(user\) must have text"),
    ({"messages": as_turn(["a", "b"], "A.")}, r"messages\[0\] \(user\) must have text"),
    ({"messages": as_turn("Q?", {"text": "A."})}, r"messages\[1\] \(assistant\) must have text"),
    ({"messages": as_turn([{"type": "image", "text": ""}, {"type": "text", "text": "x"}], "A.")}, r"messages\[0\] \(user\) must have text"),  # noqa: E501
    ({"messages": [TALK[0], tool({"temp": 20}), TALK[1]]}, "leaves out .*temp"),
    ({"messages": [TALK[0], tool(["x", "y"]), TALK[1]]}, "leaves out .*tool"),
    ({"messages": [TALK[0], tool(7), TALK[1]]}, "leaves out .*tool"),
    ({"messages": TALK, "question": "Another?"}, "'question' is not read beside messages"),
    ({"messages": TALK, "functions": [{"name": "f"}]}, "'functions' is not read beside messages"),
    ({"text": "a cat", "system": "S."}, "'system' is not read beside text"),
    ({"prompt": "p", "completion": "c", "context": "It rains."}, "'context' is not read beside prompt, completion"),  # noqa: E501
    ({"text": "a cat", "history": [["q", "a"]]}, "'history' is not read beside text"),
    ({"messages": TALK, "history": [["q", 3]]}, r"history\[1\] \(assistant\) must have text"),
    ({"messages": TALK, "history": "before"}, "'history' must be a list of messages"),
    ({"messages": TALK, "system": ["S."]}, "'system' must be a string"),
    ({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, r"messages\[1\]: 'weight' must be 0 or 1, found '0.5'"),  # noqa: E501
    ({"messages": [TALK[0], TALK[1] | {"train": "no"}]}, r"messages\[1\]: 'train' must be 0 or 1"),
    ({"messages": calls(tool_calls=[{"function": {"name": "f", "arguments": "x=1"}}])}, r"messages\[1\]: a tool call is"),  # noqa: E501
    ({"messages": calls(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])}, r"messages\[1\]: a tool call is"),  # noqa: E501
    ({"messages": calls(tool_calls=[{"name": "f", "parameters": {"x": 1}}])}, r"messages\[1\]: a tool call is"),  # noqa: E501
    ({"messages": calls(tool_calls="f(1)")}, r"messages\[1\]: a tool call is"),
    (share(("human", "q"), ("function_call", "f(1)")), r"conversations\[1\]: a tool call is"),
])  # fmt: skip
def test_rows_that_would_lose_something_are_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}") as caught:
        load_examples(str(path), Tokenizer(SHARED / "tokenizers" / "qwen3"))
    assert len(str(caught.value).splitlines()) <= 2


@real
def test_what_a_tool_returns_is_rendered_as_the_template_can():
    llama = Tokenizer(SHARED / "tokenizers" / "llama3")
    for content, text in (({"temp": 20, "ok": True}, '{"temp": 20, "ok": true}'), (7, "7")):
        row = {"messages": [TALK[0], tool(content), TALK[1]]}
        whole = llama.decode(render_row(row, llama)[0].ids, skip_special=False)
        assert f"<|start_header_id|>ipython<|end_header_id|>\n\n{text}<|eot_id|>" in whole
    talk = [*TALK[:1], *calls(content="Let me see.", tool_calls=[CALL])[1:]]
    with pytest.raises(UserError, match="leaves out .*Let me see"):  # Llama writes the call alone
        render_row({"messages": talk}, llama)


def test_templates_may_move_and_merge_turns_but_not_drop_them(tmp_path):
    merged = ("{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}{% set rest = messages[1:] %}"  # noqa: E501
              "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"  # noqa: E501
              "{{ '[' + m.role + ']' + (first if loop.last or loop.nextitem is undefined or loop.index == loop.length - 1 else '')"  # noqa: E501
              " + (m.content.split('</think>')[-1] | trim) + '<|eos|>' }}{% endfor %}")  # fmt: skip
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "merged", merged))
    chat = system("S.", *as_turn("q", "<think>x</think>a", "r"))
    tokenizer.check_messages(chat)
    assert "[user]S.\nr" in tokenizer.render([*chat, *as_turn("", "b")[1:]])
    few = CHATML.replace("for m in messages", "for m in messages[-2:]")
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "few", few))
    assert render_row({"messages": as_turn("q", "a")}, tokenizer)
    with pytest.raises(UserError, match='leaves out .*\'{"role": "user", "content": "q"}\''):
        render_row({"messages": as_turn("q", "a", "q", "b")}, tokenizer)
    with pytest.raises(UserError, match="leaves out .*tool_calls"):  # no word of calls in it
        render_row({"messages": calls(content="x", tool_calls=[CALL])}, Tokenizer(
            write_tokenizer(tmp_path / "calls", CHATML)))  # fmt: skip


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False},  # noqa: E501
                                  {"loss": False}, {"loss_weight": 0}, {"mask": True}, {"masked": 1}])  # fmt: skip  # noqa: E501
def test_turns_of_weight_0_are_context(chatml, flag):
    chat = as_turn("q", "bad", "r", "good")
    chat[1] |= flag
    chat[3] |= {key: 1 - value for key, value in flag.items()}
    segment = render_row({"messages": chat}, chatml)[0]
    assert scored_text(chatml, segment) == "good<|im_end|>"
    plain = render_row({"messages": as_turn("q", "bad", "r", "good")}, chatml)[0]
    assert segment.ids.tolist() == plain.ids.tolist()
    whole = scored_text(
        chatml, render_row({"messages": chat}, chatml, assistant_only_loss=False)[0]
    )
    assert "bad" not in whole and "\nr<|im_end|>" in whole and "good" in whole
    chat[3] |= flag
    assert render_row({"messages": chat}, chatml) == "nothing scored"
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad", **flag},
              {"from": "human", "value": "r"}, {"from": "gpt", "value": "good"}]  # fmt: skip
    segment = render_row({"conversations": shared}, chatml)[0]
    assert scored_text(chatml, segment) == "good<|im_end|>"


THOUGHT = as_turn("q", "<think>\nx\n</think>\n\na", "r", "<think>\ny\n</think>\n\nb")
NONE = "<think>\n\n</think>\n\n"


@real
def test_reasoning_is_left_out_of_the_score_on_request():
    qwen = Tokenizer(SHARED / "tokenizers" / "qwen3")

    def scored(chat, reasoning):
        return scored_text(qwen, render_row({"messages": chat}, qwen, reasoning=reasoning)[0])

    ends = "a<|im_end|>", "b<|im_end|>"
    assert scored(THOUGHT, "last") == ends[0] + "<think>\ny\n</think>\n\n" + ends[1]
    assert scored(THOUGHT, "mask_empty") == scored(THOUGHT, "last")
    assert scored(THOUGHT, "mask") == "".join(ends)
    empty = as_turn("q", "a", "r", "b")
    assert scored(empty, "last") == ends[0] + NONE + ends[1]
    assert scored(empty, "mask") == scored(empty, "mask_empty") == "".join(ends)
    for chat in (THOUGHT, empty):
        kept, masked = (
            render_row({"messages": chat}, qwen, reasoning=name)[0].ids.tolist()
            for name in ("last", "mask")
        )
        assert kept == masked
    # the prompt opens and closes the thought itself: nothing to leave out
    row = {"messages": empty, "chat_template_kwargs": {"enable_thinking": False}}
    segment = render_row(row, qwen, reasoning="mask")[0]
    assert scored_text(qwen, segment) == "".join(ends)


def test_a_thought_that_the_prompt_opens_is_left_out(tmp_path):
    opens = THINK.replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"
    )
    opens = opens.replace("'<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ c",
                          "'<think>\\nso\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ c")  # fmt: skip  # noqa: E501
    tokenizer = Tokenizer(write_tokenizer(tmp_path, opens))
    for reasoning, text in (
        ("last", "so\n</think>\n\na<|im_end|>"),
        ("mask", "a<|im_end|>"),
    ):
        segment = render_row({"messages": as_turn("q", "a")}, tokenizer, reasoning=reasoning)[0]
        assert scored_text(tokenizer, segment) == text


@real
def test_every_turn_is_trained_as_it_is_asked_for(tmp_path):
    """Each turn of each row: the prompt's ids and the scored ones are those of generation and of the
    turn as the last; both come from transformers. The hold-out is drawn by conversation."""  # noqa: E501
    folder = SHARED / "tokenizers" / "qwen3"
    qwen, theirs, path = Tokenizer(folder), reference(folder), tmp_path / "rows.jsonl"
    chats = [
        THOUGHT,
        system("S.", *as_turn("q", "a", "r", "b", "s", "c")),
        as_turn("q", "a"),
    ]
    chats.append([*as_turn("q", "a", "r", "b")])
    chats[3][1] = chats[3][1] | {"weight": 0}
    chats.append(calls(reasoning_content="call it", tool_calls=[CALL]))
    chats.append(as_turn("q", "a", "r", "b"))
    chats[5][3] = chats[5][3] | {"weight": 0}  # only its first turn is trained
    path.write_text("\n".join(json.dumps({"messages": chat, "tools": TOOLS}) for chat in chats))
    examples, ledger = load_examples(path, qwen, reasoning="every_turn")
    want = []
    for chat in chats:
        turns = [i for i, m in enumerate(chat) if m["role"] == "assistant" and "weight" not in m]
        for i in turns:
            ask = theirs.apply_chat_template(
                chat[:i], tools=TOOLS, add_generation_prompt=True, tokenize=False
            )
            whole = theirs.apply_chat_template(chat[: i + 1], tools=TOOLS, tokenize=False)
            want.append((ask, whole.removeprefix(ask).removesuffix("\n")))
    found = []
    for (segment,) in examples:
        scored = np.flatnonzero(segment.labels != IGNORE)
        start, stop = scored[0], scored[-1] + 1
        texts = segment.ids[:start], segment.ids[start:stop]
        found.append(tuple(qwen.decode(ids, skip_special=False) for ids in texts))
        assert segment.ids[:start].tolist() == qwen.encode(found[-1][0])
    assert found == want and len(want) == 10
    assert ledger.rows == ledger.examples == 10 and not ledger.notes
    assert rows_of(examples)[0]["completion"]["content"] == THOUGHT[1]["content"]
    sides = split_holdout(examples, 2, seed=3)
    numbers = [set(side.cache.entries["row"][side.indices].tolist()) for side in sides]
    assert not numbers[0] & numbers[1] and len(numbers[1]) == 2
    for options in ({"assistant_only_loss": False}, {"completion_only_loss": True}):
        with pytest.raises(UserError, match="every_turn scores each answer"):
            load_examples(path, qwen, reasoning="every_turn", **options)


def test_a_long_answer_without_a_thought_takes_no_longer(chatml):
    """A pattern that looks for </think> from every place takes minutes for this."""
    chat = as_turn("q", "a cat <think> sat " * 20_000)
    began = time.process_time()
    render_row({"messages": chat}, chatml, reasoning="mask")
    assert time.process_time() - began < 5 and data.thought_of(chat[1]) == ""


@pytest.mark.parametrize("m, thought", [
    ({"content": "<think>\nx\n</think>\n\na"}, "x"),
    ({"content": "x\n</think>a</think>"}, "x"),  # the prompt opened it
    ({"content": "a", "reasoning_content": " x "}, "x"),
    ({"content": "a", "reasoning": "x", "thinking": ""}, "x"),
    ({"content": None, "thinking": "x", "tool_calls": [CALL]}, "x"),
    ({"content": "so <think> a"}, ""),
])  # fmt: skip
def test_where_thoughts_stand(m, thought):
    assert data.thought_of(m) == thought


@real
def test_an_empty_key_hides_no_thought():
    qwen = Tokenizer(SHARED / "tokenizers" / "qwen3")
    answer = {"role": "assistant", "content": "a", "thinking": "", "reasoning": "x"}
    segment = render_row({"messages": [*as_turn("q"), answer]}, qwen)[0]
    assert scored_text(qwen, segment) == "<think>\nx\n</think>\n\na<|im_end|>"


@real
def test_the_ledger_tells_what_is_left_out(tmp_path):
    qwen, path = Tokenizer(SHARED / "tokenizers" / "qwen3"), tmp_path / "rows.jsonl"
    extra = {"id": 1, "source": "s", "category": "c", "rationale": "why", "note": ""}
    rows = [
        {"messages": THOUGHT, **extra},
        {"messages": THOUGHT[:2]},
        {"messages": TALK, **extra},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    ledger = load_examples(path, qwen)[1]
    turns = "turns whose thoughts the template leaves out (see --reasoning)"
    assert ledger.notes == {"rows whose 'rationale' is not read": 2, turns: 1}
    assert f"\n1 {turns}\n" in str(ledger) and ledger.as_dict()["notes"] == ledger.notes
    assert not load_examples(path, qwen, recipe="chatml", reasoning="every_turn")[1].notes.get(
        turns
    )


def test_recipes_are_split_by_turns_too(chatml, tmp_path):
    """What the recipe makes is split where it has several turns, and made anew where it has one."""
    text = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in as_turn(*"abcd")
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "answer": "so\n#### 7"}))
    examples, _ = load_examples(
        tmp_path / "a.jsonl", chatml, recipe="chatml", reasoning="every_turn"
    )
    assert [scored_text(chatml, e[0]) for e in examples] == ["b<|im_end|>", "d<|im_end|>"]
    assert [row["prompt"][-1]["content"] for row in rows_of(examples)] == ["a", "c"]
    examples, _ = load_examples(
        tmp_path / "b.jsonl", chatml, recipe="gsm8k", reasoning="every_turn"
    )
    assert rows_of(examples)[0]["answer"] == "7"
    assert scored_text(chatml, examples[0][0]).startswith("so")


# --- truncation and the ledger --------------------------------------------------------------------


def test_truncation_takes_the_prompt_and_never_the_answer(styled):
    style, tokenizer = styled
    rng, seen = random.Random(3), set()
    for _ in range(150):
        chat = random_chat(rng)
        row = rng.choice(
            [
                {"messages": chat},
                {"prompt": chat[0]["content"], "completion": chat[1]["content"]},
                {"text": chat[0]["content"]},
            ]
        )
        whole = render_row(row, tokenizer)
        if isinstance(whole, str):
            continue
        whole, room = whole[0], rng.randint(1, 60)
        cut = render_row(row, tokenizer, room)
        scored = whole.labels != IGNORE
        last = int(np.flatnonzero(scored)[-1]) + 1
        answer = next(n for n in range(last + 1) if n == last or not scored[last - 1 - n])
        if "text" in row:
            seen.add("text")
            assert (
                cut == "nothing scored"
                or len(cut[0].ids) == min(room, len(whole.ids))
                and (cut[0].ids == whole.ids[: len(cut[0].ids)]).all()
            )
        elif isinstance(cut, str):
            seen.add(cut)
            assert cut == "answer longer than max_length" and answer + 1 > room
        else:
            seen.add("cut" if len(cut[0].ids) < len(whole.ids) else "whole")
            kept = cut[0]
            assert len(kept.ids) <= room or len(whole.ids) <= room
            end = int(np.flatnonzero(kept.labels != IGNORE)[-1]) + 1
            assert (
                kept.labels[end - answer : end].tolist()
                == whole.labels[last - answer : last].tolist()
            )
            if int(whole.ids[0]) in tokenizer.special_ids:
                assert kept.ids[0] == whole.ids[0]

            def runs(labels):
                return "".join("x" if label != IGNORE else " " for label in labels).split()

            assert all(
                run in runs(whole.labels) for run in runs(kept.labels)
            )  # an answer is scored whole or not at all
            assert len(kept.ids) == min(room, len(whole.ids)) or len(kept.ids) == last <= room
    assert {"text", "cut", "whole", "answer longer than max_length"} <= seen


def test_fit_by_hand():
    ids, no, yes = np.arange(10), [False], [True]

    def flags(*runs):
        return np.array([flag for run in runs for flag in run])

    got = fit(ids, flags(no * 3, yes * 2, no * 3, yes * 2), 5, {0})
    assert got[0].tolist() == [0, 6, 7, 8, 9] and got[1].tolist() == [False] * 3 + [True] * 2
    got = fit(
        ids, flags(no * 3, yes * 2, no * 3, yes * 2), 7, {0}
    )  # through the first answer: its rest is context
    assert got[0].tolist() == [0, 4, 5, 6, 7, 8, 9] and got[1].sum() == 2
    got = fit(ids, flags(no * 3, yes * 2, no * 3, yes * 2), 8, set())
    assert got[0].tolist() == [*range(2, 10)] and got[1].sum() == 4
    got = fit(
        ids, flags(no * 3, yes * 2, no * 5), 4, set()
    )  # what follows the last answer goes first
    assert got[0].tolist() == [1, 2, 3, 4]
    assert fit(ids, flags(no * 8, yes * 2), 2, {0}) is None
    assert fit(ids, flags(no * 8, yes * 2), 3, {0})[0].tolist() == [0, 8, 9]
    assert fit(ids, flags(no, yes * 9), 4, {0})[0].tolist() == [0, 1, 2, 3]  # a text


@pytest.mark.parametrize("preference", [False, True])
def test_ledger_accounts_for_every_token(chatml, tmp_path, preference):
    rng, path, rows = random.Random(4), tmp_path / "rows.jsonl", []
    for _ in range(120):
        chat = random_chat(rng)
        pair = {
            "prompt": chat[0]["content"] * rng.randint(1, 4),
            "chosen": chat[1]["content"],
            "rejected": rng.choice(["no", chat[1]["content"]]),
        }
        rows.append(pair if preference else rng.choice([{"messages": chat}, pair, {"text": chat[0]["content"]}, {"messages": as_turn("only asked")},  # noqa: E501
                                                         {"prompt": "p", "completion": ""}]))  # fmt: skip  # noqa: E501
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, ledger = load_examples(
        [path], chatml, max_length=24, max_samples=100, seed=5, preference=preference
    )
    kept = rows_of(examples)
    full = [render_row(row, chatml, preference=preference) for row in rows]
    assert (
        len(examples) == len(kept) == ledger.examples
        and ledger.rows == 120
        and ledger.rows_not_sampled == 20
    )
    assert ledger.rows == ledger.examples + ledger.rows_dropped + ledger.rows_not_sampled
    assert ledger.tokens == ledger.scored + ledger.masked + ledger.truncated + ledger.dropped
    assert ledger.scored == sum((s.labels != IGNORE).sum() for e in examples for s in e)
    assert ledger.scored + ledger.masked == sum(len(s.ids) for e in examples for s in e)
    assert sum(r["rows"] for r in ledger.reasons.values()) == ledger.rows_dropped
    assert sum(r["tokens"] for r in ledger.reasons.values()) == ledger.dropped
    before = [render_row(row, chatml, preference=preference) for row in kept]
    assert (
        ledger.truncated
        == sum(len(s.ids) for e in before for s in e) - ledger.scored - ledger.masked
    )
    assert "answer longer than max_length" in ledger.reasons and all(
        r["where"][0].startswith(str(path)) for r in ledger.reasons.values()
    )
    assert (
        "chosen and rejected are the same" if preference else "nothing scored"
    ) in ledger.reasons
    assert (
        json.loads(json.dumps(ledger.as_dict()))["tokens"] == ledger.tokens
        and 2 <= len(str(ledger).splitlines()) <= 3
    )
    again = load_examples(
        [path], chatml, max_length=24, max_samples=100, seed=5, preference=preference
    )[0]
    other = load_examples(
        [path], chatml, max_length=24, max_samples=100, seed=6, preference=preference
    )[0]
    again, other = rows_of(again), rows_of(other)
    assert again == kept != other and [rows.index(row) for row in kept] == sorted(
        rows.index(row) for row in kept
    )
    assert any(isinstance(found, str) for found in full)


def test_what_could_teach_nothing_stops_the_run(chatml, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": as_turn("only asked")}))
    with pytest.raises(
        UserError, match=r"nothing to train on: .*nothing scored: 1, first .*rows.jsonl:1"
    ):
        load_examples(path, chatml)
    path.write_text(json.dumps({"text": "a cat sat on the mat and said"}))
    with pytest.raises(UserError, match="never learn to stop"):
        load_examples(path, chatml, max_length=4)


def test_holdout_is_a_seeded_partition(chatml, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"{n} a", "completion": "cat"}) for n in range(50))
    )
    examples, _ = load_examples(path, chatml)
    kept, held = split_holdout(examples, 0.2, seed=1)

    def text(found):
        return [chatml.decode(example[0].ids).split()[0] for example in found]

    def number(found):
        return [row["prompt"].split()[0] for row in rows_of(found)]

    assert len(held) == 10 and sorted(text(kept) + text(held), key=int) == [
        str(n) for n in range(50)
    ]
    assert text(kept) == number(kept) and text(held) == number(held)
    same, other = (split_holdout(examples, 10, seed=seed)[1] for seed in (1, 2))
    assert number(same) == number(held) != number(other)
    assert len({kept.fingerprint, held.fingerprint, examples.fingerprint}) == 3
    with pytest.raises(UserError, match="cannot hold out 50 of 50"):
        split_holdout(examples, 50)


# --- reading --------------------------------------------------------------------------------------

ROWS = [{"text": "é\u2028 one"}, {"text": "two\n\nlines"}, {"text": "three"}]


def test_readers_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n", "\n\n", 1), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.DictWriter(file, ["text"]).writeheader()
        csv.DictWriter(file, ["text"]).writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = sorted(tmp_path.iterdir())
    assert (
        all([row for _, row in read_rows(str(file))] == ROWS for file in files)
        and len(files) == 7
    )
    assert [where for where, _ in read_rows(tmp_path / "a.jsonl")] == [
        f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 3, 4)
    ]
    assert (
        read_rows(tmp_path / "b.json")[2][0] == f"{tmp_path / 'b.json'}[2]"
        and len(read_rows(tmp_path)) == 21
    )


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON: .*found|a.jsonl:2: not JSON: Expecting value: '{\"text\":'"),  # noqa: E501
    ("a.jsonl", b'{"text": "x"}\n[1, 2]\n', r"a.jsonl:2: a row is an object, found '\[1, 2\]'"),
    ("a.jsonl", b'{"text": "x"}\n"y"\n', "a.jsonl:2: a row is an object"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8: .*byte 0xff"),
    ("a.jsonl", b"", "a.jsonl: no rows in it"),
    ("a.jsonl", b"\n\n", "a.jsonl: no rows in it"),
    ("a.jsonl", b"[" * 100000, "a.jsonl:1: not JSON"),
    ("a.json", b'[{"text": "x"},\n {"text" "y"}]', "a.json:2: not JSON: Expecting ':' delimiter"),
    ("a.json", b'"x"', "a.json: expected rows, found 'x'"),
    ("a.json", b"[]", "a.json: no rows in it"),
    ("a.json", b"", "a.json:1: not JSON"),
    ("a.json", b'[{"text": "x"}, 5]', r"a.json\[1\]: a row is an object, found '5'"),
    ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),  # noqa: E501
    ("a.csv", b"text\nx\ny,z\n", r"a.csv\[1\]: more fields than the header's 1"),
    ("a.parquet", b"PAR1 not really", "a.parquet: not a parquet file"),
    ("a.txt", b"x", "a.txt: not a known kind of file; known are .jsonl"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:20] + b"\xff" * 30, "a.jsonl.gz: cannot be read"),  # noqa: E501
    ("u.data", b"1\t7\t4\t9\n", "u.item: cannot be read: No such file"),
])  # fmt: skip
def test_files_that_are_wrong_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(tmp_path / name))
    print(caught.value)
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 300


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"trian.jsonl: no such file \(nearest: .*train.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))


@real
def test_a_data_set_of_the_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name in ("org/one/data/train-00000-of-00002", "org/one/data/train-00001-of-00002", "org/one/data/test-00000-of-00001",  # noqa: E501
                 "org/two/main/train-00000-of-00001", "org/two/main/test-00000-of-00001", "org/two/other/train-00000-of-00001"):  # fmt: skip  # noqa: E501
        path = tmp_path / "root" / "datasets" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": name}]), path)
    (tmp_path / "root" / "datasets" / "org" / "json").mkdir()
    (tmp_path / "root" / "datasets" / "org" / "json" / "test.jsonl").write_text(
        '{"text": "lines"}'
    )
    hub = subprocess.Popen(
        [
            sys.executable,
            SHARED / "tools" / "minihub.py",
            tmp_path / "root",
            "--port",
            "0",
            "--token",
            "local",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1])
        from support.readers import UserError, read_rows
        for source in sys.argv[2:]:
            try: print([row["text"].removeprefix("org/") for _, row in read_rows(source)])
            except UserError as error: print("error:", error)"""
    try:
        url = hub.stdout.readline().split()[-1]
        env = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "local",
            "HF_HUB_OFFLINE": "0",
        }
        sources = [
            "org/one",
            "org/one:test",
            "org/two:main",
            "org/two:main:test",
            "org/two",
            "org/two:mian",
            "org/none",
            "org/json#v1.0:test",
        ]
        command = [sys.executable, "-c", code, Path(data.__file__).parent]
        output = subprocess.run([*command, *sources], env=env, capture_output=True, text=True)
        env |= {"HF_TOKEN": "wrong", "HF_HOME": str(tmp_path / "other")}
        refused = subprocess.run([*command, "org/one"], env=env, capture_output=True, text=True)
    finally:
        hub.terminate()
    lines = output.stdout.splitlines()
    assert lines[0] == "['one/data/train-00000-of-00002', 'one/data/train-00001-of-00002']", (
        output.stderr
    )
    assert lines[1:4] == [
        "['one/data/test-00000-of-00001']",
        "['two/main/train-00000-of-00001']",
        "['two/main/test-00000-of-00001']",
    ]
    assert lines[4].startswith(
        "error: org/two has several parts; name one of: org/two:main:train, org/two:other:train"
    )
    assert lines[5].startswith("error: org/two:mian has no such part") and lines[6].startswith(
        "error: org/none: no file here"
    )
    assert "local" not in lines[6] and lines[7:] == ["['lines']"]
    assert re.match("error: org/one: no file here.*repository needs HF_TOKEN", refused.stdout), (
        refused.stderr
    )


def test_folders_globs_and_weights(chatml, tmp_path):
    for name, count in (("a", 30), ("b", 10), ("c", 10)):
        rows = [{"prompt": f"{name} {n}", "completion": "cat"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert len(read_rows(tmp_path)) == 50 and len(read_rows(tmp_path / "[bc].jsonl")) == 20
    examples, ledger = load_examples([f"{a}@1", f"{b}@3"], chatml)
    assert [source["share"] for source in ledger.sources] == [
        0.25,
        0.75,
    ] and "75.0% from " in str(ledger)

    def names(epoch):
        return [row["prompt"] for row in rows_of(examples.epoch(epoch))]

    assert (
        len(examples.epoch(0)) == len(examples) == 40 == len(names(0))
        and len(ledger.sources) == 2
    )
    assert names(0) == names(0) != names(1)
    for found in (
        names(0),
        names(1),
    ):  # 10 of a's 30 rows, none twice; b's 10 rows three times each
        assert len({name for name in found if name[0] == "a"}) == 10
        assert all(found.count(f"b {n}") == 3 for n in range(10))
    kept, held = split_holdout(examples, 8)
    assert len(kept.epoch(3)) == 32 and not {*kept.epoch(3).indices} & {*held.indices}
    assert [s["share"] for s in load_examples([f"{a}@1", b], chatml)[1].sources] == [
        0.5,
        0.5,
    ]  # none given is 1
    plain, ledger = load_examples([a, b], chatml)
    assert plain.epoch(5).indices.tolist() == [*range(40)] and [
        s["share"] for s in ledger.sources
    ] == [
        0.75,
        0.25,
    ]
    for weight in ("x", "0", "-1", "", "inf"):
        with pytest.raises(UserError, match="the weight after @ must be a number above 0"):
            load_examples([f"{a}@{weight}"], chatml)


def test_a_second_start_renders_nothing(chatml, tmp_path, monkeypatch):
    """The cache is keyed by content, tokenizer, template, settings and this code; nothing half-made stays behind."""  # noqa: E501
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    path, calls = tmp_path / "rows.jsonl", []
    path.write_text(
        "\n".join(
            json.dumps({"messages": as_turn("a cat", f"sat {n}"), "choices": [n]})
            for n in range(3000)
        )
    )
    first, ledger = load_examples(path, chatml)
    monkeypatch.setattr(data, "render_rows", lambda *_, **__: calls.append(1) or iter(()))
    second, same = load_examples(path, chatml)
    assert (
        not calls
        and same == ledger
        and second.fingerprint == first.fingerprint
        and second.row(2999)[1]["choices"] == [2999]
    )
    assert all(
        (a.ids == b.ids).all() and (a.labels == b.labels).all()
        for x, y in zip(first, second)
        for a, b in zip(x, y)
    )
    assert [p.name[0] for p in (tmp_path / "cache").iterdir()] != ["."] and first[2999][
        0
    ].ids.dtype == np.int32
    monkeypatch.undo()
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))

    def folder(*args, **options):
        return load_examples(*args, **options)[0].cache.folder

    other = Tokenizer(write_tokenizer(tmp_path / "other", THINK))
    cut, drawn = {"max_length": 9}, {"max_samples": 5, "seed": 7}
    folders = [
        folder(path, chatml),
        folder(path, other),
        folder(path, chatml, **cut),
        folder(path, chatml, seed=7),
    ]
    folders += [folder(path, chatml, max_samples=5), folder(path, chatml, **drawn)]
    path.write_text(path.read_text().replace("sat 7", "mat 7"))
    folders.append(folder(path, chatml))
    assert folders[3] == folders[0] and len(set(folders)) == 6
    path.write_text('{"text": "fine"}\n{"text": 5}')
    with pytest.raises(UserError):
        load_examples(path, chatml)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {p.name for p in folders}


def test_a_date_in_the_template_is_part_of_the_key(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": as_turn("a", "b")}))
    dated = write_tokenizer(tmp_path / "dated", "{{ strftime_now('%d') }}" + CHATML)
    plain = write_tokenizer(tmp_path / "plain", CHATML)
    for folder, same in ((dated, False), (plain, True)):
        one, two = (
            load_examples(tmp_path / "rows.jsonl", Tokenizer(folder, datetime(2026, 1, day)))[0]
            for day in (1, 2)
        )
        one_folder, two_folder = one.cache.folder, two.cache.folder
        assert (one_folder == two_folder) == same == ((one[0][0].ids == two[0][0].ids).all())


# --- recipes --------------------------------------------------------------------------------------

ECQA = {"q_text": "Where?", "q_op1": "here", "q_op2": "there", "q_op3": "now", "q_op4": "then", "q_op5": "up",  # noqa: E501
        "q_ans": "there", "taskB": "It is not here. "}  # fmt: skip
ARC = {
    "question": "Where?",
    "choices": {"text": ["B", "A"], "label": ["A", "B"]},
    "answerKey": "B",
}
LISTED = {
    "question": "Where?",
    "choices": ["here", "there"],
    "answer": "B",
    "rationale": "why",
    "dataset": "maps",
}


def test_recipes_by_hand():
    ecqa, gsm8k, alpaca, chatml = (
        data.use_recipe(name, {}, 0)[0] for name in ("ecqa", "gsm8k", "alpaca", "chatml")
    )
    made = ecqa(ECQA)
    assert (
        made["completion"][0]["content"] == "It is not here.\nAnswer: B" and made["answer"] == "B"
    )
    assert made["prompt"][0]["content"].startswith(
        "Where?\nA. here\nB. there\nC. now\nD. then\nE. up\n"
    )
    assert (
        made["choices"] == [*"ABCDE"]
        and ecqa(ARC)["answer"] == "B"
        and ecqa(LISTED | {"answer": 0})["answer"] == "A"
    )
    assert ecqa(LISTED | {"answer": "here", "weight": 0.5})["weight"] == 0.5
    made = gsm8k({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    assert made["completion"][0]["content"] == "1+1=2\nAnswer: 2" and made["answer"] == "2"
    made = alpaca({"instruction": "do", "input": "", "output": "done"})
    assert (
        made["prompt"].endswith("### Instruction:\ndo\n\n### Response:")
        and "Input" not in made["prompt"]
    )
    assert "paired" in alpaca({"instruction": "do", "input": "it", "output": "done"})["prompt"]
    text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq\nr<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"  # noqa: E501
    assert (
        chatml({"text": text})["messages"]
        == as_turn("q\nr", "a", system="s")
        == chatml({"messages": as_turn("q\nr", "a", system="s")})["messages"]
    )
    whole = {
        "conversations": [{"from": "human", "value": "q"}],
        "system": "s",
        "tools": TOOLS,
        "weight": None,
    }
    assert chatml(whole) == whole
    pick, draws = data.use_recipe("ultrafeedback", {}, 0)
    made = pick({"prompt": "p", "chosen": as_turn("p", "c"), "rejected": "r"})
    assert (
        draws
        and made["prompt"] == as_turn("p")
        and made["chosen"] == as_turn("p", "c")
        and made["rejected"] == as_turn("", "r")[1:]
    )
    rated = {
        "instruction": "p",
        "completions": [
            {"response": r, "overall_score": n} for r, n in (("x", 5), ("y", "8"), ("z", 2))
        ],
    }
    seen = {
        json.dumps([pick(rated, epoch)[side][0]["content"] for side in ("chosen", "rejected")])
        for epoch in range(20)
    }
    assert seen == {'["y", "x"]', '["y", "z"]'}
    assert (
        pick({**rated, "completions": rated["completions"][:1]})
        == "all completions are rated alike"
    )


def test_mcqa_draws_its_wording_but_never_its_answer():
    make, draws = data.use_recipe("mcqa", {"topic": "geography"}, 3)
    rows = [make(LISTED, epoch) for epoch in range(200)]
    assert (
        draws
        and rows == [make(LISTED, epoch) for epoch in range(200)]
        and make(LISTED, 0) != make(ECQA, 0)
    )
    assert len({row["prompt"].split("\n")[0] for row in rows}) == 3 and any(
        "geography" in row["prompt"] for row in rows
    )
    answers = {
        "B. there",
        "B) there",
        "(B) there",
        "B – there",
        "b) there",
        "2. there",
        "there",
    }
    assert {row["answer"] for row in rows} == answers
    for row in (
        rows
    ):  # one style within a question, the thought in the prompt, the answer alone is scored
        lines = row["prompt"].split("\n")
        assert (
            row["completion"] == f" {row['answer']}"
            and lines[3].endswith(row["answer"])
            and row["answer"] == row["choices"][1]
        )
        assert (
            lines[2].replace("here", "there").translate(str.maketrans("Aa1", "Bb2")) == lines[3]
        )
        assert lines[4:] == ["Solve step-by-step.", "<think> why </think>", " Answer:"]
    half, never = (data.use_recipe("mcqa", {"cot": cot}, 3)[0] for cot in (0.5, 0))
    shares = [
        sum("<think>" in make(LISTED, epoch)["prompt"] for epoch in range(200))
        for make in (half, never)
    ]
    assert (
        70 < shares[0] < 130
        and shares[1] == 0
        and "maps" in str([half(LISTED, epoch) for epoch in range(9)])
    )


def test_movielens_from_its_original_tables(tmp_path):
    rng = random.Random(0)
    items = [f"{n}|Film {n} (199{n % 10})|01-Jan-1995||url é|0|1" for n in range(1, 30)]
    (tmp_path / "u.item").write_bytes("\n".join(items).encode("latin-1"))
    lines = [
        f"{user}\t{item}\t{rng.randint(1, 5)}\t{when}"
        for user in (1, 2)
        for when, item in enumerate(rng.sample(range(1, 30), 13))
    ]
    rng.shuffle(lines)
    (tmp_path / "u.data").write_text("\n".join(lines))
    rows = read_rows(tmp_path)
    assert len(rows) == 6 and all(len(row["history"]) == 10 for _, row in rows)
    where, row = rows[0]
    user, item, rating, when = lines[int(where.rpartition(":")[2]) - 1].split("\t")
    assert (
        row["title"].startswith(f"Film {item} ") and row["rating"] == int(rating) and when == "10"
    )
    before = sorted(
        (line.split("\t") for line in lines if line.startswith(user + "\t")),
        key=lambda cells: int(cells[3]),
    )
    assert [title.split()[1] for title, _ in row["history"]] == [
        cells[1] for cells in before[:10]
    ]
    made = data.use_recipe("movielens", {"liked": 3}, 0)[0](row)
    assert (
        made["completion"][0]["content"]
        == made["answer"]
        == ("Yes" if int(rating) >= 3 else "No")
    )
    liked, disliked = [line for line in made["prompt"][0]["content"].split("\n")[:2]]
    assert all(
        (title in liked) == (stars >= 3) and (title in disliked) == (stars < 3)
        for title, stars in row["history"]
    )
    told = data.use_recipe("movielens", {}, 0)[0](
        {"instruction": "i", "input": "x", "output": "Yes."}
    )
    assert told["output"] == "Yes" == told["answer"] and told["choices"] == ["Yes", "No"]
    (tmp_path / "u.data").write_text("1 2 3")
    with pytest.raises(UserError, match="u.data: not tables of MovieLens"):
        read_rows(tmp_path)


def test_epochs_differ_and_come_back(chatml, tmp_path):
    """A recipe that draws renders every epoch anew, the same in a second start and whatever else is in the data."""  # noqa: E501
    path = tmp_path / "rows.jsonl"
    rows = [LISTED | {"question": f"Where is {n}?"} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))

    def load(**options):
        return load_examples(path, chatml, recipe="mcqa", seed=5, **options)

    def texts(examples):
        return [chatml.decode(example[0].ids) for example in examples]

    examples, ledger = load()
    epochs = [texts(examples.epoch(n)) for n in range(3)]
    assert epochs[0] == texts(examples) and epochs == [
        texts(load()[0].epoch(n)) for n in range(3)
    ]
    assert (
        sum(a == b for a, b in zip(*epochs[:2])) < 15 > sum(a == b for a, b in zip(*epochs[1:]))
    )
    assert {*texts(load(max_samples=9)[0].epoch(2))} <= {*epochs[2]}
    kept, held = split_holdout(examples, 10)
    assert sorted(texts(kept.epoch(1)) + texts(held.epoch(1))) == sorted(epochs[1])
    assert all(
        row["answer"] in text and row["choices"] for row, text in zip(rows_of(held), texts(held))
    )
    fixed = load_examples(path, chatml, recipe="ecqa")[0]
    assert texts(fixed.epoch(1)) == texts(fixed)
    short = load(max_length=12)[0]  # where a later rendering is too long, the first stays
    assert all(len(example[0].ids) <= 12 for n in range(4) for example in short.epoch(n))


@pytest.mark.parametrize("recipe, args, row, message", [
    ("ecqa", {}, {"question": "q"}, r"does not fit recipe ecqa \(question, choices, answer, explanation\): 'choices'"),  # noqa: E501
    ("ecqa", {}, LISTED | {"answer": "E"}, "does not fit recipe ecqa .* is not one of the choices"),
    ("ecqa", {}, LISTED | {"answer": 2}, "2 is not one of the choices"),
    ("mcqa", {}, LISTED | {"choices": "abc"}, "does not fit recipe mcqa"),
    ("mcqa", {"cto": 1}, LISTED, r"recipe_args: mcqa takes no 'cto' \(nearest: cot"),
    ("mcqa", {"rng": 1}, LISTED, "recipe_args: mcqa takes no 'rng'"),
    ("gsm8k", {}, {"question": "q", "answer": "2"}, "does not fit recipe gsm8k"),
    ("alpaca", {}, {"prompt": "q"}, "does not fit recipe alpaca .*: 'instruction'"),
    ("chatml", {}, {"prompt": "q"}, "fits no schema: it has prompt"),
    ("chatml", {}, {"text": 5}, "does not fit recipe chatml"),
    ("chatml", {}, {"text": "no markup"}, "'messages' must be a list"),
    ("movielens", {}, {"history": []}, "does not fit recipe movielens"),
    ("ultrafeedback", {}, {"prompt": "q"}, "does not fit recipe ultrafeedback"),
    ("alpaka", {}, LISTED, r"recipe: 'alpaka' is not one of mcqa, .*\(nearest: alpaca"),
])  # fmt: skip
def test_recipes_that_do_not_fit_are_named(chatml, tmp_path, recipe, args, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message) as caught:
        load_examples(path, chatml, recipe=recipe, recipe_args=args)
    print(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and (
        not str(caught.value)[0] == "/" or "rows.jsonl:1: " in str(caught.value)
    )


@real
@pytest.mark.parametrize("recipe, file", [
    ("ecqa", "ecqa/val.csv"), ("mcqa", "ecqa/val.csv"), ("ecqa", "arc_challenge/test.jsonl"), ("gsm8k", "gsm8k/test.jsonl"),  # noqa: E501
    ("alpaca", "alpaca/alpaca_en_999.json"), ("ultrafeedback", "ultrafeedback/test.jsonl"),
    ("chatml", "chat/identity_500.jsonl"),
])  # fmt: skip
def test_recipes_on_the_real_sets(recipe, file):
    """Every token is accounted for, every row's answer is in what is scored."""
    tokenizer = Tokenizer(SHARED / "tokenizers" / "qwen3")
    preference = recipe == "ultrafeedback"
    examples, ledger = load_examples(
        SHARED / "data" / file,
        tokenizer,
        recipe=recipe,
        preference=preference,
        max_samples=60,
    )
    assert ledger.scored + ledger.masked == sum(
        len(s.ids) for example in examples for s in example
    )
    assert ledger.scored == sum(
        (s.labels != IGNORE).sum() for example in examples for s in example
    )
    assert (
        ledger.tokens == ledger.scored + ledger.masked + ledger.dropped and ledger.examples >= 58
    )
    for example, row in zip(examples, rows_of(examples)):
        assert "answer" not in row or row["answer"] in scored_text(tokenizer, example[0])


# --- settings -------------------------------------------------------------------------------------


@dataclass
class Base:
    seed: int = 42  # of order and dropout
    lora_r: int = 16  # rank; 0: full fine-tuning
    max_length: int | None = None  # tokens of an example # not more


@dataclass
class Settings(Base):
    model: str = "tiny"  # folder or hub id, 100 %
    learning_rate: float = 2e-4  # peak
    data: list[str] = field(default_factory=lambda: ["a.jsonl", "b.jsonl"])  # files
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decays
    merge: bool = True  # write merged/
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # which layers
    rank_pattern: dict = field(default_factory=dict)  # ranks by name
    kind: str = "cosine"  # of schedule
    val_size: float = 0.0  # share or count
    shape: str = "round"  # of schedule
    layers: list[str] = field(
        default_factory=lambda: ["a_long_name_of_a_layer", "the_long_name_of_another_layer"]
    )  # behind a wrapped default

    CHOICES = {"shape": ("round", "square")}


def test_flags_and_files_make_a_config(tmp_path):
    assert parse_config(Settings, []) == Settings()
    got = parse_config(
        Settings,
        "--lora-r 8 --learning_rate=1e-3 --data x.jsonl d/y.jsonl --merge false --max_length 5 --kind linear".split(),  # noqa: E501
    )
    assert got == Settings(
        lora_r=8,
        learning_rate=1e-3,
        data=["x.jsonl", "d/y.jsonl"],
        merge=False,
        max_length=5,
        kind="linear",
    )
    assert (
        parse_config(Settings, ["--merge"]).merge is True
        and parse_config(Settings, ["--max_length", "none"]).max_length is None
    )
    assert parse_config(Settings, ["--betas", "0.8,0.9"]).betas == [
        0.8,
        0.9,
    ] and parse_config(Settings, ["--data", "x"]).data == ["x"]
    for words, modules in (
        (["all-linear"], ["all-linear"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
    ):
        assert parse_config(Settings, ["--target_modules", *words]).target_modules == modules
    assert parse_config(Settings, ["--rank_pattern", '{"q_proj": 4}']).rank_pattern == {
        "q_proj": 4
    }
    assert parse_config(Settings, ["--data", "x", "--seed", "1", "--data", "y", "z"]).data == [
        "x",
        "y",
        "z",
    ]
    assert parse_config(Settings, ["--cutoff_len", "7", "--lora-rank", "3"]) == Settings(
        max_length=7, lora_r=3
    )
    path = tmp_path / "c.yaml"
    path.write_text(
        "lora: {r: 32}\ntraining:\n  learning_rate: 3e-5\n  deep: {seed: 1}\ncutoff_len: 9\ndata: z.jsonl\nrank_pattern: {a: 1}\nval_size: 5\n"  # noqa: E501
    )
    got = parse_config(Settings, ["--config", str(path), "--seed", "2"])
    assert got == Settings(
        lora_r=32,
        learning_rate=3e-5,
        seed=2,
        max_length=9,
        data=["z.jsonl"],
        rank_pattern={"a": 1},
        val_size=5,
    )
    (tmp_path / "c.json").write_text('{"lora": {"r": 4}, "merge": false,\n\t"learning_rate": 1}')
    got = parse_config(Settings, ["--config", str(tmp_path / "c.json")])
    assert got == Settings(lora_r=4, merge=False, learning_rate=1.0) and isinstance(
        got.learning_rate, float
    )


TOOLS_CONFIGS = {
    "LLaMA-Factory": ("model_name_or_path: m\ndataset: a.json\ncutoff_len: 5\nlora_rank: 3\n"
                      "lora_target: q_proj,v_proj\nlearning_rate: 1.0e-4", {}),
    "Axolotl": ("base_model: m\ndataset: []\nsequence_len: 5\nlora_r: 3\nlora_target_modules: [q_proj, v_proj]\n"  # noqa: E501
                "learning_rate: 0.0001\nval_set_size: 0.1", {"data": [], "val_size": 0.1}),
    "TRL": ("model_name_or_path: m\ndataset_name: a.json\nmax_seq_length: 5\nlora_r: 3\n"
            "lora_target_modules: [q_proj, v_proj]\nlearning_rate: 1e-4", {}),
    "sections": ('{"model": {"model_name_or_path": "m"}, "data": {"train_file": "a.json", "max_length": 5},\n'  # noqa: E501
                 '"lora": {"rank": 3, "target_modules": ["q_proj", "v_proj"]}, "training": {"lr": 1e-4}}', {}),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS_CONFIGS)
def test_the_names_of_other_tools_are_understood(tmp_path, tool):
    text, other = TOOLS_CONFIGS[tool]
    path = tmp_path / ("c.json" if text[0] == "{" else "c.yaml")
    path.write_text(text)
    want = dict(
        model="m",
        data=["a.json"],
        max_length=5,
        lora_r=3,
        target_modules=["q_proj", "v_proj"],
        learning_rate=1e-4,
    )
    assert parse_config(Settings, ["--config", str(path)]) == Settings(**want | other)


def test_a_partial_file_and_dotted_flags_override(tmp_path):
    """Project B's way: a whole JSON file, a small nested one over it, flags over both."""
    (tmp_path / "base.json").write_text(
        '{"lora": {"r": 16}, "training": {"learning_rate": 2e-4, "seed": 1}, "max_length": 9}'
    )
    (tmp_path / "mine.json").write_text('{"training": {"seed": 2}}')
    words = [
        "--config",
        str(tmp_path / "base.json"),
        str(tmp_path / "mine.json"),
        "--lora.r",
        "8",
        "--training.learning_rate=1e-3",
    ]
    want = Settings(lora_r=8, learning_rate=1e-3, seed=2, max_length=9)
    assert parse_config(Settings, words) == want
    assert parse_config(Settings, [*words[:2], "--config", *words[2:]]) == want


@pytest.mark.parametrize("words, file, message", [
    (["--lora_rr", "3"], None, r"unknown argument --lora_rr \(nearest: lora_r"),
    (["--learning_rate", "fast"], None, "--learning_rate: expected float, found 'fast'"),
    (["--seed", "1.5"], None, "--seed: expected int, found '1.5'"),
    (["--merge", "perhaps"], None, "--merge: expected bool, found 'perhaps'"),
    (["--rank_pattern", "{x"], None, "--rank_pattern: expected dict, found"),
    (["stray"], None, "unknown argument stray"),
    (["--seed"], None, "--seed: expected one argument"),
    (["--data"], None, "--data: expected at least one argument"),
    (["--lora_rr", "3", "--sed=1", "--seed", "x"], None,
     r"unknown argument --lora_rr \(nearest: .*unknown argument --sed=1 \(nearest: seed\); --seed: expected int"),  # noqa: E501
    (["--config", "nowhere.yaml"], None, "--config nowhere.yaml: cannot be read: No such file"),
    ([], "lora: {rr: 3}", r"c.yaml:1: unknown key 'lora.rr' \(nearest: lora_r"),
    ([], "seed: true", "c.yaml:1: seed: expected int, found 'true'"),
    ([], "seed: [1]", r"c.yaml:1: seed: expected int, found '\[1\]'"),
    ([], "learning_rate: null", "c.yaml:1: learning_rate: expected float, found 'null'"),
    ([], "data: {a: 1}", "c.yaml:1: unknown key 'data.a'"),
    ([], "seed: 1\nseed: 2", "c.yaml:2: seed is given twice"),
    ([], "lora: {r: 1}\nlora_r: 2", "c.yaml:2: lora_r is given twice, the second time as 'lora_r'"),
    ([], "lora: {rr: 3}\nsed: 1\nseed: x", r"c.yaml:1: unknown key 'lora.rr'.*c.yaml:2: unknown key 'sed' \(nearest: seed.*"  # noqa: E501
     "c.yaml:3: seed: expected int"),
    ([], "- 1", "c.yaml: holds no settings"),
    ([], "a: [1\nb: 2", "c.yaml: cannot be read: line 2"),
    ([], "", "c.yaml: holds no settings"),
])  # fmt: skip
def test_settings_that_are_wrong_are_named(tmp_path, words, file, message):
    if file is not None:
        (tmp_path / "c.yaml").write_text(file)
        words = ["--config", str(tmp_path / "c.yaml")]
    with pytest.raises(UserError, match=message) as caught:
        parse_config(Settings, words)
    assert len(str(caught.value).splitlines()) <= 2


def test_help_explains_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(Settings, ["--help"], "What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "What it does." in text
    for part in ("--lora_r INT rank; 0: full fine-tuning (default: 16)", "folder or hub id, 100 % (default: tiny)",  # noqa: E501
                 "files (default: a.jsonl b.jsonl)", "tokens of an example # not more (default: None)", "--config FILE",  # noqa: E501
                 "which layers (default: all-linear)", "behind a wrapped default (default: a_long", "of schedule; one of round, square (default: round)"):  # fmt: skip  # noqa: E501
        assert part in text


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def run(chatml, tmp_path, monkeypatch, capsys):
    """run(command, *words) -> what `python data.py` prints about rows.jsonl."""

    def run(command, *words, file="rows.jsonl"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "data.py",
                command,
                "--model",
                str(chatml.folder),
                "--data",
                str(tmp_path / file),
                *words,
            ],
        )
        data.main()
        return capsys.readouterr().out

    return run


def test_show_prints_rows_and_ledger(tmp_path, chatml, run, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": as_turn("a cat", "sat")}))
    output = run("show")
    assert "<|im_start|>assistant\n⟦sat<|im_end|>⟧\n" in output and "1 rows: 1 examples" in output
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\033[32msat<|im_end|>\033[0m" in run("show")
    mix = ["mix", "--model", "x", "--data", "y"]
    for words, message in (
        (["show", "--dta", "x"], r"unknown argument --dta \(nearest: data"),
        (["shw"], r"unknown command 'shw' \(nearest: show"),
        (["show", "--data", "x"], "--model is needed"),
        (mix, "--output : is needed; name a new one"),
        ([*mix, "--output", str(tmp_path)], "exists already; name a new one"),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        with pytest.raises(UserError, match=message):
            data.main()


def test_audit_measures_lengths(tmp_path, chatml, run):
    rows = [{"prompt": "a " * n, "completion": "cat"} for n in range(1, 101)]
    rows[1] = rows[0]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = load_examples(tmp_path / "rows.jsonl", chatml)[0]
    lengths = np.array([len(example[0].ids) for example in examples])
    output = run("audit", "--output", str(tmp_path / "l.png"))
    head, line, scored, suggested, cut, *_ = output.splitlines()
    assert head.split() == [
        "tokens",
        "min",
        "mean",
        "max",
        "p50",
        "p90",
        "p95",
        "p99",
        "p100",
    ]
    want = [
        lengths.min(),
        lengths.mean(),
        lengths.max(),
        *np.percentile(lengths, [50, 90, 95, 99, 100]),
    ]
    assert [float(x) for x in line.split()[1:]] == [round(x, 1) for x in want]
    fits = -(-np.percentile(lengths, 99) // 64) * 64
    assert (
        f"suggested max_length: {fits:.0f} tokens" in suggested
        and "1 duplicates; 100 of 100 score an end of turn" in output
    )
    assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    assert "with max_length 20: 100 rows: 100 examples, " in run(
        "audit", "--max_length", "20", "--output", str(tmp_path / "l.png")
    )
    line = run("audit", "--by", "characters", "--output", str(tmp_path / "l.png")).splitlines()[1]
    assert float(line.split()[3]) == len("a " * 100 + "cat")
    pair = {"prompt": "a " * 20, "chosen": "cat", "rejected": "the mat and said"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    prompt, *ends = [len(s.ids) for s in render_row(pair, chatml, preference=True)]
    output = run("audit", "--preference", "--output", str(tmp_path / "l.png"), file="pairs.jsonl")
    assert float(output.splitlines()[1].split()[1]) == prompt + max(ends)


def test_mix_makes_the_folder_of_its_output(tmp_path, chatml, run):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a cat"}))
    output = tmp_path / "new" / "folder" / "mixed.jsonl"
    run("mix", "--output", str(output), file="rows.jsonl")
    assert json.loads(output.read_text())["text"] == "a cat"


def test_mix_writes_each_sources_share(tmp_path, chatml, run):
    for name in "ab":
        rows = [{"prompt": f"{name} {n}", "completion": "cat"} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run(
        "mix",
        f"{tmp_path / 'b.jsonl'}@3",
        "--output",
        str(tmp_path / "mixed.jsonl"),
        file="a.jsonl@1",
    )
    found = [row["prompt"][0] for _, row in read_rows(tmp_path / "mixed.jsonl")]
    assert (
        found.count("a") == 10
        and found.count("b") == 30
        and found != sorted(found)
        and "75.0% from" in output
    )


def test_pairs_from_the_choices_of_a_row(tmp_path, chatml, run):
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [LISTED, LISTED, ECQA | {"q_ans": "up"}]))
    )
    output = run(
        "pairs", "--recipe", "ecqa", "--output", str(tmp_path / "p.jsonl"), "--seed", "1"
    )
    pairs = [row for _, row in read_rows(tmp_path / "p.jsonl")]
    assert "2 pairs; the same as another: 1" in output and [
        p["chosen"][0]["content"][-1] for p in pairs
    ] == ["B", "E"]
    for pair in pairs:
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1] in "ABCDE"
        assert not isinstance(render_row(pair, chatml, preference=True), str)
    run("pairs", "--recipe", "mcqa", "--output", str(tmp_path / "q.jsonl"))
    for _, pair in read_rows(tmp_path / "q.jsonl"):
        assert (
            pair["prompt"].endswith(" Answer:")
            and pair["chosen"] != pair["rejected"]
            and pair["rejected"].strip() in pair["prompt"]
        )
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(
            {
                "messages": as_turn("q", "r", "s", "so\nAnswer: owl"),
                "choices": ["owl", "cat"],
            }
        )
    )
    run("pairs", "--output", str(tmp_path / "r.jsonl"))
    ((_, pair),) = read_rows(tmp_path / "r.jsonl")
    assert (
        pair["prompt"] == as_turn("q", "r", "s")
        and pair["rejected"][0]["content"] == "so\nAnswer: cat"
    )


def test_pairs_compare_answers_without_their_full_stop(tmp_path, run, monkeypatch, capsys):
    """A wrong choice takes the place and the stop of the right one; the right answer without its
    stop, which a model writes, is no wrong answer."""
    choices = ["It rains.", "It snows."]
    rows = [
        {"prompt": "a", "completion": "so. Answer: It rains.", "choices": choices},
        {"prompt": "b", "completion": "It snows", "choices": choices},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("pairs", "--output", str(tmp_path / "p.jsonl"))
    rejected = [pair["rejected"] for _, pair in read_rows(tmp_path / "p.jsonl")]
    assert rejected == ["so. Answer: It snows.", "It rains"]
    model = Path(data.__file__).parent / "examples" / "tiny-qwen3"
    tokenizer = Tokenizer(model)
    answers = [tokenizer.encode(text) for text in ("Answer: It rains", "It snows.")]
    monkeypatch.setattr("model.load_model", lambda *_, **__: None)
    monkeypatch.setattr("model.generate", lambda *_, **__: answers)
    with pytest.raises(SystemExit):
        run("pairs", "--generate", "--model", str(model), "--output", str(tmp_path / "q.jsonl"))
    assert "no pairs; answered right: 2" in capsys.readouterr().err


def test_pairs_from_a_models_own_answers(tmp_path, monkeypatch):
    """What the embedded tiny model says, where it is not the row's own answer, is rejected; the same for a same seed."""  # noqa: E501
    examples = Path(data.__file__).parent / "examples"
    lines = (examples / "mcqa" / "validation.jsonl").read_text().splitlines()[:12]
    rows = [
        {"prompt": turn["content"], "completion": " nothing"}
        for line in lines
        for turn in json.loads(line)["messages"][:1]
    ]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"prompt": "a", "completion": "b\nAnswer: c"}]))
    )
    words = [
        "data.py",
        "pairs",
        "--model",
        str(examples / "tiny-qwen3"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--generate",
        "--max_new_tokens",
        "12",
    ]
    for name in "pq":
        monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / f"{name}.jsonl")])
        data.main()
    pairs = [row for _, row in read_rows(tmp_path / "p.jsonl")]
    assert pairs == [row for _, row in read_rows(tmp_path / "q.jsonl")] and 8 <= len(pairs) <= 12
    assert all(
        pair["chosen"] == " nothing" and pair["rejected"].strip() != "nothing" for pair in pairs
    )
    assert [pair["prompt"] for pair in pairs] == [
        row["prompt"] for row in rows if row["prompt"] in {p["prompt"] for p in pairs}
    ]
