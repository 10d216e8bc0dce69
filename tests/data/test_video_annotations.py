import json

import annotation_files
import pytest
from annotation_files import describe, read_all, read_samples

from openblip.data.sources import open_source
from openblip.errors import SourceError


@pytest.fixture
def write(tmp_path):
    return lambda name, content: annotation_files.write(tmp_path / name, content)


@pytest.fixture
def video_files(tmp_path):
    def put(*names):
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        return tmp_path / "videos"

    return put


def video(number, split, **more):
    return {"video_id": f"video{number}", "id": number, "split": split, "category": 9, **more}


def sentence(number, caption):
    return {"caption": caption, "video_id": f"video{number}", "sen_id": number}


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [video(0, "train"), video(7010, "test"), video(6513, "validate"), video(7011, "test")],
    "sentences": [
        *(sentence(7010, "a man sings"), sentence(0, "a train"), sentence(7010, "someone is on stage")),
        *(sentence(7011, " "), sentence(99, "of no video")),
    ],
}


def test_msrvtt(write, video_files):
    path = write("MSRVTT_data.json", MSRVTT)
    folder = video_files("TestVideo/video7010.mp4", "TestVideo/video7011.webm", "TrainValVideo/video0.mp4")
    samples = read_samples(f"{path}#test", folder)
    assert [(s.key, s.shard) for s in samples] == [("video7010", "MSRVTT_data-test"), ("video7011", "MSRVTT_data-test")]
    assert [s.captions for s in samples] == [("a man sings", "someone is on stage"), ()]
    assert [s.image for s in samples] == [b"TestVideo/video7010.mp4", b"TestVideo/video7011.webm"]
    assert samples[0].image_id == f"{path}#test#video7010"
    assert samples[0].info["image_id"] == "video7010"
    assert samples[0].info["category"] == 9
    assert [s.captions for s in read_all(f"{path}#train", folder)[0]] == [("a train",)]


def test_msrvtt_of_one_split_needs_no_fragment(write, video_files):
    content = {"videos": [video(7010, "test")], "sentences": MSRVTT["sentences"]}
    path = write("test_videodatainfo.json", content)
    assert len(read_all(path, video_files("video7010.mp4"))[0]) == 1
    assert len(read_all(f"{path}#test", video_files("video7010.mp4"))[0]) == 1


@pytest.mark.parametrize(("fragment", "said"), [("", "say which split"), ("#val", "no split val")])
def test_msrvtt_lists_the_splits_that_it_has(write, video_files, fragment, said):
    path = write("MSRVTT_data.json", MSRVTT)
    with pytest.raises(SourceError, match=rf"{said}.*#train \(1 videos\), #test \(2 videos\), #validate"):
        open_source(f"{path}{fragment}", images=str(video_files("video0.mp4")))


def test_msrvtt_with_videos_missing_and_rows_broken(write, video_files):
    videos = [video(1, "train"), video(2, "train"), "no object", video(3, None), video(4, "train"), video(1, "train")]
    videos[4]["video_id"] = 4
    videos.append({"split": "train"})
    path = write("a.json", {"videos": videos, "sentences": ["broken", {"video_id": [3]}, sentence(1, "one")]})
    folder = video_files("video1.mp4", "video2.txt", "video3.mp4")
    samples, rejects = read_all(f"{path}#train", folder)
    assert [(s.key, s.captions) for s in samples] == [("video1", ("one",))]
    reasons = {r.key: r.reason for r in rejects}
    assert list(reasons) == ["videos[1]", "videos[2]", "videos[3]", "videos[4]", "video1", "videos[6]"]
    assert f"no video video2 (avi, m4v, mkv, mov, mp4, webm) in {folder} or below" in reasons["videos[1]"]
    assert "expected an object" in reasons["videos[2]"]
    assert "split" in reasons["videos[3]"]
    source = open_source(f"{path}#train", images=str(folder))
    assert source.describe() == {
        "format": "MSRVTT captions",
        "splits in the file": {"train": 5},
        "missing": "1 of 3 videos, as video2",
    }


