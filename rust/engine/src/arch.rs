//! A model family as data: sizes, norms, rotary positions, biases, tensor names. No tensors, no branch on names elsewhere.

use hfcore_kernels::elementwise::{Activation, Pairing, SWISH_ALPHA, SWISH_LIMIT};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::weights::{Value, Weights, nearest};

/// Where a layer's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// Before attention and before the feed-forward (llama).
    Before,
    /// After each of them, before it is added (olmo 2).
    After,
    /// Before and after (gemma 2).
    Around,
    /// One before both, which read the same and are added together (command-r).
    Parallel,
}

/// What tells one family of models from another, where their files do not say it themselves.
struct Family {
    /// `general.architecture` of GGUF files; `None`: this row is for `config.json` only.
    gguf: Option<&'static str>,
    /// `model_type` values of `config.json`.
    hf: &'static [&'static str],
    /// How GGUF files pair the numbers of a head. Converters permute llama's; transformers mostly pairs halves.
    gguf_pairing: Pairing,
    hf_pairing: Pairing,
    activation: Activation,
    /// The feed-forward has a gate beside its inputs.
    gated: bool,
    block: Block,
    /// Norms take the mean off, and may have biases.
    layer_norm: bool,
    /// Queries, keys and values always have biases.
    qkv_bias: bool,
    /// Norms over the query and key heads.
    qk_norm: bool,
    /// These norms see all heads of a row as one vector.
    qk_together: bool,
    /// transformers stores norm weights less one (gemma); GGUF files have the one added.
    hf_norm_offset: f32,
    /// Embeddings are multiplied by the square root of the width.
    scaled_embedding: bool,
    /// GGUF's logit scale divides (granite).
    divided_logits: bool,
    /// Tokens' positions are a table (gpt2), not angles.
    learned_positions: bool,
    /// transformers stores matrices as `[inputs, outputs]` (gpt2).
    hf_transposed: bool,
    /// Part of a head that turns, where the file does not say.
    partial_rotary: f32,
    /// Every n-th layer has no positions (smollm3), where the file does not list them.
    nope_interval: Option<usize>,
    /// Layers that see everything have no positions, if others have a window (command-r 7B).
    global_nope: bool,
    /// Every n-th layer sees everything, the others a window.
    window_interval: Option<usize>,
    /// Layers with a window have a rope of their own, of this base where the file does not say, or of the other's.
    local_rope: Option<Option<f32>>,
    /// Models with so many layers scale scores by hidden size / heads, which GGUF files do not say (gemma 27B).
    wide_queries: Option<usize>,
    /// Feed-forwards of which a router chooses some.
    experts: Option<Routing>,
    /// Attention reads latents, one for all heads (deepseek).
    latent: bool,
    /// Layers may be short convolutions (lfm2).
    convolution: bool,
    /// Norms have no weights (olmo).
    plain_norms: bool,
    /// Norms of queries and keys come after the rotation (hunyuan).
    qk_norm_last: bool,
    /// Base of the rope, where the file does not say.
    theta: f32,
    /// Each head has a score that takes weight and gives nothing (gpt-oss).
    sinks: bool,
    /// Where YaRN begins and ends is rounded, which GGUF files do not say.
    rounded_yarn: bool,
    tied: bool,
    /// transformers' name of the list of layers.
    hf_layers: &'static str,
    /// transformers' tensor names, by GGUF's, where they are not llama's: see `HF_NAMES`.
    hf_names: &'static [(&'static str, &'static str)],
}

/// How a router chooses experts, where files do not say.
#[derive(Clone, Copy)]
struct Routing {
    /// The chosen ones' shares are made to add up to one.
    normalised: bool,
    /// Scores are each expert's own, not one distribution.
    sigmoid: bool,
    /// Experts are as wide as plain feed-forwards, whatever else the file names.
    plain_width: bool,
    /// One more expert always runs.
    shared: bool,
}

const ROUTED: Routing = Routing {
    normalised: false,
    sigmoid: false,
    plain_width: false,
    shared: false,
};

const NORMALISED: Routing = Routing {
    normalised: true,
    ..ROUTED
};

const SIGMOID: Routing = Routing {
    sigmoid: true,
    ..NORMALISED
};

/// Most families differ from llama in a field or two.
const LLAMA: Family = Family {
    gguf: Some("llama"),
    hf: &[
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "cwm",
        "internlm3",
    ],
    gguf_pairing: Pairing::Neighbours,
    hf_pairing: Pairing::Halves,
    activation: Activation::Silu,
    gated: true,
    block: Block::Before,
    layer_norm: false,
    qkv_bias: false,
    qk_norm: false,
    qk_together: false,
    hf_norm_offset: 0.0,
    scaled_embedding: false,
    divided_logits: false,
    learned_positions: false,
    hf_transposed: false,
    partial_rotary: 1.0,
    nope_interval: None,
    global_nope: false,
    window_interval: None,
    local_rope: None,
    wide_queries: None,
    experts: None,
    latent: false,
    convolution: false,
    plain_norms: false,
    qk_norm_last: false,
    theta: 10000.0,
    sinks: false,
    rounded_yarn: true,
    tied: false,
    hf_layers: "model.layers",
    hf_names: &[],
};

const GEMMA: Family = Family {
    gguf: Some("gemma"),
    hf: &["gemma"],
    gguf_pairing: Pairing::Halves,
    activation: Activation::GeluTanh,
    hf_norm_offset: 1.0,
    scaled_embedding: true,
    tied: true,
    ..LLAMA
};

const GEMMA2: Family = Family {
    gguf: Some("gemma2"),
    hf: &["gemma2"],
    block: Block::Around,
    window_interval: Some(2),
    wide_queries: Some(46),
    hf_names: &[("ffn_norm", "pre_feedforward_layernorm")],
    ..GEMMA
};

const GRANITE: Family = Family {
    gguf: Some("granite"),
    hf: &["granite"],
    divided_logits: true,
    ..LLAMA
};

const GRANITE_MOE: Family = Family {
    gguf: Some("granitemoe"),
    hf: &["granitemoe", "granitemoeshared"],
    experts: Some(NORMALISED),
    hf_names: &[
        ("ffn_gate_inp", "block_sparse_moe.router.layer"),
        ("ffn_gate_up_exps", "block_sparse_moe.input_linear"),
        ("ffn_down_exps", "block_sparse_moe.output_linear"),
        ("ffn_gate_up_shexp", "shared_mlp.input_linear"),
        ("ffn_down_shexp", "shared_mlp.output_linear"),
    ],
    ..GRANITE
};

const COMMAND_R: Family = Family {
    gguf: Some("command-r"),
    hf: &["cohere"],
    hf_pairing: Pairing::Neighbours,
    block: Block::Parallel,
    layer_norm: true,
    tied: true,
    ..LLAMA
};

const OLMO2: Family = Family {
    gguf: Some("olmo2"),
    hf: &["olmo2"],
    gguf_pairing: Pairing::Halves,
    block: Block::After,
    qk_norm: true,
    qk_together: true,
    ..LLAMA
};

const STARCODER2: Family = Family {
    gguf: Some("starcoder2"),
    hf: &["starcoder2"],
    gguf_pairing: Pairing::Halves,
    activation: Activation::GeluTanh,
    gated: false,
    layer_norm: true,
    tied: true,
    hf_names: &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")],
    ..LLAMA
};

const GLM4: Family = Family {
    gguf: Some("glm4"),
    hf: &["glm4"],
    hf_pairing: Pairing::Neighbours,
    block: Block::Around,
    partial_rotary: 0.5,
    hf_names: &[
        ("post_attention_norm", "post_self_attn_layernorm"),
        ("post_ffw_norm", "post_mlp_layernorm"),
    ],
    ..LLAMA
};

const QWEN3: Family = Family {
    gguf: Some("qwen3"),
    hf: &["qwen3"],
    gguf_pairing: Pairing::Halves,
    qk_norm: true,
    ..LLAMA
};

const QWEN2: Family = Family {
    gguf: Some("qwen2"),
    hf: &["qwen2"],
    gguf_pairing: Pairing::Halves,
    qkv_bias: true,
    ..LLAMA
};

/// transformers' names of an expert that always runs.
const SHARED_EXPERTS: &[(&str, &str)] = &[
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
];

/// GGUF files of both versions say of themselves how their routers choose.
const DEEPSEEK2: Family = Family {
    gguf: Some("deepseek2"),
    hf: &["deepseek_v2"],
    hf_pairing: Pairing::Neighbours,
    latent: true,
    experts: Some(ROUTED),
    hf_names: SHARED_EXPERTS,
    ..LLAMA
};

const DEEPSEEK3: Family = Family {
    gguf: None,
    hf: &["deepseek_v3", "kimi_k2", "glm4_moe_lite"],
    experts: Some(SIGMOID),
    ..DEEPSEEK2
};

const ERNIE: Family = Family {
    gguf: Some("ernie4_5"),
    hf: &["ernie4_5", "helium"],
    hf_pairing: Pairing::Neighbours,
    ..LLAMA
};

const HUNYUAN: Family = Family {
    gguf: Some("hunyuan-dense"),
    hf: &["hunyuan_v1_dense"],
    gguf_pairing: Pairing::Halves,
    qk_norm: true,
    qk_norm_last: true,
    hf_names: &[
        ("attn_q_norm", "self_attn.query_layernorm"),
        ("attn_k_norm", "self_attn.key_layernorm"),
    ],
    ..LLAMA
};

