"""State dicts: read from files, checked, translated between the names of formats, and written.

A *key table* says which tensor of another format each of our parameters is: our name -> its name there.

- `{i}` is the number of a layer, and a name without `.weight` or `.bias` stands for both;
- `a.query+key+value` stands for a.query, a.key and a.value, which are stacked along the first axis;
- our names leave out the mode that `ByMode` puts into them (`.variants.encode.`);
- their names may begin with `{text}`, the prefix of a text transformer. A format that keeps an encoder and a decoder
  apart has a prefix for each mode, and a parameter that both modes share is kept under both.

D width of the text transformer, V vocabulary.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openblip.errors import CheckpointError, ConfigError
from openblip.files import atomic_file, read_json
from openblip.models.config import Blip2Head, Head, Sharing

Table = Mapping[str, str]
HeadT = TypeVar("HeadT", Head, Blip2Head)

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"

_MODE = re.compile(r"\.variants\.([a-z]+)\.")
_LAYER = re.compile(r"\.(\d+)\.")
_SELF_ATTENTION = ".attention."  # with its output and norm; the names of cross-attention have .crossattention.
_DECODER = "text_decoder"
# What torch.load raises for a file that is torn, no pickle, or one that asks for more than tensors.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
)


# ---- files


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; CheckpointError when the file is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; name a folder that holds a checkpoint.")
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{error}.") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating ones as float32; CheckpointError when it cannot be read."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; the checkpoint is incomplete.")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is the file whole?") from error
    return as_float32(tensors)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all, every tensor in its own precision."""
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        if copy.untyped_storage().data_ptr() in storages:  # the format stores no tensor that shares memory
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    with atomic_file(path) as partial:
        save_file(copies, partial, metadata={"format": "pt"})


def read_pickle(path: Path) -> Any:
    """The content of a .pth, .pt or .bin file, on the CPU, read as weights only.

    Raises CheckpointError when the file is missing or damaged, or wants to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; the checkpoint is incomplete.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _PICKLE_ERRORS as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # torch first says how to read the file all the same; what it refused comes further down.
        reason = next((line for line in lines if "Unsupported" in line), lines[0]).partition(" Please ")[0]
        raise CheckpointError(
            f"{path} cannot be read as weights, and nothing else is read from a pickle ({type(error).__name__}: "
            f"{reason}). Is the file whole, and from where you think?"
        ) from error


def as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """`content` itself; CheckpointError unless it is a dict from names to tensors."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights: a {type(content).__name__}, not names and tensors.")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds what is no weight: {', '.join(sorted(strange)[:10])}.")
    return content


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, floating ones as float32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def read_folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of transformers, floating ones as float32.

    They are in model.safetensors or pytorch_model.bin, whole or in the shards that an index names.
    """
    for file_name in (WEIGHTS, PICKLED_WEIGHTS):
        if (folder / file_name).is_file():
            return _read_weights_file(folder / file_name)
        index = folder / f"{file_name}.index.json"
        if index.is_file():
            return {n: t for shard in _shards(index) for n, t in _read_weights_file(folder / shard).items()}
    raise CheckpointError(f"{folder} has no weights: neither {WEIGHTS} nor {PICKLED_WEIGHTS}, nor an index of shards.")


def _read_weights_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return as_float32(as_state_dict(read_pickle(path), path))
    return read_safetensors(path)


def _shards(index: Path) -> list[str]:
    """The files that an index names; CheckpointError unless they lie beside it."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} names no shards.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    elsewhere = [shard for shard in shards if Path(shard).name != shard]
    if elsewhere:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(elsewhere)}.")
    return shards


# ---- checks


