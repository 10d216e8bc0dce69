"""A model as graphs of ONNX or OpenVINO, which run without torch and without OpenBLIP.

A graph is one call of the model, with sizes that may vary (docs/export.md). Two graphs write texts: a prefill reads the
prompt, and a step reads one more token of every text. The prefill computes the keys and values of an image once; the
steps are given them, and those of all tokens so far, to which each adds its own. Names are those of transformers'
exported decoders: what is called `present.0.decoder.key` is given to the next step as `past_key_values.0.decoder.key`,
and `past_key_values.0.encoder.key` is of what the text attends to, the image or a question.

All graphs of ONNX share one file of weights. Beside them stand the vocabulary and the preprocessing, as transformers
writes them, and export.json, which says what each graph takes and gives.

B images, R = B * K rows of text (K for each image), N image tokens, T text tokens, P tokens of the prompt, S tokens so
far, S' after a step, Dv image width, D width, H heads, W head width, Q queries, E embedding width, V vocabulary.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from openblip.checkpoints.checkpoint import Checkpoint
from openblip.checkpoints.huggingface import write_preprocessing, write_tokenizer
from openblip.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedTaskError
from openblip.files import atomic_folder, write_json
from openblip.models.blip import Blip, CrossKV
from openblip.models.blip2 import Blip2
from openblip.nn.attention import KeyValue, LayerKV, SelfAttentionCache
from openblip.nn.config import QFormerConfig, TextConfig
from openblip.nn.linear import FrozenLinear
from openblip.progress import Progress

GraphFormat = Literal["onnx", "openvino"]
EXPORT_FILE = "export.json"
TOLERANCE = 1e-3
"""The most by which a graph may differ from torch, as a share of its largest value where that is above 1."""
_WEIGHTS = "weights.bin"
_SMALL = 1024  # bytes of a tensor that stays in its graph: shapes, which a runtime reads before it has the weights
_ALIGNMENT = 4096  # of weights in their file, which is mapped
_NOT_EXPORTED = {
    "nlvr": "judge",
    "visdial": "rank_answers",
    "prefix": "the decoder of prefixes",
    "llm": "the language model",
}

Shape = tuple[int | str, ...]  # a name is a size that may vary


class Graph(NamedTuple):
    """A call of the model: what it computes, of the model and its inputs, and the shapes of inputs and outputs."""

    compute: Callable[..., Sequence[Tensor]]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


class GraphModule(nn.Module):
    """A graph as a module, for torch to trace."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.compute = graph.compute

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs in the order of the graph, the outputs likewise."""
        return tuple(self.compute(self.model, *inputs))


def export_checkpoint(checkpoint: Checkpoint, folder: Path, format: GraphFormat) -> dict[str, float]:
    """Write a folder with what a model can do as graphs, and return how far each of them differs from torch.

    Every graph is run by the runtime that it is for, on random inputs of other sizes than it was traced with. The
    folder appears when all are within `TOLERANCE`. The language model of a BLIP-2 is not exported, and neither are
    judgements of pairs (NLVR2) and the ranking of dialogs.

    Raises MissingExtraError without the packages; UnsupportedTaskError for a model of which there is nothing to
    export; ConfigError for one that is not in float32 on the CPU, as `load_checkpoint` reads it; CheckpointError for
    one that torch cannot trace, or whose graphs differ.
    """
    require_export_packages(format)
    _require_float32(checkpoint.model)
    graphs = find_graphs(checkpoint)
    differences: dict[str, float] = {}
    with atomic_folder(folder) as partial, Progress("exporting", total=len(graphs), unit="graphs") as bar:
        with (partial / _WEIGHTS).open("wb") as file:
            weights = WeightFile(file)
            for name, graph in graphs.items():
                _write_onnx(GraphModule(checkpoint.model, graph), graph, partial / f"{name}.onnx", weights)
                bar.show(name)
                file.flush()
                path = partial / f"{name}.onnx"
                if format == "openvino":
                    path = _convert_to_openvino(path)
                differences[name] = _difference(path, checkpoint, graph)
                bar.advance()
        if format == "openvino":
            for file_of_onnx in (partial / _WEIGHTS, *partial.glob("*.onnx")):
                file_of_onnx.unlink()
        if checkpoint.tokenizer is not None:
            write_tokenizer(partial, checkpoint.tokenizer)
        write_preprocessing(partial, checkpoint.preprocessing, "BlipProcessor")
        write_json(partial / EXPORT_FILE, _description(checkpoint, graphs, differences, format))
    return differences


def _require_float32(model: Blip | Blip2) -> None:
    """ConfigError unless all that is exported is in float32, on the CPU, and not laid out for inference."""
    parts = [part for name, part in model.named_children() if name != "language"]
    weights = [weight for part in parts for weight in part.parameters()]
    kinds = {f"{weight.dtype} on {weight.device}" for weight in weights if weight.is_floating_point()}
    kinds |= {type(layer).__name__ for part in parts for layer in part.modules() if isinstance(layer, FrozenLinear)}
    if others := sorted(kinds - {"torch.float32 on cpu"}):
        raise ConfigError(
            f"Models are exported as load_checkpoint reads them, in float32 on the CPU; this has {', '.join(others)}.",
            page="export.md",
        )


def left_out(checkpoint: Checkpoint) -> list[str]:
    """What the model can do that is not exported."""
    return [what for head, what in _NOT_EXPORTED.items() if head in checkpoint.model.config.heads]


def _description(
    checkpoint: Checkpoint, graphs: Mapping[str, Graph], differences: Mapping[str, float], format: GraphFormat
) -> dict[str, Any]:
    """The content of export.json."""
    tokenizer = checkpoint.tokenizer
    described: dict[str, Any] = {"format": format, "openblip": version("openblip")}
    if tokenizer is not None:
        first = tokenizer.cls_id if isinstance(checkpoint.model, Blip2) else tokenizer.enc_id
        if getattr(checkpoint, "encoder_token", "[ENC]") == "[CLS]":
            first = tokenizer.cls_id
        described |= {
            "prompt": checkpoint.prompt,
            "prompt_ids": tokenizer.prompt(checkpoint.prompt).tolist(),
            "start_id": tokenizer.dec_id,
            "end_id": tokenizer.sep_id,
            "pad_id": tokenizer.pad_id,
            "match_first_id": first,
        }
    described["graphs"] = {
        name: {
            "inputs": {key: list(shape) for key, shape in graph.inputs.items()},
            "outputs": {key: list(shape) for key, shape in graph.outputs.items()},
            "differs_from_torch_by": differences[name],
        }
        for name, graph in graphs.items()
    }
    return described


# ---- What is exported: a function of the model for each graph, and its shapes


def find_graphs(checkpoint: Checkpoint) -> dict[str, Graph]:
    """The graphs of what a model can do, by name; UnsupportedTaskError where there are none."""
    model, size = checkpoint.model, checkpoint.preprocessing.image_size
    is_blip, heads = isinstance(model, Blip), set(model.config.heads)
    has_connector = isinstance(model, Blip2) and model.connector is not None
    if has_connector or not heads - {"nlvr", "visdial", "prefix", "mlm"}:
        raise UnsupportedTaskError(f"Of a model with the heads {', '.join(heads)} there is nothing to export.")
    text, num_queries = _text_config(model)
    with torch.inference_mode():
        weights = next(model.vision.parameters())
        num_tokens, width = model.encode_image(weights.new_zeros(1, 3, size, size)).shape[1:]
    image_tokens: dict[str, Shape] = {"image_tokens": ("images", num_tokens, width)}
    texts: dict[str, Shape] = {"input_ids": ("rows", "tokens"), "attention_mask": ("rows", "tokens")}
    heads_and_width = (text.num_heads, text.hidden_dim // text.num_heads)

    def keys_and_values(name: str, part: str, rows: str, tokens: int | str) -> dict[str, Shape]:
        """Those of every layer, each (R, H, S, W)."""
        shape = (rows, heads_and_width[0], tokens, heads_and_width[1])
        return {f"{name}.{i}.{part}.{kind}": shape for i in range(text.num_layers) for kind in ("key", "value")}

    def step(context: dict[str, Shape]) -> Graph:
        past = keys_and_values("past_key_values", "decoder", "rows", "past")
        present = keys_and_values("present", "decoder", "rows", "past + 1")
        logits: Shape = ("rows", 1, text.vocab_size)
        return Graph(_step, {"input_ids": ("rows", 1), **past, **context}, {"logits": logits, **present})

    graphs: dict[str, Graph] = {}
    embeddings: dict[str, Shape] = {}
    if "itc" in heads:
        queries = () if is_blip else (num_queries,)
        embeddings = {"image_embeddings": ("images", *queries, model.config.embed_dim)}
    graphs["image_encoder"] = Graph(
        _encode_images, {"pixel_values": ("images", 3, size, size)}, image_tokens | embeddings
    )
    if "itc" in heads:
        graphs["text_encoder"] = Graph(_embed_texts, texts, {"text_embeddings": ("rows", model.config.embed_dim)})
    if "itm" in heads:
        graphs["match"] = Graph(_match, image_tokens | texts, {"match": ("rows",)})
    if heads & {"lm", "itg"}:
        written = keys_and_values("present", "decoder", "images", "past")
        of_images = keys_and_values("present", "encoder", "images", num_tokens) if is_blip else {}
        logits: dict[str, Shape] = {"logits": ("images", "prompt", text.vocab_size)}
        prompts: dict[str, Shape] = {"input_ids": ("images", "prompt")}
        graphs["caption_prefill"] = Graph(_prefill_caption, image_tokens | prompts, logits | written | of_images)
        kv = keys_and_values("past_key_values", "encoder", "images", num_tokens) if is_blip else {}
        graphs["caption_step"] = step(kv)
    if "vqa" in heads:
        written = keys_and_values("present", "decoder", "rows", "past")
        of_questions = keys_and_values("present", "encoder", "rows", "tokens")
        starts: dict[str, Shape] = {"decoder_input_ids": ("rows", "prompt")}
        graphs["answer_prefill"] = Graph(
            _prefill_answer,
            image_tokens | texts | starts,
            {"logits": ("rows", "prompt", text.vocab_size), **written, **of_questions},
        )
        kv = keys_and_values("past_key_values", "encoder", "rows", "tokens")
        graphs["answer_step"] = step(kv | {"encoder_attention_mask": ("rows", "tokens")})
    if "llm" in heads:
        assert isinstance(model, Blip2)  # the only one with this head
        assert model.config.language is not None
        read = image_tokens | (texts if model.config.instructed else {})
        rows = "rows" if model.config.instructed else "images"
        visual: dict[str, Shape] = {"visual_prompts": (rows, num_queries, model.config.language.hidden_dim)}
        graphs["visual_prompts"] = Graph(_visual_prompts, read, visual)
    return graphs


def _encode_images(model: Blip | Blip2, pixel_values: Tensor) -> list[Tensor]:
    """float (B, 3, S, S), normalised -> tokens (B, N, Dv), and unit vectors (B, E) or (B, Q, E) where there is ITC."""
    tokens = model.encode_image(pixel_values)
    if "itc" not in model.config.heads:
        return [tokens]
    if isinstance(model, Blip):
        return [tokens, model.embed_image(tokens)]
    return [tokens, model.embed_image(model.encode_queries(model.image_kv(tokens)).queries)]


def _embed_texts(model: Blip | Blip2, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """ids from [CLS] and their mask, int64 (R, T) -> unit vectors (R, E)."""
    return [model.embed_text(input_ids, attention_mask.bool())]


def _match(model: Blip | Blip2, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """P(match), (R,), of ids (R, T) from the first token of `match_first_id`, over B images."""
    logits = model.match_logits(input_ids, attention_mask.bool(), model.image_kv(image_tokens))
    return [logits.float().softmax(dim=1)[:, 1]]


def _prefill_caption(model: Blip | Blip2, image_tokens: Tensor, input_ids: Tensor) -> list[Tensor]:
    """ids (B, P) from [DEC] -> logits (B, P, V), and the keys and values of the prompt, and of a BLIP's image."""
    if isinstance(model, Blip2):  # whose queries are the first tokens of the cache
        cache = model.encode_queries(model.image_kv(image_tokens)).cache
        states = model.qformer(input_ids, causal=True, cache=cache)
        return [model.qformer.predict_words(states), *_of_cache(cache)]
    return _prefill(model, input_ids, model.image_kv(image_tokens, "decode"))


