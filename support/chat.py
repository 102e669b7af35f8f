"""A conversation on the terminal."""

import sys
from contextlib import suppress

from support.errors import sanitize
from support.messages import as_turn


def encode_prompt(tokenizer, prompt, variables, config):
    """A conversation by the chat template, which gets the `variables` too, a text as it is -> ids.
    Without a template the turns of a conversation are one text."""
    if isinstance(prompt, list) and tokenizer.has_template:
        if config.enable_thinking is not None:
            variables = variables | {"enable_thinking": config.enable_thinking}
        if config.system and prompt[0]["role"] != "system":
            prompt = as_turn("system", config.system) + prompt
        return tokenizer.encode(tokenizer.render(prompt, True, **variables))
    if isinstance(prompt, list):
        prompt = "".join(m["content"] for m in prompt)
    return tokenizer.head + tokenizer.encode(prompt)


class Printer:
    """Called with the new ids so far, prints the text that they add to the ids `before`."""

    def __init__(self, decode, before):
        self.decode, self.before, self.text = decode, before, ""

    def __call__(self, new):
        # the token before decides about a space; at the end may be half a character
        before = self.decode(self.before)
        text = self.decode(self.before + new)
        text = text.removeprefix(before).rstrip("\ufffd")
        print(sanitize(text[len(self.text) :]), end="", flush=True)
        self.text = text


def converse(names, answer):
    """What is typed is answered by each, answer(name, turns) -> text, with a history of its own."""
    print("/clear forgets the conversation, /exit leaves")
    histories = dict.fromkeys(names, [])
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() == "/exit":
                break
            if line.strip() == "/clear":
                histories = dict.fromkeys(names, [])
                continue
            for name in names:
                turns = histories[name] + as_turn("user", line)
                text = answer(name, turns)
                histories[name] = turns + as_turn("assistant", text)
    print()
