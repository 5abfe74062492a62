//! A safetensors checkpoint as a GGUF file says it: names, order of heads, metadata, vocabulary. Writes nothing itself.
//!
//! Whether the file says the same is not taken on trust: what was written is read again and compared ([`Export::check`]).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use hfcore_kernels::elementwise::Pairing;
use hfcore_kernels::quant::TensorType;
use serde_json::Value as Json;

use crate::arch::{Arch, Block, Rope};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::vocab;
use crate::weights::{Tensor, Value, Weights};

/// Families, by their GGUF names, whose tensors and keys are written here.
const FAMILIES: [&str; 10] = [
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "granite", "olmo2",
];

/// Tensors outside layers, and in them, by GGUF's names.
const WHOLE: [&str; 3] = ["token_embd", "output_norm", "output"];
const LAYER: [&str; 11] = [
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
];

/// A tensor of the file that is to be.
pub struct Exported {
    pub name: String,
    pub shape: Vec<usize>,
    /// The type that its numbers come in.
    pub tensor_type: TensorType,
    source: Source,
}

enum Source {
    /// A tensor of the checkpoint. Its rows are of so many heads, and change their order; something is added.
    Tensor {
        name: String,
        heads: Option<usize>,
        plus: f32,
    },
    Numbers(Vec<f32>),
}

/// What the file says, and what it holds.
pub struct Export {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Exported>,
    arch: Arch,
    tokenizer: Tokenizer,
}

impl Export {
    /// Of the checkpoint `weights` in the directory `dir`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a family, rope or tokenizer that is not written; [`Error::ModelFile`] where something is
    /// missing.
    pub fn new(weights: &Weights, dir: &Path) -> Result<Self> {
        let arch = Arch::read(weights)?;
        if !FAMILIES.contains(&arch.family) || arch.experts.is_some() {
            return Err(Error::Unsupported {
                what: "family to write as GGUF",
                name: arch.family.to_owned(),
                supported: format!("{}, without experts", FAMILIES.join(", ")),
            });
        }
        let quantised = weights.quantised.keys();
        if let Some(name) = weights.packed.keys().chain(quantised).min() {
            return Err(weights.problem(format!(
                "is quantised already, {name:?} is packed: only plain numbers are written as GGUF"
            )));
        }
        let tokenizer = Tokenizer::from_dir(dir)?;
        let mut metadata = model_keys(&arch, dir);
        let mut tensors = tensors(weights, &arch)?;
        rope_keys(weights, &arch, &mut metadata, &mut tensors)?;
        metadata.extend(vocabulary(&tokenizer, dir, arch.vocab_size)?);
        Ok(Self {
            metadata,
            tensors,
            arch,
            tokenizer,
        })
    }

    /// Layers, and whether the embedding is the output too.
    pub fn shape(&self) -> (usize, bool) {
        (self.arch.layers.len(), self.arch.tied)
    }

    /// Compare the file that was written, opened again, with the checkpoint.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what the format could not say.
    pub fn check(&self, written: &mut Weights) -> Result<()> {
        let vocabulary = written.take_metadata("tokenizer.");
        let arch = Arch::read(written)?;
        if let Some(what) = difference(&self.arch, &arch) {
            return Err(Error::Unsupported {
                what: "model to write as GGUF",
                name: format!("{} with another {what} than its family's", self.arch.family),
                supported: "what the keys of GGUF files can say".into(),
            });
        }
        match agree(&self.tokenizer, &vocab::tokenizer(&vocabulary)?) {
            true => Ok(()),
            false => Err(foreign_tokenizer()),
        }
    }
}

