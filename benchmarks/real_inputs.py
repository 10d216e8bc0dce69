"""Claim: what people's data and commands look like is read, or refused in words; nothing is lost in silence.

There is no peer: each case is a command or a few lines of Python on a small input that made trouble for users of BLIP
tools. The case says what must come of it. Run it on two checkouts for a table of before and after:

    python benchmarks/real_inputs.py INPUTS --out results.json

INPUTS is a folder of the small images, tables and tar files that the cases name: what users reported, made again. The
script that writes it, make_inputs.py, is kept with the issue that collected the reports, not in this repository.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

CAPTIONER, FILTER, MINI = "openblip-mini-captioner", "openblip-mini-filter", "openblip-mini"


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, what it printed, and its folder."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def num_lines(self) -> int:
        return len(self.stdout.splitlines())

    def says(self, *words: str) -> bool:
        text = (self.stdout + self.stderr).lower()
        return all(word.lower() in text for word in words) and "traceback" not in text


Expectation = Callable[[Outcome], bool]


@dataclass(frozen=True)
class Case:
    item: int
    name: str
    command: str  # a command line of openblip, or Python code that begins with "import"
    expected: str
    holds: Expectation
    first: tuple[str, ...] = ()  # command lines to run before it


def captioned(number: int, *words: str, code: int = 0) -> Expectation:
    return lambda o: o.code == code and o.num_lines == number and o.says(*words)


def refused(*words: str, code: int = 2) -> Expectation:
    return lambda o: o.code == code and o.says(*words) and "traceback" not in o.stderr.lower()


def done(*words: str) -> Expectation:
    return lambda o: o.code == 0 and o.says(*words)


def caption(source: str, more: str = "") -> str:
    return f"caption {source} --model {CAPTIONER} {more}".strip()


def train(source: str, more: str = "", recipe: str = "blip-mini") -> str:
    return (
        f"train {recipe} --data.source {source} --out OUT/run --training.steps 2 --training.batch-size 4 {more}".strip()
    )


def inspect(source: str, more: str = "") -> str:
    return f"data inspect {source} {more}".strip()


def capfilt(source: str, more: str = "") -> str:
    return f"capfilt {source} --captioner {CAPTIONER} --filter {FILTER} --out OUT/clean {more}".strip()


def rows(number: int) -> Expectation:
    """The captions files of a CapFilt run have this many web rows."""

    def holds(outcome: Outcome) -> bool:
        files = sorted((outcome.out / "clean/captions").glob("*.parquet"))
        sources = [row["source"] for file in files for row in pq.read_table(file).to_pylist()]
        return outcome.code == 0 and sources.count("web") == number

    return holds


PYTHON = (
    "import openblip, io, numpy as np, torch\nfrom PIL import Image\nmodel = openblip.load('openblip-mini-filter')\n"
)
PYTHON += "captioner = openblip.load('openblip-mini-captioner')\nimage = 'IN/tables/0.jpg'\n"

CASES = [
    # 1: tar shards
    Case(1, "dots in names", caption("IN/tars/dots.tar"), "2 captions", captioned(2)),
    Case(1, "dots in names, CapFilt", capfilt("IN/tars/dots.tar"), "2 web rows", rows(2)),
    Case(1, "s0.input.jpg, s0.outputs.txt", caption("IN/tars/openclip.tar"), "1 caption", captioned(1)),
    Case(1, "upper case, .caption, .gif in a tar", capfilt("IN/tars/upper.tar"), "3 web rows", rows(3)),
    Case(1, "folders with dots in a tar", capfilt("IN/tars/dirs.tar"), "3 web rows", rows(3)),
    Case(
        1,
        "texts without image",
        caption("IN/tars/missing.tar"),
        "2 captions, the rest named",
        captioned(2, "1", code=1),
    ),
    Case(1, "empty tar", caption("OUT/empty.tar"), "exit 1: 0 images", lambda o: o.code == 1 and o.says("0")),
    Case(1, "html in place of a shard", capfilt("OUT/html.tar"), "exit 1, shard failed", refused("html.tar", code=1)),
    Case(1, "cut tar", capfilt("IN/tars/cut.tar"), "the 2 whole samples, the rest a reject", rows(2)),
    Case(
        1,
        "compressed tar",
        caption("IN/tars/ok.tar.gz"),
        "read or refused in words",
        lambda o: o.num_lines == 3 or refused("gz")(o),
    ),
    # 2: long texts
    Case(2, "captions of 80 words, trained", train("IN/train/long.csv"), "says what is cut", done("cut")),
    Case(
        2,
        "long captions matched",
        PYTHON + "a = ' '.join(f'red {i}' for i in range(20))\n"
        "print(model.match(image, a + ' a dog ' * 6) != model.match(image, a + ' a cat ' * 6))",
        "texts beyond 30 words count",
        done("True"),
    ),
    # 3: options without effect
    Case(
        3,
        "--init with a tokenizer that is not there",
        train("IN/train/c.csv", f"--init {MINI} --tokenizer nowhere", "blip-mini-captioner"),
        "refused",
        refused("nowhere"),
    ),
    Case(
        3,
        "--init with --vocab-size",
        train("IN/train/c.csv", f"--init {MINI} --vocab-size 50", "blip-mini-captioner"),
        "refused",
        refused("vocab"),
    ),
    # 4: vocabulary
    Case(
        4,
        "Chinese on an English vocabulary",
        train("IN/train/zh.csv", f"--init {MINI}", "blip-mini-captioner"),
        "refused with the share",
        refused("%"),
    ),
    Case(
        4,
        "an emoji in each caption",
        train("IN/train/emoji.csv", f"--init {MINI}", "blip-mini-captioner"),
        "warns with the share",
        done("%", "unknown"),
    ),
    Case(
        4,
        "new vocabulary in fine-tuning",
        train("IN/train/zh.csv", f"--init {MINI} --tokenizer OUT/first/model", "blip-mini-captioner"),
        "trains with that vocabulary",
        lambda o: (
            o.code == 0
            and (o.out / "run/model/tokenizer.json").read_bytes() == (o.out / "first/model/tokenizer.json").read_bytes()
        ),
        (train("IN/train/zh.csv").replace("OUT/run", "OUT/first"),),
    ),
    # 5: repeated ids
    Case(5, "repeated id in csv", capfilt("IN/tables/dupid.csv"), "4 web rows", rows(4)),
    Case(5, "repeated id in parquet", capfilt("IN/parquets/dupid.parquet"), "3 web rows", rows(3)),
    # 6: how data lies around
    Case(6, "imagefolder, metadata.jsonl", capfilt("IN/hf_imagefolder/train"), "3 web rows", rows(3)),
    Case(6, "imagefolder with splits", capfilt("IN/hf_imagefolder"), "3 web rows", rows(3)),
    Case(6, "imagefolder, metadata.csv", capfilt("IN/hf_imagefolder_csv"), "3 web rows", rows(3)),
    Case(6, "img2dataset's files", capfilt("IN/img2ds_files"), "3 web rows", rows(3)),
    Case(6, "folder of a dataset repository", capfilt("IN/hf_repo"), "4 web rows", rows(4)),
    Case(6, "save_to_disk", capfilt("IN/hf_saved"), "4 web rows", rows(4)),
    Case(6, ".arrow file", capfilt("IN/hf_saved/data-00000-of-00001.arrow"), "4 web rows", rows(4)),
    Case(6, "parquet with paths", capfilt("OUT/paths.parquet", "--images IN/tables"), "2 web rows", rows(2)),
    Case(6, "Flickr30k results.csv", capfilt("IN/tables/flickr30k.csv"), "2 web rows", rows(2)),
    Case(6, "Flickr8k captions.txt", capfilt("IN/tables/captions.txt"), "2 web rows", rows(2)),
    Case(6, "Flickr8k token.txt", capfilt("IN/tables/Flickr8k.token.txt"), "2 web rows", rows(2)),
    Case(6, "data-juicer jsonl", capfilt("IN/tables/messages.jsonl"), "1 web row", rows(1)),
    Case(
        6,
        "columns filepath, title",
        capfilt("IN/tables/othercols.csv", "--image-column filepath --caption-column title"),
        "1 web row",
        rows(1),
    ),
    Case(
        6,
        "columns image_file, description",
        train("IN/tables/imgcol.csv", "--data.image-column image_file --data.caption-column description"),
        "trains",
        done("trained"),
    ),
    Case(
        6,
        "columns of parquet",
        capfilt("IN/parquets/othercols.parquet", "--image-column img --caption-column en_text"),
        "1 web row",
        rows(1),
    ),
    Case(
        6,
        "a column that is not there",
        capfilt("IN/tables/othercols.csv", "--image-column nope --caption-column title"),
        "lists the columns",
        refused("filepath", "title"),
    ),
    Case(6, "a list of images in parquet", capfilt("IN/parquets/listimages.parquet"), "1 web row", rows(1)),
    Case(6, "null image in parquet", capfilt("IN/parquets/nullimage.parquet"), "1 web row, 1 reject", rows(1)),
    Case(6, "linked folder", capfilt("IN/links"), "3 web rows", rows(3)),
    Case(6, "folder that links to itself", caption("IN/looped"), "1 caption", captioned(1)),
    Case(6, "the source is a link", capfilt("IN/rootlink"), "3 web rows", rows(3)),
    Case(6, "semicolons", capfilt("IN/tables/semicolon.csv"), "1 web row", rows(1)),
    Case(6, "byte order mark, csv", capfilt("IN/tables/bom.csv"), "2 web rows", rows(2)),
    Case(6, "byte order mark, jsonl", capfilt("IN/tables/bom.jsonl"), "3 web rows", rows(3)),
    Case(
        6,
        "latin-1 csv",
        capfilt("IN/tables/latin1.csv"),
        "read, or refused as not UTF-8",
        lambda o: rows(2)(o) or refused("utf-8")(o) or refused("utf-8", code=1)(o),
    ),
    Case(
        6,
        "utf-16 csv",
        capfilt("IN/tables/utf16.csv"),
        "read, or refused as not UTF-8",
        lambda o: rows(1)(o) or refused("utf")(o),
    ),
    Case(
        6,
        "csv without header",
        capfilt("IN/tables/noheader.csv"),
        "refused, or read",
        lambda o: rows(2)(o) or refused("column")(o),
    ),
    Case(6, "pandas index column", capfilt("IN/tables/pandas_index.csv"), "2 web rows", rows(2)),
    Case(6, "quotes and line breaks in csv", capfilt("IN/tables/quoted.csv"), "3 web rows", rows(3)),
    Case(
        6,
        "commas without quotes",
        capfilt("IN/tables/unquoted.csv"),
        "the broken row is named",
        lambda o: (o.code in (0, 1) and o.says("1 reject")) or rows(3)(o),
    ),
    Case(6, "broken lines of jsonl", capfilt("IN/tables/broken.jsonl"), "1 web row, rejects named", rows(1)),
    Case(6, "json list", capfilt("IN/tables/list.json"), "2 web rows", rows(2)),
    Case(6, "json object name: caption", capfilt("IN/tables/dict.json"), "2 web rows", rows(2)),
    Case(6, "kohya's folders", capfilt("IN/kohya"), "2 web rows", rows(2)),
    # 7: what one command writes, another reads
    Case(
        7,
        "caption --out is a source",
        capfilt("OUT/r.jsonl"),
        "6 web rows",
        rows(6),
        (
            caption(
                "IN/tables/imageonly.jsonl IN/tables/2.jpg IN/tables/3.jpg IN/tables/4.jpg IN/tables/5.jpg",
                "--out OUT/r.jsonl",
            ),
        ),
    ),
    Case(
        7,
        "caption --out of a folder is a source",
        capfilt("OUT/r.jsonl", "--images IN/dups"),
        "3 web rows",
        rows(3),
        (caption("IN/dups", "--out OUT/r.jsonl"),),
    ),
    Case(
        7,
        "three captions in a sidecar",
        capfilt("OUT/side"),
        "3 web rows",
        rows(3),
        (caption("OUT/side", "--sidecar --num-captions 3"),),
    ),
    Case(
        7,
        "sidecar of another extension",
        capfilt("OUT/side"),
        "1 web row",
        rows(1),
        (caption("OUT/side", "--sidecar --extension .caption"),),
    ),
    Case(
        7,
        "--out x.csv",
        caption("IN/dups", "--out OUT/x.csv"),
        "csv, or refused",
        lambda o: refused("csv")(o) or (o.code == 0 and (o.out / "x.csv").read_text().startswith("key,")),
    ),
    Case(7, "csv of images alone", caption("IN/tables/imageonly.csv"), "2 captions", captioned(2)),
    Case(7, "jsonl of images alone", caption("IN/tables/imageonly.jsonl"), "2 captions", captioned(2)),
    Case(7, "parquet of images alone", caption("IN/parquets/imageonly.parquet"), "2 captions", captioned(2)),
    # 8: one list of image formats
    Case(
        8,
        "formats, captioned",
        caption("IN/formats"),
        "every readable one; the others named",
        lambda o: o.num_lines == 31 and o.says("svg"),
    ),
    Case(
        8,
        "formats, inspected",
        inspect("IN/formats", "--samples 0"),
        "the same number as captioned",
        lambda o: o.says("svg"),
    ),
    Case(8, "formats, CapFilt", capfilt("IN/formats"), "unused files counted", lambda o: o.says("svg")),
    Case(8, "a.jpg beside a.png", caption("IN/dups"), "3 captions", captioned(3)),
    Case(8, "strange names", caption("IN/names"), "14 captions", captioned(14)),
    Case(8, "a folder with brackets and commas", caption("'IN/photos [2023], best'"), "1 caption", captioned(1)),
    Case(8, "broken link", caption("IN/filelinks"), "1 caption, the link named", captioned(1, "broken", code=1)),
    # 9: images of other ranges
    Case(
        9,
        "float TIFF in 0..1",
        PYTHON + "x = np.zeros((64, 64), np.float32); x[:32] = 1\nImage.fromarray(x).save('OUT/x.tiff')\n"
        "y = model.prepare('OUT/x.tiff')\nprint(int(y.max()) > 200 and int(y.min()) < 60)",
        "scaled to 0..255, or refused",
        lambda o: o.says("True") or "ImageError" in o.stderr,
    ),
    Case(
        9,
        "12 bits in 16",
        PYTHON + "x = np.zeros((64, 64), np.uint16); x[:32] = 4095\nImage.fromarray(x).save('OUT/x.png')\n"
        "y = model.prepare('OUT/x.png')\nprint(int(y.max()) > 200)",
        "scaled by its range, or refused",
        lambda o: o.says("True") or "ImageError" in o.stderr,
    ),
    # 10: starts and resumes of trainings
    Case(10, "after a wrong source", train("IN/train/c.csv"), "trains", done("trained"), (train("IN/nothing.csv"),)),
    Case(
        10,
        "another rate at a resume",
        train("IN/train/c.csv", "--training.steps 4 --training.learning-rate 0.0001 --resume"),
        "goes on",
        done("trained"),
        (train("IN/train/c.csv"),),
    ),
    Case(
        10,
        "more steps at a resume",
        train("IN/train/c.csv", "--training.steps 8 --resume"),
        "goes on and names the schedule",
        done("schedule"),
        (train("IN/train/c.csv"),),
    ),
    Case(
        10,
        "another model at a resume",
        train("IN/train/c.csv", "--vocab-size 50 --resume"),
        "refused",
        refused("vocab"),
        (train("IN/train/c.csv"),),
    ),
    # 11: devices and precisions
    Case(11, "no cuda here", caption("IN/dups", "--device cuda"), "one line", refused("cuda")),
    Case(11, "no mps here", caption("IN/dups", "--device mps"), "one line", refused("mps")),
    Case(11, "a device that is none", caption("IN/dups", "--device gpu"), "one line", refused("gpu")),
    Case(
        11,
        "dtype by name",
        "import openblip\nmodel = openblip.load('openblip-mini', dtype='bfloat16')\n"
        "print(model.match('IN/tables/0.jpg', 'a dog').item() >= 0)",
        "runs",
        done("True"),
    ),
    Case(11, "quantization of a BLIP", caption("IN/dups", "--quantization 8bit"), "refused", refused("language model")),
    Case(
        11, "a precision that is none", caption("IN/dups", "--dtype half"), "lists those there are", refused("float16")
    ),
    Case(11, "dtype of a training", train("IN/train/c.csv", "--training.dtype bfloat16"), "trains", done("trained")),
    # 12: images in Python
    *[
        Case(12, name, PYTHON + f"print(type(captioner.caption({code})).__name__)", "read", done(kind))
        for name, code, kind in [
            ("BytesIO", "io.BytesIO(open(image, 'rb').read())", "str"),
            ("an open file", "open(image, 'rb')", "str"),
            ("bytearray", "bytearray(open(image, 'rb').read())", "str"),
            ("gray array", "np.zeros((32, 32), np.uint8)", "str"),
            ("RGBA array", "np.zeros((32, 32, 4), np.uint8)", "str"),
            ("float array", "np.zeros((32, 32, 3), np.float32)", "str"),
            ("CHW tensor", "torch.zeros(3, 32, 32)", "str"),
            ("list of tensors", "[torch.zeros(3, 32, 32)] * 2", "list"),
        ]
    ],
    Case(
        12,
        "None in a list",
        PYTHON + "captioner.caption([image, None])",
        "ConfigError lists what is taken",
        lambda o: o.code == 1 and "ConfigError" in o.stderr and "bytes" in o.stderr,
    ),
    Case(
        12,
        "a number",
        PYTHON + "captioner.caption(3)",
        "ConfigError lists what is taken",
        lambda o: o.code == 1 and "ConfigError" in o.stderr and "bytes" in o.stderr,
    ),
    Case(
        12,
        "one text, many images",
        PYTHON + "print(tuple(model.match([image] * 3, 'a dog').shape))",
        "(3,)",
        done("(3,)"),
    ),
    Case(
        12, "many texts, one image", PYTHON + "print(tuple(model.match(image, ['a', 'b']).shape))", "(2,)", done("(2,)")
    ),
    # 14: sources everywhere
    Case(
        14,
        "a mixture is evaluated",
        f"evaluate caption --model {CAPTIONER} --data IN/tables/captions.txt,IN/tables/bom.csv",
        "scores",
        done("CIDEr"),
    ),
    # 15: decoding options
    Case(
        15,
        "no_repeat_ngram_size",
        PYTHON + "noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)\n"
        "beam = openblip.Beam(num_beams=3, max_new_tokens=20, no_repeat_ngram_size=2)\n"
        "t = captioner.caption(noise, decoding=beam).split()\n"
        "print(len(set(zip(t, t[1:]))) == len(t) - 1)",
        "no pair of words twice",
        done("True"),
    ),
    Case(
        15,
        "top_k",
        PYTHON + "one = captioner.caption(image, decoding=openblip.Nucleus(top_k=1, top_p=1.0, seed=1))\n"
        "print(one == captioner.caption(image, decoding=openblip.Greedy()))",
        "top_k=1 is greedy",
        done("True"),
    ),
    # 16: sidecars
    Case(
        16,
        "empty text files are filled",
        caption("OUT/kohya", "--sidecar"),
        "2.txt is filled",
        lambda o: o.code == 0 and bool((o.out / "kohya/2.txt").read_text().strip()),
    ),
    Case(
        16,
        "--append",
        caption("OUT/kohya", "--sidecar --append"),
        "0.txt keeps its text and gains one",
        lambda o: (
            o.code == 0
            and (o.out / "kohya/0.txt").read_text().startswith("ohwx, a girl")
            and len((o.out / "kohya/0.txt").read_text()) > 14
        ),
    ),
    # 18: the contract's files
    Case(
        18,
        "manifest.json, report.json",
        capfilt("IN/tables/bom.csv"),
        "models, counts",
        lambda o: (
            "models" in json.loads((o.out / "clean/manifest.json").read_text())
            and all("counts" in json.loads(p.read_text()) for p in (o.out / "clean/captions").glob("*.report.json"))
        ),
    ),
    # 20: threads
    Case(
        20,
        "explain in eight threads",
        PYTHON + "from concurrent.futures import ThreadPoolExecutor\nimport pickle\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    maps = list(pool.map(lambda _: model.explain(image, 'a dog').heat, range(16)))\n"
        "pickle.dumps(model.model)\n"
        "print(all(np.allclose(np.asarray(m), np.asarray(maps[0]), atol=1e-5) for m in maps))",
        "16 equal maps",
        done("True"),
    ),
    # 21: settings of an output file
    Case(
        21,
        "another prompt in the same --out",
        caption("IN/dups", "--out OUT/r.jsonl --prompt 'a photo of'"),
        "refused",
        refused("prompt"),
        (caption("IN/dups", "--out OUT/r.jsonl"),),
    ),
    Case(
        21,
        "another model in the same --out",
        f"caption IN/dups --model {MINI} --out OUT/r.jsonl",
        "refused",
        refused("model"),
        (caption("IN/dups", "--out OUT/r.jsonl"),),
    ),
    # 22: resume
    Case(22, "train --resume RUN", "train --resume OUT/run", "goes on", done("run"), (train("IN/train/c.csv"),)),
    # 23: nothing scored
    Case(
        23,
        "captions are missing",
        f"evaluate caption --model {CAPTIONER} --data IN/dups",
        "an error",
        lambda o: o.code in (1, 2) and o.says("caption"),
    ),
    Case(
        23,
        "questions are missing",
        f"evaluate vqa --model {CAPTIONER} --data IN/tables/bom.csv",
        "an error",
        lambda o: o.code in (1, 2) and o.says(),
    ),
    # 24: other readers
    Case(
        24,
        "pyarrow reads captions/*.parquet",
        capfilt("IN/tables/bom.csv"),
        "one table",
        lambda o: o.code == 0 and opens_with_pyarrow(o.out / "clean/captions"),
    ),
    # 25: errors
    Case(
        25,
        "decoding by name",
        PYTHON + "captioner.caption(image, decoding='beam')",
        "ConfigError names Beam",
        lambda o: o.code == 1 and "ConfigError" in o.stderr and "Beam" in o.stderr,
    ),
    Case(
        25,
        "overlong prompt",
        PYTHON + "captioner.caption(image, prompt='a ' * 600)",
        "ConfigError says how long",
        lambda o: o.code == 1 and "ConfigError" in o.stderr,
    ),
    Case(
        25,
        "a run folder is its model",
        "import openblip; print(sorted(openblip.load('OUT/run').tasks))",
        "loads",
        done("match"),
        (train("IN/train/c.csv"),),
    ),
    Case(
        25,
        "no network",
        caption("IN/dups").replace(CAPTIONER, "someone/somewhat"),
        "says that the hub could not be asked",
        refused("could not"),
    ),
    # 26: help
    Case(26, "train --help", "train --help", "names and descriptions apart", lambda o: "retrievalFine" not in o.stdout),
]


def opens_with_pyarrow(folder: Path) -> bool:
    return ds.dataset(sorted(map(str, folder.glob("*.parquet")))).count_rows() > 0


def prepare(inputs: Path, out: Path) -> None:
    """Inputs that cases change, or that make_inputs.py does not write."""
    tarfile.open(out / "empty.tar", "w").close()
    (out / "html.tar").write_text("<!doctype html><html>404 not found</html>" * 30)
    pq.write_table(pa.table({"image": ["0.jpg", "1.jpg"], "caption": ["a dog", "a cat"]}), out / "paths.parquet")
    (out / "side").mkdir()
    shutil.copy(inputs / "tables/0.jpg", out / "side/0.jpg")
    shutil.copytree(inputs / "kohya/10_girl", out / "kohya")


def run(command: str, inputs: Path, out: Path) -> Outcome:
    if command.startswith("import"):
        argv = [sys.executable, "-c", command.replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/")]
    else:
        parts = shlex.split(command)
        argv = [sys.executable, "-m", "openblip"]
        argv += [part.replace("IN/", f"{inputs}/").replace("OUT/", f"{out}/") for part in parts]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=180, env={**os.environ, "HF_HUB_OFFLINE": "0"}
        )
    except subprocess.TimeoutExpired as error:
        return Outcome(-1, str(error.stdout or ""), f"hangs: {error.stderr!r}", out)
    return Outcome(done.returncode, done.stdout, done.stderr, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    results = []
    for case in CASES:
        if options.only and case.item not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            prepare(options.inputs, out)
            start = time.perf_counter()
            for command in case.first:
                run(command, options.inputs, out)
            outcome = run(case.command, options.inputs, out)
            try:
                right = bool(case.holds(outcome))
            except Exception as error:  # a file that is not there, say: the case does not hold
                right = False
                outcome = Outcome(
                    outcome.code, outcome.stdout, f"{outcome.stderr}\n{type(error).__name__}: {error}", out
                )
        last = [line for line in (outcome.stderr or outcome.stdout).strip().splitlines() if line.strip()]
        came = f"exit {outcome.code}, {outcome.num_lines} lines; {last[-1][:110] if last else ''}"
        print(
            f"{'ok ' if right else 'BAD'} {case.item:2d} {case.name} | {case.expected} | {came} | "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if options.verbose and not right:
            print(outcome.stdout[-1500:], outcome.stderr[-2500:], sep="\n", flush=True)
        results.append(
            {"item": case.item, "case": case.name, "expected": case.expected, "right": right, "outcome": came}
        )
    print(f"{sum(r['right'] for r in results)} of {len(results)} right")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
