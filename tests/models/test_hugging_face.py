"""Models of Hugging Face's transformers and peft, tiny and with random weights, that compute their own loss."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from live_training import Training, check_gradients, check_values, sgd

import gimli_compile as gimli
from gimli_compile.coverage.widening import Widened

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(autouse=True)
def widened():
    """Runs in float64 what these models compute in float32 inside, which has no slopes to compare with."""
    hf.utils.logging.set_verbosity_error()
    with Widened():
        yield


# ---------------------------------------------------------------------- batches


def ids(seed, size=2, length=6):
    return torch.randint(3, 50, (size, length), generator=torch.Generator().manual_seed(seed))


def padding():
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return mask


def floats(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(steps=2):
    return [{"input_ids": ids(t), "labels": ids(50 + t), "attention_mask": padding()} for t in range(steps)]


def unpadded(steps=2):
    return [{"input_ids": ids(t), "labels": ids(50 + t)} for t in range(steps)]


def classified(steps=2):
    return [{"input_ids": ids(t), "labels": torch.tensor([0, 1]), "attention_mask": padding()} for t in range(steps)]


def pixels(steps=2):
    return [{"pixel_values": floats(t, 2, 3, 16, 16), "labels": torch.tensor([0, 1])} for t in range(steps)]


def sound(steps=2):
    return [{"input_values": floats(t, 2, 400), "labels": torch.tensor([0, 1])} for t in range(steps)]


def spectra(steps=2):
    return [{"input_features": floats(t, 2, 8, 12), "labels": ids(t)} for t in range(steps)]


def pairs(steps=2):
    ends = torch.full((2, 1), 2)
    return [
        {"input_ids": torch.cat((ids(t, 2, 5), ends), 1), "pixel_values": floats(t, 2, 3, 16, 16), "return_loss": True}
        for t in range(steps)
    ]


# ---------------------------------------------------------------------- configurations

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**SIZES, **TOKENS, **STILL}
DECODER = {**SIZES, **TOKENS, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 1, "head_dim": 8}
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "use_cache": False}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "use_cache": False, **TOKENS,
    "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER = {key: value for key, value in BART.items() if key != "max_position_embeddings"} | {
    "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "begin_suppress_tokens": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
IMAGE = {**SIZES, **STILL, "image_size": 16, "patch_size": 8}
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0, **STILL,
}  # fmt: skip
SOUND = {
    **SIZES, "vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "layerdrop": 0.0, "apply_spec_augment": False, "classifier_proj_size": 8,
}  # fmt: skip
NEO = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "window_size": 4,
    "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "use_cache": False,
}  # fmt: skip
MAMBA = {
    "vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "expand": 1, "conv_kernel": 3,
    "use_cache": False,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
DISTIL = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
OPT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 24, "num_attention_heads": 2,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
CLIP = {"text_config": DECODER, "vision_config": {**SIZES, "image_size": 16, "patch_size": 8}, "projection_dim": 8}

Case = tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], Callable[[], list[Any]]]
CASES: dict[str, Case] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, ENCODER, text),
    "bert_dropout": (hf.BertForMaskedLM, hf.BertConfig, {**SIZES, **TOKENS}, text),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, ENCODER, text),
    "distilbert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig, DISTIL, text),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig, {**ENCODER, "embedding_size": 8}, classified),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig, {**ENCODER, "embedding_size": 8}, text),
    "deberta_v2": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, {**ENCODER, **DEBERTA}, text),
    "mpnet": (hf.MPNetForMaskedLM, hf.MPNetConfig, ENCODER, text),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT, text),
    "gpt_neo": (hf.GPTNeoForCausalLM, hf.GPTNeoConfig, NEO, text),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, DECODER, text),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, {**GPT, "rotary_dim": 4}, text),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, OPT, text),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED, text),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**GROUPED, "sliding_window": 4}, text),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED, text),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, GROUPED, text),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, DECODER, text),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {key: GPT[key] for key in ("vocab_size", "n_layer", "n_head")} | {"hidden_size": 16, "use_cache": False}, text),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig, DECODER, text),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, MAMBA, unpadded),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5, text),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig, BART, text),
    "mbart": (hf.MBartForConditionalGeneration, hf.MBartConfig, BART, text),
    "pegasus": (hf.PegasusForConditionalGeneration, hf.PegasusConfig, BART, text),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig, WHISPER, spectra),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**GROUPED, **EXPERTS, "num_local_experts": 3}, text),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, IMAGE, pixels),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig, IMAGE, pixels),
    "beit": (hf.BeitForImageClassification, hf.BeitConfig, {**IMAGE, "use_relative_position_bias": True}, pixels),
    "swin": (hf.SwinForImageClassification, hf.SwinConfig, SWIN, pixels),
    "convnext": (hf.ConvNextForImageClassification, hf.ConvNextConfig, {"num_stages": 2, "hidden_sizes": [6, 8], "depths": [1, 1]}, pixels),
    "resnet": (hf.ResNetForImageClassification, hf.ResNetConfig, {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "hidden_act": "silu"}, pixels),
    "segformer": (hf.SegformerForImageClassification, hf.SegformerConfig, SEGFORMER, pixels),
    "wav2vec2": (hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, SOUND, sound),
    "hubert": (hf.HubertForSequenceClassification, hf.HubertConfig, SOUND, sound),
    "clip": (hf.CLIPModel, hf.CLIPConfig, CLIP, pairs),
}  # fmt: skip


# ---------------------------------------------------------------------- trainings


def moved(model):
    """Moves all parameters off the zeros and ones that they start with."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def own_loss(model, batch):
    return model(**batch).loss


def trained_only(params):
    return sgd([parameter for parameter in params if parameter.requires_grad])


def training(make, batches):
    return Training(make, trained_only, own_loss, batches, prepare=moved)


def case(name):
    kind, configuration, options, batches = CASES[name]
    return training(lambda: kind(configuration(**options)), batches())


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))


def checkpointed(reentrant):
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def adapted(**options):
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


VARIANTS = {
    "checkpointed": lambda: checkpointed(False),
    "checkpointed_reentrant": lambda: checkpointed(True),
    "lora": lambda: adapted(task_type="CAUSAL_LM", lora_dropout=0.1),
}


# Pegasus looks its fixed positions up under `no_grad`, which stops a gradient that differences do not.
STOPPED = {"pegasus": ("params",)}


@pytest.mark.parametrize("name", CASES)
def test_a_model_trains_as_live_and_differentiates(name):
    check_gradients(case(name), ("groups.0.lr",), STOPPED.get(name, ()), check_values(case(name)), batch=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_and_adapters(name):
    made = training(VARIANTS[name], text())
    check_gradients(made, ("groups.0.lr",), fn=check_values(made), batch=False)


def test_an_adapter_that_detaches_its_norms():
    """DoRA stops the gradient through the norms of its weights, so that only values can be compared with differences."""
    check_values(training(lambda: adapted(task_type="CAUSAL_LM", use_dora=True), text()))


def test_routing_in_python_is_refused():
    """Which experts run is decided by values that have derivatives."""
    options = {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 3, "experts_implementation": "eager"}
    made = training(lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**options)), text())
    _, _, fn = made.functionalized()
    with pytest.raises(gimli.CaptureError, match=r"modeling_mixtral\.py"):
        fn.step(fn.init(), text()[0])