impl Exported {
    /// Its numbers, ready to be quantised; `own` holds them where they do not stand so in the checkpoint.
    ///
    /// # Errors
    /// Where the checkpoint lacks the tensor.
    pub fn read<'a>(&'a self, weights: &'a Weights, own: &'a mut Vec<u8>) -> Result<Tensor<'a>> {
        let (tensor, heads, plus) = match &self.source {
            Source::Tensor { name, heads, plus } => (weights.require(name)?, *heads, *plus),
            Source::Numbers(numbers) => {
                own.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
                return Ok(Tensor::of(self.tensor_type, &self.shape, own).named(&self.name));
            }
        };
        if self.shape.len() == 1 {
            let numbers = tensor.dequantize();
            let order = neighbours(numbers.len(), heads);
            own.extend(order.flat_map(|i| (numbers[i] + plus).to_le_bytes()));
        } else if heads.is_some() {
            neighbours(tensor.rows(), heads).for_each(|i| own.extend(tensor.row(i)));
        } else {
            return Ok(tensor.named(&self.name));
        }
        Ok(Tensor::of(self.tensor_type, &self.shape, own).named(&self.name))
    }
}

/// Where row `i` of heads whose pairs are neighbours comes from, if they are halves: `rows` of so many heads; of none, as
/// they are.
fn neighbours(rows: usize, heads: Option<usize>) -> impl Iterator<Item = usize> {
    let dim = rows / heads.unwrap_or(1).max(1);
    (0..rows).map(move |row| match heads {
        Some(_) => row / dim * dim + row % dim / 2 + row % 2 * (dim / 2),
        None => row,
    })
}

/// Every tensor of the checkpoint under its name in GGUF files.
fn tensors(weights: &Weights, arch: &Arch) -> Result<Vec<Exported>> {
    let norms: &[&str] = match arch.block {
        Block::Before => &["ffn_norm"],
        Block::After => &["post_attention_norm", "post_ffw_norm"],
        Block::Around => &["post_attention_norm", "ffn_norm", "post_ffw_norm"],
        Block::Parallel => &[],
    };
    let mut names: HashMap<String, (Option<usize>, String)> = HashMap::new();
    let endings = ["weight", "bias"];
    let mut add = |layer, stem: &str, as_stem: &str| {
        for ending in endings {
            let theirs = arch.tensor_name(layer, &format!("{stem}.{ending}"));
            let ours = match layer {
                Some(i) => format!("blk.{i}.{as_stem}.{ending}"),
                None => format!("{as_stem}.{ending}"),
            };
            names.insert(theirs, (layer, ours));
        }
    };
    WHOLE.iter().for_each(|stem| add(None, stem, stem));
    for i in 0..arch.layers.len() {
        LAYER
            .iter()
            .chain(norms)
            .for_each(|stem| add(Some(i), stem, stem));
        // GGUF has gate and inputs together under the inputs' name.
        add(Some(i), "ffn_gate_up", "ffn_up");
    }
    let mut own: Vec<&String> = weights.tensors.keys().collect();
    own.sort();
    let mut out = Vec::new();
    for name in own {
        let tensor = weights.require(name)?;
        let head = arch.tied && *name == arch.tensor_name(None, "output.weight");
        if head || name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        let Some((layer, ours)) = names.get(name) else {
            return Err(weights.problem(format!(
                "tensor {name:?} has no place in architecture {:?}",
                arch.family
            )));
        };
        out.push(exported(arch, name, *layer, ours, &tensor));
    }
    out.sort_by_key(|tensor| place(&tensor.name));
    Ok(out)
}

/// The embedding, the output, then layer by layer.
fn place(name: &str) -> (usize, String) {
    let layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    let number = layer.and_then(|(i, _)| i.parse::<usize>().ok());
    (number.map_or(0, |i| i + 1), name.to_owned())
}

fn exported(
    arch: &Arch,
    name: &str,
    layer: Option<usize>,
    ours: &str,
    tensor: &Tensor,
) -> Exported {
    let stem = ours.rsplit('.').nth(1).unwrap_or_default();
    let turned = layer.is_some() && gguf_pairing(arch) != arch.pairing;
    let heads = match stem {
        "attn_q" if turned => Some(arch.heads),
        "attn_k" if turned => Some(arch.kv_heads),
        _ => None,
    };
    let norm = stem.ends_with("_norm") && ours.ends_with(".weight");
    Exported {
        name: ours.to_owned(),
        shape: tensor.shape.to_vec(),
        tensor_type: match tensor.shape.len() {
            1 => TensorType::F32,
            _ => tensor.tensor_type,
        },
        source: Source::Tensor {
            name: name.to_owned(),
            heads,
            plus: if norm { arch.norm_offset } else { 0.0 },
        },
    }
}