const LFM2: Family = Family {
    gguf: Some("lfm2"),
    hf: &["lfm2"],
    gguf_pairing: Pairing::Halves,
    qk_norm: true,
    convolution: true,
    theta: 1e6,
    tied: true,
    hf_names: &[
        ("output_norm", "model.embedding_norm"),
        ("attn_norm", "operator_norm"),
        ("attn_q_norm", "self_attn.q_layernorm"),
        ("attn_k_norm", "self_attn.k_layernorm"),
        ("attn_output", "self_attn.out_proj"),
        ("ffn_norm", "ffn_norm"),
        ("ffn_gate", "feed_forward.w1"),
        ("ffn_up", "feed_forward.w3"),
        ("ffn_down", "feed_forward.w2"),
        ("ffn_gate_inp", "feed_forward.gate"),
        ("exp_probs_b", "feed_forward.expert!"),
        ("ffn_gate.#", "feed_forward.experts.#.w1"),
        ("ffn_up.#", "feed_forward.experts.#.w3"),
        ("ffn_down.#", "feed_forward.experts.#.w2"),
        ("ffn_gate_up_exps", "feed_forward.experts.gate_up_proj!"),
        ("ffn_down_exps", "feed_forward.experts.down_proj!"),
    ],
    ..LLAMA
};

const FAMILIES: &[Family] = &[
    LLAMA,
    QWEN2,
    QWEN3,
    Family {
        gguf: Some("smollm3"),
        hf: &["smollm3"],
        nope_interval: Some(4),
        tied: true,
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    Family {
        gguf: Some("gemma3"),
        hf: &["gemma3_text"],
        qk_norm: true,
        window_interval: Some(6),
        local_rope: Some(Some(10000.0)),
        wide_queries: Some(62),
        ..GEMMA2
    },
    Family {
        gguf: None,
        hf: &["vaultgemma"],
        block: Block::Before,
        ..GEMMA2
    },
    Family {
        gguf: Some("phi3"),
        hf: &["phi3"],
        gguf_pairing: Pairing::Halves,
        ..LLAMA
    },
    Family {
        gguf: None,
        hf: &["mixtral"],
        experts: Some(NORMALISED),
        hf_names: &[
            ("ffn_gate_inp", "block_sparse_moe.gate"),
            ("ffn_gate.#", "block_sparse_moe.experts.#.w1"),
            ("ffn_up.#", "block_sparse_moe.experts.#.w3"),
            ("ffn_down.#", "block_sparse_moe.experts.#.w2"),
            ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj!"),
            ("ffn_down_exps", "block_sparse_moe.experts.down_proj!"),
        ],
        ..LLAMA
    },
    Family {
        gguf: Some("qwen2moe"),
        hf: &["qwen2_moe"],
        experts: Some(ROUTED),
        ..QWEN2
    },
    Family {
        gguf: Some("qwen3moe"),
        hf: &["qwen3_moe"],
        experts: Some(NORMALISED),
        ..QWEN3
    },
    Family {
        gguf: Some("olmoe"),
        hf: &["olmoe"],
        qk_together: true,
        experts: Some(ROUTED),
        ..QWEN3
    },
    GRANITE,
    GRANITE_MOE,
    Family {
        gguf: None,
        ..OLMO2
    },
    // GGUF files of olmo 3 call it olmo 2 with windows.
    Family {
        hf: &["olmo3"],
        window_interval: Some(4),
        local_rope: Some(None),
        ..OLMO2
    },
    Family {
        gguf: Some("stablelm"),
        hf: &["stablelm"],
        gguf_pairing: Pairing::Halves,
        layer_norm: true,
        partial_rotary: 0.25,
        hf_names: &[
            ("attn_q_norm.#", "self_attn.q_layernorm.norms.#"),
            ("attn_k_norm.#", "self_attn.k_layernorm.norms.#"),
        ],
        ..LLAMA
    },
    STARCODER2,
    Family {
        gguf: Some("phi2"),
        hf: &["phi"],
        block: Block::Parallel,
        partial_rotary: 0.5,
        tied: false,
        hf_names: &[
            ("attn_output", "self_attn.dense"),
            ("ffn_up", "mlp.fc1"),
            ("ffn_down", "mlp.fc2"),
            ("output_norm", "model.final_layernorm"),
        ],
        ..STARCODER2
    },
    Family {
        gguf: Some("nemotron"),
        hf: &["nemotron"],
        activation: Activation::ReluSquared,
        hf_norm_offset: 1.0,
        partial_rotary: 0.5,
        tied: false,
        hf_names: &[],
        ..STARCODER2
    },
    Family {
        gguf: Some("seed_oss"),
        hf: &["seed_oss"],
        gguf_pairing: Pairing::Halves,
        ..LLAMA
    },
    Family {
        gguf: Some("arcee"),
        hf: &["arcee"],
        activation: Activation::ReluSquared,
        gated: false,
        ..LLAMA
    },
    Family {
        gguf: Some("gpt2"),
        hf: &["gpt2"],
        learned_positions: true,
        hf_transposed: true,
        hf_layers: "transformer.h",
        hf_names: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("attn_norm", "ln_1"),
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        ],
        ..STARCODER2
    },
    COMMAND_R,
    Family {
        gguf: Some("cohere2"),
        hf: &["cohere2"],
        window_interval: Some(4),
        global_nope: true,
        ..COMMAND_R
    },
    GLM4,
    Family {
        gguf: None,
        hf: &["glm"],
        block: Block::Before,
        hf_names: &[],
        ..GLM4
    },
    ERNIE,
    Family {
        gguf: Some("ernie4_5-moe"),
        hf: &["ernie4_5_moe"],
        theta: 500_000.0,
        experts: Some(NORMALISED),
        tied: true,
        hf_names: &[
            ("exp_probs_b", "mlp.moe_statics.e_score_correction!"),
            ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
            ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
            ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
        ],
        ..ERNIE
    },
    DEEPSEEK2,
    DEEPSEEK3,
    Family {
        hf: &["youtu"],
        experts: None,
        tied: true,
        ..DEEPSEEK3
    },
    Family {
        gguf: Some("glm4moe"),
        hf: &["glm4_moe"],
        gguf_pairing: Pairing::Halves,
        partial_rotary: 0.5,
        experts: Some(SIGMOID),
        hf_names: SHARED_EXPERTS,
        ..LLAMA
    },
    Family {
        gguf: Some("dots1"),
        hf: &["dots1"],
        experts: Some(Routing {
            normalised: false,
            ..SIGMOID
        }),
        hf_names: SHARED_EXPERTS,
        ..QWEN3
    },
    Family {
        gguf: Some("minimax-m2"),
        hf: &["minimax_m2"],
        qk_together: true,
        theta: 5e6,
        experts: Some(Routing {
            plain_width: true,
            ..SIGMOID
        }),
        hf_names: &[
            ("ffn_gate_inp", "block_sparse_moe.gate"),
            ("exp_probs_b", "block_sparse_moe.e_score_correction!"),
            ("ffn_gate.#", "block_sparse_moe.experts.#.w1"),
            ("ffn_up.#", "block_sparse_moe.experts.#.w3"),
            ("ffn_down.#", "block_sparse_moe.experts.#.w2"),
            ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj!"),
            ("ffn_down_exps", "block_sparse_moe.experts.down_proj!"),
        ],
        ..QWEN3
    },
    HUNYUAN,
    Family {
        gguf: Some("hunyuan-moe"),
        hf: &["hunyuan_v1_moe"],
        experts: Some(Routing {
            plain_width: true,
            shared: true,
            ..NORMALISED
        }),
        hf_names: &[
            ("attn_q_norm", "self_attn.query_layernorm"),
            ("attn_k_norm", "self_attn.key_layernorm"),
            ("ffn_gate_inp", "mlp.gate.wg"),
            ("ffn_gate_shexp", "mlp.shared_mlp.gate_proj"),
            ("ffn_up_shexp", "mlp.shared_mlp.up_proj"),
            ("ffn_down_shexp", "mlp.shared_mlp.down_proj"),
        ],
        ..HUNYUAN
    },
    Family {
        gguf: Some("apertus"),
        hf: &["apertus"],
        gguf_pairing: Pairing::Halves,
        activation: XIELU,
        gated: false,
        qk_norm: true,
        theta: 12e6,
        hf_names: &[
            ("attn_norm", "attention_layernorm"),
            ("ffn_norm", "feedforward_layernorm"),
            ("xielu.#", "mlp.act_fn.#!"),
        ],
        ..LLAMA
    },
    Family {
        gguf: Some("olmo"),
        hf: &["olmo"],
        layer_norm: true,
        plain_norms: true,
        ..LLAMA
    },
    LFM2,
    Family {
        gguf: Some("lfm2moe"),
        hf: &["lfm2_moe"],
        experts: Some(SIGMOID),
        ..LFM2
    },
    Family {
        gguf: Some("exaone4"),
        hf: &["exaone4"],
        gguf_pairing: Pairing::Halves,
        block: Block::After,
        qk_norm: true,
        global_nope: true,
        window_interval: Some(4),
        ..LLAMA
    },
    Family {
        gguf: Some("gpt-oss"),
        hf: &["gpt_oss"],
        gguf_pairing: Pairing::Halves,
        activation: Activation::ClampedSwish,
        qkv_bias: true,
        window_interval: Some(2),
        experts: Some(NORMALISED),
        sinks: true,
        rounded_yarn: false,
        hf_names: &[("ffn_gate_inp", "mlp.router")],
        ..LLAMA
    },
];