def _prefill_answer(
    model: Blip, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
) -> list[Tensor]:
    """Questions (R, T) from `match_first_id` over B images, and ids (R, P) from [DEC] -> logits (R, P, V), and the keys
    and values of the prompt and of the questions.
    """
    image_kv = model.image_kv(image_tokens, "encode")
    return _prefill(model, decoder_input_ids, model.question_kv(input_ids, attention_mask.bool(), image_kv))


def _prefill(model: Blip, input_ids: Tensor, context_kv: CrossKV) -> list[Tensor]:
    cache = SelfAttentionCache(model.config.text.num_layers)
    states = model.text(input_ids, "decode", context_kv=context_kv.layers, cache=cache)
    of_context = [x for kv in cast(list[KeyValue], context_kv.layers) for x in (kv.key, kv.value)]
    return [model.text.predict_words(states), *_of_cache(cache), *of_context]


def _step(model: Blip | Blip2, input_ids: Tensor, *past: Tensor) -> list[Tensor]:
    """The next token of R texts, ids (R, 1) -> logits (R, 1, V), and the keys and values of all tokens.

    past: by layer the keys and values (R, H, S, W) of the tokens so far; for a BLIP then those of B contexts, and where
    these are questions their mask, int64 (B, T).
    """
    text, num_queries = _text_config(model)
    num_layers = text.num_layers
    pairs = list(zip(past[0:-1:2], past[1::2], strict=True))  # without a mask at the end, which has no partner
    cache = SelfAttentionCache(num_layers)
    for layer, (key, value) in zip(cache.layers, pairs[:num_layers], strict=True):
        layer.append(key, value)
    num_past = past[0].shape[2]
    if isinstance(model, Blip2):
        position = num_past - num_queries
        states = model.qformer(input_ids, cache=cache, positions=torch.arange(position, position + 1))
        return [model.qformer.predict_words(states), *_of_cache(cache)]
    mask = past[-1].bool()[:, None, None, :] if len(past) % 2 else None
    context_kv: list[LayerKV] = [KeyValue(key, value, mask) for key, value in pairs[num_layers:]]
    positions = torch.arange(num_past, num_past + 1)
    states = model.text(input_ids, "decode", context_kv=context_kv, cache=cache, positions=positions)
    return [model.text.predict_words(states), *_of_cache(cache)]


