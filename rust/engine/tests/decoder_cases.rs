//! Tiny checkpoints of every family against transformers' logits. Data from HFCORE_CASES; skipped without it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hfcore_engine::arch::{Arch, Block, LatentArch};
use hfcore_engine::batch::{Batch, Caller, Forward, PAGE};
use hfcore_engine::candle::Candle;
use hfcore_engine::cpu::Cpu;
use hfcore_engine::decoder::{Decoder, Resident};
use hfcore_engine::device::Device;
use hfcore_engine::device::KvType;
use hfcore_engine::files;
use hfcore_engine::weights::Weights;
use hfcore_kernels::elementwise::Activation;
use serde_json::{Value as Json, json};

const FAMILIES: [&str; 9] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
];

fn cases() -> Option<PathBuf> {
    match std::env::var_os("HFCORE_CASES") {
        Some(dir) => Some(PathBuf::from(dir).join("families")),
        None => {
            eprintln!("skipped: HFCORE_CASES is not set");
            None
        }
    }
}

/// (model, golden) of every case of this issue.
fn models(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let quantised = quantised(dir).into_iter();
    let mut all: Vec<_> = FAMILIES
        .iter()
        .map(|f| dir.join(f))
        .chain(quantised)
        .map(|model| (model.clone(), model.join("golden.json")))
        .filter(|(_, golden)| golden.exists())
        .collect();
    for entry in std::fs::read_dir(dir.join("gguf")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "gguf") {
            all.push((path.clone(), path.with_extension("golden.json")));
        }
    }
    all.sort();
    all
}

/// Every quantised checkpoint.
fn quantised(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("quant")).unwrap();
    let mut all: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// The numbers of a NumPy file of little-endian f32.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..start]);
    assert!(
        header.contains("'<f4'") && header.contains("'fortran_order': False"),
        "{header}"
    );
    let numbers = bytes[start..].as_chunks().0.iter();
    numbers.map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn quantised_matrices_are_the_numbers_of_their_libraries() {
    let Some(dir) = cases() else { return };
    for model in quantised(&dir) {
        let text = std::fs::read(model.join("golden.json")).unwrap();
        let golden: Json = serde_json::from_slice(&text).unwrap();
        for tensor in golden["weights"].as_array().into_iter().flatten() {
            let want = npy(&model.join(tensor["file"].as_str().unwrap()));
            let (_, got) = files::numbers(&model, tensor["name"].as_str().unwrap()).unwrap();
            assert!(got == want, "{}", model.display());
        }
    }
}

fn decoder<D: Device>(device: impl Fn() -> D, path: &Path) -> Decoder<D> {
    let weights = Arc::new(files::open(path).unwrap());
    let arch = Arch::read(&weights).unwrap();
    let device_of_weights = device();
    let resident =
        Resident::load(&device_of_weights, arch, weights, None, None, &|_, _| true).unwrap();
    Decoder::new(device(), Arc::new(resident), 16).unwrap()
}

fn ids(json: &serde_json::Value) -> Vec<u32> {
    json.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

/// Last-position logits, the prompt fed in chunks of `chunk`.
fn logits(
    decoder: &mut dyn Forward,
    ids: &[u32],
    chunk: usize,
    original: Option<usize>,
) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE) as u32).rev().collect();
    let long = original.is_some_and(|n| ids.len() > n);
    let mut start = 0;
    loop {
        let end = ids.len().min(start + chunk);
        let mut batch = Batch::default();
        batch.push(&ids[start..end], start, &pages, long);
        if end == ids.len() {
            batch.outputs.push((end - start - 1) as u32);
            return decoder.forward(&batch, &mut ()).unwrap().to_vec();
        }
        decoder.forward(&batch, &mut ()).unwrap();
        start = end;
    }
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().cloned().fold(f64::MIN, f64::max);
    let sum = x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    x.iter().map(|x| x - max - sum).collect()
}