def test_of_two_videos_of_one_name_the_outer_one_counts(write, video_files):
    folder = video_files("a/b/video1.mp4", "b/video1.mp4", "c/video1.mp4")
    (sample,) = read_samples(write("a.json", {"videos": [video(1, "test")]}), folder)
    assert sample.image == b"b/video1.mp4"
    assert sample.captions == ()  # there are no sentences


def test_the_test_list_of_msrvtt(write, video_files):
    rows = [
        "key,vid_key,video_id,sentence",
        "ret0,msr9770,video9770,a person is connecting something to system",
        'ret1,msr9771,video9771,"a little girl, who does gymnastics"',
        "ret2,msr1",
        "ret3,msr9772,video9772,gone",
        "ret4,msr9770,video9770,someone plugs it in",
        "ret5,msr1,,x",
    ]
    path = write("MSRVTT_JSFUSION_test.csv", "\n".join(rows))
    samples, rejects = read_all(path, video_files("all/video9770.mp4", "all/video9771.mp4"))
    assert [s.key for s in samples] == ["video9770", "video9771"]
    assert [s.image_id for s in samples] == [f"{path}#{s.key}" for s in samples]
    assert samples[0].captions == ("a person is connecting something to system", "someone plugs it in")
    assert samples[1].captions == ("a little girl, who does gymnastics",)
    assert samples[1].image == b"all/video9771.mp4"
    assert [r.key for r in rejects] == ["video9772", "line 4", "line 7"]
    assert "no video video9772" in rejects[0].reason
    assert rejects[1].reason == "line 4: 2 values for 4 columns"
    assert "video_id" in rejects[2].reason
    described = describe(path, video_files())
    assert described == {"format": "list of captioned videos", "missing": "1 of 3 videos, as video9772"}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_the_test_list_as_blips_authors_distribute_it(write, video_files, suffix):
    rows = [{"clip_name": "video9770", "caption": "a person"}, {"clip_name": "video1", "caption": "a girl"}]
    text = "\n".join(map(json.dumps, rows)) + "\n{broken" if suffix == "jsonl" else rows
    samples, rejects = read_all(write(f"msrvtt_test.{suffix}", text), video_files("video9770.mp4", "video1.avi"))
    assert [(s.key, s.captions) for s in samples] == [("video9770", ("a person",)), ("video1", ("a girl",))]
    assert [r.key for r in rejects] == (["line 3"] if suffix == "jsonl" else [])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_that_names_files_stays_a_table(write, video_files, name):
    video_files("a.mp4")
    row = {"video": "videos/a.mp4", "video_id": "7", "caption": "x"}
    text = "{broken\n" + json.dumps(row) if name == "t.jsonl" else f"{','.join(row)}\n{','.join(row.values())}"
    samples, rejects = read_all(write(name, text))
    assert [s.image for s in samples] == [b"a.mp4"]
    assert [r.key for r in rejects] == (["000000001"] if name == "t.jsonl" else [])


def test_msrvtt_questions(write, video_files):
    def row(number, answer, question="who?", video_id=6513):
        return {"answer": answer, "category_id": 14, "id": number, "question": question, "video_id": video_id}

    rows = [row(158581, "couch", "what is it?"), row(158582, "three", "how many?"), row(158583, "x", video_id=99)]
    rows += [row(158584, "x", " "), row(158585, 3), row(158586, None), ["broken"]]
    del rows[5]["answer"]
    path = write("test_qa.json", rows)
    # What another data set calls its videos is no video of this one.
    samples, rejects = read_all(path, video_files("video6513.mp4", "vid99.mp4"))
    assert [s.key for s in samples] == ["158581", "158582", "158586"]
    assert [s.info["answers"] for s in samples] == [["couch"], ["three"], []]
    assert samples[0].captions == ()
    assert samples[0].image_id == samples[1].image_id == f"{path}#video6513"
    assert dict(samples[0].info) == {
        "question": "what is it?",
        "answers": ["couch"],
        "question_id": 158581,
        "image_id": "video6513",
        "video_id": 6513,
        "category_id": 14,
    }
    reasons = [r.reason for r in rejects]
    assert [reason.split(":")[0] for reason in reasons] == ["[2]", "[3]", "[4]", "[6]"]
    assert "no video video99 (" in reasons[0]
    assert "question" in reasons[1]
    assert "answer" in reasons[2]
    assert describe(path, video_files()) == {"format": "MSRVTT-QA questions"}