/// transformers' tensor names, by GGUF's. `#` is a number; a name with `!` is the whole of it, without `.weight`.
const HF_NAMES: &[(&str, &str)] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_sinks", "self_attn.sinks!"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("shortconv.#", "conv.#"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_gate_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("exp_probs_b", "mlp.gate.e_score_correction!"),
    ("ffn_gate.#", "mlp.experts.#.gate_proj"),
    ("ffn_up.#", "mlp.experts.#.up_proj"),
    ("ffn_down.#", "mlp.experts.#.down_proj"),
    ("ffn_gate_up_exps", "mlp.experts.gate_up_proj!"),
    ("ffn_down_exps", "mlp.experts.down_proj!"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

/// Rotary positions of some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position, one for each pair of numbers.
    pub frequencies: Vec<f32>,
    /// The same for long sequences, where the family distinguishes (longrope).
    pub long_frequencies: Option<Vec<f32>>,
    /// Multiplies cosines and sines.
    pub factor: f32,
    /// Queries grow with their distance from the beginning (ministral 3).
    pub growth: Option<Growth>,
}

impl Rope {
    /// Of a whole head of `dim` numbers, unscaled.
    pub fn of_base(base: f32, dim: usize) -> Self {
        Self::new(base_frequencies(base, dim))
    }

    fn new(frequencies: Vec<f32>) -> Self {
        Self {
            frequencies,
            long_frequencies: None,
            factor: 1.0,
            growth: None,
        }
    }
}

/// Queries at position p are multiplied by `1 + beta ln(1 + floor(p / each))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    pub beta: f32,
    pub each: f32,
}

/// xIELU before a layer's own numbers are read.
const XIELU: Activation = Activation::Xielu {
    positive: 0.8,
    negative: 0.8,
    beta: 0.5,
};

/// Attention over latents (MLA; DeepSeek-AI 2024, arXiv:2405.04434). The cache holds a latent and a rotated key for each
/// position, which all heads share: `Arch::kv_heads` is 1, `Arch::head_dim` the size of both together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentArch {
    /// Size of what queries are made of; none: they are made of the stream.
    pub query_rank: Option<usize>,
    /// Size of a latent.
    pub rank: usize,
    /// The part of a query or key that is not rotated, and the part that is.
    pub plain: usize,
    pub rotated: usize,
    /// Size of a head's values.
    pub value: usize,
    /// Of the norms of what queries are made of, and of latents.
    pub eps: f32,
}

/// Experts stand in groups of equal size, of which the best are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    pub count: usize,
    pub used: usize,
}

/// Feed-forwards of which a router chooses some for each token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertArch {
    pub count: usize,
    /// How many run for a token.
    pub used: usize,
    pub intermediate_size: usize,
    /// One that always runs, beside them.
    pub shared_size: Option<usize>,
    /// The chosen ones' shares are made to add up to one.
    pub normalised: bool,
    /// Scores are each expert's own, by a sigmoid; else one distribution, by a softmax.
    pub sigmoid: bool,
    pub groups: Option<Groups>,
    /// Multiplies the shares.
    pub scale: f32,
}

/// One layer's own traits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerArch {
    /// Which of `Arch::ropes`; `None`: no positions.
    pub rope: Option<usize>,
    /// How many positions back it sees, its own among them; `None`: all.
    pub window: Option<usize>,
    /// Its feed-forward is one of `Arch::experts`.
    pub experts: bool,
    /// It is a short convolution in place of attention.
    pub convolution: bool,
}

/// Where tensor names come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Gguf,
    Transformers {
        layers: &'static str,
        own: &'static [(&'static str, &'static str)],
        /// Saved without the head: names lack their first part.
        bare: bool,
    },
}

/// A model's shape, whatever file it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// The family, by its GGUF name if it has one.
    pub family: &'static str,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Positions that the model was made for.
    pub context_size: usize,
    pub norm_eps: f32,
    /// Added to norm weights when they are read.
    pub norm_offset: f32,
    pub activation: Activation,
    /// The feed-forward has a gate beside its inputs.
    pub gated: bool,
    pub block: Block,
    /// Norms take the mean off, and may have biases.
    pub layer_norm: bool,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies what attention and feed-forward add.
    pub residual_scale: f32,
    /// Multiplies logits, before they are capped.
    pub logit_scale: f32,
    /// Multiplies attention scores.
    pub attention_scale: f32,
    pub attention_softcap: Option<f32>,
    pub logit_softcap: Option<f32>,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    /// Norms of queries and keys see all heads of a row as one vector.
    pub qk_together: bool,
    /// They come after the rotation.
    pub qk_norm_last: bool,
    /// Queries, keys and values are kept within this of zero.
    pub qkv_limit: Option<f32>,
    /// Norms have no weights.
    pub plain_norms: bool,
    pub latent: Option<LatentArch>,
    /// How many positions the short convolutions of layers see.
    pub convolution: Option<usize>,
    /// Layers after the last one, for guessing tokens: the file's, not read.
    pub guessing_layers: usize,
    /// Tokens' positions are a table.
    pub learned_positions: bool,
    /// Matrices are stored as `[inputs, outputs]`.
    pub transposed: bool,
    /// Each head has a score that takes weight and gives nothing.
    pub sinks: bool,
    pub experts: Option<ExpertArch>,
    pub tied: bool,
    pub pairing: Pairing,
    pub ropes: Vec<Rope>,
    pub layers: Vec<LayerArch>,
    /// A token sees those after it too: it makes vectors, no text (embeddinggemma).
    pub both_ways: bool,
    /// Prompts longer than this take `Rope::long_frequencies`.
    pub original_context: Option<usize>,
    names: Names,
}

/// No real model comes near these; a hostile file might.
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 20;
const MAX_CONTEXT: usize = 1 << 24;

impl Arch {
    /// Read it from a model's metadata or `config.json`.
    ///
    /// # Errors
    /// `Unsupported` names an unknown architecture or rope scaling and what is known; `ModelFile` a missing or
    /// impossible value.
    pub fn read(weights: &Weights) -> Result<Self> {
        let arch = Self::read_any(weights)?;
        match arch.both_ways {
            false => Ok(arch),
            true => Err(Error::Unsupported {
                what: "attention",
                name: "bidirectional".into(),
                supported: "causal; SentenceEncoder makes vectors with this model".into(),
            }),
        }
    }

