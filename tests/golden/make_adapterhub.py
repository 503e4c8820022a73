"""Writes tests/golden/adapterhub with the real `adapters` package, in an environment of its own:

    python -m venv /tmp/hub && /tmp/hub/bin/pip install torch adapters==1.3.0
    /tmp/hub/bin/python tests/golden/make_adapterhub.py

For each family a tiny model with random weights, its adapters in each placement as AdapterHub saves
them, and the logits that it computes with each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import adapters
import torch
import transformers
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "adapterhub"
SMALL = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, "num_key_value_heads": 1}),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
         "bos_token_id": 0, "eos_token_id": 2},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SMALL),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 31, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8},
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": 31, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 1},
    ),
}  # fmt: skip
ADAPTERS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "parallel": ParBnConfig(reduction_factor=2),
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    ids = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    for family, (kind, config, settings) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so large that every part of it shows
                parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.ndim == 1))
        folder = FOLDER / family
        model.save_pretrained(folder)
        adapters.init(model)
        given = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids.flip(0)
        with torch.no_grad():
            logits = {"ids": ids, "base": model(**given).logits}
            for name, adapter in ADAPTERS.items():
                model.add_adapter(name, config=adapter)
                for key, parameter in model.named_parameters():
                    if f".adapters.{name}." in key:
                        parameter.copy_(0.3 * torch.randn(parameter.shape))
                model.set_active_adapters(name)
                logits[name] = model(**given).logits
                (folder / name).mkdir()
                model.save_adapter(str(folder / name), name, use_safetensors=True)
                model.set_active_adapters(None)
        save_file({k: v.contiguous() for k, v in logits.items()}, folder / "logits.safetensors")
    for pattern in ("*/*/head_config.json", "*/*/model_head.safetensors"):
        for path in FOLDER.glob(pattern):
            path.unlink()


if __name__ == "__main__":
    main()
