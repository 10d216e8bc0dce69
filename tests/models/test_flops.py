"""The counts of operations, held equal to what torch counts while the models compute.

B batch, T text tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from openblip.errors import ConfigError
from openblip.generation.decoding import Nucleus
from openblip.generation.search import generate
from openblip.models import flops
from openblip.models.blip2 import Blip2
from openblip.models.config import Projection
from openblip.models.flops import LanguageModelShape
from openblip.models.vision_tower import run_frozen
from openblip.nn.config import (
    ConnectorConfig,
    PatchMlpConfig,
    PoolingConfig,
    ResamplerConfig,
    Sharing,
    SoftPromptConfig,
)
from tasks.tiny_tasks import BLIP2_CONFIGS, make_blip2, make_task
from tiny_blip import SIZE, TINY, random_batch, random_pixels, random_tokens, tiny_blip
from tiny_blip2 import tiny_blip2

BATCH, LENGTH = 3, 8
ROTATION = partial(pytest.approx, rel=1e-3)  # some versions of transformers turn positions by a matrix product
PAIRS = random_batch([LENGTH, 5, LENGTH - 1], image_ids=[1, 2, 3])


def counted(run: Callable[[], Any]) -> int:
    """The operations of a call. Attention is computed step by step: torch does not count its kernel for CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def train(task: torch.nn.Module, batch: Any) -> None:
    sum(task.train()(batch, 0, torch.Generator().manual_seed(0)).values()).backward()


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_writing_captions(size: int) -> None:
    model = tiny_blip().requires_grad_(False)  # the counter cannot follow weights into inference mode
    pixels, prompt = random_pixels(2, size=size), torch.tensor([58])

    def run() -> None:
        kv = model.image_kv(model.encode_image(pixels), "decode")
        whole = Nucleus(max_new_tokens=6, min_new_tokens=6, seed=0)
        generate(model, kv, prompt, 2, whole, num_captions=3, eos_id=3)

    assert counted(run) == 2 * flops.caption_flops(model.config, 3, 6, prompt_tokens=1, image_size=size)


def test_scoring_texts() -> None:
    model, texts = tiny_blip(), random_tokens([LENGTH, LENGTH])

    def run() -> None:
        image_tokens = model.encode_image(random_pixels(1))
        model.match_logits(texts.ids, texts.mask, model.image_kv(image_tokens))
        model.embed_image(image_tokens)
        model.embed_text(texts.ids, texts.mask)

    assert counted(run) == flops.score_flops(model.config, [LENGTH, LENGTH])


@pytest.mark.parametrize("sharing", ["all_but_sa", "none"])
@pytest.mark.parametrize("name", ["pretraining", "filtering", "itc+lm", "albef"])
def test_contrastive_steps(name: str, sharing: Sharing) -> None:
    task = make_task(name, sharing)
    config = task.model.config
    expected = flops.contrastive_step_flops(config, BATCH, LENGTH, num_keys=0)
    assert counted(lambda: train(task, PAIRS)) == expected
    task.after_step()  # three pairs are in the queue now
    longer = flops.contrastive_step_flops(config, BATCH, LENGTH, num_keys=BATCH)
    assert counted(lambda: train(task, PAIRS)) == longer > expected


@pytest.mark.parametrize("name", ["in-batch", "clip", "itm", "lm", "mlm"])
def test_steps_without_a_momentum_model(name: str) -> None:
    task = make_task(name, "none")
    expected = flops.contrastive_step_flops(task.model.config, BATCH, LENGTH, num_keys=None)
    assert counted(lambda: train(task, PAIRS)) == expected


def test_captioning_step() -> None:
    task = make_task("captioning")
    read = LENGTH + task.prompt_ids.numel() - 2  # the prompt stands for [CLS], and the last token is not read
    assert counted(lambda: train(task, PAIRS)) == flops.captioning_step_flops(task.model.config, BATCH, read)


@pytest.mark.parametrize("train_vision", [False, True])
def test_stage_1(train_vision: bool) -> None:
    task, _ = make_blip2("stage1", train_vision=train_vision)
    use: flops.VisionUse = "trained" if train_vision else "frozen"
    expected = flops.stage1_step_flops(task.model.config, BATCH, LENGTH, vision_use=use)
    assert counted(lambda: train(task, PAIRS)) == expected


def test_stage_1_over_stored_features_and_without_itg() -> None:
    task, _ = make_blip2("stage1")
    features = run_frozen(task.model.vision, random_pixels(BATCH))
    stored = replace(PAIRS, pixels=features)
    expected = flops.stage1_step_flops(task.model.config, BATCH, LENGTH, vision_use="cached")
    assert counted(lambda: train(task, stored)) == expected
    without = type(task)(replace(BLIP2_CONFIGS["stage1"], itg=False), task.model, task.tokenizer, task.preprocessing)
    expected = flops.stage1_step_flops(task.model.config, BATCH, LENGTH, vision_use="cached", itg=False)
    assert counted(lambda: train(without, stored)) == expected


