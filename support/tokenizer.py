"""A checkpoint's tokenizer files: its special and end tokens, its chat templates in jinja2's
sandbox, and texts to ids and back within limits on time and memory."""

import itertools
import json
import secrets
from datetime import datetime
from pathlib import Path

import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.errors import UserError, as_user_error, brief
from support.files import read_json, regular_file
from support.hub import companions
from support.messages import separate_thought
from support.sandbox import Overrun, bounded, check_growth

# Stand for the ends of {% generation %}. Random: a row that contained one could move its own mask.
OPEN, CLOSE = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(2))


MARK = 10**18 + secrets.randbits(59)  # this number and the next ones stand for contents
LONGEST_ROW = 2**21  # characters: about 500,000 tokens, and 0.4 GB while they are encoded


def check_texts(sides):
    """UserError: the texts of a row's sides, [(text or ids, ...), ...] each, can't be encoded."""
    pieces = itertools.chain(*sides)
    text = "".join(piece for piece, *_ in pieces if isinstance(piece, str))
    surrogate = "half a surrogate pair in its text, which was cut inside a character"
    with as_user_error(surrogate, UnicodeEncodeError):
        text.encode()
    if len(text) > LONGEST_ROW:
        raise UserError(
            f"a row of {len(text):,} characters; split it into rows of at most {LONGEST_ROW:,}"
        )


class Generation(jinja2.ext.Extension):
    """The tags `{% generation %} ... {% endgeneration %}`, which mark what the model writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return OPEN + caller() + CLOSE


def template_environment(now):
    """jinja2's sandbox with the functions that transformers gives to chat templates."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **kwargs):  # jinja's own escapes HTML and sorts keys
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


