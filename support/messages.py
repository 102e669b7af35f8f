"""A row's messages as chat templates want them, from the names that other tools have for the same:
ShareGPT, OpenAI, Llama, Axolotl, ms-swift. What would be lost on the way is a UserError."""

import json
from contextlib import suppress

from support.errors import UserError, as_user_error, brief

ROLES = {  # a template's role: the names that ShareGPT, OpenAI, Llama and others have for it
    "system": "developer",
    "user": "human prompter",
    "assistant": "gpt chatgpt bot ai model function_call tool_call",
    "tool": "ipython observation function tool_response function_response",
}
ROLE_OF = {name: role for role in ROLES for name in (role, *ROLES[role].split())}
# keys by which OpenAI, Axolotl, ms-swift and others leave a message unscored: the value that does
UNSCORED = {
    "weight": 0,
    "loss_weight": 0,
    "train": 0,
    "training": 0,
    "loss": 0,
    "mask": 1,
    "masked": 1,
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a message


def as_turn(role, content):
    return [{"role": role, "content": content}]


def join_texts(content):
    """A list of text parts as one string; anything else as it is."""
    with suppress(AttributeError, TypeError, LookupError):
        if all(part.get("type", "text").endswith("text") for part in content):
            return "".join(part["text"] for part in content)
    return content


def read_calls(calls, where):
    """Tool calls, perhaps in JSON, as templates want them: objects with their arguments as one."""

    def read(value):
        if isinstance(value, str):
            return json.loads(value or "{}")
        return value

    expected = f"{where}: a tool call is an object (or its JSON) with name and arguments"
    faults = ValueError, TypeError, LookupError, AttributeError, RecursionError
    with as_user_error(expected, *faults, on=calls):
        calls = read(calls)
        result = []
        for call in [calls] if isinstance(calls, dict) else calls:
            function = call.get("function", call)
            function = {"name": function["name"], "arguments": read(function["arguments"])}
            if not isinstance(function["arguments"], dict):
                raise TypeError("the arguments are not an object")
            names = {"id": call["id"]} if "id" in call else {}
            result.append({"type": "function", "function": function, **names})
        return result


def messages_of(row, key):
    """A row's messages as templates want them: other tools' names mapped, lists of text parts
    joined, `weight` 0 where a message is not scored, values of None left out.
    UserError: no message, nor a list of them, or one without role or text."""
    sources = row[key]
    if isinstance(sources, dict):
        sources = [sources]
    if not isinstance(sources, list) or not sources:
        raise UserError(f"'{key}' must be a list of messages, found {brief(row[key])}")
    messages = []
    for i, source in enumerate(sources):
        where = f"{key}[{i}]"
        if not isinstance(source, dict):
            raise UserError(f"{where} must be a message with role and content: {brief(source)}")
        m = {name: value for name, value in source.items() if value is not None}
        for name, other in (("role", "from"), ("content", "value")):
            if other in m:
                m.setdefault(name, m.pop(other))
        if not isinstance(m.get("role"), str):
            raise UserError(f"{where} has no role: {brief(source)}")
        name = m["role"].strip().lower()
        role = m["role"] = ROLE_OF.get(name, m["role"])
        if name in ("function_call", "tool_call"):
            m |= {"function_call": m.get("content"), "content": ""}
        calls = m.pop("function_call", None) or m.get("tool_calls")
        if calls:
            m["tool_calls"] = read_calls(calls, where)
        content = m["content"] = join_texts(m.get("content"))
        is_text = isinstance(content, str) or (content is not None and role == "tool")
        if not is_text and (content is not None or not calls):
            raise UserError(f"{where} ({role}) must have text as its content: {brief(content)}")
        flags = {name: m.pop(name) for name in UNSCORED if name in m}
        for name, flag in flags.items():
            if flag not in (0, 1):
                raise UserError(f"{where}: '{name}' must be 0 or 1, found {brief(flag)}")
            if flag == UNSCORED[name]:
                m["weight"] = 0
        messages.append(m)
    return messages


def separate_thought(m):
    """What a message has under the first filled of THOUGHTS, or ""."""
    return next((m[key] for key in THOUGHTS if m.get(key)), "")


def thought_of(m):
    """A message's thought, or "": where templates look for it."""
    written, end, _ = (m["content"] or "").partition("</think>")
    thought = str(separate_thought(m) or (end and written))
    return thought.rpartition("<think>")[2].strip()
