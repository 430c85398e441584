"""What users need to test a guarded program: a tiny real model in milliseconds, a scripted one, a sink in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hallucination_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from hallucination_guard.audit.record import AuditRecord

__all__ = ["MemorySink", "tiny_model", "tiny_tokenizer"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_tokenizer(*, chat_template: str | None = CHATML, special: tuple[str, ...] = _SPECIAL) -> Any:
    """A byte-level tokenizer that needs no file: one token a byte, and these special tokens.

    Args:
        chat_template: Jinja source; None for a base model's tokenizer.
        special: the special tokens, ids 0 … ; the third is the end of a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        additional_special_tokens=list(special[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(family: str = "llama", *, dtype: Any = None, seed: int = 0, tied: bool = False, **sizes: Any) -> Any:
    """A random ``transformers`` model of a real architecture, small enough for unit tests.

    Args:
        family: ``llama``, ``qwen3``, ``gemma2``, ``gemma3``, ``mistral``, ``phi3`` or ``gpt2``.
        dtype: torch dtype; float32 by default.
        seed: of the weights; the global random state is left as it was.
        tied: whether head and input embedding are one matrix.
        **sizes: override the configuration, for example ``num_hidden_layers=8``.

    Raises:
        ConfigurationError: if the family is not one of these.
    """
    import torch
    import transformers

    extra: dict[str, Any] = {}
    if family in ("gemma2", "gemma3", "mistral"):
        extra["sliding_window"] = 8
    names = {
        "llama": "Llama",
        "qwen3": "Qwen3",
        "gemma2": "Gemma2",
        "gemma3": "Gemma3",
        "mistral": "Mistral",
        "phi3": "Phi3",
        "gpt2": "GPT2",
    }
    if family not in names:
        raise ConfigurationError(f"no tiny model of family {family!r}", hint=f"one of {', '.join(sorted(names))}")
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=320, n_embd=32, n_layer=6, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, tie_word_embeddings=tied, **sizes,
        )  # fmt: skip
        kind: Any = transformers.GPT2LMHeadModel
    else:
        suffix = "TextConfig" if family == "gemma3" else "Config"
        config = getattr(transformers, names[family] + suffix)(
            **{**_SIZES, **extra, "tie_word_embeddings": tied, **sizes}
        )
        kind = getattr(transformers, names[family] + "ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        # The default initialisation is so small that every gradient is nearly nil and every answer the same.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype or torch.float32).eval()


class MemorySink:
    """An audit sink that keeps its records in a list."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    def __call__(self, record: AuditRecord) -> str:
        """Keep the record; its id."""
        self.records.append(record)
        return record.id