def _visual_prompts(model: Blip2, image_tokens: Tensor, *texts: Tensor) -> list[Tensor]:
    """What a language model reads of B images, (B, Q, Dl), or of R = B * K where the Q-Former reads texts too."""
    image_kv = model.image_kv(image_tokens)
    if not texts:
        return [model.visual_prompts(model.encode_queries(image_kv).queries)]
    input_ids, attention_mask = texts
    return [model.visual_prompts(model.encode_multimodal(input_ids, attention_mask.bool(), image_kv))]


def _of_cache(cache: SelfAttentionCache) -> list[Tensor]:
    """Keys and values by layer."""
    return [x for layer in cache.layers for x in (layer.key, layer.value) if x is not None]


# ---- How it is traced, written and checked


class WeightFile:
    """One file that the graphs share: equal weights are written once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def place(self, tensor: Any) -> Any:
        """The same tensor, of onnx_ir, as one whose data is in the file."""
        import onnx_ir

        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return onnx_ir.ExternalTensor(
            _WEIGHTS, self._offsets[key], len(data), tensor.dtype, shape=tensor.shape, name=tensor.name
        )


def _write_onnx(module: GraphModule, graph: Graph, path: Path, weights: WeightFile) -> None:
    import onnx_ir

    sizes = {"images": 2, "rows": 4, "tokens": 5, "prompt": 3}
    inputs = _random_inputs(module.model, graph, sizes)
    text, num_queries = _text_config(module.model)
    longest = {"tokens": text.max_positions, "prompt": text.max_positions, "past": num_queries + text.max_positions - 1}
    dims = {name: torch.export.Dim(name, max=longest.get(name)) for name in (*sizes, "past")}
    varying = [
        {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for shape in graph.inputs.values()
    ]
    with _quiet_export():
        try:
            traced = torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes={"inputs": tuple(varying)},
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # that rows divide over images depends on both
            )
            program = torch.onnx.export(
                traced, (), input_names=list(graph.inputs), output_names=list(graph.outputs), dynamo=True, verbose=False
            )
        except Exception as error:  # of many kinds, for an image encoder of transformers that cannot be traced
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"The graph {path.stem} of this model cannot be exported: {reason}") from error
    assert program is not None  # no file was named, so there is a program
    model: Any = program.model
    shapes = [*graph.inputs.values(), *graph.outputs.values()]
    for node in model.graph:
        node.metadata_props.clear()  # lines of code, with the paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None  # with names of torch; runtimes infer it anew
    for value, shape in zip([*model.graph.inputs, *model.graph.outputs], shapes, strict=True):
        value.shape = onnx_ir.Shape(shape)
    for value in model.graph.initializers.values():
        if value.const_value.nbytes > _SMALL:
            value.const_value = weights.place(value.const_value)
    onnx_ir.save(model, path)


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence what torch's exporter says of packages that are not installed, and of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _text_config(model: Any) -> tuple[TextConfig | QFormerConfig, int]:
    """The shape of what reads and writes texts, and how many queries stand in its cache before them."""
    if isinstance(model, Blip):
        return model.config.text, 0
    qformer: QFormerConfig = model.config.qformer
    return qformer, qformer.num_queries


def _random_inputs(model: Any, graph: Graph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of these sizes: normal noise, tokens of the vocabulary, masks that hide the end of the first text."""
    text, num_queries = _text_config(model)
    generator, inputs = torch.Generator().manual_seed(0), {}
    for name, shape in graph.inputs.items():
        actual = [sizes[size] if isinstance(size, str) and size != "past" else size for size in shape]
        actual = [num_queries + sizes["prompt"] if size == "past" else size for size in actual]
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(text.vocab_size, cast(Any, actual), generator=generator)
        elif name.endswith("attention_mask"):
            inputs[name] = torch.ones(cast(Any, actual), dtype=torch.long)
            inputs[name][0, 2:] = 0
        else:
            inputs[name] = torch.randn(cast(Any, actual), generator=generator)
    return inputs


