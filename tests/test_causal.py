"""A decoder-only language model as the reader, against transformers' own, which it must equal."""

import json
import logging
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import atlas
import export_huggingface
from atlas import config, preflight
from atlas.checkpoint import load_checkpoint
from atlas.command_line import parse_config
from atlas.model.adapters import merge_saved
from atlas.model.causal import CausalReader
from atlas.model.inputs import Inputs
from atlas.model.interface import Reader
from atlas.model.pretrained import CAUSAL_TYPES
from atlas.model.prompts import PromptInputs, check_of_questions
from atlas.model.reader import FusionInDecoder, load_reader
from atlas.model.signals import PROMPT_MODES, mode_of, reading_of, token_log_likelihoods
from atlas.model.tokenization import PromptTokenizer, load_reader_tokenizer
from tests.kit import command_line, language_model, logged, read_jsonl, run, run_on, slow, world, write_jsonl
from tests.test_parallel import KINDS as PARALLEL
from tests.test_parallel import assert_same_run

CPU = torch.device("cpu")
KINDS = ("plain", "chat", "spaces")
PASSAGES = [
    {"title": "Kobari", "text": "The river of Kobari is Selnu."},
    {"title": "", "text": "Tamvor is a town with a trade."},
    {"title": "Lingra", "text": "The founder of Lingra is Pelzor. " * 9},
]
EVIDENCE = {"write_results": True, "write_evidence": True}
QUESTION_MODE = {"train_retriever": True, "gold_score_mode": "question"}
QUESTION = "question: what is the river of Kobari? answer: <extra_id_0>"


def inputs_of(kind, **flags):
    flags = {"n_context": 3, "text_maxlength": 24, "generation_max_length": 8} | flags
    reader_flag = {"reader_model_type": str(language_model(kind))}
    return PromptInputs(
        config.Model(**reader_flag, **flags), load_reader_tokenizer(str(language_model(kind))), None, device=CPU
    )


def theirs(kind):
    directory = str(language_model(kind))
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def row(rows, b=0, k=0):
    return rows.ids[b, k][rows.mask[b, k]].tolist()


def hidden_of(reader, rows):
    return reader.encode(rows.ids, rows.mask), rows.mask.flatten(1)


def test_both_readers_keep_the_interface():
    readers = {
        name: load_reader(str(path), dropout=None)
        for name, path in (("t5", world() / "models/reader"), ("llama", language_model()))
    }
    assert all(isinstance(reader, Reader) for reader in readers.values())
    assert isinstance(readers["t5"], FusionInDecoder) and (readers["t5"].fuses, readers["llama"].fuses) == (True, False)
    assert (readers["t5"].inputs, readers["llama"].inputs) == (Inputs, PromptInputs)
    assert type(readers["llama"]).__name__ == "LlamaForCausalLM"


# ---- text to tokens


def test_the_prompt_is_what_their_tokenizer_makes_of_the_text():
    text = "Kobari\nThe river of Kobari is Selnu.\n\nTamvor is a town with a trade.\n\nQuestion: {}\nAnswer:"
    text = text.format("what is the river of Kobari?")
    for kind in KINDS:
        tokenizer = theirs(kind)[1]
        ids = row(inputs_of(kind).reader([QUESTION], [PASSAGES[:2]]))
        said = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] if kind == "chat" else None
        assert ids == (chat or tokenizer(text)["input_ids"]), kind
        assert (
            row(inputs_of(kind, chat_template=False).reader([QUESTION], [PASSAGES[:2]])) == tokenizer(text)["input_ids"]
        )
    assert row(inputs_of("spaces").reader(["a"], None))[0] == theirs("spaces")[1].bos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_passages_are_cut_one_by_one_and_the_question_never(kind):
    make, tokenizer = inputs_of(kind), theirs(kind)[1]
    question = "what is the river of Kobari and of Tamvor and of Lingra " * 9
    (text,) = make.reader_tokenizer.decode([row(make.reader([question], [PASSAGES]))])
    assert "The river of Kobari is Selnu." in text and " ".join(question.split()) in " ".join(text.split())
    last = text.split("trade.")[1].split("Question")[0].strip()
    n = len(tokenizer(last, add_special_tokens=False)["input_ids"])
    assert (
        20 <= n <= 24
        and "Lingra\n" + PASSAGES[2]["text"] != last
        and ("Lingra\n" + PASSAGES[2]["text"]).startswith(last)
    )


def test_what_is_said_to_t5_alone_is_left_out():
    make = inputs_of("plain", passage_format=r"- {text}", reader_prompt_format=r"{query}\n{passages}\n=")
    queries = ["question: a <extra_id_0> b? answer: <extra_id_0>", "The <extra_id_0> of Kobari. <extra_id_0>", "plain"]
    rows = make.reader(queries, [PASSAGES[:1], [], PASSAGES[:2]])
    decoded = make.reader_tokenizer.decode([row(rows, b) for b in range(3)])
    assert decoded == [
        "a ___ b?\n- The river of Kobari is Selnu.\n=",
        "The ___ of Kobari.\n\n=",
        "plain\n- The river of Kobari is Selnu.\n\n- Tamvor is a town with a trade.\n=",
    ]
    assert rows.lengths.tolist() == rows.mask.sum(-1).tolist()


def test_prompts_fit_into_the_positions_or_say_what_is_too_long(caplog):
    make = inputs_of("plain", text_maxlength=200)
    make.reader_positions = 120
    rows = make.reader(["what?"] * 2, [[PASSAGES[2]] * 3, [PASSAGES[2]] * 3])
    assert 60 < rows.lengths.max() <= 112 and caplog.text.count("does not fit into the 120 positions") == 1
    with pytest.raises(ValueError, match="the 120 positions of the reader are too few for --n_context 1, the "):
        make.reader(["what is this " * 90], [PASSAGES[:1]])


