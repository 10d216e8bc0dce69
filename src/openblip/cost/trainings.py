"""The pre-trainings of the papers as work for `estimate_training`: what recipes say, and the operations of a sample.

No torch here. Texts are counted at the length to which batches are padded, so the operations are upper limits. One
process is one accelerator of the paper; what several processes compute again for negatives of others is left out.
"""

from dataclasses import replace
from functools import partial

from openblip.cost.formula import PairsOptions, TrainingWork
from openblip.models import flops
from openblip.models.config import Blip2Config, LanguageConfig
from openblip.models.flops import LanguageModelShape
from openblip.nn.config import VisionConfig
from openblip.recipes import RECIPES
from openblip.recipes.run import BlipRun, Run
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig

BLIP_PROCESSES, BLIP2_PROCESSES = 32, 16
CLIP_L = VisionConfig(patch_size=14, hidden_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096, output_norm=False)
_opt = partial(LanguageModelShape, num_layers=32, mlp_matrices=2, vocab_size=50_272)
_flan_t5 = partial(LanguageModelShape, num_layers=24, mlp_matrices=3, vocab_size=32_128, is_encoder_decoder=True)
OPT_2_7B = _opt(hidden_dim=2560, attention_dim=2560, key_value_dim=2560, mlp_dim=10_240)
OPT_6_7B = _opt(hidden_dim=4096, attention_dim=4096, key_value_dim=4096, mlp_dim=16_384)
FLAN_T5_XL = _flan_t5(hidden_dim=2048, attention_dim=2048, key_value_dim=2048, mlp_dim=5120)
FLAN_T5_XXL = _flan_t5(hidden_dim=4096, attention_dim=4096, key_value_dim=4096, mlp_dim=10_240)


def paper_trainings(data: PairsOptions) -> list[tuple[TrainingWork, int]]:
    """Each pre-training, and the number of accelerators that it was run on in the paper."""
    on_129m = RECIPES["blip-base"]()
    on_129m = replace(on_129m, training=replace(on_129m.training, steps=256_940))  # the recipe says so
    blips = [
        _blip("BLIP ViT-B 14M", RECIPES["blip-base"](), 252e6),
        _blip("BLIP ViT-B 129M", on_129m, 252e6),
        _blip("BLIP ViT-L 129M", RECIPES["blip-large"](), 470e6),
    ]
    blip2s = [
        _stage1("BLIP-2 stage 1 ViT-L", RECIPES["blip2-stage1-vit-l"](), CLIP_L),
        _stage1("BLIP-2 stage 1 ViT-g", RECIPES["blip2-stage1"](), None),
        _stage2("BLIP-2 stage 2 OPT-2.7B", RECIPES["blip2-stage2-opt"](), OPT_2_7B),
        _stage2("BLIP-2 stage 2 OPT-6.7B", RECIPES["blip2-stage2-opt"](), OPT_6_7B),
        _stage2("BLIP-2 stage 2 FlanT5-XL", RECIPES["blip2-stage2-t5"](), FLAN_T5_XL),
        _stage2("BLIP-2 stage 2 FlanT5-XXL", RECIPES["blip2-stage2-t5"](), FLAN_T5_XXL),
    ]
    works = [(work, BLIP_PROCESSES) for work in blips] + [(work, BLIP2_PROCESSES) for work in blip2s]
    return [(replace(work, data=data), processes) for work, processes in works]


def _work(name: str, run: Run, processes: int, frozen: int, step: int, parameters: float) -> TrainingWork:
    """frozen: operations of frozen models for a sample; step: of everything else for a micro-batch."""
    training = run.training
    return TrainingWork(
        name=name,
        steps=training.steps,
        samples_per_step=training.batch_size * processes,
        frozen_flops=frozen,
        trained_flops=step / training.batch_size,
        trained_parameters=parameters,
        checkpoint_every=training.checkpoint_every,
    )


def _blip(name: str, run: Run, parameters: float) -> TrainingWork:
    assert isinstance(run, BlipRun)
    assert isinstance(run.task, PretrainingConfig)
    assert isinstance(run.task.contrastive, ContrastiveConfig)
    assert run.model is not None
    keys = run.task.contrastive.queue_size
    step = flops.contrastive_step_flops(run.model, run.training.batch_size, run.data.max_text_length, keys)
    return _work(name, run, BLIP_PROCESSES, 0, step, parameters)


def _stage1(name: str, run: Run, vision: VisionConfig | None) -> TrainingWork:
    config = Blip2Config() if vision is None else Blip2Config(vision=vision)
    size, tokens = run.training.batch_size, run.data.max_text_length
    step = flops.stage1_step_flops(config, size, tokens, vision_use="cached")
    return _work(name, run, BLIP2_PROCESSES, flops.vision_flops(flops.vision_shape(config)), step, 188e6)


def _stage2(name: str, run: Run, language: LanguageModelShape) -> TrainingWork:
    """A decoder reads all of a caption; of an encoder-decoder, the encoder reads a quarter on average."""
    source = LanguageConfig(name=name, hidden_dim=language.hidden_dim)
    config = Blip2Config(heads=("llm",), language=source)
    size, tokens = run.training.batch_size, source.max_text_tokens
    prompt = tokens // 4 if language.is_encoder_decoder else 1
    step = flops.stage2_step_flops(config, language, size, prompt, tokens - prompt, vision_use="cached")
    written = flops.frozen_language_flops(language, config.qformer.num_queries + prompt, tokens - prompt)
    frozen = flops.vision_flops(flops.vision_shape(config)) + written
    return _work(name, run, BLIP2_PROCESSES, frozen, step - size * written, 107e6)
