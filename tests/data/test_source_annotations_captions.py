"""COCO, NoCaps, Karpathy's splits and lists of captions, in miniature as they are distributed."""

import pytest
from annotation_files import describe, read_all, read_samples, write

from openblip.data.sources import open_mixture, open_source
from openblip.errors import SourceError
from source_items import items_of

NOCAPS = {
    "images": [
        {"id": 0, "open_images_id": "0013ea2087020901", "file_name": "0013ea.jpg", "domain": "in-domain"},
        {"id": 1, "open_images_id": "0015efcb77ed8be5", "file_name": "0015ef.jpg", "domain": "near-domain"},
        {"id": 2, "open_images_id": "00177b4bd6d2ebe7", "file_name": "00177b.jpg", "domain": "out-of-domain"},
    ],
    "annotations": [
        {"image_id": 0, "id": 0, "caption": "A baby is standing in front of a house."},
        {"image_id": 0, "id": 1, "caption": "A little girl in a white jacket."},
        {"image_id": 1, "id": 2, "caption": "A bottle."},
        {"image_id": 2, "id": 3, "caption": "A squid."},
    ],
}


def test_nocaps_has_domains(tmp_path, images, write_images):
    write_images("0013ea.jpg", "0015ef.jpg", "00177b.jpg")
    path = write(tmp_path / "nocaps_val_4500_captions.json", NOCAPS)
    samples = read_samples(path, images)
    assert [s.info["domain"] for s in samples] == ["in-domain", "near-domain", "out-domain"]
    assert samples[0].captions == ("A baby is standing in front of a house.", "A little girl in a white jacket.")
    assert samples[1].image == (images / "0015ef.jpg").read_bytes()
    assert samples[0].info["open_images_id"] == "0013ea2087020901"
    assert describe(path, images) == {"format": "NoCaps captions"}


def test_images_without_annotations_are_for_prediction(tmp_path, images, write_images):
    write_images("0000.jpg")
    content = {"info": {}, "images": [{"id": 7, "file_name": "0000.jpg"}], "licenses": []}
    path = write(tmp_path / "nocaps_test_image_info.json", content)
    samples, rejects = read_all(path, images)
    assert [(s.key, s.captions) for s in samples] == [("7", ())]
    assert not rejects
    assert "annotations" in describe(path, images)["missing"]


def test_annotations_that_are_no_captions(tmp_path, images, write_images):
    write_images("a.jpg")
    boxes = [{"image_id": 1, "bbox": [0, 0, 2, 2], "category_id": 3}]
    path = write(tmp_path / "instances.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": boxes})
    with pytest.raises(SourceError, match="no captions; found: image_id, bbox, category_id"):
        open_source(str(path), images=str(images))


def karpathy_image(number, split, *captions, **fields):
    sentences = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": number} for text in captions]
    return {"sentids": [number], "imgid": number, "split": split, "sentences": sentences, **fields}


def karpathy_coco(number, folder, split, *captions):
    name = f"COCO_{folder}_{number:012d}.jpg"
    return karpathy_image(number - 100, split, *captions, filepath=folder, filename=name, cocoid=number)


@pytest.fixture
def dataset_coco(tmp_path, write_images):
    write_images(*(f"{folder}/COCO_{folder}_{n:012d}.jpg" for folder, n in (("train2014", 101), ("val2014", 102))))
    rows = [
        karpathy_coco(101, "train2014", "train", "A dog.", " A red dog. "),
        karpathy_coco(102, "val2014", "restval", "A cat."),
        karpathy_coco(102, "val2014", "test", "A test."),
        karpathy_coco(103, "val2014", "val", "gone"),
    ]
    return write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": rows})


def test_karpathy_train_has_restval(dataset_coco, images):
    source = open_source(f"{dataset_coco}#train", images=str(images))
    assert source.shards() == ["dataset_coco-train"]
    samples = read_samples(f"{dataset_coco}#train", images)
    assert [(s.key, s.captions) for s in samples] == [("101", ("A dog.", "A red dog.")), ("102", ("A cat.",))]
    assert [s.info["split"] for s in samples] == ["train", "restval"]
    assert samples[0].image == (images / "train2014" / f"COCO_train2014_{101:012d}.jpg").read_bytes()
    assert source.describe()["splits in the file"] == {"train": 2, "test": 1, "val": 1}


