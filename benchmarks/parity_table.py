"""Every kind of BLIP and BLIP-2, by those who made its format and by OpenBLIP, on the same weights.

Prints a table in Markdown:

    python benchmarks/parity_table.py

The models are those of tests/parity: tiny, random, float32 on the CPU, of unusual sizes (three heads, an odd
grid, text and image widths that differ where the class allows it). "read": a file of theirs, by OpenBLIP,
against their outputs. "written": read, written again by OpenBLIP, and computed by them (for openblip: by
OpenBLIP from its own folder). The scores are logits, and cosines for ITC.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("parity", "")]
import blip2_cases  # noqa: E402
from parity_cases import CLASSES, TOKENIZER, Outputs, our_outputs, released_outputs, their_model, their_outputs  # noqa: E402

from openblip.checkpoints.loading import load_checkpoint, save_checkpoint  # noqa: E402
from released_files import KINDS, TEXT_DIM, released_file  # noqa: E402


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| model | format | compared | max. difference | greedy and beam texts |")
    print("|---|---|---|---|---|")
    for class_name in CLASSES:
        for form, found, expected in folder_rows(class_name):
            print(row(f"`{class_name}`", form, found, expected), flush=True)
    languages: tuple[blip2_cases.Language, ...] = ("opt", "llama", "t5")
    writers = [(name, language) for name in blip2_cases.WRITERS for language in languages]
    for class_name, language in [*writers, (blip2_cases.RETRIEVER, None)]:
        for form, found, expected in blip2_rows(class_name, language):
            name = f"`{class_name}`" if language is None else f"`{class_name}`, {language}"
            print(row(name, form, found, expected), flush=True)
    wide = [(kind, 192, "") for kind in KINDS]
    for kind, image_dim, note in [*wide, ("VQA", TEXT_DIM, ", one width")]:
        for form, found, expected in file_rows(kind, image_dim):
            print(row(f"released {kind}{note}", form, found, expected), flush=True)


def folder_rows(class_name: str) -> Iterator[tuple[str, Outputs, Outputs]]:
    """One of transformers' classes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = their_model(class_name)
        theirs.save_pretrained(folder / "theirs")
        TOKENIZER.save(folder / "theirs")
        expected = their_outputs(theirs)
        checkpoint = load_checkpoint(folder / "theirs")
        yield "huggingface, read", our_outputs(checkpoint), expected
        save_checkpoint(checkpoint, folder / "written", "huggingface")
        written = getattr(transformers, class_name).from_pretrained(folder / "written").eval()
        yield "huggingface, written", their_outputs(written), expected
        save_checkpoint(checkpoint, folder / "ours", "openblip")
        yield "openblip, written", our_outputs(load_checkpoint(folder / "ours")), expected


def blip2_rows(
    class_name: str, language: blip2_cases.Language | None
) -> Iterator[tuple[str, blip2_cases.Outputs, blip2_cases.Outputs]]:
    """One of transformers' classes of BLIP-2, around one kind of language model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = blip2_cases.their_model(class_name, language)
        blip2_cases.write_theirs(folder / "theirs", theirs, language)
        expected = blip2_cases.their_outputs(theirs, language)
        checkpoint = load_checkpoint(folder / "theirs")
        yield "huggingface, read", blip2_cases.our_outputs(checkpoint), expected
        save_checkpoint(checkpoint, folder / "written", "huggingface")
        written = getattr(transformers, class_name).from_pretrained(folder / "written").eval()
        yield "huggingface, written", blip2_cases.their_outputs(written, language), expected
        save_checkpoint(checkpoint, folder / "ours", "openblip")
        yield "openblip, written", blip2_cases.our_outputs(load_checkpoint(folder / "ours")), expected


def file_rows(kind: str, image_dim: int) -> Iterator[tuple[str, Outputs, Outputs]]:
    """One of the released kinds of .pth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = released_file(kind, image_dim)
        torch.save({"model": state}, folder / "released.pth")
        TOKENIZER.save(folder)
        expected = released_outputs(kind, state)
        checkpoint = load_checkpoint(folder / "released.pth")
        yield "original, read", our_outputs(checkpoint), expected
        save_checkpoint(checkpoint, folder / "written.pth", "original")
        written = torch.load(folder / "written.pth", weights_only=True)["model"]
        yield "original, written", released_outputs(kind, written), expected
        save_checkpoint(checkpoint, folder / "ours", "openblip")
        yield "openblip, written", our_outputs(load_checkpoint(folder / "ours")), expected


def row(model: str, form: str, found: Outputs | blip2_cases.Outputs, expected: Outputs | blip2_cases.Outputs) -> str:
    """One line of the table: the largest difference of any score, and whether all texts are the same."""
    difference = max((found.scores[name] - scores).abs().max().item() for name, scores in expected.scores.items())
    texts = "none written"
    if expected.texts:
        same = all(found.texts[name] == written for name, written in expected.texts.items())
        texts = "identical" if same else "DIFFERENT"
    return f"| {model} | {form} | {', '.join(expected.scores)} | {difference:.1e} | {texts} |"


if __name__ == "__main__":
    main()
