"""Tiny transformers models with random weights, built from configurations: nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported: its advice is not about us

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForTokenClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

VOCABULARY = 61
PAD = 1
Batch = dict[str, Any]


def _encoder(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "pad_token_id": PAD,
        "num_labels": 3,
        "initializer_range": 0.2,  # wider than usual, so that outputs depend on inputs
    }


def _sides(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": dropout,
        "attention_dropout": dropout,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "num_labels": 3,
        "init_std": 0.2,
    }


def build(kind: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in training mode; the same weights every time for one kind."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, kind)))
        model: nn.Module = _build(kind, dropout)
    return model.to(dtype).train()


def _build(kind: str, dropout: float) -> Any:
    encoder = _encoder(dropout)
    if kind == "sequence":
        return BertForSequenceClassification(BertConfig(**encoder, classifier_dropout=dropout))
    if kind == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(**encoder, classifier_dropout=dropout))
    if kind == "longformer":  # pads its tokens to full windows
        return LongformerForTokenClassification(LongformerConfig(**encoder, attention_window=4, sep_token_id=2))
    if kind == "tokens":
        return BertForTokenClassification(BertConfig(**encoder, classifier_dropout=dropout))
    if kind == "masked_lm":
        return BertForMaskedLM(BertConfig(**encoder))
    if kind == "causal":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=24,
                n_layer=2,
                n_head=2,
                n_positions=64,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                attention_dropout=dropout,
                initializer_range=0.2,
            )
        )
    if kind in ("gemma2", "granite", "recurrent_gemma", "t5gemma"):  # these change their logits after the head
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_dropout": dropout,
            "initializer_range": 0.3,
        }
        if kind == "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=12, final_logit_softcapping=2.0))
        if kind == "granite":
            return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
        if kind == "recurrent_gemma":
            del sizes["attention_dropout"]
            sizes["num_hidden_layers"] = 3  # the third is the first with attention
            return RecurrentGemmaForCausalLM(
                RecurrentGemmaConfig(
                    **sizes, lru_width=24, attention_window_size=8, logits_soft_cap=3.0, w_init_variance_scale=2.0
                )
            )
        sides = {**sizes, "head_dim": 12, "dropout_rate": dropout, "final_logit_softcapping": 3.0}
        return T5GemmaForConditionalGeneration(
            T5GemmaConfig(encoder=sides, decoder=sides, dropout_rate=dropout, vocab_size=VOCABULARY)
        )
    if kind == "seq2seq":
        return BartForConditionalGeneration(BartConfig(**_sides(dropout)))
    if kind == "seq2seq_sequence":
        return BartForSequenceClassification(BartConfig(**_sides(dropout)))
    if kind == "decoder":
        return BartForCausalLM(BartConfig(**_sides(dropout)))
    if kind == "m2m":  # makes its decoder's inputs in the forward pass, and has no method that does
        return M2M100ForConditionalGeneration(M2M100Config(**_sides(dropout), encoder_layerdrop=0.0, decoder_layerdrop=0.0))
    if kind == "prompt":  # three virtual tokens before the text; all weights are trained
        from peft import PromptTuningConfig, get_peft_model

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return get_peft_model(_build("causal", dropout), config).requires_grad_(True)
    if kind == "xlnet":  # which embeds its tokens as (time, batch)
        return XLNetLMHeadModel(
            XLNetConfig(
                vocab_size=VOCABULARY, d_model=24, n_layer=1, n_head=2, d_inner=48, dropout=dropout, initializer_range=0.2
            )
        )
    assert kind == "t5"
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=12,
            d_ff=48,
            num_layers=1,
            num_heads=2,
            dropout_rate=dropout,
            pad_token_id=PAD,
            eos_token_id=2,
            decoder_start_token_id=PAD,
        )
    )


def batch_for(kind: str, rows: int = 4, pads: int = 0) -> Batch:
    """Texts of different lengths, padded on the right to the longest and then `pads` further, with labels."""
    generator = torch.Generator().manual_seed(17)
    lengths = [9, 6, 7, 4][:rows]
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=generator)
    ids[:, 0] = 0
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    ids[torch.arange(rows), torch.tensor(lengths) - 1] = 2
    if kind in ("sequence", "roberta", "seq2seq_sequence"):
        labels = torch.randint(0, 3, (rows,), generator=generator)
    else:
        classes = 3 if kind in ("tokens", "longformer") else VOCABULARY
        labels = torch.randint(3 if classes > 3 else 0, classes, (rows, 9), generator=generator)
        labels = torch.where(mask, labels, -100)
    batch = {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long(), "labels": labels}
    return pad(batch, pads)


def pad(batch: Batch, pads: int) -> Batch:
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        name: nn.functional.pad(value, (0, pads), value=fill[name]) if value.ndim == 2 else value
        for name, value in batch.items()
    }


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; zeros where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def word_level_bert(folder: Path, words: Sequence[str]) -> Path:
    """A random BERT of a few thousand weights with a tokenizer of these words, saved into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


class AfterHead(nn.Module):
    """A small language model that does something to the logits of its head, which has more classes than width."""

    def __init__(self, change: Callable[[Tensor], Tensor], classes: int = VOCABULARY) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding, self.norm = nn.Embedding(VOCABULARY, 12), nn.BatchNorm1d(12)
            self.head = nn.Linear(12, classes, bias=False)
        self.dropout = nn.Dropout(0.2)
        self.change, self.passes = change, 0

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.dropout(self.norm(self.embedding(input_ids).flatten(0, 1))).view(*input_ids.shape, -1)
        return self.change(self.head(hidden))