def test_karpathy_test_and_an_image_that_is_gone(dataset_coco, images):
    assert [s.captions for s in read_samples(f"{dataset_coco}#test", images)] == [("A test.",)]
    samples, rejects = read_all(f"{dataset_coco}#val", images)
    assert not samples
    assert "COCO_val2014_000000000103.jpg" in rejects[0].reason


def test_images_without_their_folders(dataset_coco, images):
    (images / "train2014" / f"COCO_train2014_{101:012d}.jpg").rename(images / f"COCO_train2014_{101:012d}.jpg")
    assert [s.key for s in read_all(f"{dataset_coco}#train", images)[0]] == ["101", "102"]


def test_a_karpathy_file_needs_a_split(dataset_coco, images):
    sizes = r"#train \(2 images\), #test \(1 images\), #val \(1 images\)"
    with pytest.raises(SourceError, match=f"say which split.*{sizes}"):
        open_source(str(dataset_coco), images=str(images))
    with pytest.raises(SourceError, match=f"no split dev.*{sizes}"):
        open_source(f"{dataset_coco}#dev", images=str(images))


def test_a_part_and_a_mixture_of_splits(dataset_coco, images):
    mixture = open_mixture(f"{dataset_coco}#train@0.9,{dataset_coco}#test@0.1", images=str(images))
    assert [source.name for source in mixture.sources] == [f"{dataset_coco}#train", f"{dataset_coco}#test"]
    assert open_source(f"{dataset_coco}#train[:99%]", images=str(images)).describe()["format"] == "Karpathy split"


def test_karpathy_flickr30k(tmp_path, images, write_images):
    write_images("flickr30k-images/1000.jpg", "1001.jpg")
    rows = [karpathy_image(0, "train", "Two men.", filename="1000.jpg")]
    rows += [karpathy_image(1, "train", "A girl.", "Another.", filename="1001.jpg")]
    path = write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": rows})
    samples = read_samples(f"{path}#train", images)
    assert [(s.key, s.captions) for s in samples] == [("0", ("Two men.",)), ("1", ("A girl.", "Another."))]


def test_broken_karpathy_rows_are_named(tmp_path, images, write_images):
    write_images("a.jpg")
    rows = [
        karpathy_image(0, "test", "fine", filename="a.jpg"),
        karpathy_image(0, "test", "again", filename="a.jpg"),
        {**karpathy_image(2, "test", filename="a.jpg"), "sentences": "text"},
        karpathy_image(3, "test", "no name"),
        {**karpathy_image(4, "test", filename="a.jpg"), "sentences": [{"tokens": ["x"]}]},
        "an image",
        karpathy_image(True, "test", "x", filename="a.jpg"),
    ]
    path = write(tmp_path / "dataset.json", {"images": rows})
    samples, rejects = read_all(f"{path}#test", images)
    assert [s.captions for s in samples] == [("fine",)]
    reasons = {r.key: r.reason for r in rejects}
    assert reasons.keys() == {"0", "images[2]", "images[3]", "images[4]", "images[5]", "images[6]"}
    assert reasons["0"] == "images[1]: duplicate key, the first one stays"
    assert reasons["images[3]"] == "images[3]: no filename"


def test_a_split_where_there_are_none(tmp_path, images, write_images):
    write_images("0013ea.jpg")
    path = write(tmp_path / "nocaps.json", NOCAPS)
    with pytest.raises(SourceError, match="no splits to choose from; leave out #val"):
        open_source(f"{path}#val", images=str(images))
    odd = write(tmp_path / "odd.json#val", NOCAPS)
    with pytest.raises(SourceError, match="not a format"):  # a file of this name, not a split of another
        open_source(str(odd), images=str(images))


