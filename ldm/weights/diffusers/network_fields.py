"""Lists how ldm treats each config field of diffusers' UNet and VAE and of transformers' CLIP towers.

Covers diffusers 0.42.1, transformers 5.24 and earlier versions, whose files have more fields.
"""

from ldm.weights.diffusers.fields import Config, Fields

# Settings that ldm's networks lack, with the value that disables each. A missing field is disabled too.
UNET_FIXED: Config = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "center_input_sample": False,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_cond_proj_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
}
UNET_RARE: Config = {  # as above, but ldm does not write these because they are rarely set
    "attention_type": "default",
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "timestep_post_act": None,
}
UNET = Fields(
    honoured=frozenset(
        {
            "in_channels", "out_channels", "sample_size", "block_out_channels", "layers_per_block", "down_block_types",
            "up_block_types", "transformer_layers_per_block", "cross_attention_dim", "use_linear_projection",
            "norm_num_groups", "attention_head_dim", "num_attention_heads",
        }
    ),
    fixed=UNET_FIXED | UNET_RARE,
    ignored=frozenset(
        {
            "upcast_attention",  # selects a dtype, as precision= does
            "addition_embed_type_num_heads", "addition_time_embed_dim",  # used only with addition_embed_type
            "class_embeddings_concat", "projection_class_embeddings_input_dim",  # used only with class_embed_type
        }
    ),
)  # fmt: skip

VAE_FIXED: Config = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
VAE = Fields(
    honoured=frozenset(
        {
            "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels",
            "scaling_factor", "shift_factor", "norm_num_groups",
        }
    ),
    fixed=VAE_FIXED,
    ignored=frozenset({"sample_size", "force_upcast"}),  # of tiling, and of float16, which ldm's VAE never uses
)  # fmt: skip

# Fields that transformers writes into every config: names, outputs of its API, and settings of text generation.
OF_TRANSFORMERS = frozenset(
    {
        "add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
        "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder",
        "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "prefix", "problem_type", "remove_invalid_values",
        "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
        "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
        "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
        "use_bfloat16", "use_cache",
    }
)  # fmt: skip
TOWER = frozenset({"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"})
TOWER_FIXED: Config = {"layer_norm_eps": 1e-5, "pruned_heads": (None, {})}
# Initialisation and dropout affect only training, the width of a projection is read from its tensor, and the tokenizer
# defines the start and padding tokens.
TOWER_IGNORED = OF_TRANSFORMERS | {
    "attention_dropout", "dropout", "initializer_factor", "initializer_range", "projection_dim", "bos_token_id",
    "pad_token_id", "logit_scale_init_value",
}  # fmt: skip
TEXT = Fields(
    honoured=TOWER | {"vocab_size", "max_position_embeddings"},
    fixed=TOWER_FIXED | {"eos_token_id": (49407, 2)},  # position of the pooled state; early files have 2 but mean 49407
    ignored=TOWER_IGNORED,
)
IMAGE = Fields(
    honoured=TOWER | {"image_size", "patch_size"},
    fixed=TOWER_FIXED | {"num_channels": 3},
    ignored=TOWER_IGNORED | {"eos_token_id"},
)