    /// The same, also of a model that makes vectors alone.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_any(weights: &Weights) -> Result<Self> {
        let arch = match &weights.config {
            Some(config) => from_config(weights, config)?,
            None => from_gguf(weights)?,
        };
        arch.check(weights)?;
        Ok(arch)
    }

    /// The file's name for a tensor: `name` as GGUF has it, less `blk.N.` for a tensor of a layer.
    pub fn tensor_name(&self, layer: Option<usize>, name: &str) -> String {
        match (self.names, layer) {
            (Names::Gguf, None) => name.to_string(),
            (Names::Gguf, Some(i)) => format!("blk.{i}.{name}"),
            (Names::Transformers { layers, own, bare }, layer) => {
                let name = transformers_name(layers, own, layer, name);
                match name.split_once('.') {
                    Some((_, rest)) if bare => rest.to_string(),
                    _ => name,
                }
            }
        }
    }

    /// transformers' name of a layer's module, whatever file the model came from: `name` as GGUF has it.
    pub fn module_name(&self, layer: usize, name: &str) -> String {
        let (layers, own) = match self.names {
            Names::Transformers { layers, own, .. } => (layers, own),
            Names::Gguf => {
                let family = self.family();
                (family.hf_layers, family.hf_names)
            }
        };
        let name = transformers_name(layers, own, Some(layer), name);
        name.strip_suffix(".weight")
            .map_or(name.clone(), str::to_string)
    }

    /// How transformers pairs the numbers of a head.
    pub fn transformers_pairing(&self) -> Pairing {
        match self.names {
            Names::Transformers { .. } => self.pairing,
            Names::Gguf => self.family().hf_pairing,
        }
    }

    /// The row of a GGUF file's family.
    fn family(&self) -> &'static Family {
        let found = FAMILIES.iter().find(|f| f.gguf == Some(self.family));
        found.unwrap_or(&LLAMA)
    }

    fn check(&self, weights: &Weights) -> Result<()> {
        let width = |name: &str, value: usize, limit: usize| {
            if (1..=limit).contains(&value) {
                return Ok(());
            }
            Err(weights.problem(format!("{name} must be between 1 and {limit}, got {value}")))
        };
        width("the number of layers", self.layers.len(), MAX_LAYERS)?;
        width("the hidden size", self.hidden_size, MAX_WIDTH)?;
        width("the intermediate size", self.intermediate_size, MAX_WIDTH)?;
        width("the number of heads", self.heads, 4096)?;
        width(
            "the number of key and value heads",
            self.kv_heads,
            self.heads,
        )?;
        width("the head size", self.head_dim, 4096)?;
        width("the context size", self.context_size, MAX_CONTEXT)?;
        width("the vocabulary", self.vocab_size, 1 << 24)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return Err(weights.problem(format!(
                "{heads} heads do not share {kv} key and value heads evenly"
            )));
        }
        let angles = self
            .ropes
            .iter()
            .map(|r| r.frequencies.len())
            .max()
            .unwrap_or(0);
        if 2 * angles > self.head_dim {
            return Err(weights.problem(format!(
                "{angles} rotary pairs in heads of {}",
                self.head_dim
            )));
        }
        self.check_experts(weights)?;
        self.check_mixers(weights)?;
        let finite = [
            self.norm_eps,
            self.attention_scale,
            self.embedding_scale,
            self.residual_scale,
            self.logit_scale,
        ];
        if finite.iter().any(|x| !x.is_finite()) || self.norm_eps < 0.0 {
            return Err(weights.problem("norm epsilon and scales must be finite"));
        }
        Ok(())
    }

    /// Experts' tensors are `[experts, inputs, outputs]`, gates and inputs in pairs: transformers' gpt-oss.
    pub fn turned_experts(&self) -> bool {
        self.sinks && self.names != Names::Gguf
    }

    /// Whether a tensor is of a layer that is not read.
    pub fn is_guessing(&self, tensor: &str) -> bool {
        let first = match self.names {
            Names::Gguf => "blk",
            Names::Transformers { layers, .. } => layers,
        };
        let number = tensor
            .strip_prefix(first)
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|rest| rest.split('.').next())
            .and_then(|number| number.parse::<usize>().ok());
        let layers = self.layers.len();
        number.is_some_and(|n| (layers..layers.saturating_add(self.guessing_layers)).contains(&n))
    }

    fn check_mixers(&self, weights: &Weights) -> Result<()> {
        if let Some(latent) = &self.latent {
            for (what, size) in [
                ("the rank of queries", latent.query_rank.unwrap_or(1)),
                ("the rank of latents", latent.rank),
                ("the part of keys that is not rotated", latent.plain),
                ("the part of keys that is rotated", latent.rotated),
                ("the size of values", latent.value),
            ] {
                let limit = if what == "the rank of queries" {
                    MAX_WIDTH
                } else {
                    4096
                };
                if !(1..=limit).contains(&size) {
                    return Err(weights
                        .problem(format!("{what} must be between 1 and {limit}, got {size}")));
                }
            }
        }
        if !self.layers.iter().any(|layer| layer.convolution) {
            return Ok(());
        }
        match self.convolution {
            Some(2..=64) if self.hidden_size.is_multiple_of(2) => Ok(()),
            Some(2..=64) => Err(weights.problem(format!(
                "the hidden size of short convolutions must be even, got {}",
                self.hidden_size
            ))),
            got => Err(weights.problem(format!(
                "short convolutions see 2 to 64 positions, got {got:?}"
            ))),
        }
    }

    fn check_experts(&self, weights: &Weights) -> Result<()> {
        let Some(experts) = &self.experts else {
            return Ok(());
        };
        let (count, used) = (experts.count, experts.used);
        if self.block != Block::Before {
            return Err(weights.problem("experts without a norm before them"));
        }
        if !(1..=4096).contains(&count) || !(1..=count).contains(&used) {
            return Err(weights.problem(format!(
                "{used} of {count} experts for each token, wanted 1 to all of at most 4096"
            )));
        }
        if let Some(groups) = &experts.groups {
            let (of, used) = (groups.count, groups.used);
            let even = of > 0 && count.is_multiple_of(of) && (1..=of).contains(&used);
            // A group's score is the sum of its best two.
            let alone = even && experts.sigmoid && count / of < 2;
            if !even || alone || count / of * used < experts.used {
                return Err(weights.problem(format!(
                    "{} of {count} experts for each token cannot stand in {used} of {of} groups",
                    experts.used
                )));
            }
        }
        if !experts.scale.is_finite() {
            return Err(weights.problem("the scale of experts must be finite"));
        }
        for width in [Some(experts.intermediate_size), experts.shared_size] {
            if let Some(width) = width.filter(|w| !(1..=MAX_WIDTH).contains(w)) {
                return Err(weights.problem(format!(
                    "the size of an expert must be between 1 and {MAX_WIDTH}, got {width}"
                )));
            }
        }
        Ok(())
    }
}

/// Angles per position: base^(-2 i / dim), computed in f32 as transformers does.
fn base_frequencies(base: f32, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| 1.0 / base.powf((2 * i) as f32 / dim as f32))
        .collect()
}

fn unknown(what: &'static str, name: &str, supported: impl Iterator<Item = &'static str>) -> Error {
    let supported: Vec<_> = supported.map(str::to_string).collect();
    let near = nearest(name, supported.iter())
        .map(|near| format!("; the nearest is {near:?}"))
        .unwrap_or_default();
    let elsewhere = match what {
        "architecture" => "; backend=\"transformers\" may run it",
        _ => "",
    };
    Error::Unsupported {
        what,
        name: name.to_string(),
        supported: supported.join(", ") + &near + elsewhere,
    }
}

// ---------------------------------------------------------------------------------------------------- GGUF

