"""Packed rows, rows without padding and pairs: each sample's score is that of its own loss, whatever a collator made of it.

TRL's trainers where TRL is installed, and everywhere a Trainer whose collators and loss do the same to the batch.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LR, BETA, PAD = 0.05, 0.1, 0
WORDS = 30


def language_model(tied=False, kind=None):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=1, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return (kind or transformers.LlamaForCausalLM)(config).double()


def tokens(seed, least=3, most=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, WORDS + 2, (int(torch.randint(least, most, (), generator=g)),), generator=g).tolist()


TEXTS = [{"input_ids": tokens(i), "sample_id": 100 + i} for i in range(12)]
PAIRS = [
    {"prompt_ids": tokens(i, 2, 5), "chosen_ids": tokens(50 + i, 2, 5), "rejected_ids": tokens(90 + i, 2, 5), "sample_id": f"p{i}"}
    for i in range(12)
]


def val_loss(model):
    x = torch.arange(2, 2 + 16).view(2, 8)
    return F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def log_probs(model, ids):
    """``[T - 1]``: of each token after those before it, one text alone."""
    x = torch.tensor([ids])
    return model(input_ids=x).logits[0, :-1].log_softmax(-1).gather(1, x[0, 1:, None]).squeeze(1)


def of_text(model, ids, count):
    return -log_probs(model, ids).sum() / count


def of_pair(model, reference, pair, count):
    """The share that a pair has in the mean over ``count`` of them."""
    ratios = []
    for answer in (pair["chosen_ids"], pair["rejected_ids"]):
        ids, start = pair["prompt_ids"] + answer, len(pair["prompt_ids"]) - 1
        ratios.append(log_probs(model, ids)[start:].sum() - log_probs(reference, ids)[start:].sum().detach())
    return -F.logsigmoid(BETA * (ratios[0] - ratios[1])) / count


def totals_of(model, steps, schedule):
    """``{id: sum of scores}`` of SGD, and each step's sum: a step is a list of (id, its loss as a function of the model)."""
    params, totals, sums = list(model.parameters()), {}, []
    for number, step in enumerate(steps):
        foreseen = schedule == "lookahead" and number >= 10  # the validation gradient is that before the step
        grads = [torch.autograd.grad(loss(model), params, allow_unused=True) for _, loss in step]
        grads = [[torch.zeros_like(p) if x is None else x for p, x in zip(params, g, strict=True)] for g in grads]
        whole = [sum(g) for g in zip(*grads, strict=True)]
        before = 0.0 if foreseen else LR / 2
        with torch.no_grad():
            torch._foreach_sub_(params, whole, alpha=before)
        slope = torch.autograd.grad(val_loss(model), params)
        with torch.no_grad():
            torch._foreach_sub_(params, whole, alpha=LR - before)
        scores = [LR * sum(float((a * b).sum()) for a, b in zip(slope, g, strict=True)) for g in grads]
        for (name, _), score in zip(step, scores, strict=True):
            totals[name] = totals.get(name, 0.0) + score
        sums.append(sum(scores))
    return totals, sums


EPOCHS = {"midpoint": 2, "lookahead": 5}  # more than the ten steps before it foresees any


def options_of(folder, batch, schedule="midpoint"):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": batch, "num_train_epochs": EPOCHS[schedule], "learning_rate": LR,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100, "gradient_checkpointing": False,
    }  # fmt: skip


def train(trainer, dataset=None, **options):
    """Trains with the callback; what it saw: the run, and of each batch the ids, offsets, tokens and the count of labels."""
    from adam_ghost.integrations.hf import AttributionCallback

    callback = AttributionCallback(val_loss, strict=True, **options)
    callback.attach(trainer, dataset)
    compute_loss, seen = trainer.compute_loss, []

    def spy(model, inputs, *args, num_items_in_batch=None, **kwargs):
        seen.append((inputs.get("sample_id"), inputs["input_ids"], num_items_in_batch))
        return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert all(s.coverage == 1 and not s.skipped for s in callback.run.steps)
    return callback.run, seen


def assert_totals(run, model, steps, schedule, rtol=1e-9):
    """``model``: as it was before the training."""
    totals, sums = totals_of(model, steps, schedule)
    found = run.scores()
    scale = max(map(abs, totals.values()))
    assert dict(zip(found.ids, found.total, strict=True)) == pytest.approx(totals, rel=rtol, abs=rtol * scale)
    assert [s.score_sum[0] for s in run.steps] == pytest.approx(sums, rel=100 * rtol)