/// How GGUF files of a family pair the numbers of a head.
fn gguf_pairing(arch: &Arch) -> Pairing {
    match arch.family {
        "llama" | "smollm3" | "granite" => Pairing::Neighbours,
        _ => Pairing::Halves,
    }
}

fn size(n: usize) -> Value {
    Value::Int(n as i64)
}

fn number(x: f32) -> Value {
    Value::Float(f64::from(x))
}

/// The model's sizes.
fn model_keys(arch: &Arch, dir: &Path) -> Vec<(String, Value)> {
    let family = arch.family;
    let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let text = |s: &str| Value::String(s.to_owned());
    let mut keys = vec![
        ("general.architecture".to_owned(), text(family)),
        ("general.type".to_owned(), text("model")),
        ("general.name".to_owned(), text(&name)),
    ];
    let mut put = |key: &str, value: Value| keys.push((format!("{family}.{key}"), value));
    put("block_count", size(arch.layers.len()));
    put("context_length", size(arch.context_size));
    put("embedding_length", size(arch.hidden_size));
    put("feed_forward_length", size(arch.intermediate_size));
    put("attention.head_count", size(arch.heads));
    put("attention.head_count_kv", size(arch.kv_heads));
    put("attention.key_length", size(arch.head_dim));
    put("attention.value_length", size(arch.head_dim));
    put("vocab_size", size(arch.vocab_size));
    let eps = match arch.layer_norm {
        true => "attention.layer_norm_epsilon",
        false => "attention.layer_norm_rms_epsilon",
    };
    put(eps, number(arch.norm_eps));
    if let Some(window) = arch.layers.iter().find_map(|layer| layer.window) {
        put("attention.sliding_window", size(window));
    }
    if let Some(cap) = arch.attention_softcap {
        put("attn_logit_softcapping", number(cap));
    }
    if let Some(cap) = arch.logit_softcap {
        put("final_logit_softcapping", number(cap));
    }
    if family == "granite" {
        put("embedding_scale", number(arch.embedding_scale));
        put("residual_scale", number(arch.residual_scale));
        put("attention.scale", number(arch.attention_scale));
        put("logit_scale", number(1.0 / arch.logit_scale));
    }
    keys
}

/// Positions: the base, and what is not as the base alone says as factors, by which angles are divided.
fn rope_keys(
    weights: &Weights,
    arch: &Arch,
    keys: &mut Vec<(String, Value)>,
    tensors: &mut Vec<Exported>,
) -> Result<()> {
    let family = arch.family;
    let (Some(rope), Some(config)) = (arch.ropes.first(), &weights.config) else {
        return Ok(());
    };
    let parameters = config.get("rope_parameters").filter(|v| !v.is_null());
    let full = parameters.map(|p| p.get("full_attention").unwrap_or(p));
    let of = |json: Option<&Json>| {
        json.and_then(|j| j.get("rope_theta"))
            .and_then(Json::as_f64)
    };
    let base = of(full).or_else(|| of(Some(config))).unwrap_or(10000.0) as f32;
    let dim = 2 * rope.frequencies.len();
    let mut put = |key: &str, value: Value| keys.push((format!("{family}.rope.{key}"), value));
    put("freq_base", number(base));
    put("dimension_count", size(dim));
    let scaling = full.or_else(|| config.get("rope_scaling").filter(|v| !v.is_null()));
    let text = |key: &str| scaling.and_then(|s| s.get(key)).and_then(Json::as_str);
    let kind = text("rope_type")
        .or_else(|| text("type"))
        .unwrap_or("default");
    let float = |key: &str| scaling.and_then(|s| s.get(key)).and_then(Json::as_f64);
    let factors = |frequencies: &[f32]| -> Vec<f32> {
        let plain = (0..dim / 2).map(|i| 1.0 / base.powf((2 * i) as f32 / dim as f32));
        plain
            .zip(frequencies)
            .map(|(plain, own)| plain / own)
            .collect()
    };
    match kind {
        "default" | "dynamic" => {}
        "linear" => {
            put("scaling.type", Value::String("linear".into()));
            put(
                "scaling.factor",
                number(float("factor").unwrap_or(1.0) as f32),
            );
        }
        "yarn" => {
            put("scaling.type", Value::String("yarn".into()));
            put(
                "scaling.factor",
                number(float("factor").unwrap_or(1.0) as f32),
            );
            if let Some(original) = float("original_max_position_embeddings") {
                put("scaling.original_context_length", size(original as usize));
            }
        }
        "llama3" if family == "llama" => {
            tensors.push(table("rope_freqs.weight", factors(&rope.frequencies)));
        }
        "longrope" | "su" if family == "phi3" => longrope(arch, rope, factors, &mut put, tensors),
        other => {
            return Err(Error::Unsupported {
                what: "rope scaling to write as GGUF",
                name: format!("{other} of {family}"),
                supported: "default, linear, yarn; llama3 of llama; longrope of phi3".into(),
            });
        }
    }
    Ok(())
}