fn from_gguf(w: &Weights) -> Result<Arch> {
    let name = w
        .get_str("general.architecture")?
        .ok_or_else(|| w.missing_key("general.architecture"))?;
    let family = FAMILIES
        .iter()
        .find(|f| f.gguf == Some(name))
        .ok_or_else(|| unknown("architecture", name, FAMILIES.iter().filter_map(|f| f.gguf)))?;
    let key = |k: &str| format!("{name}.{k}");
    let size = |k: &str| w.get_usize(&key(k));
    let need = |k: &str| size(k)?.ok_or_else(|| w.missing_key(&key(k)));
    let hidden_size = need("embedding_length")?;
    let heads = need("attention.head_count")?;
    let head_dim = match size("attention.key_length")? {
        Some(n) => n,
        None if heads > 0 => hidden_size / heads,
        None => 0,
    };
    let value_dim = size("attention.value_length")?.unwrap_or(head_dim);
    if value_dim != head_dim && !family.latent {
        return Err(w.problem(format!(
            "keys of {head_dim} and values of {value_dim} numbers per head"
        )));
    }
    let guessing_layers = size("nextn_predict_layers")?.unwrap_or(0);
    let layers = need("block_count")?.saturating_sub(guessing_layers);
    let layers = layers.min(MAX_LAYERS + 1);
    let kv_heads = gguf_kv_heads(w, &key("attention.head_count_kv"), heads)?;
    let context_size = need("context_length")?;
    let scaling = gguf_scaling(w, name)?;
    let dim = size("rope.dimension_count")?
        .unwrap_or(head_dim)
        .min(2 * MAX_WIDTH);
    let base = w.get_f32(&key("rope.freq_base"))?.unwrap_or(family.theta);
    let mut global = Rope::new(base_frequencies(base, dim));
    gguf_scale(w, family, &scaling, base, &mut global)?;
    let mut ropes = vec![global];
    if let Some(of) = family.local_rope {
        let own = w.get_f32(&key("rope.freq_base_swa"))?.or(of);
        ropes.push(Rope::new(base_frequencies(own.unwrap_or(base), dim)));
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let norm_eps = match w.get_f32(&key("attention.layer_norm_epsilon"))? {
        Some(eps) => eps,
        None => w.get_f32(&eps)?.ok_or_else(|| w.missing_key(&eps))?,
    };
    let vocab_size = match size("vocab_size")? {
        Some(n) => n,
        None => w.require("token_embd.weight")?.rows(),
    };
    let experts = gguf_experts(w, family, name, layers)?;
    let dense_layers = size("leading_dense_block_count")?.unwrap_or(0);
    let windows = gguf_windows(w, family, name)?;
    let logit_scale = w.get_f32(&key("logit_scale"))?.filter(|&x| x != 0.0);
    let parallel = w.get_bool(&key("use_parallel_residual"))?.unwrap_or(false);
    let interval = size("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let layer = |i: usize| LayerArch {
        experts: experts.is_some() && i >= dense_layers && (i + 1).is_multiple_of(interval),
        convolution: family.convolution && kv_heads.get(i) == Some(&0),
        ..windows.layer(family, i)
    };
    let latent = gguf_latent(w, family, name, dim, norm_eps)?;
    let scale = match (
        w.get_f32(&key("attention.scale"))?.filter(|&x| x > 0.0),
        &latent,
    ) {
        (Some(scale), _) => scale,
        (None, Some(latent)) => {
            let length = (latent.plain + latent.rotated) as f32;
            scaling.growth().powi(2) / length.sqrt()
        }
        (None, None) => gguf_attention_scale(family, layers, hidden_size, heads, head_dim),
    };
    let mut arch = Arch {
        vocab_size,
        hidden_size,
        intermediate_size: match &experts {
            Some(e) => size("feed_forward_length")?.unwrap_or(e.intermediate_size),
            None => need("feed_forward_length")?,
        },
        heads,
        kv_heads: match latent {
            Some(_) => 1,
            None => kv_heads.iter().copied().max().unwrap_or(heads),
        },
        head_dim: latent.map_or(head_dim, |l| l.rank.saturating_add(l.rotated)),
        context_size,
        norm_eps,
        norm_offset: 0.0,
        qkv_limit: w.get_f32(&key("attention.clamp_kqv"))?.filter(|&x| x > 0.0),
        latent,
        convolution: size("shortconv.l_cache")?,
        guessing_layers,
        embedding_scale: w.get_f32(&key("embedding_scale"))?.unwrap_or(1.0),
        residual_scale: w.get_f32(&key("residual_scale"))?.unwrap_or(1.0),
        logit_scale: match (logit_scale, family.divided_logits) {
            (Some(by), true) => 1.0 / by,
            (by, _) => by.unwrap_or(1.0),
        },
        attention_scale: scale,
        attention_softcap: w
            .get_f32(&key("attn_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        logit_softcap: w
            .get_f32(&key("final_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        tied: w.tensor("output.weight").is_none(),
        pairing: family.gguf_pairing,
        ropes,
        layers: (0..layers).map(layer).collect(),
        original_context: scaling.original_context,
        experts,
        names: Names::Gguf,
        ..family.arch()
    };
    arch.qk_norm |= w.tensor("blk.0.attn_q_norm.weight").is_some();
    arch.transposed = false;
    if parallel {
        arch.block = Block::Parallel;
    }
    if family.scaled_embedding {
        arch.embedding_scale = (hidden_size as f32).sqrt();
    }
    Ok(arch)
}

/// Heads of keys and values: of all layers, or of each, where 0 means that it has no attention.
fn gguf_kv_heads(w: &Weights, key: &str, heads: usize) -> Result<Vec<usize>> {
    let Some(Value::Ints(_)) = w.metadata.get(key) else {
        return Ok(vec![w.get_usize(key)?.unwrap_or(heads)]);
    };
    let all = w.get_ints(key)?.unwrap_or_default();
    let all: Vec<_> = all
        .iter()
        .map(|&n| usize::try_from(n).unwrap_or(usize::MAX))
        .collect();
    let mut with = all.iter().filter(|&&n| n > 0);
    let first = with.next();
    match with.find(|n| Some(*n) != first) {
        None => Ok(all),
        Some(other) => Err(w.problem(format!(
            "layers with {} and with {other} key and value heads",
            first.copied().unwrap_or_default()
        ))),
    }
}

fn gguf_latent(
    w: &Weights,
    family: &Family,
    name: &str,
    rotated: usize,
    eps: f32,
) -> Result<Option<LatentArch>> {
    if !family.latent {
        return Ok(None);
    }
    let size = |k: &str| w.get_usize(&format!("{name}.attention.{k}"));
    // Files whose cache is made for latents say their sizes first, the model's beside them.
    let either = |a: &str, b: &str| match size(a)? {
        Some(n) => Ok(n),
        None => size(b)?.ok_or_else(|| w.missing_key(&format!("{name}.attention.{b}"))),
    };
    let key = either("key_length_mla", "key_length")?;
    Ok(Some(LatentArch {
        query_rank: size("q_lora_rank")?.filter(|&n| n > 0),
        rank: either("kv_lora_rank", "kv_lora_rank")?,
        plain: key.saturating_sub(rotated),
        rotated,
        value: either("value_length_mla", "value_length")?,
        eps,
    }))
}

fn gguf_experts(
    w: &Weights,
    family: &Family,
    name: &str,
    layers: usize,
) -> Result<Option<ExpertArch>> {
    let key = |k: &str| format!("{name}.{k}");
    let size = |k: &str| w.get_usize(&key(k));
    let Some(count) = size("expert_count")?.filter(|&n| n > 0) else {
        return Ok(None);
    };
    let need = |k: &str| size(k)?.ok_or_else(|| w.missing_key(&key(k)));
    let routing = family.experts.unwrap_or(NORMALISED);
    // Converters have written other sizes of shared experts than theirs.
    let shared = |i: usize| w.tensor(&format!("blk.{i}.ffn_up_shexp.weight"));
    let shared = (0..layers).find_map(shared).map(|t| t.rows());
    let groups = match (
        size("expert_group_count")?,
        size("expert_group_used_count")?,
    ) {
        (Some(count), Some(used)) if count > 1 => Some(Groups { count, used }),
        _ => None,
    };
    Ok(Some(ExpertArch {
        count,
        used: need("expert_used_count")?,
        intermediate_size: match size("expert_feed_forward_length")? {
            Some(n) => n,
            None => need("feed_forward_length")?,
        },
        shared_size: match shared {
            Some(rows) => Some(rows),
            None => size("expert_shared_feed_forward_length")?.filter(|&n| n > 0),
        },
        normalised: w
            .get_bool(&key("expert_weights_norm"))?
            .unwrap_or(routing.normalised),
        sigmoid: match size("expert_gating_func")? {
            None | Some(0) => routing.sigmoid,
            Some(1) => false,
            Some(2) => true,
            Some(other) => {
                return Err(w.problem(format!(
                    "experts are chosen by function 1 (softmax) or 2 (sigmoid), got {other}"
                )));
            }
        },
        groups,
        scale: w
            .get_f32(&key("expert_weights_scale"))?
            .filter(|&x| x != 0.0)
            .unwrap_or(1.0),
    }))
}

/// Which layers of a GGUF model have a window.
struct Windows {
    window: Option<usize>,
    interval: Option<usize>,
    listed: Option<Vec<bool>>,
}

fn gguf_windows(w: &Weights, family: &Family, name: &str) -> Result<Windows> {
    let window = w.get_usize(&format!("{name}.attention.sliding_window"))?;
    let key = format!("{name}.attention.sliding_window_pattern");
    let (mut interval, mut listed) = (family.window_interval, None);
    match w.metadata.get(&key) {
        Some(Value::Bools(_)) => listed = w.get_bools(&key)?.map(<[bool]>::to_vec),
        Some(_) => interval = w.get_usize(&key)?.filter(|&n| n > 0),
        None => {}
    }
    let window = window.filter(|&n| n > 0);
    Ok(Windows {
        window,
        interval,
        listed,
    })
}

impl Windows {
    /// The traits of layer `i`: with an interval n, layers n-1, 2n-1, ... see everything.
    fn layer(&self, family: &Family, i: usize) -> LayerArch {
        let nope = family
            .nope_interval
            .is_some_and(|n| (i + 1).is_multiple_of(n));
        let windowed = match (&self.listed, self.interval) {
            (Some(listed), _) => listed.get(i).copied().unwrap_or(false),
            (None, Some(n)) => !(i + 1).is_multiple_of(n),
            (None, None) => true,
        };
        let window = self.window.filter(|_| windowed);
        let local = usize::from(window.is_some() && family.local_rope.is_some());
        let nope = nope || (family.global_nope && self.window.is_some() && !windowed);
        let nope = nope || family.learned_positions;
        LayerArch {
            rope: (!nope).then_some(local),
            window,
            experts: false,
            convolution: false,
        }
    }
}

impl Family {
    fn name(&self) -> &'static str {
        let hf = self.hf.first().copied();
        self.gguf.or(hf).unwrap_or_default()
    }

    /// What the family alone says of a model; all sizes are 0.
    fn arch(&self) -> Arch {
        Arch {
            family: self.name(),
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            context_size: 0,
            norm_eps: 0.0,
            norm_offset: self.hf_norm_offset,
            activation: self.activation,
            gated: self.gated,
            block: self.block,
            layer_norm: self.layer_norm,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            attention_scale: 1.0,
            attention_softcap: None,
            logit_softcap: None,
            qkv_bias: self.qkv_bias,
            qk_norm: self.qk_norm,
            qk_together: self.qk_together,
            qk_norm_last: self.qk_norm_last,
            qkv_limit: None,
            plain_norms: self.plain_norms,
            latent: None,
            convolution: None,
            guessing_layers: 0,
            learned_positions: self.learned_positions,
            transposed: self.hf_transposed,
            sinks: self.sinks,
            experts: None,
            tied: self.tied,
            pairing: self.hf_pairing,
            ropes: Vec::new(),
            layers: Vec::new(),
            both_ways: false,
            original_context: None,
            names: Names::Gguf,
        }
    }
}

/// GGUF files do not say `query_pre_attn_scalar`: it is the head size, but for gemma's largest models.
fn gguf_attention_scale(
    family: &Family,
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
) -> f32 {
    let width = if family.wide_queries == Some(layers) && heads > 0 {
        hidden / heads
    } else {
        head_dim
    };
    1.0 / (width as f32).sqrt()
}

struct GgufScaling {
    kind: String,
    factor: f32,
    attention_factor: Option<f32>,
    original_context: Option<usize>,
    /// Of what scores grow by with the logarithm of the factor: then the angles' own factor is 1 (deepseek).
    log_multiplier: Option<f32>,
}

impl GgufScaling {
    /// What queries and keys are multiplied by.
    fn growth(&self) -> f32 {
        match self.log_multiplier.filter(|_| self.factor > 1.0) {
            Some(by) => 1.0 + by * self.factor.ln(),
            None => 1.0,
        }
    }
}

fn gguf_scaling(w: &Weights, name: &str) -> Result<GgufScaling> {
    let key = |k: &str| format!("{name}.rope.scaling.{k}");
    Ok(GgufScaling {
        kind: w.get_str(&key("type"))?.unwrap_or("none").to_string(),
        factor: w.get_f32(&key("factor"))?.unwrap_or(1.0),
        attention_factor: w.get_f32(&key("attn_factor"))?,
        original_context: w.get_usize(&key("original_context_length"))?,
        log_multiplier: w.get_f32(&key("yarn_log_multiplier"))?,
    })
}

fn gguf_scale(
    w: &Weights,
    family: &Family,
    scaling: &GgufScaling,
    base: f32,
    rope: &mut Rope,
) -> Result<()> {
    let name = family.name();
    let factors = |tensor: &str| -> Result<Option<Vec<f32>>> {
        let Some(t) = w.tensor(tensor) else {
            return Ok(None);
        };
        if t.elements() != rope.frequencies.len() {
            let (got, want) = (t.elements(), rope.frequencies.len());
            return Err(w.problem(format!(
                "tensor {tensor:?} has {got} numbers, wanted {want}"
            )));
        }
        Ok(Some(t.dequantize()))
    };
    let divided = |by: &[f32]| {
        rope.frequencies
            .iter()
            .zip(by)
            .map(|(f, by)| f / by)
            .collect::<Vec<_>>()
    };
    if let (Some(long), Some(short)) = (
        factors("rope_factors_long.weight")?,
        factors("rope_factors_short.weight")?,
    ) {
        let context = w.get_usize(&format!("{name}.context_length"))?.unwrap_or(0);
        let original = scaling.original_context.unwrap_or(context).max(1);
        rope.factor = scaling
            .attention_factor
            .unwrap_or_else(|| longrope_factor(context, original));
        (rope.long_frequencies, rope.frequencies) = (Some(divided(&long)), divided(&short));
        return Ok(());
    }
    if let Some(by) = factors("rope_freqs.weight")? {
        rope.frequencies = divided(&by);
        return Ok(());
    }
    match scaling.kind.as_str() {
        "none" => {}
        "linear" if scaling.factor > 0.0 => {
            rope.frequencies
                .iter_mut()
                .for_each(|f| *f /= scaling.factor);
        }
        "yarn" if scaling.factor > 0.0 => {
            let beta = |k: &str| w.get_f32(&format!("{name}.rope.scaling.{k}"));
            let context = w.get_usize(&format!("{name}.context_length"))?.unwrap_or(0);
            let yarn = Yarn {
                factor: scaling.factor,
                original: scaling.original_context.unwrap_or(context) as f32,
                fast: beta("yarn_beta_fast")?.unwrap_or(32.0),
                slow: beta("yarn_beta_slow")?.unwrap_or(1.0),
                truncate: family.rounded_yarn,
            };
            yarn.scale(base, &mut rope.frequencies);
            let own = scaling.attention_factor.unwrap_or(1.0);
            rope.factor = match scaling.log_multiplier {
                Some(_) => own,
                None => own * yarn_factor(scaling.factor, 1.0),
            };
        }
        // Without its factor tensors there is nothing to scale by.
        "longrope" => {}
        other => {
            return Err(unknown(
                "rope scaling",
                other,
                ["none", "linear", "longrope", "yarn"].into_iter(),
            ));
        }
    }
    Ok(())
}

/// LongRoPE's attention factor (Ding et al. 2024, arXiv:2402.13753).
fn longrope_factor(context: usize, original: usize) -> f32 {
    let ratio = context as f64 / original as f64;
    if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / (original as f64).ln()).sqrt() as f32
    }
}

// ---------------------------------------------------------------------------------------------------- config.json

/// Values of a `config.json`, with errors that name the key.
struct Config<'a> {
    weights: &'a Weights,
    json: &'a Json,
}

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.json.get(key).filter(|v| !v.is_null())
    }
    fn wrong(&self, key: &str, wanted: &str, got: &Json) -> Error {
        let got: String = got.to_string().chars().take(60).collect();
        self.weights.problem(format!(
            "config.json: {key:?} should be {wanted}, got {got}"
        ))
    }
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        // A list of a number for each layer, where they are all the same.
        let one = match v.as_array().map(Vec::as_slice) {
            Some([first, rest @ ..]) if rest.iter().all(|x| x == first) => first,
            _ => v,
        };
        let n = one
            .as_u64()
            .ok_or_else(|| self.wrong(key, "a whole number", v))?;
        Ok(Some(usize::try_from(n).unwrap_or(usize::MAX)))
    }
    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| self.weights.problem(format!("config.json has no {key:?}")))
    }
    /// The first of these keys that there is.
    fn either(&self, keys: &[&str]) -> Result<Option<usize>> {
        for key in keys {
            if let Some(n) = self.size(key)? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }
    /// One of these keys must be there; the first is what it should be called.
    fn need_either(&self, keys: &[&str]) -> Result<usize> {
        match self.either(keys)? {
            Some(n) => Ok(n),
            None => self.need(keys.first().copied().unwrap_or_default()),
        }
    }
    fn float(&self, key: &str) -> Result<Option<f32>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        let x = v.as_f64().filter(|x| x.is_finite());
        Ok(Some(
            x.ok_or_else(|| self.wrong(key, "a finite number", v))? as f32,
        ))
    }
    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        Ok(Some(
            v.as_bool()
                .ok_or_else(|| self.wrong(key, "true or false", v))?,
        ))
    }
    fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        let wrong = || self.wrong(key, "a list of finite numbers", v);
        let list = v.as_array().ok_or_else(wrong)?;
        list.iter()
            .map(|x| {
                x.as_f64()
                    .filter(|x| x.is_finite())
                    .map(|x| x as f32)
                    .ok_or_else(wrong)
            })
            .collect::<Result<_>>()
            .map(Some)
    }
    fn str(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Json::as_str)
    }
    fn of<'b>(&'b self, json: &'b Json) -> Config<'b> {
        Config {
            weights: self.weights,
            json,
        }
    }
}