LANGUAGE_SETTINGS: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "tie_word_embeddings": False}
LANGUAGE_MODELS = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=64, **LANGUAGE_SETTINGS,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            **LANGUAGE_SETTINGS,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, num_heads=3, d_ff=24, num_layers=12, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, **LANGUAGE_SETTINGS,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models(kind: str) -> None:
    model = LANGUAGE_MODELS[kind]()
    shape, visual, ids = LanguageModelShape.of(model.config), torch.randn(2, 5, 16), torch.randint(1, 50, (2, 4))
    if shape.is_encoder_decoder:
        found = counted(lambda: model(inputs_embeds=visual, labels=ids, use_cache=False))
    else:
        whole = torch.cat([visual, model.get_input_embeddings()(ids)], dim=1).detach()
        found = counted(lambda: model(inputs_embeds=whole, use_cache=False))
    assert found == ROTATION(2 * flops.language_flops(shape, prefix=5, tokens=4))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models_that_write(kind: str) -> None:
    """Three texts of four tokens, with a cache that the prefix has filled once."""
    model = LANGUAGE_MODELS[kind]().eval()
    shape, visual, words = (
        LanguageModelShape.of(model.config),
        torch.randn(1, 5, 16),
        torch.ones(3, 1, dtype=torch.int64),
    )

    def run() -> None:
        if shape.is_encoder_decoder:
            states = model.encoder(inputs_embeds=visual)
            first = model(encoder_outputs=states, decoder_input_ids=words[:1])
            copies = BaseModelOutput(last_hidden_state=states.last_hidden_state.expand(3, -1, -1))
            context = {"encoder_outputs": copies}
        else:
            first, context = model(inputs_embeds=visual, logits_to_keep=1), {}
        cache = first.past_key_values
        cache.batch_repeat_interleave(3)
        for _ in range(3):
            ids = {"decoder_input_ids": words} if shape.is_encoder_decoder else {"input_ids": words}
            model(**ids, **context, past_key_values=cache)

    expected = flops.language_write_flops(shape, 5, 3, 4)
    if shape.is_encoder_decoder:  # here the first step ran once, not for each of the texts
        expected -= 2 * (flops.language_write_flops(shape, 5, 1, 1) - flops.language_write_flops(shape, 5, 0, 0))
    assert counted(run) == ROTATION(expected)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2(kind: str) -> None:
    """The count of an encoder-decoder includes gradients that do not arise, in one of its 12 layers."""
    checkpoint = tiny_blip2(("itc",), "opt")
    model, language = checkpoint.model, LANGUAGE_MODELS[kind]()
    model.freeze("vision")
    language.eval().requires_grad_(False)
    ids = torch.randint(1, 50, (BATCH, 6))

    def run() -> None:
        output = model.encode_queries(model.image_kv(model.encode_image(random_pixels(BATCH))))
        visual = model.visual_prompts(output.queries)
        if kind == "t5":
            language(inputs_embeds=visual, labels=ids, use_cache=False).loss.backward()
        else:
            inputs = torch.cat([visual, language.get_input_embeddings()(ids)], dim=1)
            language(inputs_embeds=inputs, use_cache=False).logits.sum().backward()

    prompt = 0 if kind == "t5" else 1
    shape = LanguageModelShape.of(language.config)
    expected = flops.stage2_step_flops(model.config, shape, BATCH, prompt, 6 - prompt)
    assert counted(run) == (expected if kind == "opt" else pytest.approx(expected, rel=0.03))


def test_the_paper_s_models() -> None:
    """Magnitudes that are known: ViT-B/16 at 224 pixels has 17.6 billion multiply-adds, DeiT's paper says."""
    base = replace(TINY, vision=flops.VisionConfig())
    assert flops.vision_flops(base.vision) == pytest.approx(2 * 17.5e9, rel=0.01)
    assert flops.vision_flops(base.vision, 384) == pytest.approx(2 * 55.5e9, rel=0.01)


CONNECTORS: list[ConnectorConfig | None] = [
    None,
    PoolingConfig(side=1),
    PatchMlpConfig(hidden_dim=20),
    SoftPromptConfig(hidden_dim=20),
    ResamplerConfig(num_queries=3, hidden_dim=24, num_layers=2, num_heads=2, mlp_dim=40),
]


@pytest.mark.parametrize("connector", CONNECTORS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_visual_prompts(connector: ConnectorConfig | None, projection: Projection) -> None:
    config = tiny_blip2((), "opt").model.config
    model = Blip2(replace(config, connector=connector, projection=projection))
    features = torch.randn(BATCH, 5, TINY.vision.hidden_dim)
    visual = model.visual_prompts(model.encode_visual(features))
    assert visual.shape[1] == flops.visual_tokens(model.config, 5)
    expected = flops.visual_prompt_flops(model.config, 5, visual.shape[2])
    assert counted(lambda: model.visual_prompts(model.encode_visual(features))) == BATCH * expected


def test_captions_of_blip2_are_the_sum_of_their_parts() -> None:
    config = tiny_blip2().model.config
    shape = LanguageModelShape.of(LANGUAGE_MODELS["opt"]().config)
    found = flops.blip2_caption_flops(config, shape, 2, 6, prompt_tokens=3)
    queries, tokens = config.qformer.num_queries, flops.num_image_tokens(config.vision)
    model = tiny_blip2().model.requires_grad_(False)
    image = counted(lambda: model.encode_queries(model.image_kv(model.encode_image(random_pixels(1)))))
    assert found == image + 2 * queries * 32 * 16 + flops.language_write_flops(shape, queries + 3, 2, 6)
    assert tokens == 5


def test_a_tower_of_transformers_has_no_shape_in_the_config() -> None:
    with pytest.raises(ConfigError, match="tiny-clip is not in the model's config"):
        flops.stage1_step_flops(tiny_blip2(tower=True).model.config, 1, 1)
