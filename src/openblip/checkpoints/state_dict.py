"""State dicts: read from files, checked, translated between the parameter names of two formats, and written.

A *key table* says which tensor of another format each of our parameters is: our name -> its name there.

- `{i}` is the number of a layer, and a name without `.weight` or `.bias` stands for both;
- `a.query+key+value` stands for a.query, a.key and a.value, which are stacked along the first axis;
- our names leave out the mode that `ByMode` puts into them (`.variants.encode.`);
- the other format's names may begin with `{text}`, the prefix of a text transformer. A format that keeps an encoder
  and a decoder apart has a prefix for each mode, and a parameter that both modes share is kept under both.

D width of the text transformer, V vocabulary.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openblip.errors import CheckpointError, ConfigError
from openblip.files import atomic_file, damage, read_json
from openblip.models.config import Blip2Config, BlipConfig
from openblip.nn.config import Sharing

Table = Mapping[str, str]
State = Mapping[str, Tensor]
ChooseDtype = Callable[[int], torch.dtype]
"""The precision that a model is to have, by the number of its weights."""

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
LOG_TEMPERATURE = "log_temperature"  # our temperature of ITC; a format whose key table has no such row keeps none

# What other formats keep of the temperature -> from that to ours, and back.
_TEMPERATURES = {"temp": (torch.log, torch.exp), "logit_scale": (torch.neg, torch.neg)}

# Entries under which trainings save a state dict; what wrappers of modules (torch.compile, FSDP, ...) put into names
_WRAPPED = ("model", "state_dict", "model_state_dict", "module")
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")

_DTYPES = {  # safetensors' names
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MODE = re.compile(r"\.variants\.([a-z]+)\.")
_LAYER = re.compile(r"\.(\d+)\.")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; CheckpointError when the file is missing or damaged."""
    check_file(path)
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{error}.") from error


def in_float32(num_weights: int) -> torch.dtype:
    return torch.float32


def count_weights(state: State) -> int:
    """The number of values of all tensors."""
    return sum(tensor.numel() for tensor in state.values())


def add_weights(digest: Any, state: State) -> None:
    """Add names, precisions, shapes and values of all tensors to a hash of hashlib, whatever their order."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle, in the file's precision."""
    return as_state_dict(read_tensors(path), path)


def write_safetensors(path: Path, tensors: State) -> None:
    """Write a safetensors file, whole or not at all, every tensor in its own precision."""
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().to("cpu").contiguous()
        if copies[name].untyped_storage().data_ptr() in storages:  # the format stores no tensors that share memory
            copies[name] = copies[name].clone()
        storages.add(copies[name].untyped_storage().data_ptr())
    with atomic_file(path) as partial:
        save_file(copies, partial, metadata={"format": "pt"})


def read_tensors(path: Path) -> Any:
    """The content of a .safetensors, .pth, .pt or .bin file, on the CPU; CheckpointError when it is damaged or wants to
    run code.
    """
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return _map_tensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # in which trainings keep their options
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is the file whole?") from error
    except Exception as error:  # of a dozen classes, depending on where a file is torn
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # torch first says how to read the file all the same; what it refused comes further down.
        reason = next((line for line in lines if "Unsupported" in line), lines[0]).partition(" Please ")[0]
        raise CheckpointError(
            f"{path} cannot be read as weights, and nothing else is read from a pickle ({type(error).__name__}: "
            f"{reason}). Is the file whole, and from where you think? If it holds settings beside its weights, and you "
            "trust it, save the weights alone to another file."
        ) from error


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each a mapping of its own onto the file.

    So a tensor is read when it is used, and its memory is given back with it. The library maps the file as one, and
    everything that was read stays in memory beside the model.
    """
    with safetensors.safe_open(path, framework="pt"):
        pass  # it has checked that the file is whole, and what its header says
    with path.open("rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path} holds {name} as {entry['dtype']}, which no model of OpenBLIP has.")
        data = torch.empty(0, dtype=torch.uint8)
        if last > first:  # nothing cannot be mapped
            data = torch.from_numpy(np.memmap(path, np.uint8, "c", start + first, (last - first,)))
        tensors[name] = data.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def check_file(path: Path) -> None:
    """Raise a CheckpointError for a file that is missing, or in whose place a failed download left something else."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; the checkpoint is incomplete: download it again.")
    if (problem := damage(path)) is not None:
        raise CheckpointError(f"{path} cannot be read: it {problem}.")


def as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """`content` itself, or the state dict that a training has saved in it; CheckpointError unless it is a dict from
    names to tensors.
    """
    while isinstance(content, dict) and (name := next((n for n in _WRAPPED if isinstance(content.get(n), dict)), None)):
        content = content[name]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights: a {type(content).__name__}, not names and tensors.")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds more than weights: {', '.join(sorted(strange)[:10])}.")
    return content