@pytest.mark.parametrize("n", [20, 130])
def test_a_question_that_cannot_be_read_is_found_before_the_run(tmp_path, n, capsys):
    rows = read_jsonl(world() / "train.jsonl")
    write_jsonl(tmp_path / "train.jsonl", rows[:3] + [rows[3] | {"question": "what is this " * n}] + rows[4:])
    flags = read_with(eval_data=None, train_data=[tmp_path / "train.jsonl"], total_steps=1, generation_max_length=64)
    if n == 20:
        run(tmp_path, **flags)
        return
    with pytest.raises(SystemExit):
        run(tmp_path, **flags)
    said = capsys.readouterr().err
    assert re.search(r"train.jsonl, line 4: the 512 positions .* the question 'what is this ", said), said
    directory = run(tmp_path, name="skipping", **flags, bad_lines="skip")
    assert len(read_jsonl(directory / "bad_lines.train_data.jsonl")) == 1


def test_a_chat_is_the_same_every_day_and_does_not_think():
    loaded = theirs("chat")[1]
    loaded.chat_template = (
        "{{ strftime_now('%d %B %Y') }}{% if enable_thinking is not defined or enable_thinking %} think{% endif %}"
        "{% for message in messages %} {{ message.content }}{% endfor %}"
    )
    assert PromptTokenizer(loaded).chat("hello") == "26 Jul 2024 hello"
    loaded.chat_template = {"default": "{% for message in messages %}{{ message.content }}!{% endfor %}", "other": ""}
    assert PromptTokenizer(loaded).chat("hello") == "hello!"


INST = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"
)
THINKS = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}<think>\n\n</think>"
    "\n\n{% endif %}{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(("kind", "template"), [("spaces", INST), ("chat", THINKS), ("chat", None)])
def test_an_answer_is_tokenized_as_its_chat_template_has_it(kind, template):
    loaded, make = theirs(kind)[1], inputs_of(kind)
    loaded.chat_template = template or loaded.chat_template
    make.reader_tokenizer = PromptTokenizer(loaded)
    answers = ["Selnu", "Pelzor Kobari", "river"]
    for answer, tokens in zip(answers, make.target_tokens(answers), strict=True):
        said = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": answer}]
        whole = loaded.apply_chat_template(said, enable_thinking=False)["input_ids"]
        assert any(whole[i : i + len(tokens)] == tokens for i in range(len(whole))), answer
        assert make.reader_tokenizer.decode([tokens]) == [answer] and tokens[-1] == loaded.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_cannot_act_as_special_tokens(kind):
    make, loaded = inputs_of(kind, decoder_format="{target}" + theirs(kind)[1].eos_token), theirs(kind)[1]
    text = "see " + " ".join(loaded.all_special_tokens) + " assistant"
    special = set(loaded.all_special_ids) - {loaded.unk_token_id}
    usual, crafted = (
        [token for token in row(make.reader([f"who {one}?"], [[{"title": one, "text": one}]])) if token in special]
        for one in ("it", text)
    )
    assert crafted == usual
    (tokens,) = make.target_tokens([f"it {loaded.eos_token} is"])
    assert [token for token in tokens if token in special] == [loaded.eos_token_id] == tokens[-1:]
    assert make.target_tokens(["Selnu"]) == inputs_of(kind).target_tokens(["Selnu"])


def test_a_pad_token_without_an_embedding_is_not_used():
    loaded = theirs("plain")[1]
    loaded.add_special_tokens({"pad_token": "[PAD]"})
    assert PromptTokenizer(loaded, embeddings=len(loaded)).pad_id == loaded.pad_token_id == len(loaded) - 1
    assert PromptTokenizer(loaded, embeddings=len(loaded) - 1).pad_id == loaded.eos_token_id


def test_a_long_target_takes_its_room_from_the_passages():
    make = inputs_of("plain", text_maxlength=200)
    make.reader_positions = 160
    (answer,) = make.target_tokens(["The founder of Lingra is Pelzor. " * 5])
    long = make.training(["what?"], [[PASSAGES[2]] * 3], [answer])
    assert (
        long.lengths.max() + len(answer)
        <= 160
        < make.reader(["what?"], [[PASSAGES[2]] * 3]).lengths.max() + len(answer)
    )
    judged = make.judging(["what?"], [[PASSAGES[2]]], [answer], "ppmean")
    assert judged.rows.lengths.max() + len(answer) <= 160


def test_what_is_too_long_in_training_alone_is_found_before_it():
    settings = replace(inputs_of("plain").settings, n_context=2, retriever_n_context=40)
    tokenizer = load_reader_tokenizer(str(language_model()))
    question, answer = "what is this " * 66, ["Selnu"]
    check = partial(check_of_questions, settings, tokenizer)
    loop, unjudged = (
        config.RetrieverTraining(gold_score_mode="loop", train_retriever=trains) for trains in (True, False)
    )
    by_questions = replace(learning("question"), freeze_reader=True)
    check(unjudged)(question, answer)
    with pytest.raises(
        ValueError, match=r"for --retriever_n_context 40 \(--gold_score_mode loop leaves out one\), .* lower --ret"
    ):
        check(loop)(question, answer)
    for without_answers in (None, by_questions):
        check(without_answers)("what?", ["it is " * 400])
    prompts_alone = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    )
    loaded = theirs("chat")[1]
    loaded.chat_template = prompts_alone + "{% endfor %}!"
    assert PromptTokenizer(loaded).before_answer == ("!", "")
    with pytest.raises(
        ValueError, match="and an answer of 1601.*lower --n_context, --generation_max_length or --target_max"
    ):
        check(unjudged)("what?", ["it is " * 400])


