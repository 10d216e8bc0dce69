"""Why the Hugging Face hub gave nothing: what its client and transformers raise, in words."""

import pickle
import re

import pytest
from huggingface_hub import errors as hub
from huggingface_hub.utils import httpx

from openblip.cli.main import main
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError, ImageError, hub_problem, page_command

_RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
_NO_NETWORK = hub.LocalEntryNotFoundError("nothing in the cache")
_NO_NETWORK.__cause__ = httpx.ConnectError("name or service not known")


def as_transformers(error: Exception) -> Exception:
    """It raises an OSError from the hub's error."""
    outer = OSError("we looked everywhere")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("wrap", [lambda error: error, as_transformers])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_NO_NETWORK, "could not be asked .*not known.* cache does not have"),
        (httpx.ConnectError("refused"), "could not be asked .*refused"),
        (hub.HfHubHTTPError("500 server error", response=_RESPONSE), "could not be asked .*500"),
        (hub.RepositoryNotFoundError("404", response=_RESPONSE), "has none of that name, or a private one"),
        (hub.GatedRepoError("403", response=_RESPONSE), "accepted its terms"),
        (hub.RemoteEntryNotFoundError("404", response=_RESPONSE), None),
        (OSError("disk"), None),
    ],
)
def test_the_hub_is_not_blamed_for_the_network(error, words, wrap, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    problem = hub_problem(wrap(error))
    assert problem is None if words is None else re.search(words, problem)


def test_offline_mode_is_told_apart(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "was not asked, since offline mode is on" in str(hub_problem(_NO_NETWORK))


def test_a_tokenizer_by_name(monkeypatch):
    def fails(*_):
        raise _NO_NETWORK

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(CheckpointError, match="someone/somewhat is no folder, and the Hugging Face hub could not"):
        Tokenizer.load("someone/somewhat")


def test_an_error_says_where_it_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    error = pickle.loads(pickle.dumps(ConfigError("no", page="data.md#sources")))
    assert error.page == "data.md#sources"
    assert page_command(error.page) == "openblip docs data#sources"
    assert ImageError("no").__notes__ == ["See `openblip docs errors#images-and-videos-that-cannot-be-read`"]
    assert not hasattr(ConfigError("no"), "__notes__")  # what was being done is not known
    assert main(["caption", "a.png"]) == 2  # without --model: the command's own guide
    assert capsys.readouterr().err.endswith("(see `openblip docs caption`)\n")
