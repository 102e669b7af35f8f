"""What a row means: its prompt and answers, in the schemas of TRL, Alpaca, ShareGPT, LLaMA-Factory.
Nothing that a row says is lost in silence."""

import itertools
import json

from support.errors import UserError, as_user_error, brief, nearest
from support.messages import as_turn, messages_of

SCHEMAS = (
    "messages",
    "conversations chosen rejected",
    "conversations",
    "prompt completion",
    "prompt chosen rejected",
    "instruction output",
    "instruction chosen rejected",
    "question chosen rejected",
    "chosen rejected",
    "text",
)
FOR_CHATS = {"system", "history", "tools", "chat_template_kwargs"}
CONTEXT = {"functions", "instruction", "input", "question", "query", "context", "documents"}
KEPT = ("weight", "choices", "answer", "tools", "chat_template_kwargs")
METADATA = (
    "id idx index uuid prompt_id conversation_id source dataset subset split "
    "category topic type tags language lang model score score_chosen score_rejected"
)
ALPACA = (  # tatsu-lab/stanford_alpaca, train.py
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


def alpaca_prompt(row):
    """Stanford Alpaca's text for a row's instruction and its input, if any."""
    extra, paired = row.get("input") or "", ""
    if extra:
        paired = ", paired with an input that provides further context"
        extra = f"\n\n### Input:\n{extra}"
    return ALPACA.format(paired=paired, instruction=row["instruction"], input=extra)


def common_length(first, second):
    """How many elements two sequences have in common from the start."""
    for n, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return n
    return min(len(first), len(second))


def rest_of(row):
    """What stays with each row that is made of a row."""
    return {key: row[key] for key in KEPT if key in row}


def text_of(row, key):
    if not isinstance(row[key], str):
        raise UserError(f"'{key}' must be a string, found {brief(row[key])}")
    return row[key]


def turns_of(row, key):
    """A row's prompt or answer as messages: a string is one turn."""
    if isinstance(row[key], (list, dict)):
        return messages_of(row, key)
    is_answer = key in ("completion", "output", "chosen", "rejected")
    return as_turn("assistant" if is_answer else "user", text_of(row, key))


def context_of(row):
    """The turns that `system` and `history` ([question, answer] pairs or messages) put before a
    row's own."""
    turns, history = [], row.get("history")
    if row.get("system"):
        turns = as_turn("system", text_of(row, "system"))
    if not history:
        return turns
    if isinstance(history, list) and all(isinstance(pair, list) for pair in history):
        roles = itertools.cycle(("user", "assistant"))
        history = [{"role": next(roles), "content": t} for pair in history for t in pair]
    return turns + messages_of({"history": history}, "history")


def schema_of(row, preference=False):
    """The first of SCHEMAS that a row fits. UserError: there is none."""
    filled = {key for key, value in row.items() if value is not None}
    schemas = [schema for schema in SCHEMAS if "chosen" in schema or preference is not True]
    schema = next((schema for schema in schemas if filled.issuperset(schema.split())), None)
    if schema is None:
        known = {key for schema in schemas for key in schema.split()}
        names = [f"{key}{'' if key in known else nearest(key, known)}" for key in filled]
        names = ", ".join(sorted(names))[:200]
        expected = ", ".join(schema.replace(" ", "+") for schema in schemas)
        raise UserError(
            f"fits no schema: it has {names or 'no keys'}; expected one of {expected}; "
            "--recipe reads other columns"
        )
    return schema


def unread_keys(row, preference=False):
    """The keys of a row that nothing here reads and that are not known as metadata."""
    schema = schema_of(row, preference)
    known = {*schema.split(), *FOR_CHATS, *CONTEXT, *KEPT, *METADATA.split()}
    if preference == "unpaired":
        known.add("label")
    return [key for key in row if row[key] and key not in known]


def split_sides(row, keys, chat):
    """(prompt, answers) of a row whose schema has several keys: strings, or lists of messages."""
    first = keys[0]
    is_chat = any(isinstance(row[key], (list, dict)) for key in keys)
    if first in CONTEXT or any(map(row.get, FOR_CHATS)):
        is_chat = is_chat or chat
    if first == "instruction" and is_chat and row.get("input"):
        text = text_of(row, "instruction") + "\n" + text_of(row, "input")
        row = row | {"instruction": text}
    elif first == "instruction" and not is_chat:
        row = row | {"instruction": alpaca_prompt(row)}
    sides = [turns_of(row, key) if is_chat else text_of(row, key) for key in keys]
    answers, shared = sides[1:], []
    if "chosen" in keys:  # as in TRL, the prompt is what both begin with
        answers = sides[-2:]
        ends = [side[:-1] if is_chat else side for side in answers]
        shared = ends[0][: common_length(*ends)]
    prompt = sides[0]
    if first == "chosen":  # a space before the difference is the answer's
        prompt = shared if is_chat else shared[: max(shared.rfind(" "), 0)]
    elif is_chat and all(m in shared for m in prompt):
        prompt = shared
    if is_chat or first == "chosen":  # some data sets repeat the prompt in the answers
        n = len(prompt)
        answers = [side[n:] if side[:n] == prompt else side for side in answers]
    return prompt, answers


def split_row(row, chat, preference=False):
    """A row -> (prompt, answers): strings, or lists of messages if the row has them (if `chat`,
    also where it has a system turn, a history or tools, and Alpaca's rows). The prompt of a text or
    conversation is empty; answers are one, or chosen and rejected.
    UserError: it fits none of SCHEMAS, a value is of a wrong type, or a context would be lost."""
    schema = schema_of(row, preference)
    keys = schema.split()
    if schema == "text":
        prompt, answers = "", [text_of(row, "text")]
    elif len(keys) == 1:
        prompt, answers = [], [messages_of(row, schema)]
    else:
        prompt, answers = split_sides(row, keys, chat)
    lost, texts = FOR_CHATS | CONTEXT, [prompt, *answers]
    if isinstance(prompt, list):
        if row.get("history") and not preference:  # LLaMA-Factory scores its answers too
            answers, prompt = [prompt + answer for answer in answers], []
        context = context_of(row)
        if context[:1] == (prompt or answers[0])[:1]:
            del context[:1]
        answers = answers if prompt else [context + answer for answer in answers]
        prompt = prompt and context + prompt
        texts = [str(m["content"]) for m in itertools.chain(prompt, *answers)]
        lost = CONTEXT
    if keys[0] == "instruction":
        keys.append("input")
    check_lost(row, lost, keys, "\n".join(texts))
    return prompt, answers


def check_lost(row, lost, keys, text):
    """UserError: a row's value of one of the `lost` keys is not in the `text` that its `keys` give
    the model."""
    for key in lost.difference(keys):
        if row.get(key) and str(row[key]) not in text:
            advice = "put it into the prompt or the messages, or drop it"
            raise UserError(f"'{key}' is not read beside {', '.join(keys)}: {advice}")


def template_kwargs(row):
    """The template's variables that a row sets: `chat_template_kwargs` and `tools`."""
    kwargs, tools = row.get("chat_template_kwargs") or {}, row.get("tools")
    reserved = {"messages", "add_generation_prompt", "keep_marks", "self"}
    if not isinstance(kwargs, dict) or kwargs.keys() & reserved:
        expected = "must be an object of the template's variables"
        raise UserError(f"'chat_template_kwargs' {expected}, found {brief(kwargs)}")
    if tools and isinstance(tools, str):
        expected = "'tools' must be a list or one in JSON"
        with as_user_error(expected, ValueError, RecursionError, on=tools):
            tools = json.loads(tools)
    return kwargs | {"tools": tools} if tools else kwargs


def weight_of(row):
    weight = 1.0 if row.get("weight") is None else row["weight"]
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < 1e30:
        raise UserError(f"'weight' must be a number of at least 0, found {brief(weight)}")
    return float(weight)


def with_completion(row, has_template):
    """(a row of an own set with its reference as the completion, whether it has a reference).
    UserError: it has two questions or two references."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in row.keys() & {"messages", "conversations"}:
        if "reference" in row or messages_of(row, key)[-1]["role"] != "assistant":
            row["prompt"] = row.pop(key)
    columns = row.keys() & {"reference", "completion", "chosen"} or row.keys() & {"answer"}
    for names in (columns, row.keys() & {"prompt", "question"}):
        if len(names) > 1:
            raise UserError(f"has {' and '.join(sorted(names))}; leave one of them")
    if "question" in row:
        question = text_of(row, "question")
        row["prompt"] = as_turn("user", question) if has_template else question
    if "prompt" not in row:
        if "reference" in row:
            raise UserError("'reference' needs a 'question', 'prompt' or 'messages'")
        return row, True
    for key in columns & {"reference", "answer"}:
        row["completion"] = text_of(row, key)
    if not columns:
        row["completion"] = "?"  # the renderer needs one
    for key in ("question", "reference", "answer"):
        row.pop(key, None)
    return row, bool(columns)
