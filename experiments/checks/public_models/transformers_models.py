"""Flax models of transformers (below version 5, which dropped them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import transformers

from experiments.checks.public_models.model import PublicModel, Units, images, quick_jit, sequences, tokens

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 24, 4, 2, 31, 6
CLASSES = 5
# Classes that take the shapes of their inputs from the configuration.
_WITH_SHAPES = ("FlaxViTForImageClassification", "FlaxCLIPModel")
_HEADS = {WIDTH: Units(block=WIDTH // HEADS)}


def pretrained(
    kind: str,
    config: Any,
    inputs: tuple[Any, ...],
    *,
    second: str = "decoder_input_ids",
    output: str = "last_hidden_state",
    swapped: tuple[str, ...] = (),
    fused: Units | None = None,
) -> PublicModel:
    """A Flax model of a configuration, with random weights.

    Args:
      kind: The name of the class.
      config: The configuration.
      inputs: The first input of the class's ``__call__``, and another one if there are two.
      second: The name of the second input.
      output: The name of the output.
      swapped: The field of ``PublicModel``.
      fused: The form of the outputs of a kernel for queries, keys and values together.
    """
    options = {} if kind in _WITH_SHAPES else {"input_shape": _input_shape(inputs[0])}
    model = getattr(transformers, kind)(config, _do_init=False, **options)
    params = quick_jit(lambda key: model.init_weights(key, model.input_shape))(jax.random.key(0))

    def apply(tree: Any, *arrays: jax.Array) -> jax.Array:
        return getattr(model(*arrays[:1], params=tree, **dict(zip([second], arrays[1:]))), output)

    return PublicModel(
        apply,
        params,
        inputs,
        kept=frozenset([VOCABULARY, CLASSES]),
        swapped=swapped,
        units=_HEADS | ({3 * WIDTH: fused} if fused else {}),
        averages=("batch_stats",),
        is_flax=True,
    )


def _input_shape(array: jax.Array) -> tuple[int, ...]:
    """The shape for the initialisation. Images have their channels last there, and first in calls."""
    return (1, *array.shape[2:], array.shape[1]) if array.ndim == 4 else (1, *array.shape[1:])


def models() -> dict[str, Callable[[], PublicModel]]:
    """The models by name, as functions that make them."""
    return _sequence_models() | _vision_models()


def _sequence_models() -> dict[str, Callable[[], PublicModel]]:
    ids = tokens(LENGTH, VOCABULARY)
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    bert = common | {"intermediate_size": 36, "max_position_embeddings": 16}
    llama = bert | {"num_key_value_heads": 2}
    bart = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 36,
        "decoder_ffn_dim": 36,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = {**bart, **special, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10}
    t = transformers
    return {
        "bert": lambda: pretrained("FlaxBertModel", t.BertConfig(**bert), (ids,)),
        "distilbert": lambda: pretrained(
            "FlaxDistilBertModel",
            t.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=36),
            (ids,),
        ),
        "gpt2": lambda: pretrained(
            "FlaxGPT2LMHeadModel",
            t.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=16),
            (ids,),
            output="logits",
            swapped=("'c_",),
            fused=Units(repeats=3, block=WIDTH // HEADS),
        ),
        "llama": lambda: pretrained("FlaxLlamaModel", t.LlamaConfig(**bert), (ids,)),
        "mistral": lambda: pretrained("FlaxMistralModel", t.MistralConfig(**llama), (ids,)),
        "gemma": lambda: pretrained("FlaxGemmaModel", t.GemmaConfig(**llama, head_dim=6), (ids,)),
        "bloom": lambda: pretrained(
            "FlaxBloomModel",
            t.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
            (ids,),
            fused=Units(block=3 * WIDTH // HEADS),
        ),
        "t5": lambda: pretrained(
            "FlaxT5Model",
            t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=36, num_layers=LAYERS, num_heads=HEADS),
            (ids, tokens(4, VOCABULARY, seed=2)),
        ),
        "bart": lambda: pretrained(
            "FlaxBartModel", t.BartConfig(**bart, max_position_embeddings=16), (ids, tokens(4, VOCABULARY, seed=2))
        ),
        "whisper": lambda: pretrained(
            "FlaxWhisperModel",
            t.WhisperConfig(**whisper),
            (sequences(8, 20), tokens(4, VOCABULARY, seed=2)),
        ),
    }


def _vision_models() -> dict[str, Callable[[], PublicModel]]:
    ids = tokens(LENGTH, VOCABULARY)
    pictures = images(32).transpose(0, 3, 1, 2)
    stages = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1], "num_labels": CLASSES}
    tower = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": 36}
    t = transformers
    return {
        "vit": lambda: pretrained(
            "FlaxViTForImageClassification",
            t.ViTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=36,
                image_size=32,
                patch_size=8,
                num_labels=CLASSES,
            ),
            (pictures,),
            output="logits",
        ),
        "clip": lambda: pretrained(
            "FlaxCLIPModel",
            t.CLIPConfig(
                text_config=tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
                vision_config=tower | {"image_size": 32, "patch_size": 16},
                projection_dim=20,
            ),
            (ids, pictures),
            second="pixel_values",
            output="logits_per_image",
        ),
        "resnet": lambda: pretrained(
            "FlaxResNetForImageClassification", t.ResNetConfig(**stages), (pictures,), output="logits"
        ),
        "regnet": lambda: pretrained(
            "FlaxRegNetForImageClassification",
            t.RegNetConfig(**stages | {"hidden_sizes": [12, 24]}, groups_width=6),
            (pictures,),
            output="logits",
        ),
    }