class CheckpointTokenizer:
    """A checkpoint's `tokenizer.json` with its special tokens, end tokens and chat template.

    `now` (default: the time of the call) is what `strftime_now` formats: Llama 3.2 writes the date
    into its system turn, so a run that is resumed tomorrow needs the day on which it began.
    `adapter`: a folder whose tokenizer files go before the checkpoint's.
    UserError: a file is missing or broken. Source: transformers' PreTrainedTokenizerFast.
    """

    def __init__(self, folder, now=None, adapter=None):
        self.folder, self.files = Path(folder), companions(folder, adapter)
        path = self.files.get("tokenizer.json")
        if not path:
            raise UserError(f"{self.folder}: no tokenizer.json in it; give a checkpoint's folder")
        file = str(regular_file(path, 2**28))
        with as_user_error(f"{path}: not a tokenizer", Exception):  # the library has no subclass
            self.backend = tokenizers.Tokenizer.from_file(file)
        check_growth(self.backend, path)
        self.backend.no_truncation()  # the file may carry either from an earlier use
        self.backend.no_padding()
        config = self.read("special_tokens_map.json") | self.read("tokenizer_config.json")
        self.checked = set()  # shapes of conversations, see check_messages
        self.read_special_tokens(config)
        self.read_templates(config, now or datetime.now())

    def read(self, name):
        return read_json(self.files[name]) if name in self.files else {}

    def read_special_tokens(self, config):
        self.special = {}  # {"bos_token": "<s>", ...}
        for name, token in config.items():
            if isinstance(token, dict):
                token = token.get("content")
            if name.endswith("_token") and isinstance(token, str):
                self.special[name] = token
        fault = f"{self.files.get('tokenizer_config.json')}: its tokens are malformed"
        with as_user_error(fault, Exception):
            self.add_tokens(config)
        self.bos_id, eos_id, self.pad_id = (
            self.backend.token_to_id(self.special.get(name, ""))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        added = self.backend.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = {id for id, token in added.items() if token.special}
        ends = [eos_id]
        for name in ("generation_config.json", "config.json"):
            ids = self.read(name).get("eos_token_id")
            ends += ids if isinstance(ids, list) else [ids]
        ends = [id for id in ends if isinstance(id, int) and 0 <= id < 2**24]
        self.eos_ids = list(dict.fromkeys(ends))

    def add_tokens(self, config):
        """Gives those that tokenizer_config.json alone names the next ids, as transformers does."""
        tokens = config.get("added_tokens_decoder") or {}
        tokens = [tokenizers.AddedToken(**tokens[id]) for id in sorted(tokens, key=int)]
        self.backend.add_tokens(tokens)
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        more = more.values() if isinstance(more, dict) else more or ()
        texts = [token["content"] if isinstance(token, dict) else token for token in more]
        added = self.backend.get_added_tokens_decoder().values()
        new = dict.fromkeys([*self.special.values(), *texts])
        known = {token.content for token in added}
        self.backend.add_special_tokens([text for text in new if text not in known])

    def read_templates(self, config, now):
        self.template_file = self.files.get("chat_template.jinja")
        if self.template_file:
            file = regular_file(self.template_file, 2**20)
            templates = file.read_text(encoding="utf-8", errors="replace")
        else:
            self.template_file = self.files.get("tokenizer_config.json", self.folder)
            templates = config.get("chat_template") or []
        if isinstance(templates, str):
            templates = [{"name": "default", "template": templates}]
        # the day that its renderings depend on
        self.date = f"{now:%F}" if "strftime_now" in str(templates) else ""
        environment = template_environment(now)
        fault = f"{self.template_file}: not a chat template, nor a list of them by name"
        with bounded(fault), as_user_error(fault, Exception):
            self.templates = {
                t["name"]: environment.from_string(t["template"]) for t in templates
            }
        self.has_template = bool(self.templates)

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text, special=False):
        """str -> list of ids; `special` applies the tokenizer's post-processor (Llama's BOS)."""
        return next(self.encode_all([text], special))

    def encode_all(self, texts, special=False):
        """Yields the ids of each text. The library encodes 2^20 characters at once, on every core;
        that takes 170 bytes per character."""
        ends = itertools.accumulate(map(len, texts))
        for _, group in itertools.groupby(zip(texts, ends), lambda pair: pair[1] >> 20):
            batch = [text for text, _ in group]
            try:
                encodings = self.backend.encode_batch_fast(batch, add_special_tokens=special)
            except BaseException as error:  # the library's panics are no Exception
                if isinstance(error, (KeyboardInterrupt, Overrun)):
                    raise
                message = f"cannot encode {brief(max(batch, key=len))}: {brief(str(error))}"
                raise UserError(f"{self.files['tokenizer.json']}: {message}") from None
            for encoding in encodings:
                yield encoding.ids

    def decode(self, ids, skip_special=True):
        """Ids -> str, by default without special tokens."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def render(
        self,
        messages,
        /,
        add_generation_prompt=False,
        tools=None,
        keep_marks=False,
        **kwargs,
    ):
        """Messages -> text by the checkpoint's template, which also gets `kwargs`.
        UserError: there is no template, or it fails."""
        if not self.templates:
            raise UserError(
                f"{self.folder}: no chat template; "
                "use prompt/completion or text rows, or a chat model"
            )
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            names = ", ".join(self.templates)
            raise UserError(f"{self.template_file}: no template is named 'default': {names}")
        messages = [
            {key: value for key, value in m.items() if value is not None} for m in messages
        ]
        for m in messages:  # templates know the reasoning by one of two names, rows by three
            if thought := separate_thought(m):
                m |= {"reasoning_content": thought, "thinking": thought}
        variables = self.special | {"tools": tools or None, "documents": None} | kwargs
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        fault = f"{self.template_file}: the chat template failed"
        with bounded(fault), as_user_error(fault, Exception):  # untrusted code, untrusted rows
            text = self.templates[name].render(variables)
        return text if keep_marks else text.replace(OPEN, "").replace(CLOSE, "")

    def check_messages(self, messages, /, **kwargs):
        """UserError: the template leaves out a content or a tool call, as it does where it doesn't
        know the role. Numbers stand for them, so one rendering checks every conversation of the
        same shape."""
        marked, owners = [], []

        def mark(value):
            if isinstance(value, dict):
                return {k: v if k in ("type", "id") else mark(v) for k, v in value.items()}
            if isinstance(value, list):
                return [*map(mark, value)]
            if value is None or not str(value).strip():
                return value
            owners.append(m)
            number = MARK + len(owners)
            return str(number) if isinstance(value, str) else number

        for m in messages:
            marks = {key: mark(m[key]) for key in ("content", "tool_calls") if key in m}
            marked.append({"role": m["role"], **marks})
        shape = hash(repr((marked, kwargs)))
        if shape in self.checked:
            return
        text = self.render([m | marks for m, marks in zip(messages, marked)], **kwargs)
        for number, m in enumerate(owners, MARK + 1):
            if str(number) not in text:
                raise UserError(
                    f"{self.template_file}: leaves out what this message says, whose role or "
                    f"form it doesn't know: {brief(m)}"
                )
        self.checked.add(shape)
