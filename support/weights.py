"""A checkpoint's safetensors files, one or sharded: their headers, names and shapes checked, and
written a shard at a time."""

import json
from pathlib import Path

from support.errors import UserError, nearest
from support.files import read_header, read_json, write_tensors


def checkpoint_tensors(folder):
    """{tensor name: (file, shape, dtype name)} from the headers of a checkpoint, one file or
    sharded."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return read_header(single)
    if not index.exists():
        hint = ""
        if list(folder.glob("*.bin")):
            hint = " (pickle files are never read: convert them to safetensors)"
        raise UserError(f"{folder}: neither {single.name} nor {index.name} in it{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map in it")
    tensors = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: names {file!r}; a shard is a .safetensors file of the same folder"
            )
        if not (folder / file).exists():
            raise UserError(f"{index}: names {file}, which is not there")
        for name, entry in read_header(folder / file).items():
            if weight_map.get(name) == file:
                tensors[name] = entry
    if missing := sorted(weight_map.keys() - tensors):
        raise UserError(
            f"{index}: {len(missing)} tensors are not in the files it names, first: {missing[0]}"
        )
    return tensors


def check_names(expected, actual, where):
    """Raises one UserError for all missing, unexpected and misshapen tensors; expected and actual
    are {name: shape}."""
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    faults = [f"missing {name}" for name in missing]
    for n, name in enumerate(missing[:8]):
        faults[n] += nearest(name, unexpected[:1000])
    faults += [f"unexpected {name}" for name in unexpected]
    for name, shape in expected.items():
        if name in actual and tuple(actual[name]) != tuple(shape):
            faults.append(f"{name} is {list(actual[name])}, expected {list(shape)}")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        shown = "; ".join(faults[:8])
        raise UserError(f"{where}: {len(faults)} tensor(s) do not fit: {shown}{more}")


def in_shards(tensors, max_bytes):
    """The (name, tensor) pairs as dicts of up to max_bytes. One dict, filled again and again: the
    last shard's memory is free before the next one fills."""
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_shards(tensors, folder, max_bytes):
    """Writes (name, tensor) pairs, taken one at a time, into files of up to max_bytes, with an
    index where they are several."""
    names, total = [], 0  # of each shard; bytes of all
    for shard in in_shards(tensors, max_bytes):
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        write_tensors(shard, folder / f"shard-{len(names)}")
    weight_map = {}
    for n, shard_names in enumerate(names, 1):
        file = f"model-{n:05d}-of-{len(names):05d}.safetensors"
        file = file if len(names) > 1 else "model.safetensors"
        (folder / f"shard-{n}").rename(folder / file)
        weight_map |= dict.fromkeys(shard_names, file)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
