"""Files, folders and the tokenizer's files: what is read, and what is refused."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, write_checkpoint
from test_sft import write_tokenizer

from data import Tokenizer, as_turn, load_examples
from lora import LoRAConfig, add_lora, merge, save_adapter
from model import load_model
from support.errors import UserError
from support.hub import companions
from support.readers import find_files, read_rows

TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
real = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no ../shared folder")


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, expected",
    [
        ("train.jsonl test.jsonl", "train.jsonl"),
        ("train.jsonl dev.jsonl test.csv notes.txt", "train.jsonl"),
        ("data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl data/test.jsonl",
         "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl"),
        ("data/a.jsonl b.jsonl", "b.jsonl data/a.jsonl"),
        ("a.jsonl b.jsonl.gz", "a.jsonl b.jsonl.gz"),
        ("test.jsonl", "test.jsonl"),
        ("my_train.json my-eval.json", "my_train.json"),
        ("training.jsonl valid.jsonl", "training.jsonl"),
        ("constrain.jsonl latest.jsonl", "constrain.jsonl latest.jsonl"),  # parts of words
        ("Train.jsonl TEST.jsonl", "Train.jsonl"),
        ("train.jsonl more.jsonl", "train.jsonl"),  # as `datasets`; the command says so
    ],
)  # fmt: skip
def test_a_folder_gives_its_train_split(tmp_path, capsys, names, expected):
    (tmp_path / "data").mkdir()
    for name in names.split():
        (tmp_path / name).write_text('{"text": "x"}\n')
    paths = [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))]
    assert paths == expected.split()
    total = sum(".txt" not in name for name in names.split())
    said = f"its train split, {len(paths)} of {total} files: "
    assert (said in capsys.readouterr().out) == (len(paths) < total)


@pytest.mark.parametrize(
    "names, message",
    [
        ("test.jsonl validation.jsonl", "has several splits; name one: 'test.jsonl, valid"),
        ("a.jsonl test.jsonl", "has several splits; name one: 'a.jsonl, test.jsonl'"),
        ("a.txt", "no file in it of a kind in .jsonl, .json"),
        ("", "no file in it of a kind in"),
    ],
)
def test_folders_that_have_no_clear_rows(tmp_path, names, message):
    for name in names.split():
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path))


def test_data_sets_names_the_same_split(tmp_path):
    """The files that `datasets` takes for train, of folders where it knows a split."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    for n, names in enumerate(
        ("train.jsonl test.jsonl", "data/train-00000-of-00001.jsonl data/test-00000-of-00001.jsonl",
         "my_train.jsonl my_dev.jsonl", "x-training.jsonl x-evaluation.jsonl")
    ):  # fmt: skip
        folder = tmp_path / str(n)
        (folder / "data").mkdir(parents=True)
        for name in names.split():
            (folder / name).write_text('{"text": "x"}\n')
        theirs = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
        assert [str(path) for path in find_files(str(folder))] == theirs["train"]


