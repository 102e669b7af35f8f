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
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, groupby, islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from support.errors import UserError, as_user_error
from support.files import read_tensor, write_stream, write_tensors

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
    """Adds up each tensor over the ranks, in place; FSDP has added up what is divided."""
    if size() == 1:
        return
    tensors = [tensor for tensor in tensors if not is_divided(tensor)]
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


# --- weights, divided among the ranks -------------------------------------------------------------


def is_sharded(model):
    return getattr(model, "sharded", False)


def is_divided(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor, gathered where it is divided: then every rank has to call this."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def own_rows(tensor):
    """The rows of a divided tensor that this rank has, as FSDP deals them out: blocks of one size,
    of which the last may be shorter or empty."""
    block = -(-len(tensor) // size())
    start, stop = (min(n * block, len(tensor)) for n in (rank(), rank() + 1))
    return slice(start, stop)


@torch.no_grad()
def assign(tensor, values):
    """Copies the values of a whole tensor into what this rank has of it."""
    if is_divided(tensor):
        tensor, values = tensor.to_local(), values[own_rows(tensor)]
    tensor.copy_(values)


@torch.no_grad()
def read_into(tensor, file, name):
    """Fills what this rank has of a tensor from a stored one, of which it reads no other rows. That
    may have more columns or rows: PiSSA's start is written behind what was trained."""
    rows, local = None, tensor
    if is_divided(tensor):
        rows, local = own_rows(tensor), tensor.to_local()
    local.copy_(read_tensor(file, name, rows)[tuple(map(slice, local.shape))])


def write_on_first(write, tensors, *args):
    """write((name, tensor) pairs, *args) on the first rank. A divided tensor is gathered when it is
    its turn, so that no rank ever has more than one."""
    pairs = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    if is_first():
        write(pairs, *args)
    for _ in pairs:  # the others take part
        pass
    wait()


def write_whole(tensors, folder, name):
    """Writes tensors as one process does, from divided ones too: then every rank calls this. So a
    checkpoint resumes on any number of ranks, and holds no pickle, which
    torch.distributed.checkpoint's has for its index."""
    if any(map(is_divided, tensors.values())):
        write_on_first(write_stream, tensors, folder and folder / name, tensors)
    elif is_first():
        write_tensors(tensors, folder / name)


def shard(model, blocks, mode, device, cpu_offload):
    """Divides weights among the ranks (FSDP2: Zhao et al. 2023, arXiv:2304.11277) while they are on
    `meta`, and gives each rank's part memory: it is filled by `read_into`.

    base: the blocks' frozen matrices; a block is gathered when it runs, forward and backward, and
    dropped. What trains stays whole on every rank, so optimizer, clipping and checkpoints see plain
    tensors. Packed 4-bit weights become uint8 parameters: FSDP divides no buffers, and storage in
    16 bit would change the bits of NaN patterns.
    full: every weight, with its gradient and the optimizer's states (ZeRO-3: Rajbhandari et al.
    2020, arXiv:1910.02054). grad_op: blocks stay gathered until the step's last micro-batch is
    through (ZeRO-2). Gradients are summed. In both the embedding, which may be the head too, stays
    gathered from forward to the end of backward: the loss uses it outside of any block.
    cpu_offload: the blocks' parts lie in CPU memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for layer in blocks.modules():
        if "weight" in layer._buffers:
            weight = layer._buffers.pop("weight")
            layer.weight = nn.Parameter(weight, requires_grad=False)
    policy = CPUOffloadPolicy(device.type == "cuda") if cpu_offload else OffloadPolicy()
    mesh, base, keep = init_device_mesh(device.type, (size(),)), mode == "base", mode == "grad_op"
    undivided = {p for p in model.parameters() if base and p.dim() == 1}
    options = {"mesh": mesh, "ignored_params": undivided}
    for block in blocks:
        fully_shard(block, reshard_after_forward=not keep, offload_policy=policy, **options)
    if base:
        undivided |= {p for p in model.parameters() if not is_divided(p)}
    fully_shard(model, reshard_after_forward=False, **options)
    model.exchange = Exchange()
    # their names until torch 2.12
    gather_all = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter_sums = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    for module in (model, *blocks):
        module.set_custom_all_gather(Collective(model.exchange, gather_all))
        module.set_custom_reduce_scatter(Collective(model.exchange, scatter_sums))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        module.set_reshard_after_backward(not keep, recurse=False)
    (blocks if base else model).to_empty(device="cpu" if cpu_offload else device)


@dataclass
class Exchange:
    """FSDP's collectives in a step, of which every rank makes the same ones in the same order."""

    passes: int = 0  # forward and backward, as many on each rank
    made: int = 0
    skip: int = 0
    ending: bool = False

    def agree_passes(self, number):
        """The largest of the ranks' numbers of micro-batches; from here on collectives count."""
        if not self.ending:
            self.passes, self.made = agree(number), 0
        return self.passes


class Collective:
    """One of FSDP's collectives, counted (torch.distributed.fsdp's interface for own ones)."""

    def __init__(self, exchange, function):
        self.exchange, self.function = exchange, function

    def allocate(self, shape, **options):
        return torch.empty(*shape, **options)

    def __call__(self, output_tensor, input_tensor, group, **options):
        if self.exchange.skip:
            self.exchange.skip -= 1
            return
        self.exchange.made += 1
        return self.function(output_tensor, input_tensor, group=group, **options)


def end_pass(model, accumulate, *args):
    """accumulate(model, *args) where the same failed on this rank, while the others wait in its
    collectives. Those that were made before are left out, so the result is worthless.
    UserError before torch 2.13, whose FSDP can't begin a pass anew."""
    exchange = model.exchange
    if not hasattr(model, "reset_iter_state"):
        raise UserError(
            f"sharding: torch {torch.__version__} can't go on where memory ran out, 2.13 can; "
            "give a smaller --micro_batch_tokens"
        )
    model.reset_iter_state()
    exchange.skip, exchange.ending = exchange.made, True
    accumulate(model, *args)
    exchange.ending = False


def use_shards(model, device):
    """Makes a divided model, loaded and with what trains in place, ready to run."""
    for p in model.parameters():
        if not is_divided(p):
            p.data = p.data.to(device)
    for module in model.modules():
        if getattr(module, "start", None):  # PiSSA's
            module.start = tuple(tensor.to(device) for tensor in module.start)
        if hasattr(module, "unshard"):  # makes the buffers to gather into, not in inference mode
            module.unshard()
            module.reshard()
    model.sharded = True


def reshard(model):
    """Drops what is gathered, before the parts themselves are used or changed."""
    if is_sharded(model):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