fn divergence(golden: &[f64], ours: &[f32]) -> f64 {
    let a = log_softmax(golden);
    let b = log_softmax(&ours.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum()
}

/// What feeding a prompt in chunks may change.
#[derive(PartialEq)]
enum Chunks {
    /// Nothing: design rule 10.
    NoBit,
    /// The order of sums, so no more than the limit that holds against transformers.
    Rounding,
}

fn check<D: Device>(device: impl Fn() -> D + Copy, limit: f64, chunks: Chunks) {
    let Some(dir) = cases() else { return };
    let mut failures = Vec::new();
    for (model, golden) in models(&dir) {
        let golden: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        let mut decoder = decoder(device, &model);
        let original = Arch::read(&files::open(&model).unwrap())
            .unwrap()
            .original_context;
        let mut worst = 0f64;
        for prompt in golden["prompts"].as_array().unwrap() {
            let ids = ids(&prompt["ids"]);
            let want: Vec<f64> = prompt["logits"]
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_f64().unwrap())
                .collect();
            let whole = logits(&mut decoder, &ids, ids.len(), original);
            let chunked = logits(&mut decoder, &ids, 7, original);
            if chunks == Chunks::NoBit {
                assert_eq!(
                    whole,
                    chunked,
                    "{}: chunks change the bits",
                    model.display()
                );
            }
            for ours in [&whole, &chunked] {
                worst = worst.max(divergence(&want, &ours[..want.len()]));
            }
            let whole: Vec<f64> = whole.iter().map(|&x| f64::from(x)).collect();
            let between = divergence(&whole, &chunked);
            assert!(
                between < limit,
                "{}: chunks change KL by {between:.2e}",
                model.display()
            );
        }
        println!(
            "{:60} KL {worst:.2e}",
            model.file_name().unwrap().to_string_lossy()
        );
        if worst >= limit || worst.is_nan() {
            failures.push(format!("{}: KL {worst:.2e}", model.display()));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn the_cpu_device_is_near_transformers() {
    check(|| Cpu::new(Some(2)), 2e-2, Chunks::NoBit);
}

#[test]
fn the_cpu_device_is_near_transformers_with_int8_pages_too() {
    let cpu = || Cpu::new(Some(2)).with_kv_type(KvType::Int8);
    check(cpu, 2e-2, Chunks::NoBit);
}

#[test]
fn the_candle_device_is_transformers() {
    check(Candle::cpu, 1e-9, Chunks::Rounding);
}

/// The `config.json` of a tiny model, with these keys of its own.
fn config(own: Json) -> Json {
    let mut config = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 80,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    });
    let all = config.as_object_mut().unwrap();
    all.extend(own.as_object().unwrap().clone());
    config
}

type Named = (String, Vec<usize>);

/// The tensors that a tied model of this shape has: name and shape.
fn tensors(arch: &Arch) -> Vec<Named> {
    let hidden = arch.hidden_size;
    let whole = |name: &str, shape| (arch.tensor_name(None, name), shape);
    let mut all = vec![whole("token_embd.weight", vec![arch.vocab_size, hidden])];
    if arch.learned_positions {
        all.push(whole(
            "position_embd.weight",
            vec![arch.context_size, hidden],
        ));
    }
    let mut norm = vec![("output_norm.weight".to_string(), vec![hidden])];
    add_biases(arch, &mut norm);
    norm.retain(|_| !arch.plain_norms);
    all.extend(norm.into_iter().map(|(name, shape)| whole(&name, shape)));
    for (i, layer) in arch.layers.iter().enumerate() {
        let mut own = match (arch.latent, layer.convolution) {
            (_, true) => convolution_tensors(arch),
            (Some(latent), _) => latent_tensors(arch, &latent),
            _ => attention_tensors(arch),
        };
        own.extend(norm_tensors(arch));
        own.extend(feed_forward_tensors(arch, layer.experts));
        add_biases(arch, &mut own);
        all.extend(
            own.into_iter()
                .map(|(name, shape)| (arch.tensor_name(Some(i), &name), shape)),
        );
    }
    all
}

/// Families with LayerNorm have biases throughout, but for command-r's.
fn add_biases(arch: &Arch, all: &mut Vec<Named>) {
    let everywhere = arch.layer_norm && arch.block != Block::Parallel && !arch.plain_norms;
    let biased = |name: &str| {
        let experts = name.ends_with("_exps.weight") || name.starts_with("ffn_gate_inp");
        everywhere || (arch.sinks && experts) || (arch.qkv_bias && is_qkv(name))
    };
    let biases: Vec<_> = all
        .iter()
        .filter(|(name, _)| biased(name))
        .map(|(name, shape)| {
            let name = name.replace("weight", "bias");
            match (&shape[..], arch.transposed, arch.sinks) {
                ([n], _, _) => (name, vec![*n]),
                ([_, n], true, _) => (name, vec![*n]),
                ([n, _], false, _) => (name, vec![*n]),
                (other, _, _) => (name, vec![other[0], other[2]]),
            }
        })
        .collect();
    all.extend(biases);
}

fn is_qkv(name: &str) -> bool {
    ["attn_q.weight", "attn_k.weight", "attn_v.weight"].contains(&name)
}

fn attention_tensors(arch: &Arch) -> Vec<Named> {
    let (hidden, dim) = (arch.hidden_size, arch.head_dim);
    let (q, kv) = (arch.heads * dim, arch.kv_heads * dim);
    let turned = |out: usize, inputs: usize| match arch.transposed {
        true => vec![inputs, out],
        false => vec![out, inputs],
    };
    let mut all = vec![("attn_output", turned(hidden, q))];
    match arch.transposed || arch.family == "phi3" {
        true => all.push(("attn_qkv", turned(q + 2 * kv, hidden))),
        false => all.extend([
            ("attn_q", vec![q, hidden]),
            ("attn_k", vec![kv, hidden]),
            ("attn_v", vec![kv, hidden]),
        ]),
    }
    if arch.qk_norm {
        let of = |n: usize| if arch.qk_together { n } else { dim };
        all.extend([("attn_q_norm", vec![of(q)]), ("attn_k_norm", vec![of(kv)])]);
    }
    if arch.sinks {
        all.push(("attn_sinks", vec![arch.heads]));
    }
    weights_of(all)
}

fn weights_of(all: Vec<(&str, Vec<usize>)>) -> Vec<Named> {
    let full = |(name, shape): (&str, Vec<usize>)| (format!("{name}.weight"), shape);
    all.into_iter().map(full).collect()
}

fn norm_tensors(arch: &Arch) -> Vec<Named> {
    let hidden = arch.hidden_size;
    let (before, after) = match arch.block {
        Block::Before | Block::Parallel => (true, false),
        Block::After => (false, true),
        Block::Around => (true, true),
    };
    let mut all = Vec::new();
    if before {
        all.push(("attn_norm", vec![hidden]));
    }
    if before && arch.block != Block::Parallel {
        all.push(("ffn_norm", vec![hidden]));
    }
    if after {
        all.extend([
            ("post_attention_norm", vec![hidden]),
            ("post_ffw_norm", vec![hidden]),
        ]);
    }
    all.retain(|_| !arch.plain_norms);
    weights_of(all)
}

fn convolution_tensors(arch: &Arch) -> Vec<Named> {
    let hidden = arch.hidden_size;
    weights_of(vec![
        ("shortconv.in_proj", vec![3 * hidden, hidden]),
        ("shortconv.conv", vec![hidden, 1, arch.convolution.unwrap()]),
        ("shortconv.out_proj", vec![hidden, hidden]),
    ])
}

fn latent_tensors(arch: &Arch, latent: &LatentArch) -> Vec<Named> {
    let (hidden, heads) = (arch.hidden_size, arch.heads);
    let queries = heads * (latent.plain + latent.rotated);
    let both = heads * (latent.plain + latent.value);
    let mut all = vec![
        ("attn_kv_a_mqa", vec![latent.rank + latent.rotated, hidden]),
        ("attn_kv_a_norm", vec![latent.rank]),
        ("attn_kv_b", vec![both, latent.rank]),
        ("attn_output", vec![hidden, heads * latent.value]),
    ];
    match latent.query_rank {
        Some(rank) => all.extend([
            ("attn_q_a", vec![rank, hidden]),
            ("attn_q_a_norm", vec![rank]),
            ("attn_q_b", vec![queries, rank]),
        ]),
        None => all.push(("attn_q", vec![queries, hidden])),
    }
    weights_of(all)
}

fn feed_forward_tensors(arch: &Arch, experts: bool) -> Vec<Named> {
    let (hidden, ff) = (arch.hidden_size, arch.intermediate_size);
    let mut all = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| all.push((format!("{name}.weight"), shape));
    let Some(experts) = arch.experts.filter(|_| experts) else {
        match (arch.gated, arch.family) {
            (_, "gpt2") => add("ffn_up".into(), vec![hidden, ff]),
            (false, _) => add("ffn_up".into(), vec![ff, hidden]),
            (true, "phi3" | "glm4") => add("ffn_gate_up".into(), vec![2 * ff, hidden]),
            (true, _) => {
                add("ffn_gate".into(), vec![ff, hidden]);
                add("ffn_up".into(), vec![ff, hidden]);
            }
        }
        match arch.transposed {
            true => add("ffn_down".into(), vec![ff, hidden]),
            false => add("ffn_down".into(), vec![hidden, ff]),
        }
        if matches!(arch.activation, Activation::Xielu { .. }) {
            add("xielu.alpha_p".into(), vec![1]);
            add("xielu.alpha_n".into(), vec![1]);
        }
        return all;
    };
    let (count, ff) = (experts.count, experts.intermediate_size);
    add("ffn_gate_inp".into(), vec![count, hidden]);
    if arch.sinks {
        add("ffn_gate_up_exps".into(), vec![count, hidden, 2 * ff]);
        add("ffn_down_exps".into(), vec![count, ff, hidden]);
    } else if arch.family == "granitemoe" {
        add("ffn_gate_up_exps".into(), vec![count, 2 * ff, hidden]);
        add("ffn_down_exps".into(), vec![count, hidden, ff]);
    } else {
        for e in 0..count {
            add(format!("ffn_gate.{e}"), vec![ff, hidden]);
            add(format!("ffn_up.{e}"), vec![ff, hidden]);
            add(format!("ffn_down.{e}"), vec![hidden, ff]);
        }
    }
    if let Some(ff) = experts.shared_size {
        if arch.family == "qwen2moe" {
            add("ffn_gate_inp_shexp".into(), vec![1, hidden]);
        }
        add("ffn_gate_shexp".into(), vec![ff, hidden]);
        add("ffn_up_shexp".into(), vec![ff, hidden]);
        add("ffn_down_shexp".into(), vec![hidden, ff]);
    }
    if experts.sigmoid {
        all.push(("exp_probs_b.bias".into(), vec![count]));
    }
    all
}

/// Write a model of this config with random f32 weights; norms are near one.
fn write_model(dir: &Path, config: &Json) {
    let empty = Weights {
        path: "config".into(),
        files: vec![],
        tensors: HashMap::new(),
        packed: HashMap::new(),
        quantised: HashMap::new(),
        metadata: HashMap::new(),
        config: Some(config.clone()),
        generation_config: None,
    };
    let (mut header, mut data) = (json!({}), Vec::new());
    let mut seed = 1u64;
    let arch = Arch::read(&empty).unwrap();
    for (name, shape) in tensors(&arch) {
        let from = data.len();
        let middle = if shape.len() == 1 {
            1.0 - arch.norm_offset
        } else {
            0.0
        };
        for _ in 0..shape.iter().product() {
            // Knuth's generator; numbers in -0.25 .. 0.25 around the middle.
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let x = (seed >> 40) as f32 / (1u32 << 25) as f32 - 0.25;
            data.extend((middle + x).to_le_bytes());
        }
        header[name] =
            json!({ "dtype": "F32", "shape": shape, "data_offsets": [from, data.len()] });
    }
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length[..], header.as_bytes(), &data].concat();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Two steps of three sequences on scattered pages, the third a long one; the second step's logits for every row.
fn ragged(decoder: &mut dyn Forward) -> Vec<f32> {
    const PAGES: [&[u32]; 3] = [&[7, 2], &[15], &[9, 0, 14, 1, 5]];
    const ROWS: [[usize; 2]; 3] = [[23, 1], [5, 9], [60, 12]];
    let mut logits = Vec::new();
    for step in 0..2 {
        let mut batch = Batch::default();
        for (i, (pages, rows)) in PAGES.iter().zip(ROWS).enumerate() {
            let start = if step == 0 { 0 } else { rows[0] };
            let tokens: Vec<u32> = (start..start + rows[step])
                .map(|p| ((31 * i + 7 * p) % 80) as u32)
                .collect();
            batch.push(&tokens, start, pages, i == 2);
        }
        batch.outputs = (0..batch.tokens.len() as u32).collect();
        logits = decoder.forward(&batch, &mut ()).unwrap().to_vec();
    }
    logits
}

#[test]
fn forward_on_cpu_and_candle_agree_on_a_ragged_batch_of_3_sequences_with_scattered_pages() {
    let factors = |by: f32| (0..4).map(|i| by + i as f32).collect::<Vec<_>>();
    let models = [
        json!({ "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 20,
                "sliding_window_pattern": 2, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0 }),
        json!({ "model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
                "rope_scaling": { "type": "longrope", "short_factor": factors(1.0), "long_factor": factors(2.0) } }),
        json!({ "model_type": "smollm3", "no_rope_layer_interval": 2 }),
        json!({ "model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 20,
                "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0 }),
        json!({ "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2 }),
        json!({ "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3,
                "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1] }),
        json!({ "model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2,
                "embedding_multiplier": 6.0, "attention_multiplier": 0.125, "residual_multiplier": 0.5,
                "logits_scaling": 0.5 }),
        json!({ "model_type": "olmo2" }),
        json!({ "model_type": "stablelm", "layer_norm_eps": 1e-5 }),
        json!({ "model_type": "starcoder2", "hidden_act": "gelu", "sliding_window": 20 }),
        json!({ "model_type": "gpt2" }),
        json!({ "model_type": "cohere2", "sliding_window": 20, "sliding_window_pattern": 2, "logit_scale": 2.0 }),
        json!({ "model_type": "glm4" }),
        json!({ "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20 }),
        json!({ "model_type": "olmo", "clip_qkv": 0.5 }),
        json!({ "model_type": "hunyuan_v1_dense", "rope_scaling": { "type": "dynamic", "alpha": 100.0 } }),
        json!({ "model_type": "apertus", "hidden_act": "xielu" }),
        latent_config(),
        convolution_config(),
        json!({ "model_type": "glm4_moe", "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
                "moe_intermediate_size": 32, "first_k_dense_replace": 1, "use_qk_norm": true }),
        json!({ "model_type": "ministral3", "rope_parameters": { "rope_type": "yarn", "rope_theta": 10000.0,
                "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3 } }),
    ];
    for own in models {
        let name = own["model_type"].as_str().unwrap().to_string();
        let routed = !own["num_experts_per_tok"].is_null();
        let dir = std::env::temp_dir().join(format!("hfcore-ragged-{name}-{}", std::process::id()));
        write_model(&dir, &config(own));
        let cpu = ragged(&mut decoder(|| Cpu::new(Some(2)), &dir));
        let int8 = || Cpu::new(Some(2)).with_kv_type(KvType::Int8);
        let int8 = ragged(&mut decoder(int8, &dir));
        let candle = ragged(&mut decoder(Candle::cpu, &dir));
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(cpu.len(), 22 * 80);
        let apart = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max)
        };
        let largest = apart(&candle, &vec![0.0; candle.len()]);
        let (apart, int8) = (apart(&cpu, &candle), apart(&int8, &candle));
        println!("{name:60} logits up to {largest:.2}, apart {apart:.2e}, with int8 {int8:.2e}");
        // The CPU keeps keys and values in f16: measured 3e-4 to 1.3e-3 of the largest logit, and below 5e-5 with
        // candle made to round them too; in int8 6e-3 to 1.6e-2. A rope, window, norm or softcap gone wrong is at
        // least 0.13 of it.
        assert!(
            largest > 1.0 && apart < 5e-3 * largest,
            "{name}: {apart:.2e} of {largest:.2}"
        );
        // Rounded keys may tip a router's choice.
        if routed {
            continue;
        }
        assert!(
            apart < int8 && int8 < 5e-2 * largest,
            "{name} with int8: {int8:.2e} of {largest:.2}"
        );
    }
}

/// A model of deepseek's third version.
fn latent_config() -> Json {
    json!({ "model_type": "deepseek_v3", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 3,
            "topk_group": 2, "routed_scaling_factor": 1.5 })
}

fn convolution_config() -> Json {
    json!({ "model_type": "lfm2", "conv_L_cache": 3, "block_auto_adjust_ff_dim": false, "full_attn_idxs": [2] })
}

#[test]
fn who_else_is_in_a_step_and_how_a_prompt_was_cut_show_in_no_bit_of_latents_and_convolutions() {
    for own in [latent_config(), convolution_config()] {
        let name = own["model_type"].as_str().unwrap().to_string();
        let dir = std::env::temp_dir().join(format!("hfcore-cut-{name}-{}", std::process::id()));
        write_model(&dir, &config(own));
        let mut cpu = decoder(|| Cpu::new(Some(2)), &dir);
        std::fs::remove_dir_all(&dir).unwrap();
        let ids: Vec<u32> = (0..43).map(|i| i * 7 % 80).collect();
        let want = logits(&mut cpu, &ids, ids.len(), None);
        for chunk in [1, 2, 5, 16, 42] {
            assert_eq!(
                logits(&mut cpu, &ids, chunk, None),
                want,
                "{name} by {chunk}"
            );
        }
        // Positions that are run again, after others were tried in their place, and beside another sequence.
        let mut batch = Batch::default();
        batch.push(&ids[..41], 0, &[3, 9, 4], false);
        batch.outputs = vec![40];
        cpu.forward(&batch, &mut ()).unwrap();
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7, 8], 38, &[3, 9, 4], false);
        batch.outputs = vec![3];
        cpu.forward(&batch, &mut ()).unwrap();
        let mut batch = Batch::default();
        batch.push(&ids[..20], 0, &[0, 1], false);
        batch.push(&ids[38..], 38, &[3, 9, 4], false);
        batch.outputs = vec![24];
        assert_eq!(cpu.forward(&batch, &mut ()).unwrap(), want, "{name}");
    }
}

/// A mask for each row.
struct Masks(Vec<Option<Vec<u32>>>);

impl Caller for Masks {
    fn allowed(&mut self, output: usize) -> Option<&[u32]> {
        self.0[output].as_deref()
    }
    fn gone(&mut self) -> bool {
        false
    }
}

/// Leaves when it has been asked so often.
struct Leaving(usize);

impl Caller for Leaving {
    fn allowed(&mut self, _output: usize) -> Option<&[u32]> {
        None
    }
    fn gone(&mut self) -> bool {
        self.0 = self.0.saturating_sub(1);
        self.0 == 0
    }
}

#[test]
fn allowed_tokens_have_the_same_logits_whether_the_others_are_computed_or_not() {
    let own = json!({ "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 20,
                      "sliding_window_pattern": 2, "final_logit_softcapping": 3.0 });
    let dir = std::env::temp_dir().join(format!("hfcore-allowed-{}", std::process::id()));
    write_model(&dir, &config(own));
    let mut cpu = decoder(|| Cpu::new(Some(2)), &dir);
    let mut candle = decoder(Candle::cpu, &dir);
    std::fs::remove_dir_all(&dir).unwrap();
    let mut batch = Batch::default();
    batch.push(&[1, 5, 9], 0, &[2], false);
    batch.push(&[7], 0, &[0], false);
    batch.outputs = vec![2, 3];
    // Of 80 tokens, five tiles of 16.
    const VOCAB: usize = 80;
    let whole = cpu.forward(&batch, &mut ()).unwrap().to_vec();
    let reference = candle.forward(&batch, &mut ()).unwrap().to_vec();
    assert_eq!(whole.len(), 2 * VOCAB);
    let some = |mask: &[u32]| Some(mask.to_vec());
    let cases = [
        // Few: two tiles, of one row each; words beyond the vocabulary say nothing.
        (some(&[0b11]), some(&[0, 0, 1 << 15, 8]), Some([0, 4])),
        (some(&[0, 3 << 16]), some(&[1 << 31, 1 << 16]), Some([1, 3])),
        // Three tiles, or a row without a mask: all.
        (some(&[1 | 1 << 16]), some(&[0, 1]), None),
        (some(&[1]), None, None),
        (None, some(&[1]), None),
    ];
    for (first, second, tiles) in cases {
        let mut masks = Masks(vec![first, second]);
        let mut want = whole.clone();
        for (i, want) in want.iter_mut().enumerate() {
            if tiles.is_some_and(|tiles| !tiles.contains(&(i % VOCAB / 16))) {
                *want = f32::NEG_INFINITY;
            }
        }
        assert_eq!(cpu.forward(&batch, &mut masks).unwrap(), want);
        assert_eq!(candle.forward(&batch, &mut masks).unwrap(), reference);
    }
    let mut none = Masks(vec![some(&[]), some(&[0, 0, 0])]);
    let logits = cpu.forward(&batch, &mut none).unwrap();
    assert!(logits.iter().all(|x| *x == f32::NEG_INFINITY));
    assert_eq!(cpu.forward(&batch, &mut ()).unwrap(), whole);
    // Half a step leaves nothing behind.
    assert!(cpu.forward(&batch, &mut Leaving(2)).unwrap().is_empty());
    assert_eq!(cpu.forward(&batch, &mut ()).unwrap(), whole);
}

/// A safetensors file of these entries: name, dtype, shape, bytes.
fn safetensors(entries: &[(String, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (json!({}), Vec::new());
    for (name, dtype, shape, bytes) in entries {
        let from = data.len();
        data.extend(bytes);
        header[name] =
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, data.len()] });
    }
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &data].concat()
}

#[test]
fn experts_in_mxfp4_are_the_same_numbers_as_in_floats() {
    let mut own =
        json!({ "model_type": "gpt_oss", "num_local_experts": 3, "num_experts_per_tok": 2 });
    let floats = std::env::temp_dir().join(format!("hfcore-mxfp4-{}-a", std::process::id()));
    let packed = std::env::temp_dir().join(format!("hfcore-mxfp4-{}-b", std::process::id()));
    write_model(&floats, &config(own.clone()));
    own["quantization_config"] = json!({ "quant_method": "mxfp4" });
    write_model(&packed, &config(own));
    const CODES: [f32; 16] = [
        0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
    ];
    let weights = files::open(&floats).unwrap();
    let (mut plain, mut small) = (Vec::new(), Vec::new());
    let mut names: Vec<_> = weights.tensors.keys().cloned().collect();
    names.sort();
    for name in names {
        let tensor = weights.tensor(&name).unwrap();
        let shape = tensor.shape.to_vec();
        if !(name.ends_with("gate_up_proj") || name.ends_with("down_proj")) {
            let entry = (name, "F32", shape, tensor.data.to_vec());
            plain.push(entry.clone());
            small.push(entry);
            continue;
        }
        let [experts, inputs, outputs] = shape[..] else {
            panic!("{name}: {shape:?}");
        };
        let code = |i: usize| i * 7 % 13 + i / 64 % 4;
        let scale = |block: usize| 123 + (block % 3) as u8;
        let mut values = vec![0f32; experts * inputs * outputs];
        for i in 0..values.len() {
            // As it is packed: expert, output, input.
            let (e, o, at) = (i / (inputs * outputs), i / inputs % outputs, i % inputs);
            let number = CODES[code(i)] * f32::exp2(f32::from(scale(i / 32)) - 127.0);
            values[(e * inputs + at) * outputs + o] = number;
        }
        let blocks = (0..values.len() / 2).map(|i| (code(2 * i) | code(2 * i + 1) << 4) as u8);
        let blocks: Vec<u8> = blocks.collect();
        let scales: Vec<u8> = (0..values.len() / 32).map(scale).collect();
        let in_blocks = vec![experts, outputs, inputs / 32];
        let of_blocks = [&in_blocks[..], &[16]].concat();
        small.push((format!("{name}_blocks"), "U8", of_blocks, blocks));
        small.push((format!("{name}_scales"), "U8", in_blocks, scales));
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        plain.push((name, "F32", shape, bytes));
    }
    drop(weights);
    std::fs::write(floats.join("model.safetensors"), safetensors(&plain)).unwrap();
    std::fs::write(packed.join("model.safetensors"), safetensors(&small)).unwrap();
    let run = |dir: &Path| ragged(&mut decoder(Candle::cpu, dir));
    let (want, got) = (run(&floats), run(&packed));
    let blocks = std::fs::read(packed.join("model.safetensors")).unwrap();
    std::fs::remove_dir_all(&floats).unwrap();
    std::fs::remove_dir_all(&packed).unwrap();
    assert!(want.iter().any(|x| x.abs() > 1.0) && blocks.len() < 400_000);
    assert_eq!(got, want);
}

/// A part of a quantised matrix: what its name ends in, dtype, shape, bytes.
type Part = (&'static str, &'static str, Vec<usize>, Vec<u8>);

struct Noise(u64);

impl Noise {
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut byte = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
            (self.0 >> 48) as u8
        };
        (0..n).map(|_| byte()).collect()
    }

    /// F32 between `least` and twice that.
    fn scales(&mut self, n: usize, least: f32) -> Vec<u8> {
        let one = |x: u8| (least * (1.0 + f32::from(x) / 256.0)).to_le_bytes();
        self.bytes(n).into_iter().flat_map(one).collect()
    }
}

/// The parts of a matrix `[outputs, inputs]` of random codes, quantised by this method.
fn parts_of(method: &str, outputs: usize, inputs: usize, noise: &mut Noise) -> Vec<Part> {
    let (count, groups) = (outputs * inputs, inputs / 32);
    let words = |bits: usize| vec![inputs * bits / 32, outputs];
    let zeros = |bits: usize| vec![groups, outputs * bits / 32];
    let grouped = vec![groups, outputs];
    let n = groups * outputs;
    match method {
        "gptq" => vec![
            ("qweight", "I32", words(4), noise.bytes(count / 2)),
            ("qzeros", "I32", zeros(4), vec![0x77; n / 2]),
            ("scales", "F32", grouped, noise.scales(n, 0.025)),
        ],
        "gptq 8" => vec![
            ("qweight", "I32", words(8), noise.bytes(count)),
            ("qzeros", "I32", zeros(8), vec![127; n]),
            ("scales", "F32", grouped, noise.scales(n, 0.0015)),
        ],
        "gptq order" => {
            let index = (0..inputs).flat_map(|i| ((i * 5 % groups) as i32).to_le_bytes());
            let index = index.collect();
            vec![
                ("qweight", "I32", words(4), noise.bytes(count / 2)),
                ("qzeros", "I32", zeros(4), noise.bytes(n / 2)),
                ("scales", "F32", grouped, noise.scales(n, 0.025)),
                ("g_idx", "I32", vec![inputs], index),
            ]
        }
        "awq" => vec![
            (
                "qweight",
                "I32",
                vec![inputs, outputs / 8],
                noise.bytes(count / 2),
            ),
            ("qzeros", "I32", zeros(4), noise.bytes(n / 2)),
            ("scales", "F32", grouped, noise.scales(n, 0.025)),
        ],
        "int8" => vec![
            ("weight", "I8", vec![outputs, inputs], noise.bytes(count)),
            ("SCB", "F32", vec![outputs], noise.scales(outputs, 0.2)),
        ],
        "nf4" => {
            let shape = [outputs, inputs];
            let state = json!({ "blocksize": 64, "shape": shape }).to_string();
            let name = "weight.quant_state.bitsandbytes__nf4";
            let scales = noise.scales(count.div_ceil(64), 0.2);
            vec![
                ("weight", "U8", vec![count / 2, 1], noise.bytes(count / 2)),
                ("weight.absmax", "F32", vec![count.div_ceil(64)], scales),
                (name, "U8", vec![state.len()], state.into_bytes()),
            ]
        }
        "fp8" => {
            // No number of two or more.
            let codes = noise.bytes(count).into_iter().map(|b| b & 0xbf).collect();
            vec![
                ("weight", "F8_E4M3", vec![outputs, inputs], codes),
                (
                    "weight_scale_inv",
                    "F32",
                    vec![outputs / 16, groups],
                    noise.scales(n / 16, 0.2),
                ),
            ]
        }
        _ => unreachable!("{method}"),
    }
}

/// Write at `quantised` the model in `floats` with its layers' matrices quantised, and make `floats` the same numbers.
fn quantise_noise(method: &str, floats: &Path, quantised: &Path, own: Json) {
    write_model(floats, &config(own.clone()));
    let mut with = config(own);
    let library = match method {
        "int8" | "nf4" => "bitsandbytes",
        "fp8" | "awq" => method,
        _ => "gptq",
    };
    with["quantization_config"] = json!({ "quant_method": library, "group_size": 32 });
    write_model(quantised, &with);
    let (mut plain, mut small) = (Vec::new(), Vec::new());
    let weights = files::open(floats).unwrap();
    let mut names: Vec<_> = weights.tensors.keys().cloned().collect();
    names.sort();
    let mut noise = Noise(7);
    for name in &names {
        let tensor = weights.tensor(name).unwrap();
        match (name.contains("layers"), tensor.shape) {
            (true, [outputs, inputs]) => {
                let module = name.trim_end_matches(".weight");
                let parts = parts_of(method, *outputs, *inputs, &mut noise);
                let named =
                    |(end, dtype, shape, bytes)| (format!("{module}.{end}"), dtype, shape, bytes);
                small.extend(parts.into_iter().map(named));
            }
            (_, shape) => {
                let entry = (name.clone(), "F32", shape.to_vec(), tensor.data.to_vec());
                plain.push(entry.clone());
                small.push(entry);
            }
        }
    }
    std::fs::write(quantised.join("model.safetensors"), safetensors(&small)).unwrap();
    let quantised = files::open(quantised).unwrap();
    for (name, matrix) in &quantised.quantised {
        let numbers = matrix.floats(&quantised.files, None);
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        plain.push((name.clone(), "F32", matrix.shape.to_vec(), bytes));
    }
    drop(weights);
    std::fs::write(floats.join("model.safetensors"), safetensors(&plain)).unwrap();
}

#[test]
fn a_quantised_checkpoint_runs_as_the_numbers_that_it_stands_for() {
    let families = [
        json!({ "model_type": "llama" }),
        json!({ "model_type": "phi3" }),
    ];
    let methods = ["gptq", "gptq 8", "gptq order", "awq", "int8", "nf4", "fp8"];
    for (own, method) in families
        .iter()
        .flat_map(|own| methods.map(|method| (own, method)))
    {
        let family = own["model_type"].as_str().unwrap();
        let dir = |which: &str| {
            let name = format!(
                "hfcore-{family}-{}-{}-{which}",
                method.replace(' ', "-"),
                std::process::id()
            );
            std::env::temp_dir().join(name)
        };
        let (floats, quantised) = (dir("floats"), dir("quantised"));
        quantise_noise(method, &floats, &quantised, own.clone());
        let want = ragged(&mut decoder(Candle::cpu, &floats));
        let same = ragged(&mut decoder(Candle::cpu, &quantised));
        let fast = ragged(&mut decoder(|| Cpu::new(Some(2)), &quantised));
        std::fs::remove_dir_all(&floats).unwrap();
        std::fs::remove_dir_all(&quantised).unwrap();
        assert_eq!(same, want, "{family} in {method}");
        let square = |x: f32| f64::from(x) * f64::from(x);
        let apart: f64 = fast.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
        let apart = (apart / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
        println!("{family:6} {method:10} apart {apart:.2e} of the logits");
        // The rest is what activations lose in 8 bits on their way through matrices of noise. A scale, a zero point or an
        // order gone wrong leaves nothing of them.
        assert!(apart < 0.1, "{family} in {method}: {apart:.2e}");
    }
}