fn longrope(
    arch: &Arch,
    rope: &Rope,
    factors: impl Fn(&[f32]) -> Vec<f32>,
    put: &mut impl FnMut(&str, Value),
    tensors: &mut Vec<Exported>,
) {
    let long = rope
        .long_frequencies
        .as_deref()
        .unwrap_or(&rope.frequencies);
    tensors.push(table("rope_factors_long.weight", factors(long)));
    tensors.push(table(
        "rope_factors_short.weight",
        factors(&rope.frequencies),
    ));
    put("scaling.attn_factor", number(rope.factor));
    let original = arch.original_context.unwrap_or(arch.context_size);
    put("scaling.original_context_length", size(original));
}

fn table(name: &str, numbers: Vec<f32>) -> Exported {
    Exported {
        name: name.to_owned(),
        shape: vec![numbers.len()],
        tensor_type: TensorType::F32,
        source: Source::Numbers(numbers),
    }
}

/// What the second does not have as the first has it.
fn difference(a: &Arch, b: &Arch) -> Option<&'static str> {
    let near = |a: f32, b: f32| (a - b).abs() <= 1e-5 * a.abs().max(b.abs());
    let all =
        |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| near(*a, *b));
    let long = |rope: &Rope| rope.long_frequencies.clone().unwrap_or_default();
    let same = |(a, b): (&Rope, &Rope)| {
        all(&a.frequencies, &b.frequencies)
            && all(&long(a), &long(b))
            && near(a.factor, b.factor)
            && a.growth == b.growth
    };
    let sizes = |a: &Arch| {
        let heads = (a.heads, a.kv_heads, a.head_dim, a.context_size);
        (a.hidden_size, a.intermediate_size, a.vocab_size, heads)
    };
    let scales = |a: &Arch| {
        [
            a.embedding_scale,
            a.residual_scale,
            a.logit_scale,
            a.norm_eps,
        ]
    };
    let caps = |a: &Arch| (a.attention_softcap, a.logit_softcap);
    let kinds = |a: &Arch| (a.activation, a.gated, a.block, a.layer_norm);
    let norms = |a: &Arch| (a.qk_norm, a.qk_together, a.tied);
    let checks = [
        (sizes(a) == sizes(b), "size"),
        (kinds(a) == kinds(b), "activation or order of norms"),
        (norms(a) == norms(b), "norm of heads or output"),
        (caps(a) == caps(b), "softcap"),
        (all(&scales(a), &scales(b)), "scale"),
        (
            near(a.attention_scale, b.attention_scale),
            "scale of attention scores",
        ),
        (a.layers == b.layers, "pattern of windows or positions"),
        (a.ropes.iter().zip(&b.ropes).all(same), "rope"),
    ];
    checks.iter().find(|(fine, _)| !fine).map(|(_, what)| *what)
}