def raise_on_mismatch(source: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raise a CheckpointError that lists what is missing and left over, if anything is."""
    problems = [f"missing {name}" for name in sorted(missing)]
    problems += [f"left over {name}" for name in sorted(left_over)]
    if problems:
        raise CheckpointError(f"{source} does not have the weights that its kind of model has: {'; '.join(problems)}.")


def check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str) -> None:
    """Raise a CheckpointError, with a list, unless `weights` has the names and shapes of `expected`."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"left over {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the config says {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit its config: {'; '.join(problems)}.")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy `weights` into the model; CheckpointError unless names and shapes are exactly the model's."""
    check_weights(model.state_dict(), weights, origin)
    model.load_state_dict(weights)


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str, loaded: tuple[str, ...] = ()) -> None:
    """Make `weights` the model's parameters, without a copy and whatever device or precision those had.

    loaded: prefixes of the parameters that have their weights already. Raises CheckpointError unless names and shapes
    are exactly those of the others.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(loaded)}
    check_weights(expected, weights, origin)
    for name, tensor in weights.items():
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, nn.Parameter(tensor))


# ---- key tables


class Layout(NamedTuple, Generic[HeadT]):
    """How another format keeps one kind of model."""

    heads: tuple[HeadT, ...]
    table: Table
    derived: tuple[str, ...]
    """Prefixes of the names whose tensors follow from others: they may be there, and are ignored."""
    text_prefixes: Mapping[str, str] = {}
    """Mode -> prefix of the text transformer's names in that mode."""
    pooled: bool = False
    instructed: bool = False


def find_layout(
    layouts: Mapping[str, Layout[HeadT]], heads: tuple[HeadT, ...], *, pooled: bool = False, instructed: bool = False
) -> str | None:
    """Name of the first layout that holds a model with these heads; None when there is none."""
    for name, layout in layouts.items():
        if set(layout.heads) == set(heads) and (layout.pooled, layout.instructed) == (pooled, instructed):
            return name
    return None


def add_prefix(table: Table, ours: str, theirs: str) -> dict[str, str]:
    """The same table for a part of a model: prefixes before our names and before their names."""
    return {f"{ours}{name}": f"{theirs}{row}" for name, row in table.items()}


def source_keys(table: Table, name: str, text_prefixes: Mapping[str, str] | None = None) -> list[list[str]]:
    """The tensors that one of our parameters is made of, once for every copy that the format keeps."""
    mode = _MODE.search(name)
    row = _MODE.sub(".", name)
    layer = _LAYER.search(row)
    if layer is not None:
        row = row.replace(layer[0], ".{i}.", 1)
    suffix = ""
    if row not in table:
        row, _, kind = row.rpartition(".")
        suffix = f".{kind}"
    leaves = table[row].rpartition(".")[2]
    stem = table[row].removesuffix(leaves)
    if not text_prefixes:
        prefixes = [""]
    elif mode is not None and mode[1] in text_prefixes:
        prefixes = [text_prefixes[mode[1]]]
    else:  # shared by all modes
        prefixes = list(text_prefixes.values())
    number = layer[1] if layer else ""
    copies = [
        tuple(f"{stem}{leaf}".format(i=number, text=prefix) + suffix for leaf in leaves.split("+"))
        for prefix in prefixes
    ]
    return [list(copy) for copy in dict.fromkeys(copies)]


def translate(
    table: Table,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    ignored: tuple[str, ...],
    source: str,
    text_prefixes: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The weights of another format under our `names`.

    ignored: prefixes of names in `state` that may be left over. Raises a CheckpointError that lists what is missing,
    left over, of shapes that do not stack, or different where encoder and decoder share it.
    """
    keys = {name: source_keys(table, name, text_prefixes) for name in names}
    used = {key for copies in keys.values() for copy in copies for key in copy}
    raise_on_mismatch(source, used - state.keys(), {key for key in state.keys() - used if not key.startswith(ignored)})
    unlike = sorted(
        ", ".join(f"{key} {tuple(state[key].shape)}" for key in copy)
        for copies in keys.values()
        for copy in copies
        if len({state[key].shape for key in copy}) > 1
    )
    if unlike:
        raise CheckpointError(f"{source} has weights that belong together and differ in shape: {'; '.join(unlike)}.")
    weights, different = {}, []
    for name, copies in keys.items():
        weights[name], *others = (_stacked([state[key] for key in copy]) for copy in copies)
        different += [copies[0][0] for other in others if not torch.equal(other, weights[name])]
    if different:
        raise CheckpointError(
            f"{source} says that encoder and decoder share what differs: {'; '.join(sorted(different))}."
        )
    return weights


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # a scalar does not stack


def translate_back(
    table: Table, weights: Mapping[str, Tensor], text_prefixes: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Our weights under the names of another format, the inverse of `translate`."""
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for copy in source_keys(table, name, text_prefixes):
            state |= zip(copy, tensor.chunk(len(copy)) if len(copy) > 1 else [tensor], strict=True)
    return state


# ---- text transformers of other formats, which all have BERT's names


def infer_sharing(state: Mapping[str, Tensor], text_prefixes: Mapping[str, str]) -> Sharing:
    """What encoder and decoder share: as in the paper where their tensors are the same, else nothing."""
    if len(text_prefixes) == 1:
        return "all_but_sa"  # there is one mode, and nothing to share it with
    encoder, decoder = text_prefixes["encode"], text_prefixes["decode"]
    for name, tensor in state.items():
        is_text = name.startswith(f"{encoder}.") and not name.endswith(".position_ids")
        if is_text and _SELF_ATTENTION not in name:
            decoder_tensor = state.get(decoder + name.removeprefix(encoder))
            if decoder_tensor is None or not torch.equal(tensor, decoder_tensor):
                return "none"
    return "all_but_sa"


def _tied(decoder: str) -> dict[str, str]:
    """What files of a decoder keep twice: name of the copy -> name of what it is a copy of."""
    head = f"{decoder}.cls.predictions"
    return {
        f"{head}.decoder.weight": f"{decoder}.bert.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def check_tied(state: Mapping[str, Tensor], source: str, decoder: str = _DECODER) -> None:
    """Raise a CheckpointError when a file has another matrix (V, D) or bias of the decoder than ours ties."""
    for copy, original in _tied(decoder).items():
        if copy in state and original in state and not torch.equal(state[copy], state[original]):
            raise CheckpointError(f"{source}: {copy} differs from {original}; BLIP's decoder has them tied.")


def tied_copies(state: Mapping[str, Tensor], decoder: str = _DECODER) -> dict[str, Tensor]:
    """The copies that `check_tied` looks at, for a file that is to have them."""
    if f"{decoder}.cls.predictions.bias" not in state:
        return {}
    return {copy: state[original] for copy, original in _tied(decoder).items()}
