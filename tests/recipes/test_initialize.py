"""What a checkpoint of other heads gives a task: exactly its weights, and fresh ones only where named."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from openblip.data.tokenizer import Tokenizer
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.config import PRETRAINING_HEADS, BlipConfig, Head
from openblip.nn.config import Sharing
from openblip.recipes.initialize import SharedEntries, with_heads
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import BlipTaskConfig
from tiny_blip import DEC, ENC, TINY, random_pixels, random_tokens, randomise, tiny_blip

BLIP_HEADS = [TASKS[config].heads(config()) for config in get_args(BlipTaskConfig)]
SHARINGS: list[Sharing] = ["all", "all_but_sa", "all_but_ca", "none"]
EQUAL = replace(TINY, vision=replace(TINY.vision, hidden_dim=32, num_heads=4))


def blip(heads: tuple[Head, ...], sharing: Sharing = "all_but_sa", config: BlipConfig = EQUAL) -> Blip:
    model = Blip(replace(config, heads=heads, text=replace(config.text, sharing=sharing)))
    randomise(model, seed=3)
    return model.eval()


def pretrained(sharing: Sharing = "all_but_sa", config: BlipConfig = EQUAL) -> Blip:
    return blip(PRETRAINING_HEADS, sharing, config)


def copied_and_fresh(start: Blip, target: Blip) -> tuple[set[str], set[str]]:
    """Parameters of the target that equal what the start has for them, in any mode and branch, and the rest."""
    have, copied, fresh = start.state_dict(), set(), set()
    for name, value in target.state_dict().items():
        one_image = re.sub(r"\.branch\.(first|second)\.", ".branch.", name)
        names = (name, one_image, re.sub(r"\.variants\.\w+\.", ".variants.shared.", one_image))
        weight = next((have[n] for n in names if n in have), None)
        (copied if weight is not None and torch.equal(weight, value) else fresh).add(name)
    return copied, fresh


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("heads", [PRETRAINING_HEADS, ("itc", "itm"), ("lm",), ("vqa",), ("nlvr",), ("visdial",)])
def test_a_pretrained_model_gives_every_task_all_that_it_has(heads: tuple[Head, ...], sharing: Sharing) -> None:
    fresh_parts = ("nlvr_head.", ".merge.") if heads == ("nlvr",) else ()
    start = pretrained(sharing)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    target = with_heads(start, heads)
    copied, fresh = copied_and_fresh(start, target)
    assert copied
    expected = {name for name in target.state_dict() if any(part in name for part in fresh_parts)}
    assert fresh == expected
    assert target.config.heads == heads
    assert target.config.text.sharing == ("none" if "vqa" in heads else sharing)
    own = {value.data_ptr() for value in start.state_dict().values()}
    assert own.isdisjoint(value.data_ptr() for value in target.state_dict().values())
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_questions_and_answers_have_separate_weights_that_start_alike(sharing: Sharing) -> None:
    """As the released VQA fine-tuning: an encoder and a decoder, each a whole BERT."""
    target = with_heads(pretrained(sharing), ("vqa",))
    state = target.state_dict()
    pairs = [(name, name.replace(".encode.", ".decode.")) for name in state if ".variants.encode." in name]
    assert len(pairs) > 20
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    shared = {
        "all": ("embeddings", "self_attention", "cross_attention", "feed_forward"),
        "all_but_sa": ("embeddings", "cross_attention", "feed_forward"),
        "all_but_ca": ("embeddings", "self_attention", "feed_forward"),
        "none": (),
    }[sharing]
    for encode, decode in pairs:
        alike = any(f".{part}." in f".{encode}" for part in shared)
        assert torch.equal(state[encode], state[decode]) == alike, encode


def test_both_branches_over_two_images_start_as_the_one_there_was() -> None:
    """So a statement about the same image twice is read as it was about one."""
    start = pretrained()
    target = with_heads(start, ("nlvr",)).eval()
    for own, theirs in zip(target.text.layers, start.text.layers, strict=True):
        branch, single = own.cross_attention["encode"].branch, theirs.cross_attention["encode"].branch
        for side in (branch.first, branch.second):
            for name, value in single.state_dict().items():
                assert torch.equal(side.state_dict()[name], value), name
    texts, pixels = random_tokens([5, 7], first=ENC), random_pixels(2)
    with torch.no_grad():
        once = start.image_kv(start.encode_image(pixels), "encode")
        twice = target.image_kv(target.encode_pair(torch.stack([pixels, pixels], dim=1)), "encode")
        expected = start.text(texts.ids, "encode", texts.mask, once.layers)
        found = target.text(texts.ids, "encode", texts.mask, twice.layers)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_answers_that_read_questions_of_another_width_start_with_a_fresh_projection() -> None:
    start = pretrained(config=TINY)
    target = with_heads(start, ("vqa",))
    _, fresh = copied_and_fresh(start, target)
    assert fresh == {f"text.layers.{i}.cross_attention.variants.decode.branch.key_value.weight" for i in range(2)}
    for layer in target.text.layers:
        assert layer.cross_attention["decode"].branch.key_value.weight.shape == (64, 32)
        assert layer.cross_attention["encode"].branch.key_value.weight.shape == (64, 24)
    questions, answers = random_tokens([5, 3], first=ENC), random_tokens([4, 4], first=DEC)
    kv = target.image_kv(target.encode_image(random_pixels(2)), "encode")
    assert target.decode(answers.ids, target.question_kv(questions.ids, questions.mask, kv)).isfinite().all()


def test_a_dialogs_caption_is_projected_afresh_only_where_widths_differ() -> None:
    start = pretrained(config=TINY)
    _, fresh = copied_and_fresh(start, with_heads(start, ("visdial",)))
    assert fresh == {"caption_proj.weight", "caption_proj.bias"}
    answering = blip(("vqa",))  # without a matching head there is none to take over
    _, fresh = copied_and_fresh(answering, with_heads(answering, ("visdial",)))
    assert fresh == {"itm_head.weight", "itm_head.bias"}


@pytest.mark.parametrize("heads", BLIP_HEADS, ids=lambda heads: "+".join(heads))
def test_any_task_goes_on_from_its_own_model(heads: tuple[Head, ...]) -> None:
    for start in (blip(heads, "none"), tiny_blip(heads, "none"), with_heads(pretrained(config=TINY), heads)):
        randomise(start, seed=8)
        target = with_heads(start, heads).state_dict()
        assert target.keys() == start.state_dict().keys()
        assert all(torch.equal(value, target[name]) for name, value in start.state_dict().items())


def test_questions_about_clips_go_on_from_questions_about_images() -> None:
    start = with_heads(pretrained(), ("vqa",))
    assert start.config == with_heads(start, ("vqa",)).config


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        (("itc", "itm"), ("lm",), r"text\.\S+decode"),
        (("itc", "itm"), ("vqa",), r"text\.\S+decode"),
        (("lm",), ("vqa",), r"text\.\S+encode"),
        (("lm",), ("nlvr",), r"text\.\S+encode"),
        (("lm",), ("visdial",), r"text\.\S+encode"),
        (("lm",), ("itc", "itm"), "vision_proj|text_proj|temperature|itm_head|encode"),
        (("itm", "lm"), ("itc", "itm"), r"log_temperature|vision_proj"),
        (("itc", "lm"), ("itc", "itm"), r"itm_head\.weight and 1 more"),
        (("vqa",), ("itc", "itm", "lm"), "vision_proj|log_temperature"),
        (("nlvr",), ("itc", "itm"), "vision_proj|log_temperature"),
        (("nlvr",), ("visdial",), r"cross_attention\.\S+\.branch\.query"),
        (("nlvr",), ("vqa",), r"text\."),
        (("visdial",), ("itc", "itm"), "vision_proj|log_temperature"),
        (("visdial",), ("lm",), r"text\.\S+decode"),
    ],
)
def test_what_cannot_start_a_task_is_refused_by_the_name_of_what_is_missing(
    before: tuple[Head, ...], after: tuple[Head, ...], missing: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"has the heads {', '.join(before)}, from which a model with {', '.join(after)} cannot start: "
        rf"there is no \S*(?:{missing})",
    ):
        with_heads(blip(before), after)


def test_weights_that_do_not_fit_are_not_left_random() -> None:
    """Answers that read questions of another width are no decoder of captions."""
    answers = with_heads(pretrained(config=TINY), ("vqa",))
    with pytest.raises(ConfigError, match=r"there is no \S*decode\.branch\.key_value\.weight"):
        with_heads(answers, ("lm",))


@pytest.mark.parametrize("heads", [("lm",), ("vqa",)])
def test_another_vocabulary_keeps_the_embeddings_of_what_both_have(
    heads: tuple[Head, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = Tokenizer.train(["a dog and a cat"] * 2, 200), Tokenizer.train(["一只狗 a cat dog"] * 2, 210)
    text = replace(TINY.text, vocab_size=before.vocab_size)
    start = blip(PRETRAINING_HEADS, config=replace(TINY, text=text))
    target = with_heads(start, heads, entries=SharedEntries.of(before, after))
    assert target.config.text.vocab_size == after.vocab_size
    old = start.state_dict()
    rows = {
        name: value
        for name, value in target.state_dict().items()
        if len(value.shape) and len(value) == len(after.entries)
    }
    assert {name.rsplit(".", 2)[-1] for name in rows} == {"weight", "bias"}
    for name, value in rows.items():
        of_start = old.get(name, old.get(name.replace(".encode.", ".shared.").replace(".decode.", ".shared.")))
        assert of_start is not None
        for entry, i in after.entries.items():
            same = entry in before.entries and torch.equal(value[i], of_start[before.entries[entry]])
            assert same == (entry in before.entries), (name, entry)
    known = len(before.entries.keys() & after.entries.keys())
    assert f"{known} entries keep their embeddings, {after.vocab_size - known} are new" in capsys.readouterr().err


def test_vocabularies_as_large_as_berts_are_compared_at_once(tmp_path: Path) -> None:
    tokenizers = []
    for name, first in (("before", 0), ("after", 10_000)):
        (tmp_path / name).mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(first, first + 30_000))]
        (tmp_path / name / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        tokenizers.append(Tokenizer.load(tmp_path / name))
    started = time.process_time()
    shared = SharedEntries.of(*tokenizers)
    assert time.process_time() - started < 5
    assert (shared.before[4], shared.after[4], len(shared.after)) == (10_004, 4, 20_006)


def test_drop_path_is_the_tasks_and_pooling_the_checkpoints() -> None:
    start = blip(("itc", "itm"), config=replace(EQUAL, pooled=True))
    target = with_heads(start, ("itc", "itm"), drop_path=0.2)
    assert target.config.pooled
    assert target.config.vision.drop_path == 0.2
    assert [block.drop_path.probability for block in target.vision.blocks] == pytest.approx([0.0, 0.2])
    assert with_heads(start, ("itc", "itm")).config.vision.drop_path == 0.0
    assert copied_and_fresh(start, target)[1] == set()