def test_the_authors_training_list(tmp_path, images, write_images):
    write_images("val2014/a.jpg", "train2014/b.jpg")
    rows = [
        {"caption": "A woman.", "image": "val2014/a.jpg", "image_id": "coco_522418"},
        {"caption": "A woman cutting.", "image": "val2014/a.jpg", "image_id": "coco_522418"},
        {"caption": "A dog.", "image": "train2014/b.jpg", "image_id": "coco_1"},
    ]
    path = write(tmp_path / "coco_karpathy_train.json", rows)
    samples = read_samples(path, images)
    assert [s.captions for s in samples] == [("A woman.",), ("A woman cutting.",), ("A dog.",)]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert len({s.key for s in samples}) == 3


def test_the_authors_test_lists(tmp_path, images, write_images):
    write_images("val2014/a.jpg", "b.jpg")
    rows = [{"image": "val2014/a.jpg", "caption": ["1", "2", "3"]}, {"image": "b.jpg", "caption": ["4", "5"]}]
    samples, _ = read_all(write(tmp_path / "flickr30k_test.json", rows), images)
    assert [s.captions for s in samples] == [("1", "2", "3"), ("4", "5")]
    assert samples[0].image_id != samples[1].image_id
    nocaps = write(tmp_path / "nocaps_val.json", [{"image": "b.jpg", "img_id": 42}])
    assert [(s.key, s.captions) for s in read_all(nocaps, images)[0]] == [("42", ())]


def test_broken_rows_of_a_list(tmp_path, images, write_images):
    write_images("a.jpg")
    rows = [
        {"image": "a.jpg", "caption": "fine"},
        {"image": 5, "caption": "x"},
        {"image": "a.jpg", "caption": {"no": "text"}},
        {"caption": "no image"},
        [],
        {"image": "a\0.jpg", "caption": "x"},
        {"image": "gone.jpg", "caption": "x"},
    ]
    samples, rejects = read_all(write(tmp_path / "list.json", rows), images)
    assert [s.captions for s in samples] == [("fine",)]
    reasons = {r.key: r.reason for r in rejects}
    assert reasons.keys() == {f"[{n}]" for n in (1, 2, 3, 4, 5)} | {"000000006"}
    assert "found: caption" in reasons["[3]"]
    assert "gone.jpg" in reasons["000000006"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", r"\[\]"),
        ("{}", "an object with nothing"),
        ('{"images": [], "annotations": []}', "an object with images, annotations"),
        ('{"a": 1, "b": 2}', "an object with a, b"),
        ('[{"url": "x"}]', "a list of objects with url"),
        ("[1, 2]", r"\[1, 2\]"),
        ('{"images": [{"height": 5}]}', "an object with images"),
        ('{"image": "a.jpg", "caption": "x"}', "an object with image, caption"),
    ],
)
def test_an_unknown_json_says_what_it_is_and_what_is_known(tmp_path, content, found):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(SourceError, match=f"it is {found}.*Known are COCO.*Karpathy.*VQA.*VisDial.*NLVR2"):
        open_source(str(path), images=str(tmp_path))


@pytest.mark.parametrize("content", ["{", '{"images": []} {', "[1] [2]", "\ud800"])
def test_a_damaged_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match=r"x\.json: broken json"):
        read_all(tmp_path / "x.json", tmp_path)


def test_folders_of_images_are_asked_for(tmp_path):
    path = write(tmp_path / "nocaps.json", NOCAPS)
    with pytest.raises(SourceError, match="--images"):
        open_source(str(path))
    with pytest.raises(SourceError, match="nowhere: no such folder"):
        open_source(str(path), images=str(tmp_path / "nowhere"))


def test_long_files_are_cut_into_shards(tmp_path, images, write_images, monkeypatch):
    monkeypatch.setattr("openblip.data.sources.rows.ROWS_PER_SHARD", 2)
    write_images("0013ea.jpg", "0015ef.jpg", "00177b.jpg")
    source = open_source(str(write(tmp_path / "nocaps.json", NOCAPS)), images=str(images))
    assert source.shards() == ["nocaps-00000", "nocaps-00001"]
    assert [s.key for s in items_of(source)] == ["0", "1", "2"]
