"""PairRM: which text goes where, what is cut off, and that neither place is favoured. Random weights."""

import logging
import math
import sys

import pytest
import tiny
import torch
from transformers import DebertaV2Config

from trl_larpo import ConfigError
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.functions import Reward, mean_preferences, score_pools
from trl_larpo.rewards.pairrm import FIRST, SECOND, SOURCE, PairRM, PairRMModel, source_text
from trl_larpo.rewards.reward_models import load_tokenizer
from trl_larpo.run.small import save_small_pairrm


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_small_pairrm(tmp_path_factory.mktemp("pairrm"))


@pytest.fixture
def ranker(path):
    return PairRM(path, batch_size=3, device="cpu")


COMPLETIONS = ["because it is", "no", "the cat runs and runs and runs"]


def test_a_comparison_reads_prompt_first_second_each_with_its_ends(ranker):
    text = ranker.tokenizer.decode(ranker.encode("why", ["yes", "no"])[0, 1])
    assert text == f"[CLS]{SOURCE}why[SEP][CLS]{FIRST}yes[SEP][CLS]{SECOND}no[SEP]"


def test_the_score_is_that_of_the_published_formula(ranker):
    """The head over (source, candidate) for both candidates, of a batch of one without padding, written out."""
    model, ids = ranker.model, torch.tensor([ranker.encode("why", ["yes", "no no no"])[0, 1]])
    with torch.no_grad():
        hidden = model.pretrained_model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        at = {m: ids[0].tolist().index(ranker.tokenizer.convert_tokens_to_ids(m)) for m in (SOURCE, FIRST, SECOND)}
        dense, out = model.head_layer[1], model.head_layer[4]

        def head(marker):
            return out(torch.tanh(dense(torch.cat([hidden[at[SOURCE]], hidden[at[marker]]]))))

        expected = (head(FIRST) - head(SECOND)).item()
    assert abs(expected) > 1e-3
    assert ranker._compare([ids[0].tolist()])[0] == pytest.approx(expected, abs=1e-5)
    longer = ranker.encode("why is the dog so blue", ["yes", "no"])[0, 1]
    assert ranker._compare([ids[0].tolist(), longer])[0] == pytest.approx(expected, abs=1e-5), "padding"


def test_preferences_do_not_depend_on_the_place(ranker):
    matrix = torch.tensor(ranker("why is the dog blue", COMPLETIONS))
    torch.testing.assert_close(matrix, -matrix.T)
    logit = [
        ranker._compare([ranker.encode("why is the dog blue", pair)[0, 1]])[0] for pair in (("no", "x"), ("x", "no"))
    ]
    assert abs(logit[0] + logit[1]) > 1e-4, "one order alone does favour a place, or this test shows nothing"
    order = [2, 0, 1]
    moved = torch.tensor(ranker("why is the dog blue", [COMPLETIONS[i] for i in order]))
    torch.testing.assert_close(moved, matrix[order][:, order], rtol=0, atol=1e-5)


def test_rewards_are_mean_logits(path):
    """LLM-Blender's "max_logits": logits[i, j] of i before j, less logits[j, i], averaged over j."""
    ranker = PairRM(path, device="cpu")
    pool = CandidatePool(Prompt.of("why"), [Candidate(text) for text in COMPLETIONS])
    [scored] = score_pools([Reward("pairrm", ranker, pairwise=True)], [pool])
    encoded = ranker.encode("why", COMPLETIONS)
    logits = {pair: ranker._compare([ids])[0] for pair, ids in encoded.items()}
    expected = [sum(logits[i, j] - logits[j, i] for j in range(3) if j != i) / 2 / 2 for i in range(3)]
    assert [c.reward for c in scored.candidates] == pytest.approx(expected, abs=1e-5)


def test_mean_logits_rank_otherwise_than_mean_probabilities():
    """Better than all by a little, or than one by a lot: by probability the first leads, by logit the second."""
    logits = [[0.0, 0.5, 0.5], [-0.5, 0.0, 1.7], [-0.5, -1.7, 0.0]]
    probabilities = [[1 / (1 + math.exp(-x)) for x in line] for line in logits]
    by_logit, by_probability = mean_preferences(logits), mean_preferences(probabilities)
    assert by_logit.index(max(by_logit)) == 1 and by_probability.index(max(by_probability)) == 0


def test_long_texts_lose_their_end_and_what_the_prompt_leaves_is_shared(path, caplog):
    ranker = PairRM(path, device="cpu", max_length=60)  # of it 35 for the prompt
    with caplog.at_level(logging.WARNING, logger="trl_larpo.rewards.pairrm"):
        ids = ranker.encode("p" * 100, ["f" * 100, "s" * 100])[0, 1]
    assert caplog.text.count("Said once.") == 1
    text = ranker.tokenizer.decode(ids)
    source, rest = 1224 * 60 // 2048, (60 - 1224 * 60 // 2048) // 2
    expected = [(SOURCE, "p", source), (FIRST, "f", rest), (SECOND, "s", rest)]
    assert text == "".join(f"[CLS]{marker}{letter * (size - 3)}[SEP]" for marker, letter, size in expected)
    assert len(ids) <= 60
    short = ranker.tokenizer.decode(ranker.encode("p", ["f" * 100, "s"])[0, 1])
    assert short.count("f") == (60 - 4) // 2 - 3, "a short prompt leaves more to the completions"


def test_a_text_cannot_pass_for_a_marker(ranker):
    ids = ranker.encode(f"a {SECOND}", [f"b {SOURCE}{FIRST}", "c"])[0, 1]
    for marker in (SOURCE, FIRST, SECOND):
        assert ids.count(ranker.tokenizer.convert_tokens_to_ids(marker)) == 1


def test_conversations():
    assert source_text([{"role": "user", "content": "hi"}]) == "hi"
    assert source_text([{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]) == "hi"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert source_text(messages) == "USER: hi\nASSISTANT: yo"


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be loaded|no trained reward model"):
        PairRM(tiny.save_tiny_model(tmp_path), device="cpu")


def test_a_missing_package_of_its_tokenizer_is_named(tmp_path, monkeypatch):
    """The published folder has the tokenizer of DeBERTa-v3, `spm.model`; transformers alone calls it damaged."""
    path = save_small_pairrm(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spm.model").write_bytes(b"\n\x0e\n\x05[PAD]\x15\x00\x00\x00\x00\x18\x03")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        load_tokenizer(path)


def test_names_of_the_weights_are_those_of_the_published_code():
    """DeBERTa-v3-large with three further tokens, without weights: names and shapes, and 436 million of them."""
    with torch.device("meta"):
        config = DebertaV2Config(
            vocab_size=128004, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            type_vocab_size=0, position_buckets=256, relative_attention=True, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            n_tasks=1, drop_out=0.05, source_prefix_id=128001, cand1_prefix_id=128002, cand2_prefix_id=128003,
        )  # fmt: skip
        model = PairRMModel(config)
    weights = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert weights["head_layer.1.weight"] == (1024, 2048) and weights["head_layer.4.weight"] == (1, 1024)
    assert weights["pretrained_model.embeddings.word_embeddings.weight"] == (128004, 1024)
    assert weights["pretrained_model.encoder.layer.23.attention.self.query_proj.weight"] == (1024, 1024)
    assert weights["pretrained_model.encoder.rel_embeddings.weight"] == (512, 1024)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == 436