def text_steps(seen):
    """Each batch's pieces, alone."""
    by_id, steps = {t["sample_id"]: t["input_ids"] for t in TEXTS}, []
    for named, x, count in seen:
        pieces = [by_id[i] for i in named["ids"]]
        if named["offsets"] is not None:
            line = x.flatten().tolist()
            pieces = [line[a:b] for a, b in zip(named["offsets"][:-1], named["offsets"][1:], strict=True)]
        steps.append([(i, partial(of_text, ids=ids, count=count)) for i, ids in zip(named["ids"], pieces, strict=True)])
    return steps


def pair_steps(seen, reference):
    by_id = {p["sample_id"]: p for p in PAIRS}
    return [
        [(i, partial(of_pair, reference=reference, pair=by_id[i], count=len(named["ids"]))) for i in named["ids"]]
        for named, _, _ in seen
    ]


# what stands in for TRL


class Headed(transformers.LlamaForCausalLM):
    """Uses its head as TRL's trainers do: as a function, on all tokens but the last, in one line, or on those with a label."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        if labels is None:
            return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        mask = labels != -100
        if self.compact:
            picked, wanted = hidden[mask], labels[mask]
        else:
            picked, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.clamp(min=0).reshape(-1)
        each = F.linear(picked, self.lm_head.weight).log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)
        if self.compact:
            return {"log_probs": each.new_zeros(mask.shape).masked_scatter(mask, each)}
        return {"log_probs": each.view(mask.shape).masked_fill(~mask, 0.0)}


class StandIn(transformers.Trainer):
    reference = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = model(**inputs)["log_probs"]
        if self.reference is None:
            return -found.sum() / num_items_in_batch
        with torch.no_grad():
            apart = found.sum(1) - self.reference(**inputs)["log_probs"].sum(1)
        apart = found.sum(1) - found.sum(1).detach() + apart  # with the model's graph
        chosen, rejected = apart.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def padded(rows):
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, PAD)


def one_row(samples):
    """Without padding, one after another."""
    lengths = [len(s) for row in samples for s in row["pieces"]]
    x = torch.tensor([[t for row in samples for t in row["input_ids"]]])
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": x, "labels": x.masked_fill(places == 0, -100), "position_ids": places}


def pairs_collated(samples):
    answers = [[s["prompt_ids"], s[kind]] for kind in ("chosen_ids", "rejected_ids") for s in samples]
    x, labels = padded([p + a for p, a in answers]), padded([[-100] * len(p) + a for p, a in answers])
    return {"input_ids": x, "attention_mask": (x != PAD).long(), "labels": labels.masked_fill(x == PAD, -100)}


def own_columns(options):
    """Arguments of a Trainer that lets its collator have all columns, as TRL's do."""
    return transformers.TrainingArguments(**options, remove_unused_columns=False)


def in_rows(texts, size, by_token=True):
    """Rows of several texts, with an id to each token."""
    rows = []
    for k in range(0, len(texts), size):
        part = texts[k : k + size]
        row = {"input_ids": [t for s in part for t in s["input_ids"]], "pieces": [s["input_ids"] for s in part]}
        ids = [s["sample_id"] for s in part for _ in s["input_ids"]]
        rows.append({**row, "sample_id": ids if by_token else ids[0]})
    return rows


@pytest.mark.filterwarnings("ignore:adam_ghost. step .* unlike in earlier steps")
@pytest.mark.parametrize("compact", [False, True], ids=["all tokens", "those with a label"])
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
@pytest.mark.parametrize("way", ["no padding", "packed", "pairs"])
def test_collators_like_trls(tmp_path, way, schedule, compact):
    model = language_model(kind=type("Headed", (Headed,), {"compact": compact}))
    before = copy.deepcopy(model)
    samples, collate = {
        "no padding": (in_rows(TEXTS, 1, by_token=False), one_row),
        "packed": (in_rows(TEXTS, 3), one_row),
        "pairs": (PAIRS, pairs_collated),
    }[way]
    args = own_columns(options_of(tmp_path, 2 if way == "packed" else 4, schedule))
    trainer = StandIn(model, args, train_dataset=samples, data_collator=collate)
    trainer.reference = copy.deepcopy(before) if way == "pairs" else None
    run, seen = train(trainer, schedule=schedule)
    assert_totals(run, before, text_steps(seen) if way != "pairs" else pair_steps(seen, copy.deepcopy(before)), schedule)
    assert run.scores().steps.tolist() == [EPOCHS[schedule]] * 12


