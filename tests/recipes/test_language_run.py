"""From a file of texts to a frozen language model: trained, written, read back, and answering."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from small_runs import small

from openblip.checkpoints.backbones import load_language_model
from openblip.data.sources import open_mixture
from openblip.errors import CheckpointError, ConfigError
from openblip.recipes.initialize import END_OF_LINE, train_language_tokenizer
from openblip.recipes.mini import blip2_mini_opt, blip2_mini_t5
from openblip.recipes.run import LanguageShape
from openblip.tasks.language_model import no_visual
from openblip.training.run_folder import RunFolder
from shared_files import as_json, write_tar
from written_texts import beam_ids

replace = dataclasses.replace
ANSWERS = {"dog": "red", "cat": "blue", "cow": "green", "owl": "pink"}
TEXTS = [f"a {name}\nQuestion: what color? Answer: dark {color}" for name, color in ANSWERS.items()]
SMALL = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 64, "max_positions": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A shard of texts, whose images cannot be decoded, and one sample without a text."""
    members = []
    for number, info in enumerate([{"caption": "a cat"}, *({"text": text} for text in TEXTS)]):
        members += [(f"{number}.jpg", b"none"), (f"{number}.json", as_json(**info))]
    return str(write_tar(tmp_path_factory.mktemp("texts") / "0000.tar", members))


def small_run(recipe, source, out, steps=2, **shape):
    run = recipe()
    task, shape = replace(run.task, max_text_tokens=40), replace(run.shape, **{**SMALL, **shape})
    return small(run, source, out, steps=steps, learning_rate=1e-2, vocab_size=330, task=task, shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "end_of_text", "architecture"),
    [(blip2_mini_opt, "\n", "OPTForCausalLM"), (blip2_mini_t5, None, "T5ForConditionalGeneration")],
)
def test_a_language_model_learns_its_texts_by_heart(source, tmp_path, recipe, end_of_text, architecture):
    assert small_run(recipe, source, tmp_path / "run", steps=120).train()
    assert not list((tmp_path / "run").glob("*.partial"))
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    language = load_language_model(folder, end_of_text=end_of_text)
    prompts = [text.rpartition(" dark")[0] for text in TEXTS]
    rows = beam_ids(language, no_visual(language, 4), prompts, 9)
    assert [language.decode(row) for row in rows] == [f"dark {color}" for color in ANSWERS.values()]


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(source, tmp_path):
    run = small_run(blip2_mini_t5, source, tmp_path / "run", steps=4)
    run = replace(run, training=replace(run.training, checkpoint_every=2))
    assert run.train()
    model = tmp_path / "run" / "model"
    weights = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    shutil.rmtree(RunFolder(run.out).checkpoint(4))
    assert run.train(resume=True)
    assert (model / "model.safetensors").read_bytes() == weights


def test_words_have_one_form_and_lines_come_back():
    tokenizer = train_language_tokenizer(TEXTS, 400, ends=False)
    ids = tokenizer(TEXTS[0]).input_ids
    assert len(tokenizer(END_OF_LINE).input_ids) == 1
    assert ids.count(tokenizer(END_OF_LINE).input_ids[0]) == 1
    first, within = tokenizer("dog"), tokenizer("a dog")
    assert within.input_ids[-len(first.input_ids) :] == first.input_ids
    lines = tokenizer.decode(ids).split("\n")
    assert [line.strip() for line in lines] == TEXTS[0].split("\n")
    unseen = "Zebra, 7 & é"
    assert tokenizer.decode(tokenizer(unseen).input_ids).strip() == unseen
    ended = train_language_tokenizer(TEXTS, 400, ends=True)("a dog").input_ids
    assert ended[-1] == tokenizer.eos_token_id
    assert ended[:-1] == tokenizer("a dog").input_ids


@pytest.mark.slow
def test_equal_texts_give_equal_vocabularies_in_every_process():
    code = (
        "import sys\n"
        "from openblip.recipes.initialize import train_language_tokenizer\n"
        "print(train_language_tokenizer(sys.argv[1:], 340, ends=True).backend_tokenizer.to_str())\n"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code, *TEXTS], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == train_language_tokenizer(TEXTS, 340, ends=True).backend_tokenizer.to_str()


@pytest.mark.parametrize("recipe", [blip2_mini_opt, blip2_mini_t5])
def test_the_shape_is_what_the_run_says(source, tmp_path, recipe):
    run = small_run(recipe, source, tmp_path, hidden_dim=24, num_layers=3, num_heads=4, mlp_dim=40)
    language = run.initialize(open_mixture(source)).model
    assert language.hidden_dim == 24
    stacks = [m for m in language.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    # each block of T5's decoder lists its three sub-layers
    assert len(stacks) == (2 + 3 if language.is_encoder_decoder else 1)
    linear = {m.weight.shape for m in language.modules() if isinstance(m, torch.nn.Linear)}
    assert torch.Size([40, 24]) in linear
    language.train()
    first, again = (language.predict(no_visual(language, 1), [""], ["a dog"], 9).logits for _ in range(2))
    assert torch.equal(first, again)  # nothing is dropped


def test_what_cannot_be_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="40 tokens"):
        small_run(blip2_mini_opt, source, tmp_path / "a", max_positions=39).train()
    with pytest.raises(ConfigError, match="heads"):
        LanguageShape(architecture="t5", hidden_dim=30, num_heads=4)
    with pytest.raises(ConfigError, match="no text to train a vocabulary on"):
        train_language_tokenizer([], 400, ends=False)
    run = small_run(blip2_mini_opt, source, tmp_path / "b")
    run.save(run.initialize(open_mixture(source)), tmp_path / "model")
    with pytest.raises(CheckpointError, match="must be one"):
        load_language_model(tmp_path / "model", end_of_text="\n\n")