MSVD = [{"answer": "animal", "id": i, "question": "what chews?", "video_id": i + 1} for i in range(3)]


def test_msvd_questions(write, video_files):
    write("youtube_mapping.txt", "\ufeffmv89psg6zh4_33_46 vid1\n\n-4wsuPCjDBc_5_15  vid2 \r\n")
    path = write("val_qa.json", MSVD)
    names = ["YouTubeClips/mv89psg6zh4_33_46.avi", "-4wsuPCjDBc_5_15.avi", "vid3.mp4"]
    folder = video_files(*names, "vid1.mp4", "video1.mp4")
    samples = read_samples(path, folder)
    assert [s.image.decode() for s in samples] == names
    assert [s.info["image_id"] for s in samples] == ["vid1", "vid2", "vid3"]
    source = open_source(str(path), images=str(folder))
    assert source.describe()["format"] == "MSVD-QA questions"
    assert source.describe()["youtube_mapping.txt"] == str(path.parent / "youtube_mapping.txt")


def test_msvd_questions_without_the_names_of_youtube(write, video_files):
    path = write("val_qa.json", MSVD)
    samples, rejects = read_all(path, video_files("vid1.avi", "video2.mp4"))
    assert [s.image for s in samples] == [b"vid1.avi"]
    assert "no video vid2 (" in rejects[0].reason
    assert "youtube_mapping.txt, without which" in describe(path, video_files())["missing"]
    write("youtube_mapping.txt", "abc_1_2 vid2")
    assert "no video abc_1_2 or vid2 (" in read_all(path, video_files())[1][0].reason


@pytest.mark.parametrize("line", ["vid1", "abc 1", "abc"])
def test_a_broken_mapping_names_its_line(write, video_files, line):
    write("youtube_mapping.txt", f"abc vid1\n{line}\n")
    with pytest.raises(SourceError, match=r"youtube_mapping\.txt line 2"):
        open_source(str(write("val_qa.json", MSVD)), images=str(video_files("vid1.mp4")))


def test_questions_about_videos_by_name(write, video_files):
    rows = [{"answer": "x", "question": "who?", "video_id": name} for name in ("video7", "7")]
    samples, _ = read_all(write("val_qa.json", rows), video_files("video7.mkv", "vid7.mp4"))
    found = [(s.key, s.info["question_id"], s.image) for s in samples]
    assert found == [("0", 0, b"video7.mkv"), ("1", 1, b"vid7.mp4")]


def test_videos_from_a_url(write, video_files):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/msrvtt/all/video1.mp4", b"video")
    path = write("a.json", {"videos": [video(1, "test")], "sentences": [sentence(1, "x")]})
    samples, _ = read_all(path, "memory://msrvtt")
    assert [s.image for s in samples] == [b"video"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", MSRVTT | {"videos": [video(1, "test")]}),
        ("a.json", MSVD),
        ("a.csv", "video_id,sentence\nvideo1,x\n"),
        ("a.jsonl", '{"clip_name": "video1", "caption": "x"}'),
    ],
)
def test_a_folder_is_needed_and_must_hold_videos(tmp_path, write, name, content):
    path = str(write(name, content))
    with pytest.raises(SourceError, match="--images DIR"):
        open_source(path)
    with pytest.raises(SourceError, match="no such folder"):
        open_source(path, images=str(tmp_path / "none"))
    with pytest.raises(SourceError, match=r"no video .*mp4.* in this folder or below"):
        open_source(path, images=str(tmp_path))