def test_answers_are_tokenized_apart_as_they_stand_behind_the_prompt():
    for kind in KINDS:
        make, tokenizer = inputs_of(kind), theirs(kind)[1]
        targets = make.targets(["", ""], ["<extra_id_0> Selnu", "Pelzor Kobari"])
        behind = "assistant\n{}" if kind == "chat" else "Answer: {}"
        for answer, labels in zip(["Selnu", "Pelzor Kobari"], targets.labels, strict=True):
            whole = tokenizer(behind.format(answer), add_special_tokens=False)["input_ids"]
            tokens = labels[labels != -100].tolist()
            assert tokens[-1] == tokenizer.eos_token_id
            assert tokens[:-1] == whole[-len(tokens) + 1 :], kind
            assert make.reader_tokenizer.decode([tokens]) == [answer]
        assert (targets.decoder_ids[:, 1:] == targets.labels[:, :-1])[targets.labels[:, :-1] != -100].all()
    short = inputs_of("plain", target_maxlength=2).targets([""], ["Pelzor Kobari Lingra"])
    assert short.labels.shape == (1, 2)


def test_tokenizers_without_a_pad_token_pad_with_the_end_of_text():
    pads = {kind: load_reader_tokenizer(str(language_model(kind))) for kind in KINDS}
    assert [pads[kind].pad_id == pads[kind].eos_id for kind in KINDS] == [True, False, True]
    assert [len(pads[kind].start) for kind in KINDS] == [0, 0, 1]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "no end-of-text token (eos_token)",
        ),
        ("tokenizer.json", b"{", "cannot load a language model's tokenizer (tokenizer.json)"),
        ("tokenizer.json", None, "cannot load a language model's tokenizer (tokenizer.json)"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path, file, content, said):
    directory = shutil.copytree(language_model(), tmp_path / "model")
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_bytes(content)
    for load in (load_reader_tokenizer, lambda name: load_reader(name, dropout=None)):
        with pytest.raises(OSError, match=re.escape(f"--reader_model_type {directory}: ")) as error:
            load(str(directory))
        assert said in str(error.value) and "\n" not in str(error.value)


# ---- logits and losses


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_their_logits(kind):
    reader, make = load_reader(str(language_model(kind)), dropout=None), inputs_of(kind)
    rows, targets = make.reader([QUESTION], [PASSAGES]), make.targets([""], ["<extra_id_0> Selnu"])
    answer = targets.labels[0].tolist()
    ids = torch.tensor([row(rows) + answer])
    with torch.no_grad():
        ours = reader.logits(*hidden_of(reader, rows), targets.decoder_ids)
        model, n = theirs(kind)[0], len(answer)
        kept, whole = model(ids[:, :-1], logits_to_keep=n).logits, model(ids[:, :-1]).logits
        their_loss = model(ids, labels=torch.tensor([[-100] * len(row(rows)) + answer])).loss
    assert_close(ours, kept, atol=0, rtol=0)
    assert_close(ours, whole[:, -n:], atol=1e-5, rtol=0)  # a product with more rows is summed in another order
    assert_close(F.cross_entropy(ours[0], targets.labels[0]), their_loss, atol=1e-6, rtol=1e-6)


def test_padding_changes_nothing():
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain")
    queries, answers = ["what?", QUESTION, "who is the founder?"], ["Selnu", "Pelzor Kobari Lingra", "a"]
    passages = [PASSAGES[:1], PASSAGES, []]
    rows, targets = make.reader(queries, passages), make.targets(queries, answers)
    with torch.no_grad():
        together = reader.logits(*hidden_of(reader, rows), targets.decoder_ids)
        for i in range(3):
            own, wanted = make.reader(queries[i : i + 1], passages[i : i + 1]), make.targets([""], answers[i : i + 1])
            alone = reader.logits(*hidden_of(reader, own), wanted.decoder_ids)[0]
            assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=0)
        wider = F.pad(rows.ids, (0, 7), value=5), F.pad(rows.mask, (0, 7))
        hidden = reader.encode(*wider), wider[1].flatten(1)
        assert_close(reader.logits(*hidden, targets.decoder_ids), together, atol=1e-5, rtol=0)


def test_a_row_without_any_token_is_finite():
    reader = load_reader(str(language_model()), dropout=None)
    empty = torch.zeros(2, 5, 1, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool)
    assert reader.logits(*empty, torch.tensor([[0, 3, 4]] * 2)).isfinite().all()