def _convert_to_openvino(path: Path) -> Path:
    """Write the model of an ONNX file for OpenVINO, and return its path."""
    import openvino

    converted = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), converted, compress_to_fp16=False)
    return converted


def _difference(path: Path, checkpoint: Checkpoint, graph: Graph) -> float:
    """How far a graph's outputs differ from torch's, as `TOLERANCE` says; CheckpointError where it is more than that.

    It runs with one image, text and token, and with several.
    """
    run, largest = _open_graph(path), 0.0
    module = GraphModule(checkpoint.model, graph)
    for sizes in (
        {"images": 1, "rows": 1, "tokens": 2, "prompt": 1},
        {"images": 3, "rows": 3, "tokens": 4, "prompt": 2},
        {"images": 2, "rows": 6, "tokens": 7, "prompt": 5},
    ):
        inputs = _random_inputs(checkpoint.model, graph, sizes)
        with torch.inference_mode():
            expected = module(*inputs.values())
        found = run({name: x.numpy() for name, x in inputs.items()})
        for name, by_torch, by_runtime in zip(graph.outputs, expected, found, strict=True):
            reference = by_torch.float().numpy()
            if by_runtime.shape != reference.shape:
                raise CheckpointError(
                    f"{path.name} gives {name} of the shape {by_runtime.shape}; torch gives {reference.shape}."
                )
            difference = float(np.abs(by_runtime - reference).max() / max(1.0, np.abs(reference).max()))
            if not difference <= TOLERANCE:  # or no number
                raise CheckpointError(
                    f"{path.name} differs from torch by {difference:.1e} in {name}; {TOLERANCE:.0e} is allowed."
                )
            largest = max(largest, difference)
    return largest


def _open_graph(path: Path) -> Callable[[dict[str, Any]], list[Any]]:
    """A function from inputs to outputs, which a runtime computes in float32."""
    if path.suffix == ".xml":
        import openvino

        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda inputs: list(compiled(inputs).values())
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, inputs))


def require_export_packages(format: GraphFormat) -> None:
    """MissingExtraError, with the pip command, unless what writes and checks the format is installed."""
    from importlib.util import find_spec

    extra, packages = "export", ["onnx", "onnxscript", "onnxruntime"]
    if format == "openvino" and find_spec("openvino") is None:
        extra, packages = "openvino", ["openvino"]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f'{", ".join(missing)} not installed: pip install "openblip[{extra}]"')