// ------------------------------------------------------------------------------------------------ vocabulary

/// `tokenizer.ggml.token_type` of the GGUF specification.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Texts that tell pre-tokenizers from each other.
const SAMPLES: [&str; 8] = [
    "Hello world! It's 2024, isn't it? I'LL say  so: 1234567 times.",
    "  leading,   several\n\n\nlines\r\n\tand tabs \n  x",
    "CamelCaseWords and snake_case_names == 3.14159e-10 (x+y)*z; // ok",
    "caf\u{e9} cafe\u{301} na\u{ef}ve \u{c5}ngstr\u{f6}m \u{fb01}ne \u{bd} x\u{b2}",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{3002}\u{3053}\u{3093}\u{306b}\u{3061}\u{306f} \u{c548}\u{b155} 12\u{5e74}",
    "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{645}\u{631}\u{62d}\u{628}\u{627} \u{1f600}\u{1f468}\u{200d}\u{1f469} $5 #tag @me",
    "We're they'd you've he's I'm DON'T a'b ''' \"quoted\" <tag/> [x] {y}",
    "trailing space \n \u{a0}\u{2003}end",
];

fn agree(a: &Tokenizer, b: &Tokenizer) -> bool {
    SAMPLES
        .iter()
        .all(|text| match (a.encode(text, true), b.encode(text, true)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        })
}

fn foreign_tokenizer() -> Error {
    Error::Unsupported {
        what: "tokenizer to write as GGUF",
        name: "one that splits texts as none of GGUF's does".into(),
        supported: format!(
            "byte-level BPE ({}), SentencePiece BPE",
            vocab::PRE_TOKENIZERS
        ),
    }
}

fn vocabulary(
    tokenizer: &Tokenizer,
    dir: &Path,
    vocab_size: usize,
) -> Result<Vec<(String, Value)>> {
    let path = dir.join("tokenizer.json");
    let problem = |problem: String| Error::ModelFile {
        path: path.display().to_string(),
        problem,
    };
    let text = fs::read(&path).map_err(|e| problem(e.to_string()))?;
    let json: Json = serde_json::from_slice(&text).map_err(|e| problem(e.to_string()))?;
    let model = json.get("model").unwrap_or(&Json::Null);
    let merges = merges(model).ok_or_else(foreign_tokenizer)?;
    let fallback = model
        .get("byte_fallback")
        .and_then(Json::as_bool)
        .unwrap_or(false);
    let mut keys = tokens(tokenizer, &json, vocab_size, fallback);
    for (name, key) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ] {
        let token = tokenizer.special_tokens().get(name);
        if let Some(id) = token.and_then(|token| tokenizer.token_to_id(token)) {
            keys.push((key.to_owned(), size(id as usize)));
        }
    }
    let ids = tokenizer.encode("a", true)?;
    let begins = tokenizer.bos_id().is_some() && ids.first().copied() == tokenizer.bos_id();
    let eos = tokenizer.special_tokens().get("eos_token");
    let eos = eos.and_then(|eos| tokenizer.token_to_id(eos));
    let ends = eos.is_some() && ids.last().copied() == eos;
    keys.push(("add_bos_token".to_owned(), Value::Bool(begins)));
    keys.push(("add_eos_token".to_owned(), Value::Bool(ends)));
    let mut keys: Vec<_> = keys
        .into_iter()
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
        .collect();
    for (name, template) in tokenizer.chat_templates() {
        let key = match &name[..] {
            "default" => "tokenizer.chat_template".to_owned(),
            name => format!("tokenizer.chat_template.{name}"),
        };
        keys.push((key, Value::String(template.clone())));
    }
    let text = |s: &str| Value::String(s.to_owned());
    let variants: Vec<Vec<(&str, Value)>> = match fallback {
        true => [false, true]
            .map(|space| {
                let scores = Value::Floats(scores(tokenizer, &merges, vocab_size));
                let space = ("add_space_prefix", Value::Bool(space));
                vec![("model", text("llama")), ("scores", scores), space]
            })
            .into(),
        false => vocab::PRE_TOKENIZERS
            .split(',')
            .map(|pre| {
                let joined = merges.iter().map(|(a, b)| format!("{a} {b}"));
                let merges = ("merges", Value::Strings(joined.collect()));
                vec![("model", text("gpt2")), ("pre", text(pre.trim())), merges]
            })
            .collect(),
    };
    fitting(tokenizer, keys, variants)
}