fn from_config(weights: &Weights, json: &Json) -> Result<Arch> {
    let c = Config { weights, json };
    let name = c
        .str("model_type")
        .ok_or_else(|| weights.problem("config.json has no \"model_type\""))?;
    let known = || FAMILIES.iter().flat_map(|f| f.hf.iter().copied());
    let family = FAMILIES
        .iter()
        .find(|f| f.hf.contains(&name))
        .ok_or_else(|| unknown("architecture", name, known()))?;
    let hidden_size = c.need_either(&["hidden_size", "n_embd"])?;
    let heads = c.need_either(&["num_attention_heads", "n_head"])?;
    let latent = config_latent(&c, family)?;
    let head_dim = match (latent, c.size("head_dim")?) {
        (Some(latent), _) => latent.rotated,
        (None, Some(n)) => n,
        (None, None) if heads > 0 => hidden_size / heads,
        (None, None) => 0,
    };
    let layers = c.need_either(&["num_hidden_layers", "n_layer"])?;
    let context_size = c.need_either(&["max_position_embeddings", "n_positions"])?;
    let length = latent.map_or(head_dim, |l| l.plain.saturating_add(l.rotated));
    let scalar = c.float("query_pre_attn_scalar")?.unwrap_or(length as f32);
    let (ropes, original_context) =
        config_ropes(&c, family, head_dim.min(MAX_WIDTH), context_size)?;
    let names = |bare| Names::Transformers {
        layers: family.hf_layers,
        own: family.hf_names,
        bare,
    };
    let mut arch = Arch {
        vocab_size: c.need("vocab_size")?,
        hidden_size,
        intermediate_size: config_width(&c, family, hidden_size)?,
        heads,
        kv_heads: match latent {
            Some(_) => 1,
            None => c.size("num_key_value_heads")?.unwrap_or(heads),
        },
        head_dim: latent.map_or(head_dim, |l| l.rank.saturating_add(l.rotated)),
        context_size,
        qkv_limit: c.float("clip_qkv")?.filter(|&x| x > 0.0),
        latent,
        convolution: c.size("conv_L_cache")?,
        guessing_layers: c
            .either(&["num_nextn_predict_layers", "num_mtp_layers"])?
            .unwrap_or(0),
        norm_eps: config_eps(&c, family)?,
        activation: config_activation(&c, family)?,
        embedding_scale: match family.scaled_embedding {
            true => (hidden_size as f32).sqrt(),
            false => c.float("embedding_multiplier")?.unwrap_or(1.0),
        },
        residual_scale: c.float("residual_multiplier")?.unwrap_or(1.0),
        logit_scale: c.float("logit_scale")?.unwrap_or(1.0)
            / c.float("logits_scaling")?.unwrap_or(1.0),
        attention_scale: match c.float("attention_multiplier")? {
            Some(scale) => scale,
            None => config_growth(&c, &latent)?.powi(2) / scalar.sqrt(),
        },
        attention_softcap: c.float("attn_logit_softcapping")?,
        logit_softcap: c.float("final_logit_softcapping")?,
        experts: config_experts(&c, family)?,
        tied: match c.bool("tie_embedding")? {
            Some(tied) => tied,
            None => c.bool("tie_word_embeddings")?.unwrap_or(family.tied),
        },
        ropes,
        layers: (0..layers.min(MAX_LAYERS + 1))
            .map(|i| config_layer(&c, family, i))
            .collect::<Result<_>>()?,
        both_ways: both_ways(&c),
        original_context,
        names: names(false),
        ..family.arch()
    };
    arch.qkv_bias |= c.bool("attention_bias")?.unwrap_or(false);
    for key in ["use_qk_norm", "qk_layernorm"] {
        arch.qk_norm |= c.bool(key)?.unwrap_or(false);
    }
    if latent.is_some() && c.bool("rope_interleave")? == Some(false) {
        arch.pairing = Pairing::Halves;
    }
    if c.bool("use_parallel_residual")?.unwrap_or(false) {
        arch.block = Block::Parallel;
    }
    let embedding = "token_embd.weight";
    if weights.tensor(&arch.tensor_name(None, embedding)).is_none() {
        arch.names = names(true);
        if weights.tensor(&arch.tensor_name(None, embedding)).is_none() {
            arch.names = names(false);
        }
    }
    Ok(arch)
}

