"""Several processes as one: the ranks that torchrun started, what they add up, gather and agree on.

The decision that is not obvious: in one process everything here does nothing, so that the callers
have no branches. Every rank computes what follows from the settings and the data by itself; values
that only one rank has go to all of them, in the same order, so that all decide alike. gloo carries
these, and the tensors of a CPU; NCCL those of a GPU. Only the first rank writes and prints.

    torchrun --nproc_per_node 4 sft.py --config configs/qwen3-4b-sft.yaml
"""

import json
import os
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from itertools import accumulate, groupby, islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from support.errors import UserError, as_user_error

LONGEST_WAIT = timedelta(hours=1)  # of a rank for the others: rendering data, writing checkpoints
BUCKET = 2**24  # values that one reduction adds up
LOST = "another rank has ended, or was not heard of for an hour; the run has to be started again"


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    return rank() == 0


def start(device):
    """Joins the other processes, as torchrun's environment describes them. On CUDA each takes the
    GPU of its number on its node. device: the setting."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        raise UserError(f"torchrun: {here} processes for {torch.cuda.device_count()} GPUs")
    if ":" in device:
        raise UserError(f"device: {device} would be every rank's; give {device.split(':')[0]}")
    with as_user_error("torchrun: the ranks don't meet", RuntimeError, ValueError, KeyError):
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store, number, count = next(dist.rendezvous("env://"))
        # of an earlier attempt the store still has the addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=LONGEST_WAIT
        )


@contextmanager
def join_ranks(device, *contexts):
    """`start`; then the block runs on the first rank in `contexts`, on the others in silence."""
    start(device)
    with ExitStack() as stack:
        if not is_first():
            null = stack.enter_context(open(os.devnull, "w"))
            contexts = redirect_stdout(null), redirect_stderr(null)
        for context in contexts:
            stack.enter_context(context)
        yield


def gather(value):
    """[each rank's value]. It travels as JSON: no pickle is read, from a network neither."""
    if size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = agree(len(text))
    own = torch.full((longest,), ord(" "), dtype=torch.uint8)
    own[: len(text)] = text
    texts = [torch.empty_like(own) for _ in range(size())]
    with as_user_error(LOST, RuntimeError):
        dist.all_gather(texts, own)
    return [json.loads(bytes(text.tolist())) for text in texts]


def gather_each(results, model):
    """Yields the values of every rank's iterator `results`, in turns, as they come; its own where
    all ranks compute the same, see `every`."""
    if is_sharded(model):
        yield from results
        return
    while any(turn := gather([*islice(results, 1)])):
        for values in turn:
            yield from values


def agree(number):
    """The largest of the ranks' whole numbers."""
    if size() == 1:
        return number
    largest = torch.tensor(int(number))
    with as_user_error(LOST, RuntimeError):
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def wait():
    """Returns when every rank has called it."""
    agree(0)


def on_first(function, *args):
    """What function(*args), called on the first rank alone, returns there: a JSON value."""
    return gather(function(*args) if is_first() else None)[0]


@contextmanager
def first_of_node():
    """The block runs on the first rank of each node, then on its others, which find the files that
    it has cached."""
    waits = size() > 1 and os.environ["LOCAL_RANK"] != "0"
    if waits:
        wait()
    yield
    if not waits:
        wait()


def sum_tensors(tensors):
    """Adds up each tensor over the ranks, in place."""
    if size() == 1:
        return
    ends = accumulate(tensor.numel() for tensor in tensors)
    for _, bucket in groupby(zip(tensors, ends), lambda pair: pair[1] // BUCKET):
        bucket = [tensor for tensor, _ in bucket]
        values = parameters_to_vector(bucket)
        with as_user_error(LOST, RuntimeError):
            dist.all_reduce(values)
        vector_to_parameters(values, bucket)


def sum_numbers(numbers):
    """{name: number}, with the same names on every rank, added up over the ranks."""
    values = torch.tensor([*numbers.values()], dtype=torch.float64)
    sum_tensors([values])
    return dict(zip(numbers, values.tolist()))


def divide(sizes, ranks=None):
    """For each rank the indices of its share, in order, of items of these sizes, spread evenly.
    The largest come first, each to the rank that has the least so far."""
    loads = [0] * (ranks or size())
    shares = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += sizes[index]
        shares[owner].append(index)
    return [*map(sorted, shares)]


def every(items, model):
    """This rank's share of items of about equal size: every size()-th, from its own number on. All
    of them where the model is divided: there each pass needs all ranks, in step."""
    return items if is_sharded(model) else islice(items, rank(), None, size())


# --- the frozen base, divided among the ranks -----------------------------------------------------


def is_sharded(model):
    return getattr(model, "sharded", False)


def shard_base(model, blocks, device, cpu_offload):
    """Divides the blocks' frozen weights among the ranks (FSDP2: Zhao et al. 2023,
    arXiv:2304.11277): a block is gathered when it runs, forward and backward, and dropped. What
    trains stays whole on every rank, on `device`, so optimizer, clipping and checkpoints see plain
    tensors. Packed 4-bit weights become uint8 parameters: FSDP divides no buffers, and storage in
    16 bit would change the bits of NaN patterns. cpu_offload: the parts lie in CPU memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for layer in blocks.modules():
        if "weight" in layer._buffers:
            weight = layer._buffers.pop("weight")
            layer.weight = nn.Parameter(weight, requires_grad=False)
        if getattr(layer, "start", None):  # PiSSA's
            layer.start = tuple(tensor.to(device) for tensor in layer.start)
    policy = CPUOffloadPolicy(device.type == "cuda") if cpu_offload else OffloadPolicy()
    options = {"mesh": init_device_mesh(device.type, (size(),)), "offload_policy": policy}
    trained = {p for p in model.parameters() if p.requires_grad}
    for block in blocks:
        fully_shard(block, ignored_params=trained, **options)
    whole = {p for p in model.parameters() if not hasattr(p, "full_tensor")}
    for p in whole:
        p.data = p.data.to(device)
    fully_shard(model, ignored_params=whole, **options)  # the blocks' order, to gather ahead
    for block in blocks:  # makes the buffers to gather into, not in inference mode
        block.unshard()
        block.reshard()
    model.sharded = True