/// The first of the variants whose tokenizer is the checkpoint's.
fn fitting(
    tokenizer: &Tokenizer,
    keys: Vec<(String, Value)>,
    variants: Vec<Vec<(&str, Value)>>,
) -> Result<Vec<(String, Value)>> {
    let mut all: HashMap<String, Value> = keys.iter().cloned().collect();
    for variant in variants {
        let variant: Vec<(String, Value)> = variant
            .into_iter()
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
            .collect();
        all.extend(variant.iter().cloned());
        if vocab::tokenizer(&all).is_ok_and(|own| agree(tokenizer, &own)) {
            return Ok(variant.into_iter().chain(keys).collect());
        }
    }
    Err(foreign_tokenizer())
}

/// Pairs of tokens, best first; none where the model is no BPE.
fn merges(model: &Json) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Json| match merge {
        Json::String(both) => {
            let (a, b) = both.split_once(' ')?;
            Some((a.to_owned(), b.to_owned()))
        }
        Json::Array(both) => match &both[..] {
            [Json::String(a), Json::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    model.get("merges")?.as_array()?.iter().map(pair).collect()
}

/// Tokens and what they are.
fn tokens(
    tokenizer: &Tokenizer,
    json: &Json,
    vocab_size: usize,
    fallback: bool,
) -> Vec<(String, Value)> {
    let mut added: HashMap<u64, bool> = HashMap::new();
    for token in json
        .get("added_tokens")
        .and_then(Json::as_array)
        .into_iter()
        .flatten()
    {
        let special = token
            .get("special")
            .and_then(Json::as_bool)
            .unwrap_or(false);
        if let Some(id) = token.get("id").and_then(Json::as_u64) {
            added.insert(id, special);
        }
    }
    let unknown = tokenizer.special_tokens().get("unk_token");
    let unknown = unknown.and_then(|token| tokenizer.token_to_id(token));
    let (mut texts, mut types) = (Vec::new(), Vec::new());
    for id in 0..vocab_size.max(tokenizer.vocab_size()) as u32 {
        let text = tokenizer.id_to_token(id);
        let byte = |text: &str| fallback && text.len() == 6 && text.starts_with("<0x");
        types.push(match (&text, added.get(&u64::from(id))) {
            (None, _) => UNUSED,
            (Some(_), _) if fallback && Some(id) == unknown => UNKNOWN,
            (Some(_), Some(true)) => CONTROL,
            (Some(_), Some(false)) => USER_DEFINED,
            (Some(text), None) if byte(text) => BYTE,
            (Some(_), None) => NORMAL,
        });
        texts.push(text.unwrap_or_else(|| format!("[PAD{id}]")));
    }
    vec![
        ("tokens".to_owned(), Value::Strings(texts)),
        ("token_type".to_owned(), Value::Ints(types)),
    ]
}

/// SentencePiece's scores from merges: what is merged first scores highest. What no merge makes is never looked for.
fn scores(tokenizer: &Tokenizer, merges: &[(String, String)], vocab_size: usize) -> Vec<f32> {
    let mut scores = vec![0.0; vocab_size.max(tokenizer.vocab_size())];
    for (rank, (a, b)) in merges.iter().enumerate().rev() {
        let made = tokenizer.token_to_id(&format!("{a}{b}"));
        if let Some(score) = made.and_then(|id| scores.get_mut(id as usize)) {
            *score = -(rank as f32);
        }
    }
    scores
}