@pytest.mark.parametrize("kind", CAUSAL_TYPES)
def test_all_kinds_of_models_read_with_padding_as_without(tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(language_model("chat"), trust_remote_code=False)
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 0}
    own = AutoConfig.for_model(kind, **small, **heads, initializer_range=0.2)
    AutoModelForCausalLM.from_config(own, trust_remote_code=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = load_reader(str(tmp_path), dropout=None)
    assert isinstance(reader, Reader) and len(reader.blocks) == 2
    ids, answer = torch.randint(3, 90, (1, 1, 9)), torch.tensor([[0, 7, 8, 9]])
    padded = torch.cat([ids, torch.zeros(1, 1, 4, dtype=torch.int64)], 2)
    with torch.no_grad():
        alone = reader.logits(reader.encode(ids, ids > 0), ids[0] > 0, answer)
        whole = reader(torch.cat([ids[0], answer[:, 1:]], 1)).logits[:, 8:]
        hidden, mask = reader.encode(padded, padded > 0), padded[0] > 0
        assert_close(reader.logits(hidden, mask, answer), alone, atol=1e-5, rtol=0)
        written = reader.write(hidden, mask, max_length=9)
        with reader.reading_twice(hidden):
            assert_close(reader.logits(hidden, mask, answer), alone, atol=1e-5, rtol=0)
            assert reader.write(hidden, mask, max_length=9) == written
    assert_close(alone, whole, atol=1e-6, rtol=0)


# ---- answers


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_their_generate(kind, beams):
    reader, make, (model, _) = load_reader(str(language_model(kind)), dropout=None), inputs_of(kind), theirs(kind)
    queries = [QUESTION, "what?", "who is it?"]
    rows = make.reader(queries, [PASSAGES, [], PASSAGES[:1]])
    written = reader.write(*hidden_of(reader, rows), max_length=8, num_beams=beams, length_penalty=0.5)
    for i, answer in enumerate(written):
        ids = torch.tensor([row(rows, i)])
        options = {
            "max_new_tokens": 7,
            "num_beams": beams,
            "do_sample": False,
            "pad_token_id": 0,
            "length_penalty": 0.5,
        }
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        end = whole.index(make.reader_tokenizer.eos_id) if make.reader_tokenizer.eos_id in whole else len(whole)
        assert answer == whole[:end]


@pytest.mark.parametrize("flags", [{}, {"num_beams": 2}, {"prompt": [[7], [7, 8], []]}])
def test_prompts_that_are_read_twice_are_computed_once(flags):
    reader, make, computed = load_reader(str(language_model()), dropout=None), inputs_of("plain"), []
    queries = [QUESTION, "what?", "who is it?"]
    rows, targets = make.reader(queries, [PASSAGES, [], PASSAGES[:1]]), make.targets(queries, ["Selnu", "a", "b"])
    hidden, mask = hidden_of(reader, rows)
    count = lambda module, args, named: computed.append(named["input_ids"].shape[1])  # noqa: E731
    reader.register_forward_pre_hook(count, with_kwargs=True)

    def both():
        computed.clear()
        with torch.no_grad():
            logits = reader.logits(hidden, mask, targets.decoder_ids)
        return logits, reader.write(hidden, mask, max_length=9, **flags), sum(computed)

    logits, written, tokens = both()
    for _ in range(2):
        with reader.reading_twice(hidden):
            first = both()
            again = both()  # of more than two uses no two share anything
        assert_close(first[0], logits, atol=1e-6, rtol=0)
        assert first[1] == again[1] == written and again[2] == tokens
        assert first[2] == (tokens if flags else tokens - hidden.shape[1] + 1)
    with reader.reading_twice(hidden.clone()):
        assert both()[2] == tokens  # other prompts


def test_answers_begin_as_they_are_told_and_stay_as_long():
    reader = load_reader(str(language_model()), dropout=None)
    make = inputs_of("plain", decoder_prompt_format="{query}", n_context=1)
    queries = ["Kobari is", "Kobari"]
    rows, begun = make.reader(queries, None), make.prompts(queries)
    assert len(begun[0]) > len(begun[1])
    written = reader.write(*hidden_of(reader, rows), max_length=12, min_length=12, prompt=begun)
    for i in range(2):
        ids = torch.tensor([row(rows, i) + begun[i]])
        n = 12 - 1 - len(begun[i])
        plain = reader.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()
        assert written[i] == plain
    targets = make.targets(queries, ["a", "b"])
    assert targets.decoder_ids[0, 1 : 1 + len(begun[0])].tolist() == begun[0]
    assert (targets.labels[0, : len(begun[0])] == -100).all()


# ---- weights


def test_weights_of_a_checkpoint_are_loaded_by_their_names(tmp_path):
    trained = load_reader(str(language_model()), dropout=None)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    state = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    assert "lm_head.weight" not in state
    again = load_reader(str(language_model()), dropout=None, weights=False)
    again.load_state(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.randint(0, 90, (2, 7))
    assert_close(again(ids).logits, trained(ids).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="missing model.norm.weight; model.embed_tokens.weight is"):
        again.load_state({k: v[:3] if "embed" in k else v for k, v in state.items() if k != "model.norm.weight"})


def test_dropout_is_that_of_attention():
    assert load_reader(str(language_model()), dropout=0.2).has_dropout
    assert not load_reader(str(language_model()), dropout=0.0).has_dropout


# ---- judging


def judged(mode, reader, make, passages, answers):
    queries = ["what is the river of Kobari?", "who?", "what is it?"][: len(passages)]
    return queries, reading_of(reader, make.judging(queries, passages, make.target_tokens(answers), mode), 0.5)


def learning(mode, weight=1.0):
    return config.RetrieverTraining(gold_score_mode=mode, gold_question_weight=weight)


def mean_log_likelihood(reader, make, query, passages, answer):
    """The slow and obvious one: a prompt of its own, read alone."""
    rows, targets = make.reader([query], [passages]), make.targets([query], [answer])
    logits = reader.logits(*hidden_of(reader, rows), targets.decoder_ids)
    return -F.cross_entropy(logits[0], targets.labels[0]).item()


@torch.no_grad()
@pytest.mark.parametrize("mode", sorted(PROMPT_MODES.keys() - {"question"}))
def test_gold_scores_are_likelihoods_of_the_answer_behind_prompts(mode, monkeypatch):
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain", n_context=2)
    passages, answers = [PASSAGES, PASSAGES[:1], []], ["Selnu", "Pelzor Kobari", "a"]
    queries, reading = judged(mode, reader, make, passages, answers)
    assert reading.counts.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    gold = mode_of(learning(mode), reader).signal(reading)
    for name in ("AT_ONCE", "LOGITS"):
        monkeypatch.setattr(f"atlas.model.behind_prompts.{name}", 2)
        assert_close(mode_of(learning(mode), reader).signal(reading), gold, atol=1e-5, rtol=0)
        monkeypatch.undo()
    if mode == "emdr":
        assert gold.shape == (3, 3, reading.targets.labels.shape[1]) and gold.isfinite().all()
        return
    for i, passage in enumerate(PASSAGES):
        others = PASSAGES[:i] + PASSAGES[i + 1 :]
        read, sign = (others, -1) if mode == "loop" else ([passage], 1)
        expected = sign * mean_log_likelihood(reader, make, queries[0], read, answers[0])
        assert gold[0, i].item() == pytest.approx(expected, abs=1e-5)
    alone = 0.0 if mode == "loop" else mean_log_likelihood(reader, make, queries[1], PASSAGES[:1], answers[1])
    assert gold[1, 0].item() == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_emdr_divides_the_logits_by_the_temperature_and_marginalises():
    reader, make = load_reader(str(language_model()), dropout=None), inputs_of("plain")
    _, reading = judged("emdr", reader, make, [PASSAGES[:2]], ["Selnu"])
    mode, labels = mode_of(learning("emdr"), reader), reading.targets.labels[0]
    per_token = torch.stack(
        [
            (reader.logits(reading.hidden[:, k], reading.mask[:, k], reading.targets.decoder_ids)[0] / 0.5)
            .log_softmax(-1)
            .gather(1, labels[:, None])[:, 0]
            for k in range(2)
        ]
    )  # (K, T)
    gold = mode.signal(reading)
    assert_close(gold[0], per_token, atol=1e-5, rtol=0)
    scores = torch.tensor([[0.3, 0.1]])
    expected = -(per_token + (scores[0] / 0.1).log_softmax(-1)[:, None]).logsumexp(0).mean()
    assert_close(mode.loss(scores, gold, reading, 0.1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("begins", [None, "It is"])
@pytest.mark.parametrize("kind", ["plain", "chat", "spaces"])
def test_the_likelihood_of_the_question_behind_each_passage_and_of_the_answer(kind, begins):
    reader, make = load_reader(str(language_model(kind)), dropout=None), inputs_of(kind, decoder_prompt_format=begins)
    queries, answers = ["what is the river of Kobari?", "who?"], ["Selnu", "Pelzor Kobari"]
    found = make.judging(queries, [PASSAGES, PASSAGES[:1]], make.target_tokens(answers), "question")
    gold = {w: mode_of(learning("question", w), reader).signal(reading_of(reader, found, 0.5)) for w in (1.0, 0.0, 0.7)}
    assert make.reader_tokenizer.decode([found.targets.labels[i][found.asked[i]].tolist() for i in (0, 1)]) == queries
    for i, passage in enumerate(PASSAGES):
        prompt = row(make.reader(queries[:1], [[passage]]))
        n = int(found.asked[0].sum())
        tokens = found.targets.labels[0, :n].tolist()
        (start,) = [j for j in range(len(prompt)) if prompt[j : j + n] == tokens]
        logits = theirs(kind)[0](torch.tensor([prompt])).logits[0]
        question = -F.cross_entropy(logits[start - 1 : start - 1 + n], torch.tensor(tokens)).item()
        answer = mean_log_likelihood(reader, make, queries[0], [passage], answers[0])
        for weight, scores in gold.items():
            assert scores[0, i].item() == pytest.approx(weight * question + (1 - weight) * answer, abs=1e-5)
    assert found.rows.mask.any(-1).tolist() == [[True] * 3, [True, False, False]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_what_several_questions_share_is_computed_once_and_equals_what_each_computes(kind, monkeypatch):
    reader, make = load_reader(str(language_model(kind)), dropout=None), inputs_of(kind)
    queries, answers = [f"what is {word}?" for word in ("it", "Kobari", "that", "")], ["Selnu", "Pelzor", "a", "b"]
    passages = [PASSAGES, PASSAGES[::-1], PASSAGES[1:], []]
    found = make.judging(queries, passages, make.target_tokens(answers), "question")
    computed, begin = [], CausalReader.begin

    def counting(self, hidden, mask):
        computed.append(len(hidden))
        return begin(self, hidden, mask)

    monkeypatch.setattr(CausalReader, "begin", counting)
    shared = token_log_likelihoods(reading_of(reader, found, 0.5), 0.7)
    assert sum(computed) == 4  # three passages, and no passage
    monkeypatch.setattr("atlas.model.behind_prompts.SHARED", 99)
    assert_close(token_log_likelihoods(reading_of(reader, found, 0.5), 0.7), shared, atol=1e-5, rtol=0)
    assert sum(computed) == 4


@pytest.mark.parametrize(("kind", "query"), [("plain", "Answer"), ("plain", "Answer:"), ("chat", "assistant")])
def test_a_word_of_the_prompt_s_own_is_not_taken_for_the_question(kind, query):
    make = inputs_of(kind)
    found = make.judging([query], [PASSAGES[:1]], [[]], "question")
    behind = make.reader_tokenizer.decode([row(make.reader([query], [PASSAGES[:1]]))[len(row(found.rows)) :]])[0]
    assert behind.startswith(f"{query}\nAnswer:"), behind


def test_a_prompt_that_changes_the_question_cannot_judge_by_it():
    for template in ("{passages} {query!a}", "{passages}{query}"):  # the last letters of a passage are in its token
        make = inputs_of("plain", reader_prompt_format=template)
        with pytest.raises(ValueError, match="is not in its prompt as it is, so it cannot judge passages"):
            make.judging(["ere is Nzérékoré?"], [[{"title": "", "text": "a wh"}]], [[]], "question")


@pytest.mark.parametrize(
    "template", [r"{passages}\n\n{query}", r"{passages}\n{query}\nAnswer:\n", "{passages} {query}"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_judged_as_it_stands_behind_a_passage(kind, template):
    """Also by tokenizers that see the beginning of a text in another way, and behind a passage without a text."""
    make = inputs_of(kind, reader_prompt_format=template)
    queries = ["Kobari trade?", " what is the river of Kobari? \n", "river"]
    passages = [[PASSAGES[0], {"title": "", "text": ""}], PASSAGES, PASSAGES[1:]]
    found = make.judging(queries, passages, [[]] * 3, "question")
    for i, query in enumerate(queries):
        question = found.targets.labels[i][found.asked[i]].tolist()
        assert make.reader_tokenizer.decode([question]) == [query.strip()]
        for k, passage in enumerate(passages[i]):
            prompt, head = row(make.reader([query], [[passage]])), row(found.rows, i, k)
            assert prompt[: len(head)] == head and prompt[len(head) :][: len(question)] == question


# ---- runs


def read_with(kind="plain", **flags):
    return {"reader_model_type": language_model(kind), "qa_prompt_format": "{question}", "n_context": 2} | flags


def test_it_learns_its_answers_and_is_evaluated_as_it_was_trained(tmp_path):
    flags = read_with(
        "chat", train_retriever=True, query_side_retriever_training=True, use_gradient_checkpoint_reader=True
    )
    directory = run(tmp_path, **flags, total_steps=16, lr=1e-2, train_data=world() / "dev.jsonl", eval_freq=16)
    losses = logged(directory, "loss/reader_loss")
    assert losses[-1] < losses[0] / 2 and all(loss > 0 for loss in logged(directory, "loss/retriever_loss"))
    rows = read_jsonl(directory / "dev-step-16.jsonl")
    again = run(tmp_path, "evaluate", name="again", model_path=directory, **dict.fromkeys(flags), train_data=None)
    assert [row["generation"] for row in read_jsonl(again / "dev-step-0.jsonl")] == [row["generation"] for row in rows]
    assert any(row["generation"] for row in rows)


def test_what_was_saved_resumes_bit_for_bit(tmp_path):
    flags = read_with(train_retriever=True, gold_score_mode="loop", eval_data=None, dropout=0.1, total_steps=4)
    directory = run(tmp_path, **flags, save_freq=2, save_optimizer=True)
    whole = load_file(directory / "checkpoint/step-4/model.safetensors")
    assert not any("lm_head" in name for name in whole)
    shutil.rmtree(directory / "checkpoint/step-4")
    (directory / "checkpoint/latest").unlink()
    (directory / "checkpoint/latest").symlink_to("step-2")
    run(tmp_path, **flags, save_freq=2, save_optimizer=True)
    assert_close(load_file(directory / "checkpoint/step-4/model.safetensors"), whole, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"train_retriever": True, "gold_score_mode": "adist"},
            "--gold_score_mode adist looks at T5's cross-attention",
        ),
        ({"train_retriever": True, "gold_score_mode": "evalnormsum"}, "give one of ppmean, pdist, emdr, loop"),
        ({"compute_crossattention_stats": True}, "--compute_crossattention_stats looks at T5's cross-attention"),
        (
            {"reader_model_type": world() / "models/reader"} | QUESTION_MODE,
            "question needs a decoder-only language model",
        ),
        (
            {"reader_model_type": world() / "models/reader", "rerank_by_reader": 3},
            "--rerank_by_reader 3 needs a decoder",
        ),
        ({"task": "multiple_choice"}, "--task multiple_choice needs the `<extra_id_0>` of T5"),
        ({"gold_score_mode": "adist"} | EVIDENCE, "--gold_score_mode adist looks at T5's cross-attention"),
        (
            {"reader_model_type": world() / "models/reader", "gold_score_mode": "question"} | EVIDENCE,
            "question needs a decoder-only language model",
        ),
    ],
)
def test_what_only_t5_can_do_is_refused(tmp_path, flags, said):
    settings = parse_config(command_line(tmp_path, **read_with(**flags)))
    with pytest.raises(ValueError, match=re.escape(said)):
        preflight.check_reader(settings, load_reader_tokenizer(settings.model.reader_model_type))


def test_flags_of_the_other_kind_of_reader_have_no_effect(tmp_path, caplog):
    other = {"encoder_format": "{query} {text}", "chat_template": False, "passage_format": "{text}"}
    settings = parse_config(command_line(tmp_path, **read_with(**other)))
    with caplog.at_level("INFO"):
        preflight.check_reader(settings, load_reader_tokenizer(str(language_model())))
        preflight.check_reader(settings, load_reader_tokenizer(str(world() / "models/reader")))
    assert [record.getMessage() for record in caplog.records] == [
        "--encoder_format has no effect: it is for a T5 reader",
        "--passage_format has no effect: it is for a decoder-only reader",
        "--chat_template has no effect: it is for a decoder-only reader",
    ]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    home = tmp_path_factory.mktemp("asked")
    run(home, **read_with("chat"), eval_data=None, save_index_path=home / "index", total_steps=2)
    export_huggingface.main(["--model_path", str(home / "run"), "--output_directory", str(home / "export")])
    return home / "run"


@torch.no_grad()
def test_it_is_asked(asked):
    log = logging.getLogger("atlas")
    log.propagate = True
    log.handlers.clear()
    model = atlas.load(asked)
    rows = read_jsonl(world() / "dev.jsonl")[:2]
    one, two = model.ask([row["question"] for row in rows], k=3)
    stream = model.ask(rows[0]["question"], k=3, stream=True)
    assert "".join(stream) == one.text == stream.answer.text and one.text
    passages = [dict(passage.fields) for passage in one.passages]
    reader, make = model.model.reader, model.model.inputs
    said = model._answering.write(model._answering.encode([one.query], [passages]))[0]
    ended = said + [make.reader_tokenizer.eos_id] * (len(said) < 5)  # --generation_max_length 6

    def likelihood(found):
        rows, targets = make.reader([one.query], [found]), make.target_rows([one.query], [ended])
        return -F.cross_entropy(reader.logits(*hidden_of(reader, rows), targets.decoder_ids)[0], targets.labels[0])

    assert one.score == pytest.approx(likelihood(passages).exp().item(), abs=1e-5)
    gold = torch.stack([likelihood([passage]) for passage in passages]) / 0.1  # --temperature_gold
    judged = torch.tensor([passage.judgement for passage in one.passages])
    assert_close(judged, gold.softmax(0), atol=1e-4, rtol=0)
    assert all(passage.attention is None for passage in one.passages) and "attention" not in str(one)
    json.dumps(two.to_dict()), one._repr_html_()


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["both", slow("ddp"), slow("zero1"), slow("fsdp")])
def test_two_ranks_learn_what_one_does(tmp_path, kind):
    flags = read_with(train_retriever=True, per_gpu_batch_size=1, per_gpu_eval_batch_size=5)
    one = run(tmp_path, name="one", total_steps=8, accumulation_steps=2, log_freq=2, **flags)
    parallel = PARALLEL[kind] | {"use_gradient_checkpoint_reader": True}
    two = run_on(2, tmp_path, name="two", total_steps=4, **flags, **parallel)
    assert_same_run(one, two, 8, 4)
    kept = [load_file(directory / "checkpoint/latest/model.safetensors") for directory in (one, two)]
    assert kept[0].keys() == kept[1].keys()
    assert_close(*kept, atol=1e-4, rtol=0)


@pytest.mark.slow  # where bf16 is only emulated
def test_bf16_is_close_to_fp32(tmp_path):
    flags = read_with(train_retriever=True, total_steps=2, lr=0, eval_freq=2)
    losses = [
        logged(run(tmp_path, name=precision, precision=precision, **flags), "loss/reader_loss")
        for precision in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]


def test_it_is_exported_with_code_that_answers_as_it_does(asked, capsys, monkeypatch):
    exported = asked.parent / "export"
    saved = load_file(asked / "checkpoint/latest/model.safetensors")
    reader = load_reader(str(exported / "reader"), dropout=None)
    assert all(torch.equal(saved[f"reader.{name}"], parameter) for name, parameter in reader.named_parameters())
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "reader/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(exported / "reader")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    make = inputs_of("chat", text_maxlength=64)
    passages = [
        {"title": "Paris", "text": "Paris is the capital of France."},
        {"title": "Lyon", "text": "Lyon lies where the Rhône meets the Saône."},
    ]
    rows = make.reader(["what is the capital of France?"], [passages])
    (answer,) = make.reader_tokenizer.decode(reader.write(*hidden_of(reader, rows), max_length=6))
    assert capsys.readouterr().out.splitlines() == answer.splitlines() and answer
    model = atlas.load(exported, index=asked.parent / "index")
    assert model.ask("what is it?").text == atlas.load(asked).ask("what is it?").text


@pytest.mark.parametrize("reader", ["models/reader", None])
def test_a_frozen_reader_judges_and_does_not_learn(tmp_path, reader):
    """T5 as well as a language model: the retriever learns alone, and moments are kept of it alone."""
    flags = {"train_retriever": True, "freeze_reader": True, "total_steps": 2, "eval_data": None, "dropout": 0.1}
    flags |= {"gold_score_mode": "question", "gold_question_weight": 0.7} if reader is None else {}
    reader = language_model() if reader is None else world() / reader
    directory = run(tmp_path, **read_with(**flags, reader_model_type=reader))
    saved = load_file(directory / "checkpoint/latest/model.safetensors")
    assert not any(name.startswith("reader.") for name in saved)  # it is named instead
    assert load_checkpoint(directory).bases["reader"].model == str(reader)
    start = load_file(world() / "models/retriever/model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(saved[f"retriever.contriever.{name}"], start[name])
    moments = load_file(directory / "checkpoint/latest/optimizer.safetensors")
    assert {key.split("/")[0] for key in moments} == {"retriever", "skipped"}


@pytest.mark.processes
@pytest.mark.parametrize("reader", ["models/reader", None])
def test_a_frozen_reader_is_named_by_checkpoints_or_else_saved_by_them(tmp_path, reader):
    """Of a checkpoint, it is saved again, as that may go. Resuming, evaluating and exporting find it either way."""
    reader = language_model() if reader is None else world() / reader
    flags = read_with(train_retriever=True, freeze_reader=True, total_steps=4, eval_data=None, reader_model_type=reader)
    straight = run(tmp_path, name="straight", **flags)
    run(tmp_path, name="stopped", **flags | {"total_steps": 2})
    resumed = run(tmp_path, name="stopped", **flags)
    weights = [load_file(one / "checkpoint/latest/model.safetensors") for one in (straight, resumed)]
    assert_close(*weights, rtol=0, atol=0)
    taught = run(tmp_path, name="taught", **read_with(total_steps=1, eval_data=None, reader_model_type=reader))
    of_taught = run(tmp_path, name="of_taught", model_path=taught, **flags | {"save_freq": 2, "keep_checkpoints": 1})
    once = load_file(taught / "checkpoint/latest/model.safetensors")
    again = load_file(of_taught / "checkpoint/latest/model.safetensors")
    kept = {name: weight for name, weight in again.items() if name.startswith("reader.")}
    assert_close(kept, {name: once[name] for name in kept}, rtol=0, atol=0)
    shutil.rmtree(taught)
    asked = {"train_data": None, "total_steps": None, "freeze_reader": None, "train_retriever": None}
    asked = flags | asked | {"eval_data": world() / "dev.jsonl"}
    for one, expected in ((resumed, load_reader(str(reader), dropout=None)), (of_taught, None)):
        run(tmp_path, "evaluate", name=f"{one.name}-asked", model_path=one, **asked)
        export_huggingface.main(["--model_path", str(one), "--output_directory", str(one / "export")])
        exported = load_reader(str(one / "export/reader"), dropout=None)
        for name, parameter in exported.named_parameters():
            assert torch.equal(parameter, kept[f"reader.{name}"] if expected is None else expected.get_parameter(name))
    changed = load_checkpoint(resumed)
    changed.bases["reader"] = replace(changed.bases["reader"], fingerprint="0" * 16)
    with pytest.raises(ValueError, match="belongs to other weights of the reader than those of"):
        merge_saved(exported, "reader", [exported], str(reader), changed)


def test_a_run_that_reranked_is_evaluated_and_exported_so(tmp_path):
    flags = read_with("chat", rerank_by_reader=4, temperature_gold=0.3)
    trained = run(tmp_path, **flags, eval_data=None, total_steps=1)
    again = dict.fromkeys(flags) | {"train_data": None, "model_path": trained}
    told, typed, none = (
        read_jsonl(run(tmp_path, "evaluate", name=name, **again | more) / "dev-step-0.jsonl")
        for name, more in (("told", {}), ("typed", {"rerank_by_reader": 4}), ("none", {"rerank_by_reader": 0}))
    )
    assert told == typed != none
    found = run(tmp_path, "evaluate", name="found", **again, retrieve_only=True)
    found = read_jsonl(found / "dev-step-0.jsonl")  # by the retriever alone
    assert [row["passages"] for row in found] == [row["passages"] for row in none]
    export_huggingface.main(["--model_path", str(trained), "--output_directory", str(tmp_path / "export")])
    model = atlas.load(tmp_path / "export", passages=world() / "passages.jsonl")
    assert model.config.retriever_training.temperature_gold == 0.3
    answer = model.ask(told[0]["query"])
    assert [passage.id for passage in answer.passages] == [passage["id"] for passage in told[0]["passages"]]


@pytest.mark.parametrize("reader", ["models/reader", None])
def test_a_frozen_reader_in_16_bits_is_saved_as_it_was_read(tmp_path, reader):
    flags = read_with(total_steps=1, eval_data=None, reader_model_type=world() / reader if reader else language_model())
    taught = run(tmp_path, name="taught", **flags)
    judge = {"train_retriever": True, "freeze_reader": True, "precision": "bf16", "model_path": taught}
    again = run(tmp_path, name="again", **flags | judge)
    weights = [load_file(one / "checkpoint/latest/model.safetensors") for one in (taught, again)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items() if "reader." in name)
    # and the reader may learn in the same run, which it has not done yet
    joint = run(tmp_path, name="again", **flags | {"train_retriever": True, "total_steps": 2})
    moved = load_file(joint / "checkpoint/latest/model.safetensors")
    assert not all(torch.equal(moved[name], weight) for name, weight in weights[0].items() if "reader." in name)


def test_questions_without_answers_teach_where_no_answer_is_looked_at(tmp_path, capsys):
    questions = [{"question": row["question"]} for row in read_jsonl(world() / "train.jsonl")]
    flags = read_with(
        **QUESTION_MODE, train_data=write_jsonl(tmp_path / "asked.jsonl", questions), eval_data=None, total_steps=1
    )
    losses = logged(run(tmp_path, **flags, freeze_reader=True), "loss/retriever_loss")
    assert losses[0] > 0
    for others in ({}, {"freeze_reader": True, "gold_question_weight": 0.5}):
        with pytest.raises(SystemExit):
            run(tmp_path, name="learning", **flags | others)
        assert "asked.jsonl, line 1: no `answers`" in capsys.readouterr().err


@torch.no_grad()
def test_passages_are_read_in_the_order_of_the_question_s_likelihood(tmp_path, asked):
    flags = dict.fromkeys(read_with()) | {"train_data": None, "load_index_path": asked.parent / "index"}
    found = run(tmp_path, "evaluate", name="found", model_path=asked, **flags | {"n_context": 5})
    ordered = run(
        tmp_path, "evaluate", name="ordered", model_path=asked, **flags, rerank_by_reader=4
    )  # 2 of 4 are read
    reader, make = load_reader(str(asked.parent / "export/reader"), dropout=None), inputs_of("chat", text_maxlength=64)
    pairs = zip(read_jsonl(found / "dev-step-0.jsonl"), read_jsonl(ordered / "dev-step-0.jsonl"), strict=True)
    moved = 0
    for before, after in pairs:
        candidates = before["passages"][:4]
        judged = make.judging([before["query"]], [candidates], [[]], "question")
        gold = mode_of(learning("question"), reader).signal(reading_of(reader, judged, 1.0))[0].tolist()
        best = sorted(range(4), key=lambda i: -gold[i])[:2]
        assert [p["id"] for p in after["passages"]] == [candidates[i]["id"] for i in best]
        assert [p["score"] for p in after["passages"]] == [candidates[i]["score"] for i in best]
        moved += best != [0, 1]
    assert moved > 3
    alone = run(
        tmp_path, "evaluate", name="alone", model_path=asked, **flags, rerank_by_reader=4, retrieve_only=True
    )  # the reader judges and does not write
    for row, without in zip(*(read_jsonl(one / "dev-step-0.jsonl") for one in (ordered, alone)), strict=True):
        assert without["passages"] == row["passages"] and "generation" not in without
    log = logging.getLogger("atlas")
    log.propagate = True
    log.handlers.clear()
    model = atlas.load(asked, rerank_by_reader=4)
    row = read_jsonl(ordered / "dev-step-0.jsonl")[0]
    answer = model.ask(row["query"])
    ids = [passage["id"] for passage in row["passages"]]
    assert answer.text == row["generation"] and [passage.id for passage in answer.passages] == ids
    assert [passage.id for passage in model.search(row["query"])] == ids
    with pytest.raises(ValueError, match="--rerank_by_reader 4 needs a decoder-only language model"):
        atlas.load(world() / "models", rerank_by_reader=4, closed_book=True)