def unwrapped(state: State) -> dict[str, Tensor]:
    """The tensors of a whole model without what wrappers put into their names: torch.compile and FSDP anywhere, DDP, a
    LightningModule and the like one before all names, whatever it is called.
    """
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    while len(plain) > 1 and len({name.partition(".")[:2] for name in plain}) == 1:
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
    return plain


def without(prefixes: tuple[str, ...] | str, tensors: State) -> dict[str, Tensor]:
    """The tensors whose names do not begin with one of the prefixes."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def below(prefix: str, tensors: State) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of transformers, whole or in the shards that an index names, in their precision."""
    for file_name in (WEIGHTS, PICKLED_WEIGHTS):
        index = folder / f"{file_name}.index.json"
        if (folder / file_name).is_file():
            names = [file_name]
        elif index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} names no shards.")
            names = sorted({str(shard) for shard in weight_map.values()})
            elsewhere = [name for name in names if Path(name).name != name]
            if elsewhere:
                raise CheckpointError(f"{index} names files outside its folder: {', '.join(elsewhere)}.")
        else:
            continue
        return unwrapped({key: tensor for name in names for key, tensor in read_weights(folder / name).items()})
    raise CheckpointError(f"{folder} has no weights: neither {WEIGHTS} nor {PICKLED_WEIGHTS}, nor an index of shards.")


def raise_on_mismatch(
    source: object, missing: Iterable[str], left_over: Iterable[str], other: Iterable[str] = ()
) -> None:
    """Raise a CheckpointError that lists the weights that are missing, left over or otherwise wrong, if any are."""
    problems = [*(f"missing {name}" for name in sorted(missing)), *(f"left over {name}" for name in sorted(left_over))]
    problems += sorted(other)
    if problems:
        raise CheckpointError(f"{source} does not have exactly the weights of the model: {'; '.join(problems)}.")


def check_weights(expected: State, weights: State, source: object) -> None:
    """Raise a CheckpointError, with a list, unless `weights` has the names and shapes of `expected`."""
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    raise_on_mismatch(source, expected.keys() - weights.keys(), weights.keys() - expected.keys(), shapes)


def check_vocabulary(source: object, num_entries: int, model: str, num_rows: int, kind: str = "entries,") -> None:
    """Raise a CheckpointError when a tokenizer has more entries than a model has word embeddings."""
    if num_entries > num_rows:
        raise CheckpointError(
            f"{source}: the tokenizer has {num_entries} {kind} {model} {num_rows}; it belongs to another model."
        )


def load_weights(model: nn.Module, weights: State, source: object, expected: State | None = None) -> None:
    """Copy weights into a model; CheckpointError unless names and shapes are exactly those expected.

    expected: the parameters that get weights; None is all of the model's.
    """
    check_weights(model.state_dict() if expected is None else expected, weights, source)
    # With `expected`, the other weights of the model stay as they are; torch would call them missing.
    model.load_state_dict(weights, strict=expected is None)


