"""How a language model of blip2-mini answers and captions from a text, before it sees any picture.

    python benchmarks/language_answers.py FOLDER SOURCE [--limit N]

FOLDER is the model/ of `openblip train blip2-mini-opt` or `blip2-mini-t5`; SOURCE: scenes of kind documents.
"""

import argparse
import json

from openblip.checkpoints.language_models import load_language_model
from openblip.data.sources import open_source
from openblip.tasks.language_pretraining import evaluate_language


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("source")
    parser.add_argument("--limit", type=int, default=None)
    options = parser.parse_args()
    language = load_language_model(options.folder)
    if not language.is_encoder_decoder:  # a decoder's line ends as BLIP-2 ends OPT's
        language = load_language_model(options.folder, end_of_text="\n")
    prompt = "Question: {} Short answer:" if language.is_encoder_decoder else "Question: {} Answer:"
    source = open_source(options.source)
    scores = evaluate_language(language, source, question_prompt=prompt, limit=options.limit)
    shown = ("num_texts", "answers", "answers_by_kind", "captions")
    print(json.dumps({name: scores[name] for name in shown}, indent=2))


if __name__ == "__main__":
    main()
