"""The files that the snippets of README and the guides name, tiny: images, tables, annotation files, checkpoints."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

import released_blip2
from openblip.checkpoints.checkpoint import save_native
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.models.config import Head
from released_files import released_file
from shared_files import as_json, write_tar
from tiny_blip import tiny_checkpoint, tiny_tokenizer
from tiny_blip2 import tiny_blip2

CAPTIONS = ["a red dog beside two blue cars", "the small cat below a big tree", "a picture of a green bird"]
QUESTION, ANSWERS = "a small cat", ["red", "red", "green"]  # of words that the tiny vocabulary has
PRETRAINED: tuple[Head, ...] = ("itc", "itm", "lm")
BLIPS: dict[str, tuple[Head, ...]] = {
    "folder": ("itc", "itm"),
    "my-captioner": ("lm",),
    "my-filter": ("itc", "itm"),
    "runs/blip-base/model": PRETRAINED,
    "runs/caption/model": ("lm",),
    "runs/caption-large/model": ("lm",),
    "runs/captioner/model": ("lm",),
    "runs/filter/model": ("itc", "itm"),
    "runs/filter-large/model": ("itc", "itm"),
    "runs/nlvr/model": ("nlvr",),
    "runs/visdial/model": ("visdial",),
    "runs/vqa/model": ("vqa",),
}


def write_documented_files(root: Path) -> None:
    """Write all of them into an empty folder."""
    write_images(root)
    write_annotations(root)
    for name, heads in BLIPS.items():
        save_native(root / name, tiny_checkpoint(heads))
    save_checkpoint(tiny_checkpoint(("lm",)), root / "hub/blip-base", "huggingface")
    save_native(root / "runs/blip2-stage2-opt/model", tiny_blip2((), "opt"))
    for folder in (root, root / "hub/bert"):  # .pth files have no tokenizer
        tiny_tokenizer().save(folder)
    torch.save({"model": released_file("captions")}, root / "model_base_caption_capfilt_large.pth")
    write_lavis(root)


def write_images(root: Path) -> None:
    random = np.random.default_rng(0)
    val, train, vg = "coco/val2014/COCO_val2014", "coco/train2014/COCO_train2014", "images/VG_100K"
    names = ["scene.png", "a.png", "b.png", "cat.jpg", "photo.jpg", "left.png", "right.png", "photos/1.jpg"]
    names += ["photos/2.png", "nocaps/1.jpg", "imagenet/val/dog/1.jpg", "imagenet/val/cat/2.jpg", f"{vg}/1.jpg"]
    names += [f"{stem}_{number:012d}.jpg" for stem in (val, train) for number in range(3)]
    names += ["images/train2014/COCO_train2014_000000000000.jpg"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
    image = (root / "cat.jpg").read_bytes()
    for shard in ("web/0000", "web/0001", "web/00000", "web/00001", "pairs/0000", "my-pairs/0000"):
        members = [
            member
            for number, caption in enumerate([*CAPTIONS, *CAPTIONS])
            for member in ((f"{number}.jpg", image), (f"{number}.json", as_json(caption=caption)))
        ]
        write_tar(root / f"{shard}.tar", members)
    for name in ("a.mp4", "b.webm", "videos/video7010.mp4", "videos/video7011.mp4"):
        (root / name).parent.mkdir(exist_ok=True)
        with av.open(str(root / name), "w", format="mp4") as output:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8))
                output.mux(stream.encode(frame))
            output.mux(stream.encode())


def write_annotations(root: Path) -> None:
    def write(name: str, content: Any) -> None:
        (root / name).write_text(json.dumps(content))

    def vqa(subtype: str) -> None:
        questions = [{"question_id": n, "image_id": 0, "question": QUESTION} for n in range(2)]
        given = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(ANSWERS, 1)]
        answers = [{"question_id": n, "answers": given} for n in range(2)]
        common = {"data_subtype": subtype}
        write(f"v2_OpenEnded_mscoco_{subtype}_questions.json", {**common, "questions": questions})
        write(f"v2_mscoco_{subtype}_annotations.json", {**common, "annotations": answers})

    karpathy = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "cocoid": n, "split": split,
         "imgid": n, "sentences": [{"raw": caption} for caption in CAPTIONS]}
        for n, split in enumerate(("train", "train", "test"))
    ]  # fmt: skip
    write("dataset_coco.json", {"dataset": "coco", "images": karpathy})
    images = [{"id": 1, "file_name": "1.jpg", "domain": "in-domain"}]
    captions = [{"id": n, "image_id": 1, "caption": caption} for n, caption in enumerate(CAPTIONS)]
    write("nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    for split in ("train", "val", "test"):
        image = f"val2014/COCO_val2014_{0:012d}.jpg"
        row = {"question": QUESTION, "answer": ANSWERS, "image": image, "dataset": "vqa"}
        write(f"vqa_{split}.json", [{**row, "question_id": n} for n in range(2)])
    vqa("val2014")
    vqa("train2014")
    write(
        "question_answers.json",
        [{"id": 1, "qas": [{"qa_id": 1, "image_id": 1, "question": QUESTION, "answer": "red"}]}],
    )
    videos = [{"clip_name": f"video701{n}", "caption": caption} for n, caption in enumerate(CAPTIONS[:2])]
    (root / "msrvtt_test.jsonl").write_text("".join(f"{json.dumps(video)}\n" for video in videos))
    write("test_qa.json", [{"id": 0, "video_id": 7010, "question": QUESTION, "answer": "red", "category_id": 1}])
    write("answer_list.json", ["red", "green", "two"])
    write("synonyms.json", {"shoe": ["sneaker", "boot"]})
    write("names.json", {"dog": "a dog", "cat": "a cat"})
    write("templates.json", ["a picture of {}"])
    rows = [{"image": "cat.jpg", "caption": caption} for caption in CAPTIONS]
    (root / "chinese.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "products.csv").write_text("photo,price\na.png,7\ncat.jpg,8\n")
    (root / "questions.jsonl").write_text(json.dumps({"image": "a.png", "question": QUESTION, "question_id": 7}) + "\n")


def write_lavis(root: Path) -> None:
    """LAVIS' files and the frozen parts that they leave out."""
    parts = root / "hub"
    released_blip2.write_parts(parts)
    (parts / "Eva.pth").rename(root / "eva_vit_g.pth")
    released_blip2.write(root / "blip2_pretrained.pth", released_blip2.stage1())
    released_blip2.write(root / "blip2_pretrained_opt2.7b.pth", released_blip2.stage2("opt"))
    frozen = {"vision": root / "eva_vit_g.pth", "language_model": parts / "opt"}
    whole = load_checkpoint(root / "blip2_pretrained_opt2.7b.pth", **frozen)
    save_checkpoint(whole, parts / "blip2-opt", "huggingface")
    captioner = released_blip2.stage2("opt")
    captioner.visual_encoder.requires_grad_(True)
    released_blip2.write(root / "blip2_caption_opt2.7b.pth", captioner)