# --- one row, and parquet -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rows",
    [
        ('{"prompt": "a", "completion": "b"}', [{"prompt": "a", "completion": "b"}]),
        ('{\n "text":\n "a"\n}\n', [{"text": "a"}]),
        ('{"text": "a", "data": "wiki"}', [{"text": "a", "data": "wiki"}]),
        ('{"data": [{"text": "a"}], "version": 1}', [{"text": "a"}]),
        ('{"data": {"text": "a"}}', [{"data": {"text": "a"}}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('[{"text": "a"}]', [{"text": "a"}]),
    ],
)
def test_a_json_file_of_one_row(tmp_path, text, rows):
    (tmp_path / "a.json").write_text(text)
    assert [row for _, row in read_rows(tmp_path / "a.json")] == rows


CALLS = [
    [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    [{"function": {"name": "add", "arguments": {"a": 1, "b": 0}}}],
    [{"function": {"name": "set", "arguments": {"flag": False, "text": "", "list": []}}}],
    [{"function": {"name": "nested", "arguments": {"x": {"y": 1}}}}],
    [{"function": {"name": "nested", "arguments": {"x": {"z": [{"p": 1}, {"q": 2}]}}}}],
]


def test_parquet_pads_no_tool_calls(tmp_path):
    """Every call as it was written, whatever keys the others have; equal to trl's function."""
    from trl.trainer.utils import remove_none_values

    rows = [{"messages": [{"role": "assistant", "tool_calls": calls}]} for calls in CALLS]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    assert '"city": null' in json.dumps(table.to_pylist())
    found = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert found == rows == [remove_none_values(row) for row in table.to_pylist()]


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (pa.map_(pa.string(), pa.string()), [("a", "1"), ("b", "2")], {"a": "1", "b": "2"}),
        (pa.map_(pa.string(), pa.int64()), [("a", 1), ("b", None)], {"a": 1}),
        (pa.map_(pa.string(), pa.int64()), [], {}),
        (pa.list_(pa.map_(pa.string(), pa.int64())), [[("a", 1)], [("b", 2)]],
         [{"a": 1}, {"b": 2}]),
        (pa.struct({"m": pa.map_(pa.string(), pa.string())}), {"m": [("a", "1")]},
         {"m": {"a": "1"}}),
        (pa.list_(pa.int64()), [1, None, 2], [1, None, 2]),  # a list's place is its meaning
        (pa.struct({"a": pa.int64(), "b": pa.bool_()}), {"a": 0, "b": False},
         {"a": 0, "b": False}),
    ],
)  # fmt: skip
def test_parquet_maps_are_objects(tmp_path, kind, value, expected):
    pq.write_table(pa.table({"x": pa.array([value], kind)}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet")[0][1] == {"x": expected}


def test_a_map_with_a_key_twice_is_refused(tmp_path):
    kind = pa.map_(pa.string(), pa.int64())
    pq.write_table(
        pa.table({"x": pa.array([[("a", 1), ("a", 2)]], kind)}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="a.parquet: .*duplicate key was 'a'"):
        read_rows(tmp_path / "a.parquet")


# --- tokens that only tokenizer_config.json names -------------------------------------------------

PLAIN = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
TEXT = "a <tool> b<|b|><|x|>c <|x|>d<img> e"


def with_config(source, folder, **changes):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


@real
@pytest.mark.parametrize(
    "family, changes, size",
    [
        ("qwen3", {"extra_special_tokens": ["<|x|>"]}, 151670),
        ("qwen3", {"image_token": "<img>", "extra_special_tokens": []}, 151670),
        ("qwen3", {"extra_special_tokens": ["<|x|>", "<|x|>", "<|im_end|>"]}, 151670),
        (
            "llama3",
            {"extra_special_tokens": {"image_token": "<img>", "x": "<|x|>"}},
            128258,
        ),
        ("llama3", {"additional_special_tokens": ["<|b|>", "<|x|>"]}, 128258),
        ("llama3", {"pad_token": "<pad>", "extra_special_tokens": ["<|x|>"]}, 128258),
    ],
)
def test_extra_special_tokens_are_ids(tmp_path, family, changes, size):
    from transformers import PreTrainedTokenizerFast

    folder = with_config(TOKENIZERS / family, tmp_path / "t", **changes)
    ours, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert len(ours) == len(theirs) == size
    for skip in (True, False):
        text = theirs.decode(ours.encode(TEXT), skip_special_tokens=skip)
        assert ours.decode(ours.encode(TEXT), skip) == text


@real
@pytest.mark.parametrize("family", ["llama3"])
def test_added_tokens_decoder(tmp_path, family):
    """In the order of its ids, with their own flags: `<tool>` takes the space before it."""
    from transformers import PreTrainedTokenizerFast

    n = len(Tokenizer(TOKENIZERS / family))
    tokens = {
        str(n + 1): PLAIN | {"content": "<|b|>", "special": True},
        str(n): PLAIN | {"content": "<tool>", "special": False, "lstrip": True},
    }
    folder = with_config(TOKENIZERS / family, tmp_path / "t", added_tokens_decoder=tokens)
    ours, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.backend.token_to_id("<tool>") == n and ours.added["<|b|>"] == n + 1
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(
        ours.encode(TEXT), skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens_decoder": {"x": {"content": "<t>"}}},
        {"added_tokens_decoder": {"7": "<t>"}},
        {"added_tokens_decoder": ["<t>"]},
        {"extra_special_tokens": [5]},
        {"extra_special_tokens": 5},
        {"extra_special_tokens": [{"text": "<t>"}]},
    ],
)
def test_tokens_that_are_malformed(tmp_path, changes):
    (tmp_path / "s").mkdir()
    write_tokenizer(tmp_path / "s")
    folder = with_config(tmp_path / "s", tmp_path / "t", **changes)
    with pytest.raises(UserError, match="tokenizer_config.json: its tokens are malformed: "):
        Tokenizer(folder)


# --- an adapter's tokenizer -----------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "model", vocab_size=262)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter whose tokenizer has a token and a template of its own."""
    model = load_model(base)
    add_lora(model, LoRAConfig(lora_r=2, target_modules=["q_proj"]))
    folder = tmp_path / "run" / "adapter"
    save_adapter(model, folder, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"extra_special_tokens": ["<call>"], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


MESSAGES = as_turn("user", "a <call>") + as_turn("assistant", "b")


def test_the_adapters_tokenizer_and_template_stand_first(base, adapter):
    """Its template is in its config, which the base's file of its own does not hide; what ends an
    answer and is named by the base alone stays."""
    tokenizer = Tokenizer(base, adapter=adapter)
    assert tokenizer.render(MESSAGES) == "[user] a <call><|im_end|>[assistant] b<|im_end|>"
    assert tokenizer.encode("<call>") == [259] and tokenizer.eos_ids == [2, 0]
    assert Tokenizer(base).render(MESSAGES).startswith("<|im_start|>user")
    assert len(Tokenizer(base).encode("<call>")) == 6
    files = companions(base, adapter)
    assert files["config.json"].parent == base and "chat_template.jinja" not in files


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "nothing"])
def test_an_adapter_with_a_part_of_the_files(base, tmp_path, name):
    """A template alone is its own over the base's tokenizer; a config.json is not the model's."""
    (tmp_path / name).write_text("{}" if name == "config.json" else TEMPLATE)
    tokenizer = Tokenizer(base, adapter=tmp_path)
    text = tokenizer.render(MESSAGES)
    assert text.startswith("[user]" if "template" in name else "<|im_start|>")
    assert tokenizer.eos_ids == [2, 0]


def test_a_merge_takes_them_along(base, adapter, tmp_path):
    """The merged folder renders and encodes as the adapter does, in transformers too."""
    from transformers import AutoTokenizer

    merge(adapter, tmp_path / "merged")
    ours, theirs = Tokenizer(tmp_path / "merged"), Tokenizer(base, adapter=adapter)
    assert ours.render(MESSAGES) == theirs.render(MESSAGES) != Tokenizer(base).render(MESSAGES)
    assert ours.encode("<call>x") == theirs.encode("<call>x") and ours.eos_ids == [2, 0]
    auto = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert auto.apply_chat_template(MESSAGES, tokenize=False) == ours.render(MESSAGES)
    config = (tmp_path / "merged" / "config.json").read_text()
    assert config == (base / "config.json").read_text()


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_further_keeps_them(base, adapter, tmp_path, command):
    import dpo
    import sft

    row = {"prompt": as_turn("user", "a <call>"), "chosen": as_turn("assistant", "b")}
    row |= {"rejected": as_turn("assistant", "c")} if command == "dpo" else {}
    if command == "sft":
        row = {"messages": row["prompt"] + row["chosen"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    argv = f"--model {base} --adapter {adapter} --data {tmp_path / 'rows.jsonl'} --max_steps 1"
    argv += f" --eval_answers 0 --output_dir {tmp_path / 'out'} --report_to none --device cpu"
    argv += f" --ref_cache {tmp_path / 'cache'}" if command == "dpo" else ""
    {"sft": sft, "dpo": dpo}[command].main(argv.split())
    for part in (Tokenizer(base, adapter=tmp_path / "out" / "adapter"),
                 Tokenizer(tmp_path / "out" / "merged")):  # fmt: skip
        assert part.render(MESSAGES).startswith("[user]")
        assert part.encode("<call>") == [259] and part.eos_ids == [2, 0]
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["train"]
    tokenizer = Tokenizer(base, adapter=adapter)
    options = {"preference": True} if command == "dpo" else {}
    *_, ledger = load_examples(str(tmp_path / "rows.jsonl"), tokenizer, **options)
    assert report["tokens"] == ledger.tokens


def test_an_evaluation_asks_with_them(base, adapter, tmp_path):
    import eval as evaluation

    model, tokenizer, _ = evaluation.load_evaluated(
        str(adapter.parent), {}, evaluation.EvalConfig()
    )
    assert tokenizer.render(MESSAGES).startswith("[user]") and tokenizer.eos_ids == [2, 0]
    assert model.adapter.lora_r == 2


# --- what a recipe draws on -----------------------------------------------------------------------


def question(**more):
    return {"question": "Why?", "choices": ["a", "b"], "answer": "a", **more}


@pytest.mark.parametrize(
    "rows, recipe, args, message",
    [
        ([question()] * 3, "ecqa", {}, "3 rows without a rationale, so without a chain of thought"),
        ([question()] * 3, "mcqa", {}, "3 rows without a rationale, so without a chain of thought"),
        ([question()] * 3, "mcqa", {"cot": 0}, None),
        ([question(), question(rationale="So.")], "ecqa", {}, "1 rows without a rationale"),
        ([question(rationale="So.")], "ecqa", {}, None),
        ([question(rationale="  ")], "ecqa", {}, "1 rows without a rationale"),
        ([question(rationale=None, support="So.")], "ecqa", {}, None),
        ([{"question": "2+2?", "answer": "4\n#### 4"}], "gsm8k", {}, None),
        ([{"text": "x"}], "", {}, None),
    ],
)  # fmt: skip
def test_a_recipe_says_what_is_missing(base, tmp_path, rows, recipe, args, message):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = load_examples, (str(tmp_path / "r.jsonl"), Tokenizer(base))
    for _ in range(2):  # the second from the cache
        *_, ledger = load[0](*load[1], recipe=recipe, recipe_args=args)
        assert ("without a rationale" in str(ledger)) == bool(message)
        assert (message or "") in str(ledger)
    *_, ledger = load[0](*load[1], recipe=recipe, recipe_args=args, max_samples=1)
    assert "1 rows without" in str(ledger) or not message or "rationale" in str(rows)
