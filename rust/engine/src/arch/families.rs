//! The families: a row for each, and what transformers calls their tensors.

use hfcore_kernels::elementwise::{Activation, Pairing};

use super::{Arch, Block, Names, XIELU};

/// What tells one family of models from another, where their files do not say it themselves.
pub(super) struct Family {
    /// `general.architecture` of GGUF files; `None`: this row is for `config.json` only.
    pub(super) gguf: Option<&'static str>,
    /// `model_type` values of `config.json`.
    pub(super) hf: &'static [&'static str],
    /// How GGUF files pair the numbers of a head. Converters permute llama's; transformers mostly pairs halves.
    pub(super) gguf_pairing: Pairing,
    pub(super) hf_pairing: Pairing,
    pub(super) activation: Activation,
    /// The feed-forward has a gate beside its inputs.
    pub(super) gated: bool,
    pub(super) block: Block,
    /// Norms take the mean off, and may have biases.
    pub(super) layer_norm: bool,
    /// Queries, keys and values always have biases.
    pub(super) qkv_bias: bool,
    /// Norms over the query and key heads.
    pub(super) qk_norm: bool,
    /// These norms see all heads of a row as one vector.
    pub(super) qk_together: bool,
    /// transformers stores norm weights less one (gemma); GGUF files have the one added.
    pub(super) hf_norm_offset: f32,
    /// Embeddings are multiplied by the square root of the width.
    pub(super) scaled_embedding: bool,
    /// GGUF's logit scale divides (granite).
    pub(super) divided_logits: bool,
    /// Tokens' positions are a table (gpt2), not angles.
    pub(super) learned_positions: bool,
    /// transformers stores matrices as `[inputs, outputs]` (gpt2).
    pub(super) hf_transposed: bool,
    /// Part of a head that turns, where the file does not say.
    pub(super) partial_rotary: f32,
    /// Every n-th layer has no positions (smollm3), where the file does not list them.
    pub(super) nope_interval: Option<usize>,
    /// Layers that see everything have no positions, if others have a window (command-r 7B).
    pub(super) global_nope: bool,
    /// Every n-th layer sees everything, the others a window.
    pub(super) window_interval: Option<usize>,
    /// Layers with a window have a rope of their own, of this base where the file does not say, or of the other's.
    pub(super) local_rope: Option<Option<f32>>,
    /// Models with so many layers scale scores by hidden size / heads, which GGUF files do not say (gemma 27B).
    pub(super) wide_queries: Option<usize>,
    /// Feed-forwards of which a router chooses some.
    pub(super) experts: Option<Routing>,
    /// Attention reads latents, one for all heads (deepseek).
    pub(super) latent: bool,
    /// Layers may be short convolutions (lfm2).
    pub(super) convolution: bool,
    /// Norms have no weights (olmo).
    pub(super) plain_norms: bool,
    /// Norms of queries and keys come after the rotation (hunyuan).
    pub(super) qk_norm_last: bool,
    /// Base of the rope, where the file does not say.
    pub(super) theta: f32,
    /// Each head has a score that takes weight and gives nothing (gpt-oss).
    pub(super) sinks: bool,
    /// Where YaRN begins and ends is rounded, which GGUF files do not say.
    pub(super) rounded_yarn: bool,
    pub(super) tied: bool,
    /// transformers' name of the list of layers.
    pub(super) hf_layers: &'static str,
    /// transformers' tensor names, by GGUF's, where they are not llama's: see `HF_NAMES`.
    pub(super) hf_names: &'static [(&'static str, &'static str)],
}

/// How a router chooses experts, where files do not say.
#[derive(Clone, Copy)]
pub(super) struct Routing {
    /// The chosen ones' shares are made to add up to one.
    pub(super) normalised: bool,
    /// Scores are each expert's own, not one distribution.
    pub(super) sigmoid: bool,
    /// Experts are as wide as plain feed-forwards, whatever else the file names.
    pub(super) plain_width: bool,
    /// One more expert always runs.
    pub(super) shared: bool,
}

pub(super) const ROUTED: Routing = Routing {
    normalised: false,
    sigmoid: false,
    plain_width: false,
    shared: false,
};

pub(super) const NORMALISED: Routing = Routing {
    normalised: true,
    ..ROUTED
};

pub(super) const SIGMOID: Routing = Routing {
    sigmoid: true,
    ..NORMALISED
};

/// Most families differ from llama in a field or two.
pub(super) const LLAMA: Family = Family {
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

pub(super) const FAMILIES: &[Family] = &[
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
pub(super) const HF_NAMES: &[(&str, &str)] = &[
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

impl Family {
    pub(super) fn name(&self) -> &'static str {
        let hf = self.hf.first().copied();
        self.gguf.or(hf).unwrap_or_default()
    }

    /// What the family alone says of a model; all sizes are 0.
    pub(super) fn arch(&self) -> Arch {
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

/// transformers' name of a tensor, from GGUF's: of this family, or else of llama's.
pub(super) fn transformers_name(
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