def fill(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: object,
    expected: State | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> None:
    """Give a model that was made `without_weights` its weights, as `load_weights` does.

    dtype: the precision of the weights whose names begin with `prefix`; all others become float32. The weights are
    copied one by one and taken out of `weights`, so that where the caller has no other references to them, they and the
    model's never are in memory at once.
    """
    check_weights(model.state_dict() if expected is None else expected, weights, source)
    own: dict[str, Tensor] = {}
    for name in list(weights):
        tensor = weights.pop(name)
        precision = dtype if name.startswith(prefix) else torch.float32
        if not tensor.is_floating_point():
            precision = tensor.dtype
        own[name] = tensor.to(precision, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(own, strict=expected is None, assign=True)


class _NoRandomWeights(TorchFunctionMode):
    """Modules that are made within do not draw weights."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made within have no weights and are on no device, until `fill` gives them their weights.

    To draw weights on no device torch would import its compiler, which takes longer than all else.
    """
    with torch.device("meta"), _NoRandomWeights():
        yield


class Layout(NamedTuple):
    """How another format keeps one kind of model, or a part of one."""

    table: Table
    ignored: tuple[str, ...] = ()  # prefixes of what may be there: it follows from the rest, or has no use here
    heads: tuple[Any, ...] = ()
    text_prefixes: Mapping[str, str] = {}  # mode -> prefix of the text transformer's names in that mode
    pooled: bool = False


def find_layout(layouts: Mapping[str, Layout], config: BlipConfig | Blip2Config) -> str | None:
    """Name of the first layout that holds a model with this config; None when there is none."""
    kind = set(config.heads), getattr(config, "pooled", False)
    return next((name for name, layout in layouts.items() if (set(layout.heads), layout.pooled) == kind), None)


def add_prefix(table: Table, our_prefix: str, other_prefix: str) -> dict[str, str]:
    """The same table for a part of a model: prefixes before our names and before the other format's names."""
    return {our_prefix + name: other_prefix + other for name, other in table.items()}


def _source_keys(layout: Layout, name: str) -> list[list[str]]:
    """The tensors that one of our parameters is made of, once for every copy that the format keeps."""
    mode, row = _MODE.search(name), _MODE.sub(".", name)
    layer, suffix = _LAYER.search(row), ""
    if layer is not None:
        row = row.replace(layer[0], ".{i}.", 1)
    if row not in layout.table:
        row, _, kind = row.rpartition(".")
        suffix = f".{kind}"
    prefixes = list(layout.text_prefixes.values()) or [""]  # what all modes share is kept under each
    if mode is not None and mode[1] in layout.text_prefixes:
        prefixes = [layout.text_prefixes[mode[1]]]
    leaves = layout.table[row].rpartition(".")[2]
    stem = layout.table[row].removesuffix(leaves)
    copies = []
    for prefix in prefixes:
        keys = [f"{stem}{leaf}".format(i=layer[1] if layer else "", text=prefix) for leaf in leaves.split("+")]
        copy = [key + suffix for key in keys]
        if copy not in copies:
            copies.append(copy)
    return copies


def translate(layout: Layout, state: State, names: Iterable[str], source: object) -> dict[str, Tensor]:
    """The weights of another format under our `names`, without the temperature where the format keeps none.

    Raises a CheckpointError that lists what is missing, left over, of shapes that do not stack, or different where
    encoder and decoder share it.
    """
    names = [name for name in names if name != LOG_TEMPERATURE or name in layout.table]
    keys = {name: _source_keys(layout, name) for name in names}
    all_copies = [copy for copies in keys.values() for copy in copies]
    used = {key for copy in all_copies for key in copy}
    raise_on_mismatch(source, used - state.keys(), without(layout.ignored, state).keys() - used)
    unlike = [
        ", ".join(f"{key} {tuple(state[key].shape)}" for key in copy)
        for copy in all_copies
        if len({state[key].shape for key in copy}) > 1
    ]
    if unlike:
        problem = "weights that belong together and differ in shape"
        raise CheckpointError(f"{source} has {problem}: {'; '.join(sorted(unlike))}.")
    weights, different = {}, []
    for name, copies in keys.items():
        # A scalar does not stack.
        stacked = [torch.cat([state[k] for k in copy]) if len(copy) > 1 else state[copy[0]] for copy in copies]
        weights[name] = stacked[0]
        different += [copies[0][0] for other in stacked[1:] if not torch.equal(other, stacked[0])]
    if different:
        problem = "encoder and decoder should share weights that differ"
        raise CheckpointError(f"{source}: {problem}: {'; '.join(sorted(different))}.")
    if LOG_TEMPERATURE in weights:
        weights[LOG_TEMPERATURE] = _TEMPERATURES[layout.table[LOG_TEMPERATURE]][0](weights[LOG_TEMPERATURE].float())
    return weights


def translate_back(layout: Layout, weights: State) -> dict[str, Tensor]:
    """Our weights under the names of another format, the inverse of `translate`."""
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == LOG_TEMPERATURE and name not in layout.table:
            continue
        if name == LOG_TEMPERATURE:
            tensor = _TEMPERATURES[layout.table[name]][1](tensor)
        for copy in _source_keys(layout, name):
            state |= zip(copy, tensor.chunk(len(copy)) if len(copy) > 1 else [tensor], strict=True)
    return state


def infer_sharing(state: State, text_prefixes: Mapping[str, str]) -> Sharing:
    """What encoder and decoder share: as in the paper where their tensors are the same, else nothing."""
    if len(text_prefixes) == 1:
        return "all_but_sa"  # there is one mode, and nothing to share it with
    encoder, decoder = (below(f"{text_prefixes[mode]}.", state) for mode in ("encode", "decode"))
    for name, tensor in encoder.items():
        # Self-attention has .attention. in its names, with its output and norm; cross-attention .crossattention.
        is_shared = ".attention." not in name and not name.endswith("position_ids")
        if is_shared and (name not in decoder or not torch.equal(tensor, decoder[name])):
            return "none"
    return "all_but_sa"


def check_tied(state: State, source: object, decoder: str = "text_decoder") -> None:
    """Raise a CheckpointError when a copy of the decoder's matrix (V, D) or bias differs from its original."""
    for copy, original in tied_names(state, decoder).items():
        if copy in state and original in state and not torch.equal(state[copy], state[original]):
            raise CheckpointError(f"{source}: {copy} differs from {original}; in BLIP's decoder they are tied.")


def tied_names(state: State, decoder: str = "text_decoder") -> dict[str, str]:
    """What files of a decoder with a head keep twice: name of the copy -> name of what it is a copy of."""
    head = f"{decoder}.cls.predictions"
    words = f"{decoder}.bert.embeddings.word_embeddings.weight"
    tied = {f"{head}.decoder.weight": words, f"{head}.decoder.bias": f"{head}.bias"}
    return tied if f"{head}.bias" in state else {}