fn both_ways(c: &Config) -> bool {
    let value = c.get("use_bidirectional_attention");
    value.and_then(Json::as_bool).unwrap_or(false)
}

fn config_eps(c: &Config, family: &Family) -> Result<f32> {
    for key in [
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ] {
        if let Some(eps) = c.float(key)? {
            return Ok(eps);
        }
    }
    Ok(if family.layer_norm { 1e-5 } else { 1e-6 })
}

fn config_latent(c: &Config, family: &Family) -> Result<Option<LatentArch>> {
    if !family.latent {
        return Ok(None);
    }
    Ok(Some(LatentArch {
        query_rank: c.size("q_lora_rank")?,
        rank: c.need("kv_lora_rank")?,
        plain: c.need("qk_nope_head_dim")?,
        rotated: c.need("qk_rope_head_dim")?,
        value: c.need("v_head_dim")?,
        // Whatever the model's other norms have.
        eps: 1e-6,
    }))
}

/// What queries and keys of latents are multiplied by, where the rope is scaled.
fn config_growth(c: &Config, latent: &Option<LatentArch>) -> Result<f32> {
    let scaling = c.get("rope_parameters").or_else(|| c.get("rope_scaling"));
    let Some(scaling) = scaling.filter(|_| latent.is_some()) else {
        return Ok(1.0);
    };
    let s = c.of(scaling);
    let kind = s.str("rope_type").or_else(|| s.str("type"));
    let all = s.float("mscale_all_dim")?.filter(|x| *x != 0.0);
    match (kind, all, s.float("factor")?) {
        (None | Some("default"), ..) | (_, None, _) | (.., None) => Ok(1.0),
        (_, Some(all), Some(factor)) => Ok(yarn_factor(factor, all)),
    }
}

