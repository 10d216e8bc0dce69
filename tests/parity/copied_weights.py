"""Puts the weights of a part of transformers' BLIP into ours, by the key tables of the checkpoints."""

from torch import nn

from openblip.checkpoints.state_dict import Layout, Table, translate

DERIVED = ("embeddings.position_ids", "cls.predictions.decoder.")  # tied to another weight, or computed


def copy_weights(theirs: nn.Module, ours: nn.Module, table: Table, *, prefix: str = "") -> None:
    """Load `theirs`, whose names begin with `prefix`, into `ours`; the table must name all of both."""
    given = {name.removeprefix(prefix): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(translate(Layout(table, DERIVED), given, set(ours.state_dict()), "theirs"))