def test_a_collator_that_puts_samples_elsewhere_is_noticed(tmp_path):
    backwards = lambda samples: one_row(samples[::-1])  # noqa: E731
    args = own_columns(options_of(tmp_path, 4))
    model = language_model(kind=type("Headed", (Headed,), {"compact": False}))
    trainer = StandIn(model, args, train_dataset=in_rows(TEXTS, 1, by_token=False), data_collator=backwards)
    with pytest.raises(ValueError, match=r"did not put the tokens of sample \d+ one after another at 0"):
        train(trainer)


# TRL

TRLS = 1e-6  # of the largest score: TRL computes logits in float32, whatever the model's precision


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": PAD, "<eos>": 1, **{f"w{i}": i for i in range(2, WORDS + 2)}}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<eos>")


SFT = {
    "tied": ({}, True, 4),
    "untied": ({}, False, 4),
    "no padding": ({"padding_free": True, "max_length": None}, False, 4),
    "bfd": ({"packing": True, "max_length": 16, "shuffle_dataset": True}, False, 2),
    "bfd, one row": ({"packing": True, "max_length": 16}, True, 1),
    "bfd_split": ({"packing": True, "packing_strategy": "bfd_split", "max_length": 6}, False, 2),
    "wrapped": ({"packing": True, "packing_strategy": "wrapped", "max_length": 16}, False, 1),
}
quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:adam_ghost. step .* unlike in earlier steps",
    "ignore:(?!adam_ghost)",
)


@quiet
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
@pytest.mark.parametrize("case", SFT)
def test_sft(tmp_path, case, schedule):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    options, tied, batch = SFT[case]
    model, data = language_model(tied), datasets.Dataset.from_list(TEXTS)
    before = copy.deepcopy(model)
    args = trl.SFTConfig(**options_of(tmp_path, batch, schedule) | options)
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    run, seen = train(trainer, data if options.get("packing") else None, schedule=schedule)
    steps = text_steps(seen)
    if case != "wrapped":
        assert_totals(run, before, steps, schedule, TRLS)
        return
    # a sample's tokens are seen by those after them: each row's pieces add up to what the row does
    rows = [[("row", partial(of_text, ids=x[0].tolist(), count=n))] for _, x, n in seen]
    assert [s.score_sum[0] for s in run.steps] == pytest.approx(totals_of(before, rows, schedule)[1], rel=100 * TRLS)
    assert set(run.scores().ids) == {t["sample_id"] for t in TEXTS}


@quiet
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_dpo(tmp_path, schedule):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, reference = language_model(), language_model()
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.1)
    before, frozen = copy.deepcopy(model), copy.deepcopy(reference)
    args = trl.DPOConfig(**options_of(tmp_path, 4, schedule), beta=BETA)
    words = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    texts = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    data = datasets.Dataset.from_list([{k: words(p[v]) for k, v in texts.items()} | {"sample_id": p["sample_id"]} for p in PAIRS])
    trainer = trl.DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer())
    run, seen = train(trainer, schedule=schedule)
    made = {p["sample_id"]: p for p in trainer.train_dataset.to_list()}  # with ends of sentences
    assert len(made) == len(PAIRS)
    steps = [
        [(i, partial(of_pair, reference=frozen, pair=made[i], count=len(named["ids"]))) for i in named["ids"]]
        for named, _, _ in seen
    ]
    assert_totals(run, before, steps, schedule, TRLS)
    assert run.scores().steps.tolist() == [EPOCHS[schedule]] * 12


@quiet
def test_packing_needs_the_data_set(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(TEXTS)
    args = trl.SFTConfig(**options_of(tmp_path, 2), packing=True, max_length=16)
    build = lambda: trl.SFTTrainer(language_model(), args, train_dataset=data, processing_class=tokenizer())  # noqa: E731
    with pytest.raises(KeyError, match=r"packing=True does .*attach\(trainer, dataset\)"):
        train(build())
    with pytest.raises(ValueError, match="packed again, it gives other rows"):
        train(build(), datasets.Dataset.from_list(TEXTS[::-1][:11]))
