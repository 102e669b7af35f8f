"""What every test file may lean on. No test reaches a network; `transformers` is the reference to
hold ours against."""

import base64
import json
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants a hub starts its own on loopback
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of commands that a test starts

cache = tempfile.TemporaryDirectory()  # of rendered rows, gone with this process
os.environ["PLAINTUNE_CACHE"] = cache.name

import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub.utils.sha import git_hash  # noqa: E402

torch.set_num_threads(1)  # tiny shapes: threads would only wait for each other

# head_dim differs from C/H (which Llama's reference wants whole), K < H, an odd vocabulary:
# mixed-up sizes break
TINY = dict(
    model_type="qwen3",
    vocab_size=199,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.fixture(autouse=True)
def a_cpu_with_16_bit_products(monkeypatch):
    """`auto` is the checkpoint's dtype in tests, whatever CPU they run on, see model.pick_dtype."""
    has = dict.fromkeys(("avx512_bf16", "avx512_fp16"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)


@pytest.fixture
def shared():
    """The folder of real models and data beside the repository; the test is skipped where there is
    none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the repository")
    return folder


def write_checkpoint(
    folder, seed=0, dtype="float32", dialect="new", max_shard_size="5GB", **config
):
    """Writes a checkpoint with transformers' own classes and returns its folder. config overrides
    TINY; every weight is random and far from its initial value, norms and biases too. dialect
    "old": rope_scaling beside rope_theta."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype)
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**TINY, **config}), dtype=torch_dtype
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    if dialect == "old":
        raw = json.loads((folder / "config.json").read_text())
        scaling = raw.pop("rope_parameters")
        raw["rope_theta"], raw["torch_dtype"] = scaling.pop("rope_theta"), raw.pop("dtype")
        raw["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """make(name="tiny", **options of write_checkpoint) -> the folder of a new checkpoint below
    tmp_path."""
    return lambda name="tiny", **options: write_checkpoint(tmp_path / name, **options)


def adamw_steps(model, loss_fn, batches):
    """The losses of AdamW steps with decay and clipping over batches of documents (ids),
    loss_fn(model, documents) summed. eps is 1e-5: some gradients are nothing but rounding (a key's
    bias hardly moves a softmax), which 1e-8 turns into whole steps."""
    parameters, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, eps=1e-5)
    for documents in batches:
        loss = loss_fn(model, documents) / sum(len(ids) - 1 for ids in documents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def their_loss(model, documents):
    """The summed loss of a transformers model over documents, one at a time."""
    return sum(
        torch.nn.functional.cross_entropy(
            model(torch.tensor(ids)[None]).logits[0, :-1],
            torch.tensor(ids)[1:],
            reduction="sum",
        )
        for ids in documents
    )


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a push asks for. files: {repository: {path: bytes}};
    commits: (repository, message) of each; faults: statuses that the next commits are answered
    with; closed: repositories that take nothing; asked: every request. A token that is refused is
    told back, which no log may show."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Message", json.dumps(value) if status >= 400 else "")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        while length is None and (size := int(self.rfile.readline(), 16)):  # in chunks
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline() if length is None else None
        self.reply(body)

    def reply(self, body):
        hub, path, given = (
            self.server,
            self.path.partition("?")[0],
            self.headers.get("Authorization"),
        )
        hub.asked.append(path)
        repository = "/".join(path.split("/")[3:5])
        if given != f"Bearer {hub.token}":
            return self.answer(401, {"error": f"{given} is no token of ours"})
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "me", "orgs": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repository = f"{wanted['organization']}/{wanted['name']}"
            hub.files.setdefault(repository, {})
            return self.answer(200, {"url": f"{hub.url}/{repository}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/tree/" in path:
            return self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in hub.files[repository].items()
                ],
            )
        if "/preupload/" in path and repository in hub.closed:
            return self.answer(403, {"error": f"{given} may read here, no more"})
        if "/revision/" in path:
            return self.answer(200, {"id": repository, "sha": "0" * 40})
        if "/preupload/" in path:
            held = {name: git_hash(data) for name, data in hub.files[repository].items()}
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                            "oid": held.get(file["path"]),
                        }
                        for file in json.loads(body)["files"]
                    ]
                },
            )
        assert "/commit/" in path, path
        if hub.faults:
            return self.answer(hub.faults.pop(0), {"error": "not now"})
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                hub.commits.append((repository, value["summary"]))
            elif entry["key"] == "file":
                hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            else:
                del hub.files[repository][value["path"]]
        self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{repository}/commit/0"})


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback, see Hub, that this process's client talks to and whose token it has."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.token = (
        f"http://127.0.0.1:{server.server_port}",
        "hf_SecretOfThisTest",
    )
    server.files, server.commits, server.faults, server.closed, server.asked = (
        {},
        [],
        [],
        set(),
        [],
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
