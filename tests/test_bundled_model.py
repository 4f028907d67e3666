"""The bundled story model: what its files promise, and that the command that made it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from minillm.lab import train

FOLDER = train.REPOSITORY / "minillm/assets/story-6m"
CORPUS = train.REPOSITORY / "notebooks/data/fairy_tales.txt.xz"
RESULTS = train.REPOSITORY / "notebooks/results/training_story-6m.json"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def test_all_files_together_take_at_most_14_mb() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 14_000_000


def test_it_is_a_plain_qwen3_of_about_6m_parameters(model: Qwen3ForCausalLM) -> None:
    config = model.config
    assert type(model) is Qwen3ForCausalLM
    assert 5_000_000 <= model.num_parameters() <= 7_000_000
    assert config.head_dim == 64
    assert config.max_position_embeddings == 1024
    assert config.tie_word_embeddings
    assert not config.attention_bias
    assert config.rope_parameters["rope_type"] == "default"
    assert config.eos_token_id == train.END_ID
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.generation_config.temperature == 0.8
    assert model.generation_config.top_p == 0.95


def test_tokenizer_adds_nothing_and_knows_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == train.END
    assert tokenizer.eos_token_id == train.END_ID
    assert tokenizer.chat_template is None
    plain = tokenizer("Once upon a time").input_ids
    assert train.END_ID not in plain
    assert plain == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode("Once upon a time").ids
    assert tokenizer("The king." + train.END).input_ids[-1] == train.END_ID


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
@example(text="A wolf 🐺, a naïve fée; 森の中で\r\n\tdon't   stop \x00\x7f")
def test_every_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert all(0 <= i < 4096 for i in ids)
    assert tokenizer.decode(ids) == text


def test_held_out_stories_are_told_apart() -> None:
    training, held_out = train.split_stories(train.read_stories(CORPUS))
    assert (len(training), len(held_out)) == (718, 37)
    assert not set(training) & set(held_out)


def test_paragraphs_join_to_the_story_token_by_token() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    stories = train.read_stories(CORPUS)[:20]
    for story, paragraphs in zip(stories, train.encode_paragraphs(tokenizer, stories), strict=True):
        assert [token for paragraph in paragraphs for token in paragraph] == tokenizer.encode(story).ids


@pytest.mark.parametrize(
    ("paragraphs", "budget", "told"),
    [
        ([[1, 2], [3]], 3, [1, 2, 3]),
        ([[1, 2], [3, 4], [5, 6]], 4, [1, 2, 5, 6]),
        ([[1], [2], [3], [4], [5]], 4, [1, 2, 4, 5]),
        ([[1, 2, 3], [4]], 3, None),
        ([[1], [2, 3, 4]], 3, None),
    ],
)
def test_a_long_story_is_shortened_to_its_beginning_and_end(
    paragraphs: list[list[int]], budget: int, told: list[int] | None
) -> None:
    assert train.shorten(paragraphs, budget, share=0.5) == told


def test_held_out_loss_counts_every_token_once(model: Qwen3ForCausalLM) -> None:
    """Against the sum over one window, for a story that fits in one, whatever the stride."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    story = "Once upon a time there was a king who had three sons."
    ids = torch.tensor([[train.END_ID, *tokenizer.encode(story).ids, train.END_ID]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert train.held_out_loss(model, tokenizer, [story], 512)["nats_per_token"] == pytest.approx(expected, rel=1e-4)


def test_held_out_loss_is_what_the_model_card_says(model: Qwen3ForCausalLM) -> None:
    """Three short held-out stories, 15,296 characters: 0.890 when the model was made.

    The bound leaves 0.01 for kernels that round differently; a wrong weight or token costs far more than that.
    """
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    _, held_out = train.split_stories(train.read_stories(CORPUS))
    short = [story for story in held_out if len(story) < 6000][:3]
    assert sum(map(len, short)) == 15_296
    assert train.held_out_loss(model, tokenizer, short, stride=512)["nats_per_character"] <= 0.90


def test_recorded_results_are_of_the_settings_in_the_code() -> None:
    record = json.loads(RESULTS.read_text())
    assert record["settings"] == train.asdict(train.Settings())
    assert record["final"]["sliding"]["nats_per_character"] <= 0.90
    assert record["final"]["non_overlapping"]["nats_per_character"] <= 0.90
    assert record["final"]["told_and_ended"] >= record["final"]["told"] / 2
    assert [point["step"] for point in record["curve"]][-1] == record["settings"]["steps"]
    assert all(sample["text"].startswith(train.PROMPT) for sample in record["samples"])


def test_quick_training_runs_from_end_to_end(tmp_path: Path) -> None:
    results = tmp_path / "history.json"
    command = [
        sys.executable,
        "-m",
        "minillm.lab.train",
        "--quick",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "model"),
    ]
    subprocess.run([*command, "--results", str(results)], cwd=train.REPOSITORY, check=True, capture_output=True)
    record = json.loads(results.read_text())
    losses = [point["held_out_nats_per_character"] for point in record["curve"]]
    assert losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() == record["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == train.END_ID


def test_quick_training_refuses_to_replace_the_bundled_model() -> None:
    with pytest.raises(SystemExit):
        train.main(["--quick"])
