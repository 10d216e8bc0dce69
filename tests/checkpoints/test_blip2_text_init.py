"""A Q-Former that starts from BERT, against transformers' own BERT."""

from pathlib import Path

import pytest
import torch
import transformers

from openblip.checkpoints.backbones import init_qformer
from openblip.errors import CheckpointError
from openblip.nn.qformer import QFormer

NUM_WORDS = 60


def make_qformer(
    seed: int = 0, has_text_branch: bool = True, has_lm_head: bool = True, **changes: int
) -> QFormer:
    torch.manual_seed(seed)
    shape = {
        "num_queries": 3,
        "hidden_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_dim": 48,
        "context_dim": 12,
        "cross_attention_every": 2,
        "vocab_size": NUM_WORDS + 1,
        "max_positions": 24,
        **changes,
    }
    return QFormer(
        **shape,
        dropout=0.0,
        layer_norm_eps=1e-12,
        has_text_branch=has_text_branch,
        has_lm_head=has_lm_head,
        activation_checkpointing=False,
    ).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT without token types, which BLIP-2 drops."""
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1))
        model.bert.embeddings.token_type_embeddings.weight.zero_()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_text_alone_is_read_and_predicted_as_by_bert(bert: Path) -> None:
    qformer = make_qformer()
    fresh = make_qformer()
    init_qformer(qformer, str(bert))
    theirs = transformers.BertForMaskedLM.from_pretrained(bert).eval()
    ids = torch.randint(0, NUM_WORDS, (2, 7))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    states = qformer(ids, mask=mask[:, None, None, :])
    expected = theirs.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=1e-5, atol=1e-5)
    logits = qformer.predict_words(states)[..., :NUM_WORDS]
    torch.testing.assert_close(logits[mask], theirs.cls(expected)[mask], rtol=1e-5, atol=1e-5)
    assert qformer.embeddings.word is not None
    assert fresh.embeddings.word is not None
    assert torch.equal(qformer.embeddings.word.weight[NUM_WORDS:], fresh.embeddings.word.weight[NUM_WORDS:])


@torch.no_grad()
def test_queries_start_with_berts_feed_forward_too(bert: Path) -> None:
    qformer, fresh = make_qformer(), make_qformer()
    init_qformer(qformer, str(bert))
    before = fresh.state_dict()
    for name, weight in qformer.state_dict().items():
        if ".query_feed_forward." in name:
            text = name.replace("query_feed_forward", "text_feed_forward")
            assert torch.equal(weight, qformer.state_dict()[text]), name
        is_new = ".cross_attention." in name or name == "embeddings.queries"
        assert torch.equal(weight, before[name]) == is_new, name


def test_a_qformer_without_text_takes_what_queries_need(bert: Path) -> None:
    whole, queries = make_qformer(), make_qformer(has_text_branch=False, has_lm_head=False)
    init_qformer(whole, str(bert))
    init_qformer(queries, str(bert))
    for name, weight in queries.state_dict().items():
        if ".cross_attention." not in name and name != "embeddings.queries":
            assert torch.equal(weight, whole.state_dict()[name]), name


def test_another_shape_or_vocabulary_is_refused(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="4 attention heads, the run's model 8"):
        init_qformer(make_qformer(num_heads=8), str(bert))
    with pytest.raises(CheckpointError, match="use BERT's own"):
        init_qformer(make_qformer(vocab_size=99), str(bert))
    with pytest.raises(CheckpointError, match="another shape"):
        init_qformer(make_qformer(mlp_dim=64), str(bert))