/// How wide feed-forwards are.
fn config_width(c: &Config, family: &Family, hidden_size: usize) -> Result<usize> {
    let width = match c.either(&["block_ff_dim", "intermediate_size", "n_inner"])? {
        None if family.hf_transposed => hidden_size.saturating_mul(4),
        Some(n) => n,
        None => c.need("intermediate_size")?,
    };
    let plain = family.experts.is_none();
    let adjusted = c.bool("block_auto_adjust_ff_dim")?.unwrap_or(true);
    if !(family.convolution && plain && adjusted) {
        return Ok(width);
    }
    // lfm2: two thirds of it, times a factor, in whole multiples.
    let width = width.min(MAX_WIDTH) * 2 / 3;
    let by = c.float("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let width = (f64::from(by) * width as f64) as usize;
    let multiple = c.size("block_multiple_of")?.unwrap_or(256);
    Ok(width.div_ceil(multiple.max(1)).saturating_mul(multiple))
}

fn config_experts(c: &Config, family: &Family) -> Result<Option<ExpertArch>> {
    let Some(routing) = family.experts else {
        return Ok(None);
    };
    let width = match routing.plain_width {
        true => c.need("intermediate_size")?,
        false => c.need_either(&["moe_intermediate_size", "intermediate_size"])?,
    };
    let shared = [
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ];
    let several = c.either(&["n_shared_experts", "moe_num_shared_experts"])?;
    let several = several.map(|n| n.saturating_mul(width));
    let one = routing.shared.then_some(width);
    let grouped = routing.sigmoid || c.str("topk_method") == Some("group_limited_greedy");
    let groups = c.size("n_group")?.filter(|&n| grouped && n > 1);
    Ok(Some(ExpertArch {
        count: c.need_either(&[
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ])?,
        used: c.need_either(&[
            "num_experts_per_tok",
            "experts_per_token",
            "moe_topk",
            "moe_k",
        ])?,
        intermediate_size: width,
        shared_size: c.either(&shared)?.or(several).or(one).filter(|&n| n > 0),
        normalised: c.bool("norm_topk_prob")?.unwrap_or(routing.normalised),
        sigmoid: routing.sigmoid,
        groups: match groups {
            Some(count) => Some(Groups {
                count,
                used: c.size("topk_group")?.unwrap_or(count),
            }),
            None => None,
        },
        scale: c.float("routed_scaling_factor")?.unwrap_or(1.0),
    }))
}

/// Whether layer `i` has experts: all but the first ones, those that are listed, or every n-th.
fn config_sparse(c: &Config, family: &Family, i: usize) -> Result<bool> {
    let dense = |l: &Json| {
        l.as_array()
            .is_some_and(|l| l.iter().any(|n| n.as_u64() == Some(i as u64)))
    };
    let types = c.get("mlp_layer_types").and_then(|l| l.get(i));
    if let Some(kind) = types.and_then(Json::as_str) {
        return Ok(family.experts.is_some() && kind == "sparse");
    }
    let steps = ["decoder_sparse_step", "moe_layer_interval"];
    let step = c.either(&steps)?.unwrap_or(1).max(1);
    let firsts = [
        "first_k_dense_replace",
        "num_dense_layers",
        "moe_layer_start_index",
    ];
    let first = c.either(&firsts)?.unwrap_or(0);
    // Minus one is the last layer, as none is.
    let last = c.get("moe_layer_end_index").and_then(Json::as_u64);
    let outside = i < first || last.is_some_and(|last| i as u64 > last);
    let listed = c.get("mlp_only_layers").is_some_and(dense);
    Ok(family.experts.is_some() && !listed && !outside && (i + 1).is_multiple_of(step))
}

fn config_activation(c: &Config, family: &Family) -> Result<Activation> {
    if family.activation == Activation::ClampedSwish {
        for (key, wanted) in [("swiglu_limit", SWISH_LIMIT), ("swiglu_alpha", SWISH_ALPHA)] {
            if let Some(got) = c.float(key)?.filter(|x| *x != wanted) {
                return Err(c
                    .weights
                    .problem(format!("{key:?} must be {wanted}, got {got}")));
            }
        }
        return Ok(family.activation);
    }
    let keys = ["hidden_activation", "hidden_act", "activation_function"];
    match keys.iter().find_map(|key| c.str(key)) {
        None => Ok(family.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("relu") => Ok(Activation::Relu),
        Some("relu2") => Ok(Activation::ReluSquared),
        Some("xielu") => Ok(XIELU),
        Some(other) => Err(unknown(
            "activation",
            other,
            [
                "silu",
                "gelu",
                "gelu_pytorch_tanh",
                "relu",
                "relu2",
                "xielu",
            ]
            .into_iter(),
        )),
    }
}

/// A layer's window and rope, from `layer_types` (transformers 5) or the older keys.
fn config_layer(c: &Config, family: &Family, i: usize) -> Result<LayerArch> {
    let window = c.size("sliding_window")?.filter(|&n| n > 0);
    // Both ways, half of it lies before a token.
    let window = window.map(|n| if both_ways(c) { n / 2 + 1 } else { n });
    let local_rope = usize::from(family.local_rope.is_some());
    let nope = c
        .get("no_rope_layers")
        .and_then(|l| l.get(i))
        .and_then(Json::as_u64)
        .map(|n| n == 0);
    let interval = c
        .size("no_rope_layer_interval")?
        .or(family.nope_interval)
        .filter(|&n| n > 0);
    let nope = nope.unwrap_or_else(|| interval.is_some_and(|n| (i + 1).is_multiple_of(n)));
    let kind = c.get("layer_types").and_then(|l| l.get(i));
    let kind = kind.and_then(Json::as_str);
    let attends = |l: &Json| {
        l.as_array()
            .is_some_and(|l| l.iter().any(|n| n.as_u64() == Some(i as u64)))
    };
    let unlisted = kind.is_none() && c.get("full_attn_idxs").is_some_and(|l| !attends(l));
    let convolution = family.convolution && (kind == Some("conv") || unlisted);
    let windowed = match kind {
        Some("sliding_attention") => true,
        Some("full_attention") => false,
        Some("conv") if convolution => false,
        Some(other) => {
            return Err(unknown(
                "layer type",
                other,
                ["full_attention", "sliding_attention"].into_iter(),
            ));
        }
        None => older_window(c, family, i)?,
    };
    let rope = if windowed { local_rope } else { 0 };
    let nope = nope || (family.global_nope && window.is_some() && !windowed);
    let nope = nope || family.learned_positions;
    Ok(LayerArch {
        rope: (!nope).then_some(rope),
        window: window.filter(|_| windowed),
        experts: config_sparse(c, family, i)?,
        convolution,
    })
}

/// Whether a layer has a window, where `layer_types` does not say.
fn older_window(c: &Config, family: &Family, i: usize) -> Result<bool> {
    if let Some(interval) = family.window_interval {
        let interval = c.size("sliding_window_pattern")?.unwrap_or(interval).max(1);
        return Ok(!(i + 1).is_multiple_of(interval));
    }
    match c.bool("use_sliding_window")? {
        Some(used) => Ok(used && i >= c.size("max_window_layers")?.unwrap_or(0)),
        None => Ok(i >= c.size("max_window_layers")?.unwrap_or(0)),
    }
}

/// The model's ropes: the global one, and the local one of windowed layers where the family has two.
fn config_ropes(
    c: &Config,
    family: &Family,
    head_dim: usize,
    context: usize,
) -> Result<(Vec<Rope>, Option<usize>)> {
    // transformers 5: "rope_parameters", flat or one per layer type; before: "rope_theta" and "rope_scaling".
    let parameters = c.get("rope_parameters");
    let (full, local) = match parameters {
        Some(p) if p.get("full_attention").is_some() => {
            (p.get("full_attention"), p.get("sliding_attention"))
        }
        other => (other, None),
    };
    let scaling = full.or_else(|| c.get("rope_scaling"));
    let base = |of: Option<&Json>| match of {
        Some(of) => c.of(of).float("rope_theta"),
        None => Ok(None),
    };
    let partial = match (
        full.and_then(|f| f.get("partial_rotary_factor")),
        c.float("partial_rotary_factor")?,
    ) {
        (Some(p), _) => p.as_f64().map(|p| p as f32),
        (None, p) => p,
    };
    let partial = match (partial, c.size("rotary_dim")?) {
        (None, Some(dim)) if head_dim > 0 => Some(dim as f32 / head_dim as f32),
        (partial, _) => partial,
    };
    let partial = partial.unwrap_or(family.partial_rotary).clamp(0.0, 1.0);
    let dim = (head_dim as f32 * partial) as usize;
    let theta = base(full)?
        .or(c.float("rope_theta")?)
        .unwrap_or(family.theta);
    let mut rope = Rope::new(base_frequencies(theta, dim));
    let mut original = None;
    if let Some(scaling) = scaling {
        original = config_scale(c, &c.of(scaling), context, theta, &mut rope)?;
    }
    let mut ropes = vec![rope];
    if let Some(of) = family.local_rope {
        let own = base(local)?.or(c.float("rope_local_base_freq")?).or(of);
        let theta = own.unwrap_or(theta);
        let mut rope = Rope::new(base_frequencies(theta, dim));
        if let Some(local) = local {
            config_scale(c, &c.of(local), context, theta, &mut rope)?;
        }
        ropes.push(rope);
    }
    Ok((ropes, original))
}

/// Apply a rope scaling; returns the original context size where long sequences differ.
fn config_scale(
    c: &Config,
    s: &Config,
    context: usize,
    base: f32,
    rope: &mut Rope,
) -> Result<Option<usize>> {
    let factor = |key: &str| -> Result<f32> {
        let x = s
            .float(key)?
            .ok_or_else(|| s.weights.problem(format!("rope scaling has no {key:?}")))?;
        if x > 0.0 {
            Ok(x)
        } else {
            Err(s
                .weights
                .problem(format!("rope scaling: {key:?} must be positive, got {x}")))
        }
    };
    match s
        .str("rope_type")
        .or_else(|| s.str("type"))
        .unwrap_or("default")
    {
        // Dynamic scaling begins beyond the context that the model was made for, where prompts end.
        "dynamic" if s.float("alpha")?.is_some_and(|x| x > 0.0) => {
            // hunyuan: by as much for all lengths.
            let (alpha, dim) = (factor("alpha")?, 2 * rope.frequencies.len());
            let power = dim as f64 / (dim as f64 - 2.0);
            let base = f64::from(base) * f64::from(alpha).powf(power);
            rope.frequencies = base_frequencies(base as f32, dim);
            Ok(None)
        }
        "default" | "dynamic" => Ok(None),
        "yarn" => config_yarn(s, context, base, rope).map(|()| None),
        "linear" => {
            let by = factor("factor")?;
            rope.frequencies.iter_mut().for_each(|f| *f /= by);
            Ok(None)
        }
        "llama3" => {
            let original = s.need("original_max_position_embeddings")? as f32;
            let (by, low, high) = (
                factor("factor")?,
                factor("low_freq_factor")?,
                factor("high_freq_factor")?,
            );
            rope.frequencies
                .iter_mut()
                .for_each(|f| *f = llama3_frequency(*f, original, by, low, high));
            Ok(None)
        }
        "longrope" | "su" => longrope(c, s, context, rope).map(Some),
        other => Err(unknown(
            "rope scaling",
            other,
            ["default", "linear", "dynamic", "llama3", "longrope", "yarn"].into_iter(),
        )),
    }
}

fn config_yarn(s: &Config, context: usize, base: f32, rope: &mut Rope) -> Result<()> {
    let key = "original_max_position_embeddings";
    let original = s.size(key)?.unwrap_or(context).max(1) as f32;
    let factor = s.float("factor")?.unwrap_or(context as f32 / original);
    let positive = |key: &str, or: f32| -> Result<f32> {
        let x = s.float(key)?.filter(|x| *x != 0.0).unwrap_or(or);
        match x > 0.0 {
            true => Ok(x),
            false => Err(s
                .weights
                .problem(format!("rope scaling: {key:?} must be positive, got {x}"))),
        }
    };
    let yarn = Yarn {
        factor: positive("factor", factor)?,
        original,
        fast: positive("beta_fast", 32.0)?,
        slow: positive("beta_slow", 1.0)?,
        truncate: s.bool("truncate")?.unwrap_or(true),
    };
    yarn.scale(base, &mut rope.frequencies);
    let scales = (s.float("mscale")?, s.float("mscale_all_dim")?);
    rope.factor = match (s.float("attention_factor")?, scales) {
        (Some(own), _) => own,
        (None, (Some(a), Some(b))) if a != 0.0 && b != 0.0 => {
            yarn_factor(factor, a) / yarn_factor(factor, b)
        }
        _ => yarn_factor(factor, 1.0),
    };
    if let Some(beta) = s.float("llama_4_scaling_beta")? {
        let each = original;
        rope.growth = Some(Growth { beta, each });
    }
    Ok(())
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): long waves are stretched, short ones kept, by how often they turn.
struct Yarn {
    factor: f32,
    original: f32,
    /// Turns within the original context from which on a wave is kept, and to which it is stretched.
    fast: f32,
    slow: f32,
    /// Their places are rounded to whole ones.
    truncate: bool,
}

impl Yarn {
    fn scale(&self, base: f32, frequencies: &mut [f32]) {
        let dim = 2.0 * frequencies.len() as f64;
        let place = |turns: f32| {
            let waves = f64::from(self.original) / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            dim * waves.ln() / (2.0 * f64::from(base).ln())
        };
        let (mut low, mut high) = (place(self.fast), place(self.slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, f) in frequencies.iter_mut().enumerate() {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            *f = *f / self.factor * ramp + *f * (1.0 - ramp);
        }
    }
}

/// What YaRN multiplies cosines and sines by.
fn yarn_factor(factor: f32, scale: f32) -> f32 {
    match factor <= 1.0 {
        true => 1.0,
        false => (0.1 * f64::from(scale) * f64::from(factor).ln() + 1.0) as f32,
    }
}

/// Llama 3.1's scaling: long wavelengths divided, short ones kept, a smooth passage between.
fn llama3_frequency(f: f32, original: f32, factor: f32, low: f32, high: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / f;
    if wavelength > original / low {
        return f / factor;
    }
    if wavelength < original / high {
        return f;
    }
    let smooth = (original / wavelength - low) / (high - low);
    (1.0 - smooth) * f / factor + smooth * f
}

fn longrope(c: &Config, s: &Config, context: usize, rope: &mut Rope) -> Result<usize> {
    let key = "original_max_position_embeddings";
    let original = match s.size(key)? {
        Some(n) => n,
        None => c.need(key)?,
    }
    .max(1);
    let scaled = |key: &str| -> Result<Vec<f32>> {
        let by = s
            .floats(key)?
            .ok_or_else(|| s.weights.problem(format!("rope scaling has no {key:?}")))?;
        if by.len() != rope.frequencies.len() {
            let (got, want) = (by.len(), rope.frequencies.len());
            return Err(s.weights.problem(format!(
                "rope scaling: {key:?} has {got} factors, wanted {want}"
            )));
        }
        Ok(rope
            .frequencies
            .iter()
            .zip(by)
            .map(|(f, by)| f / by)
            .collect())
    };
    let (short, long) = (scaled("short_factor")?, scaled("long_factor")?);
    rope.factor = match (s.float("attention_factor")?, s.float("factor")?) {
        (Some(x), _) => x,
        (None, Some(factor)) => {
            longrope_factor((factor as f64 * original as f64) as usize, original)
        }
        (None, None) => longrope_factor(context, original),
    };
    (rope.frequencies, rope.long_frequencies) = (short, Some(long));
    Ok(original)
}

/// transformers' name of a tensor, from GGUF's: of this family, or else of llama's.
fn transformers_name(
    layers: &str,
    own: &[(&str, &str)],
    layer: Option<usize>,
    name: &str,
) -> String {
    let (stem, ending) = name.rsplit_once('.').unwrap_or((name, "weight"));
    let (stem, number) = match stem.split_once('.') {
        Some((stem, number)) => (format!("{stem}.#"), number),
        None => (stem.to_string(), ""),
    };
    let known = own.iter().chain(HF_NAMES).find(|(gguf, _)| *gguf == stem);
    let stem = known.map_or(&*stem, |(_, hf)| hf).replace('#', number);
    let whole = match (stem.strip_suffix('!'), ending) {
        (Some(stem), "weight") => stem.to_string(),
        (Some(stem), ending) => format!("{stem}_{ending}"),
        (None, ending) => format!("{stem}.{ending}"),
    };
    match layer {
        Some(i) => format!("{layers}.{i}.{whole}"),
        None => whole,
    }
}

#[cfg(test)]
mod tests;
