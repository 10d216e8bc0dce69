"""`openblip data emoji-scenes`: writes the embedded world as tar shards."""

from pathlib import Path

import tyro

from openblip.emoji_scenes.scene import Kind, Split


def command(
    out: tyro.conf.Positional[Path],
    split: Split,
    num_samples: int,
    kind: Kind = "captions",
    seed: int = 0,
    noise: float = 0.4,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write emoji scenes with captions, or with what another task needs, as tar shards.

    Everything true of a scene is known. The same request gives the same bytes; interrupted, the same command
    goes on where it stopped.

    Args:
        out: Folder for 0000.tar, 0001.tar, ...; new, empty, or of the same request.
        split: web has noisy captions; human, val and test have true ones. Pairs of nouns in val and in test
            occur in no other split. No two samples of one of them share a true caption, or show and ask the same.
        num_samples: Number of samples.
        kind: What a sample holds: an image with captions, a question and its answers (questions), a dialog and
            candidate answers (dialogs), a label (classes) or a text about it (documents); two images with a
            statement that is true or false (statements); or a short video with captions (clips) or a question
            (clip-questions).
        seed: Same kind, split and seed, same scenes.
        noise: Share of noisy captions of kind captions in split web; all else is true.
        samples_per_shard: Samples per tar file.
        num_workers: Processes; by default one per processor. Changes nothing in what is written.
        overwrite: Replace the scenes in OUT by new ones.
    """
    from openblip.emoji_scenes.writer import write_emoji_scenes

    folder = write_emoji_scenes(
        out,
        split=split,
        num_samples=num_samples,
        kind=kind,
        seed=seed,
        noise=noise,
        samples_per_shard=samples_per_shard,
        num_workers=num_workers,
        overwrite=overwrite,
    )
    print(f"wrote {num_samples} {split} scenes ({kind}) to {folder} (CC BY-SA 4.0, see LICENSE.txt there)")
    return 0
