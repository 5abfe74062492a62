//! Tests of arch.rs.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::rope::llama3_frequency;
use super::*;
use crate::weights::Value;

fn weights(config: Option<Json>, metadata: HashMap<String, Value>) -> Weights {
    Weights {
        path: "model".to_string(),
        files: Vec::new(),
        tensors: HashMap::new(),
        packed: HashMap::new(),
        quantised: HashMap::new(),
        metadata,
        config,
        generation_config: None,
    }
}

/// A small config with `extra` put over it; null takes a key away.
fn config(extra: Json) -> Json {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(extra: Json) -> Result<Arch> {
    Arch::read(&weights(Some(config(extra)), HashMap::new()))
}

fn gguf(pairs: &[(&str, Value)]) -> Result<Arch> {
    let mut metadata = HashMap::from([
        (
            "general.architecture".to_string(),
            Value::String("llama".into()),
        ),
        (
            "llama.attention.layer_norm_rms_epsilon".to_string(),
            Value::Float(1e-5),
        ),
    ]);
    for (key, value) in [
        ("embedding_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("block_count", 3),
        ("context_length", 256),
        ("feed_forward_length", 128),
        ("vocab_size", 512),
    ] {
        metadata.insert(format!("llama.{key}"), Value::Int(value));
    }
    for (key, value) in pairs {
        metadata.insert(key.to_string(), value.clone());
    }
    Arch::read(&weights(None, metadata))
}

#[test]
fn transformers_5_writes_the_same_model_in_other_keys() {
    let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3"});
    let mut parameters = llama3.clone();
    parameters["rope_theta"] = json!(500000.0);
    assert_eq!(
        read(json!({"rope_scaling": llama3})).unwrap(),
        read(json!({"rope_theta": null, "rope_parameters": parameters, "dtype": "bfloat16"}))
            .unwrap()
    );
    let gemma = json!({"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 32,
        "query_pre_attn_scalar": 24});
    let (mut old, mut new) = (gemma.clone(), gemma);
    old["rope_theta"] = json!(1e6);
    old["rope_local_base_freq"] = json!(1e4);
    old["rope_scaling"] = json!({"factor": 8.0, "rope_type": "linear"});
    old["sliding_window_pattern"] = json!(3);
    new["rope_theta"] = json!(null);
    new["rope_parameters"] = json!({
        "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}});
    new["layer_types"] = json!([
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention"
    ]);
    assert_eq!(read(old).unwrap(), read(new).unwrap());
    let factors = json!([1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]);
    let scaling = json!({"type": "longrope", "short_factor": factors, "long_factor": factors});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(500000.0);
    parameters["original_max_position_embeddings"] = json!(64);
    let phi = |extra: Json| {
        let mut all = json!({"model_type": "phi3", "sliding_window": 80});
        extra
            .as_object()
            .unwrap()
            .iter()
            .for_each(|(k, v)| all[k] = v.clone());
        read(all).unwrap()
    };
    let old = phi(json!({"original_max_position_embeddings": 64, "rope_scaling": scaling}));
    assert_eq!(old.original_context, Some(64));
    assert_eq!(
        old,
        phi(json!({"rope_theta": null, "rope_parameters": parameters}))
    );
}

#[test]
fn windows_and_positions_are_each_layers_own() {
    let windows = |extra| -> Vec<Option<usize>> {
        read(extra)
            .unwrap()
            .layers
            .iter()
            .map(|l| l.window)
            .collect()
    };
    assert_eq!(
        windows(json!({"model_type": "mistral", "sliding_window": 32})),
        [Some(32); 4]
    );
    let qwen = json!({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": false});
    assert_eq!(windows(qwen), [None; 4]);
    let late = json!({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": true,
        "max_window_layers": 3});
    assert_eq!(windows(late), [None, None, None, Some(32)]);
    let smollm = read(json!({"model_type": "smollm3"})).unwrap();
    let ropes: Vec<_> = smollm.layers.iter().map(|l| l.rope).collect();
    assert_eq!(ropes, [Some(0), Some(0), Some(0), None]);
}

#[test]
fn what_is_not_known_is_named() {
    for (extra, name) in [
        (json!({"model_type": "llamb"}), "llamb"),
        (json!({"rope_scaling": {"rope_type": "spiral"}}), "spiral"),
        (json!({"hidden_act": "relu6"}), "relu6"),
        (
            json!({"layer_types": ["chunked_attention"]}),
            "chunked_attention",
        ),
    ] {
        match read(extra) {
            Err(Error::Unsupported { name: got, .. }) => assert_eq!(got, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn impossible_sizes_are_refused_with_the_number() {
    for (extra, words) in [
        (json!({"num_hidden_layers": 1u64 << 60}), "number of layers"),
        (json!({"num_attention_heads": 0}), "head"),
        (json!({"num_key_value_heads": 3}), "4 heads do not share 3"),
        (
            json!({"hidden_size": -1}),
            "\"hidden_size\" should be a whole number, got -1",
        ),
        (
            json!({"vocab_size": "many"}),
            "\"vocab_size\" should be a whole number",
        ),
        (
            json!({"intermediate_size": null}),
            "no \"intermediate_size\"",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear"}}),
            "rope scaling has no \"factor\"",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}),
            "must be positive",
        ),
        (json!({"head_dim": 1u64 << 50}), "head size"),
    ] {
        let error = read(extra.clone()).unwrap_err().to_string();
        assert!(error.contains(words), "{extra}: {error}");
    }
    let error = gguf(&[("llama.block_count", Value::Int(1 << 40))])
        .unwrap_err()
        .to_string();
    assert!(error.contains("number of layers"), "{error}");
    let error = gguf(&[("llama.rope.dimension_count", Value::Int(64))])
        .unwrap_err()
        .to_string();
    assert!(error.contains("rotary pairs"), "{error}");
}

#[test]
fn gguf_llama_pairs_neighbours_and_transformers_halves() {
    assert_eq!(gguf(&[]).unwrap().pairing, Pairing::Neighbours);
    assert_eq!(read(json!({})).unwrap().pairing, Pairing::Halves);
}

#[test]
fn llama3_keeps_short_waves_and_stretches_long_ones() {
    let short = llama3_frequency(1.0, 8192.0, 8.0, 1.0, 4.0);
    let long = llama3_frequency(1e-5, 8192.0, 8.0, 1.0, 4.0);
    assert_eq!((short, long), (1.0, 1e-5 / 8.0));
    let between = llama3_frequency(2.0 * std::f32::consts::PI / 4096.0, 8192.0, 8.0, 1.0, 4.0);
    assert!(between > 2.0 * std::f32::consts::PI / 4096.0 / 8.0);
}

#[test]
fn names_are_those_of_the_file() {
    let (gguf, hf) = (gguf(&[]).unwrap(), read(json!({})).unwrap());
    assert_eq!(
        gguf.tensor_name(Some(3), "attn_q.weight"),
        "blk.3.attn_q.weight"
    );
    assert_eq!(
        hf.tensor_name(Some(3), "attn_q.bias"),
        "model.layers.3.self_attn.q_proj.bias"
    );
    assert_eq!(hf.tensor_name(None, "output.weight"), "lm_head.weight");
    assert!(
        hf.tensor_name(Some(0), "ffn_norm.weight")
            .ends_with("post_attention_layernorm.weight")
    );
}

#[test]
fn names_of_experts_have_their_number_and_a_family_its_own_words() {
    let moe = json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2});
    let mixtral = read(moe).unwrap();
    assert_eq!(
        mixtral.tensor_name(Some(1), "ffn_up.3.weight"),
        "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    );
    assert_eq!(
        mixtral.tensor_name(Some(0), "ffn_down_exps.weight"),
        "model.layers.0.block_sparse_moe.experts.down_proj"
    );
    let oss = json!({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2,
        "swiglu_limit": 7.0});
    let oss = read(oss).unwrap();
    assert_eq!(
        oss.tensor_name(Some(2), "ffn_gate_up_exps.bias"),
        "model.layers.2.mlp.experts.gate_up_proj_bias"
    );
    assert_eq!(
        oss.tensor_name(Some(2), "attn_sinks.weight"),
        "model.layers.2.self_attn.sinks"
    );
    let gpt2 = read(json!({"model_type": "gpt2"})).unwrap();
    assert_eq!(
        gpt2.tensor_name(Some(0), "attn_qkv.bias"),
        "transformer.h.0.attn.c_attn.bias"
    );
    assert_eq!(
        gpt2.tensor_name(None, "output_norm.bias"),
        "transformer.ln_f.bias"
    );
}

#[test]
fn experts_are_where_the_config_says_and_possible() {
    let moe = |extra: Json| {
        let mut all = json!({"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 48});
        extra
            .as_object()
            .unwrap()
            .iter()
            .for_each(|(k, v)| all[k] = v.clone());
        read(all)
    };
    let layers = |extra| -> Vec<bool> {
        let arch: Arch = moe(extra).unwrap();
        arch.layers.iter().map(|l| l.experts).collect()
    };
    assert_eq!(layers(json!({})), [true; 4]);
    assert_eq!(
        layers(json!({"mlp_only_layers": [1]})),
        [true, false, true, true]
    );
    assert_eq!(
        layers(json!({"decoder_sparse_step": 2})),
        [false, true, false, true]
    );
    for (extra, words) in [
        (json!({"num_experts_per_tok": 9}), "9 of 8 experts"),
        (json!({"num_experts": 1u64 << 40}), "at most 4096"),
        (json!({"moe_intermediate_size": 0}), "size of an expert"),
    ] {
        let error = moe(extra).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn latents_are_one_head_of_the_cache() {
    let deepseek = |extra: Json| {
        let mut all = json!({"model_type": "deepseek_v3", "q_lora_rank": 24, "kv_lora_rank": 32,
            "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 48,
            "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": true,
            "num_nextn_predict_layers": 1, "head_dim": 4});
        extra
            .as_object()
            .unwrap()
            .iter()
            .for_each(|(k, v)| all[k] = v.clone());
        read(all)
    };
    let arch = deepseek(json!({})).unwrap();
    assert_eq!((arch.heads, arch.kv_heads, arch.head_dim), (4, 1, 36));
    assert_eq!(
        (arch.attention_scale, arch.ropes[0].frequencies.len()),
        (0.25, 2)
    );
    assert_eq!(arch.pairing, Pairing::Neighbours);
    let experts = arch.experts.unwrap();
    assert_eq!((experts.shared_size, experts.sigmoid), (Some(96), true));
    assert_eq!(experts.groups, Some(Groups { count: 4, used: 2 }));
    let sparse: Vec<_> = arch.layers.iter().map(|l| l.experts).collect();
    assert_eq!(sparse, [false, true, true, true]);
    assert!(arch.is_guessing("model.layers.4.mlp.gate.weight"));
    assert!(!arch.is_guessing("model.layers.5.mlp.gate.weight"));
    assert!(!arch.is_guessing("model.layers.3.mlp.gate.weight"));
    assert_eq!(
        arch.tensor_name(Some(1), "exp_probs_b.bias"),
        "model.layers.1.mlp.gate.e_score_correction_bias"
    );
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 64});
    let scaled = deepseek(json!({"rope_parameters": yarn, "rope_interleave": false})).unwrap();
    let growth = 0.1 * 4f32.ln() + 1.0;
    assert!((scaled.attention_scale / 0.25 - growth * growth).abs() < 1e-6);
    assert_eq!(
        (scaled.ropes[0].factor, scaled.pairing),
        (1.0, Pairing::Halves)
    );
    for (extra, words) in [
        (
            json!({"kv_lora_rank": 0}),
            "the rank of latents must be between 1 and 4096, got 0",
        ),
        (json!({"kv_lora_rank": 4096}), "the head size"),
        (json!({"v_head_dim": null}), "no \"v_head_dim\""),
        (json!({"n_group": 3}), "cannot stand in 2 of 3 groups"),
        (json!({"n_group": 8}), "cannot stand in 2 of 8 groups"),
        (json!({"topk_group": 5}), "cannot stand in 5 of 4 groups"),
        (
            json!({"topk_group": 1, "num_experts_per_tok": 3}),
            "3 of 8 experts",
        ),
    ] {
        let error = deepseek(extra).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let softmax = deepseek(json!({"model_type": "deepseek_v2"})).unwrap();
    assert_eq!(softmax.experts.unwrap().groups, None);
    let grouped = json!({"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"});
    let grouped = deepseek(grouped).unwrap().experts.unwrap();
    assert_eq!(grouped.groups, Some(Groups { count: 4, used: 2 }));
    assert!(!grouped.sigmoid);
}

#[test]
fn gguf_files_say_the_sizes_of_latents_in_two_ways() {
    let deepseek = |own: &[(&str, i64)]| {
        let mut all = vec![(
            "general.architecture".to_string(),
            Value::String("deepseek2".into()),
        )];
        let common = [
            ("embedding_length", 64),
            ("attention.head_count", 4),
            ("block_count", 3),
            ("context_length", 256),
            ("feed_forward_length", 128),
            ("vocab_size", 512),
            ("attention.kv_lora_rank", 32),
            ("rope.dimension_count", 4),
        ];
        let named = |(key, value): &(&str, i64)| (format!("deepseek2.{key}"), Value::Int(*value));
        all.extend(common.iter().chain(own).map(named));
        let eps = "deepseek2.attention.layer_norm_rms_epsilon";
        all.push((eps.to_string(), Value::Float(1e-6)));
        let all: Vec<_> = all.iter().map(|(k, v)| (&k[..], v.clone())).collect();
        gguf(&all).unwrap()
    };
    let old = deepseek(&[
        ("attention.head_count_kv", 4),
        ("attention.key_length", 16),
        ("attention.value_length", 8),
    ]);
    let new = deepseek(&[
        ("attention.head_count_kv", 1),
        ("attention.key_length", 36),
        ("attention.value_length", 32),
        ("attention.key_length_mla", 16),
        ("attention.value_length_mla", 8),
    ]);
    assert_eq!(old, new);
    let latent = old.latent.unwrap();
    assert_eq!((latent.plain, latent.rotated, latent.value), (12, 4, 8));
    assert_eq!(
        (old.kv_heads, old.head_dim, old.attention_scale),
        (1, 36, 0.25)
    );
}

#[test]
fn layers_without_attention_are_short_convolutions() {
    let lfm2 = |extra: Json| {
        let mut all = json!({"model_type": "lfm2", "conv_L_cache": 3, "norm_eps": 1e-5});
        extra
            .as_object()
            .unwrap()
            .iter()
            .for_each(|(k, v)| all[k] = v.clone());
        read(all)
    };
    let kinds = |arch: &Arch| -> Vec<bool> { arch.layers.iter().map(|l| l.convolution).collect() };
    let types = ["conv", "full_attention", "conv", "conv"];
    let arch = lfm2(json!({"layer_types": types})).unwrap();
    assert_eq!(kinds(&arch), [true, false, true, true]);
    assert_eq!(arch, lfm2(json!({"full_attn_idxs": [1]})).unwrap());
    // Two thirds of 176, in whole multiples of 256.
    assert_eq!(arch.intermediate_size, 256);
    let plain = json!({"full_attn_idxs": [1], "block_auto_adjust_ff_dim": false});
    assert_eq!(lfm2(plain).unwrap().intermediate_size, 176);
    let error = lfm2(json!({"layer_types": types, "conv_L_cache": 1}));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("2 to 64 positions, got Some(1)"), "{error}");
    let error = read(json!({"layer_types": types})).unwrap_err().to_string();
    assert!(error.contains("\"conv\""), "{error}");
    let kv = |heads: Vec<i64>| {
        let mut all: Vec<_> = [
            ("embedding_length", 64),
            ("attention.head_count", 4),
            ("block_count", 3),
            ("context_length", 256),
            ("feed_forward_length", 128),
            ("vocab_size", 512),
            ("shortconv.l_cache", 3),
        ]
        .iter()
        .map(|(key, value)| (format!("lfm2.{key}"), Value::Int(*value)))
        .collect();
        let text = Value::String("lfm2".into());
        all.push(("general.architecture".into(), text));
        let eps = "lfm2.attention.layer_norm_rms_epsilon";
        all.push((eps.into(), Value::Float(1e-5)));
        all.push(("lfm2.attention.head_count_kv".into(), Value::Ints(heads)));
        let all: Vec<_> = all.iter().map(|(k, v)| (&k[..], v.clone())).collect();
        gguf(&all)
    };
    let arch = kv(vec![0, 2, 0]).unwrap();
    assert_eq!((kinds(&arch), arch.kv_heads), (vec![true, false, true], 2));
    let error = kv(vec![0, 2, 1]).unwrap_err().to_string();
    assert!(error.contains("layers with 2 and with 1"), "{error}");
}

#[test]
fn a_rope_with_an_alpha_turns_more_slowly_at_all_lengths() {
    let scaling = json!({"type": "dynamic", "alpha": 100.0, "factor": 1.0});
    let hunyuan = json!({"model_type": "hunyuan_v1_dense", "head_dim": 8, "rope_scaling": scaling});
    let base = 500000f64 * 100f64.powf(8.0 / 6.0);
    let hunyuan = read(hunyuan).unwrap();
    assert_eq!(
        hunyuan.ropes[0].frequencies,
        base_frequencies(base as f32, 8)
    );
    assert!(hunyuan.qk_norm && hunyuan.qk_norm_last);
}

#[test]
fn numbers_for_each_layer_must_be_the_same() {
    let hunyuan = |topk: Json| {
        read(
            json!({"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": topk,
            "moe_intermediate_size": [48, 48, 48, 48]}),
        )
    };
    let experts = hunyuan(json!([2, 2, 2, 2])).unwrap().experts.unwrap();
    let sizes = (experts.used, experts.intermediate_size, experts.shared_size);
    assert_eq!(sizes, (2, 176, Some(176)));
    let error = hunyuan(json!([2, 1, 2, 2])).unwrap_err().to_string();
    assert!(
        error.contains("\"moe_topk\" should be a whole number"),
        "{error}"
    );
}

#[test]
fn an_unknown_architecture_gets_the_nearest_known_one() {
    let error = read(json!({"model_type": "qwen3_mo"}))
        .unwrap_err()
        .to_string();
    let words = "the nearest is \"qwen3_moe\"; backend=\"transformers\" may run it";
    assert!(error.ends_with(words), "{error}");
}

#[test]
fn layers_that_see_everything_have_no_positions_where_others_have_a_window() {
    let ropes = |extra| -> Vec<Option<usize>> {
        read(extra).unwrap().layers.iter().map(|l| l.rope).collect()
    };
    let hybrid = json!({"model_type": "cohere2", "sliding_window": 32});
    assert_eq!(ropes(hybrid), [Some(0), Some(0), Some(0), None]);
    assert_eq!(ropes(json!({"model_type": "exaone4"})), [Some(0); 4]);
    assert_eq!(ropes(json!({"model_type": "gpt2"})), [None; 4]);
}

#[test]
fn yarn_keeps_short_waves_and_stretches_long_ones() {
    let scaling =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096});
    let yarn = &read(json!({"head_dim": 64, "rope_scaling": scaling}))
        .unwrap()
        .ropes[0];
    let plain = &read(json!({"head_dim": 64})).unwrap().ropes[0];
    assert_eq!(yarn.frequencies[0], plain.frequencies[0]);
    assert_eq!(yarn.frequencies[31], plain.frequencies[31] / 4.0);
    assert!((yarn.factor - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    let middle = yarn.frequencies[12] / plain.frequencies[12];
    assert!((0.25..1.0).contains(&middle) && middle != 0.25, "{middle}");
}

#[test]
fn gguf_names_are_as_the_converter_writes_them() {
    let granite = gguf(&[
        ("general.architecture", Value::String("granite".into())),
        ("granite.embedding_length", Value::Int(64)),
        ("granite.attention.head_count", Value::Int(4)),
        ("granite.block_count", Value::Int(2)),
        ("granite.context_length", Value::Int(256)),
        ("granite.feed_forward_length", Value::Int(128)),
        ("granite.vocab_size", Value::Int(512)),
        (
            "granite.attention.layer_norm_rms_epsilon",
            Value::Float(1e-5),
        ),
        ("granite.attention.scale", Value::Float(0.25)),
        ("granite.embedding_scale", Value::Float(12.0)),
        ("granite.residual_scale", Value::Float(0.5)),
        ("granite.logit_scale", Value::Float(8.0)),
    ])
    .unwrap();
    let scales = (granite.attention_scale, granite.embedding_scale);
    assert_eq!(scales, (0.25, 12.0));
    assert_eq!((granite.residual_scale, granite.logit_scale), (0.5, 0.125));
    let mixtral = gguf(&[
        ("llama.expert_count", Value::Int(8)),
        ("llama.expert_used_count", Value::Int(2)),
    ])
    .unwrap();
    let experts = mixtral.experts.unwrap();
    assert_eq!(
        (experts.count, experts.used, experts.intermediate_size),
        (8, 2, 128)
    );
    assert!(experts.normalised && mixtral.layers[0].experts);
}
