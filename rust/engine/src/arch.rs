//! A model family as data: sizes, norms, rotary positions, biases, tensor names. No tensors, no branch on names elsewhere.

use hfcore_kernels::elementwise::{Activation, Pairing};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::weights::Weights;

/// What tells one family of models from another, where their files do not say it themselves.
struct Family {
    /// `general.architecture` of GGUF files; `None`: this row is for `config.json` only.
    gguf: Option<&'static str>,
    /// `model_type` values of `config.json`.
    hf: &'static [&'static str],
    /// How GGUF files pair the numbers of a head. Converters permute llama's; transformers always pairs halves.
    gguf_pairing: Pairing,
    activation: Activation,
    /// Queries, keys and values always have biases.
    qkv_bias: bool,
    /// RMS norms over each query and key head.
    qk_norm: bool,
    /// Norms after attention and feed-forward too (gemma).
    post_norms: bool,
    /// transformers stores norm weights less one (gemma); GGUF files have the one added.
    hf_norm_offset: f32,
    /// Embeddings are multiplied by the square root of the width.
    scaled_embedding: bool,
    /// One tensor each for q, k, v and for gate, up (phi3).
    fused: bool,
    /// Every n-th layer has no positions (smollm3), where the file does not list them.
    nope_interval: Option<usize>,
    /// Every n-th layer sees everything, the others a window; a second rope base for those (gemma3).
    window_interval: Option<usize>,
    tied: bool,
}

/// Most families differ from llama in a field or two.
const LLAMA: Family = Family {
    gguf: Some("llama"),
    hf: &["llama", "mistral"],
    gguf_pairing: Pairing::Neighbours,
    activation: Activation::Silu,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    hf_norm_offset: 0.0,
    scaled_embedding: false,
    fused: false,
    nope_interval: None,
    window_interval: None,
    tied: false,
};

const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        gguf: Some("qwen2"),
        hf: &["qwen2"],
        gguf_pairing: Pairing::Halves,
        qkv_bias: true,
        ..LLAMA
    },
    Family {
        gguf: Some("qwen3"),
        hf: &["qwen3"],
        gguf_pairing: Pairing::Halves,
        qk_norm: true,
        ..LLAMA
    },
    Family {
        gguf: Some("smollm3"),
        hf: &["smollm3"],
        nope_interval: Some(4),
        ..LLAMA
    },
    Family {
        gguf: Some("gemma3"),
        hf: &["gemma3_text"],
        gguf_pairing: Pairing::Halves,
        activation: Activation::GeluTanh,
        qk_norm: true,
        post_norms: true,
        hf_norm_offset: 1.0,
        scaled_embedding: true,
        window_interval: Some(6),
        tied: true,
        ..LLAMA
    },
    Family {
        gguf: Some("phi3"),
        hf: &["phi3"],
        gguf_pairing: Pairing::Halves,
        fused: true,
        ..LLAMA
    },
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
}

/// One layer's own traits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerArch {
    /// Which of `Arch::ropes`; `None`: no positions.
    pub rope: Option<usize>,
    /// How many positions back it sees, its own among them; `None`: all.
    pub window: Option<usize>,
}

/// Where tensor names come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Gguf,
    Transformers,
}

/// A model's shape, whatever file it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// The family, by its GGUF name.
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
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies attention scores.
    pub attention_scale: f32,
    pub attention_softcap: Option<f32>,
    pub logit_softcap: Option<f32>,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    pub post_norms: bool,
    pub fused: bool,
    pub tied: bool,
    pub pairing: Pairing,
    pub ropes: Vec<Rope>,
    pub layers: Vec<LayerArch>,
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
            (Names::Transformers, layer) => transformers_name(layer, name, self.post_norms),
        }
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
        let finite = [self.norm_eps, self.attention_scale, self.embedding_scale];
        if finite.iter().any(|x| !x.is_finite()) || self.norm_eps < 0.0 {
            return Err(weights.problem("norm epsilon and scales must be finite"));
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
    let supported: Vec<_> = supported.collect();
    Error::Unsupported {
        what,
        name: name.to_string(),
        supported: supported.join(", "),
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
    if value_dim != head_dim {
        return Err(w.problem(format!(
            "keys of {head_dim} and values of {value_dim} numbers per head"
        )));
    }
    let layers = need("block_count")?.min(MAX_LAYERS + 1);
    let context_size = need("context_length")?;
    let scaling = gguf_scaling(w, name)?;
    let dim = size("rope.dimension_count")?
        .unwrap_or(head_dim)
        .min(2 * MAX_WIDTH);
    let base = w.get_f32(&key("rope.freq_base"))?.unwrap_or(10000.0);
    let mut global = Rope {
        frequencies: base_frequencies(base, dim),
        long_frequencies: None,
        factor: 1.0,
    };
    gguf_scale(w, name, &scaling, &mut global)?;
    let window = size("attention.sliding_window")?.filter(|&n| n > 0);
    let mut ropes = vec![global];
    let interval = match size("attention.sliding_window_pattern")? {
        Some(n) => Some(n).filter(|&n| n > 0),
        None => family.window_interval,
    };
    if family.window_interval.is_some() {
        let base = w.get_f32(&key("rope.freq_base_swa"))?.unwrap_or(10000.0);
        ropes.push(Rope {
            frequencies: base_frequencies(base, dim),
            long_frequencies: None,
            factor: 1.0,
        });
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let vocab_size = match size("vocab_size")? {
        Some(n) => n,
        None => w.require("token_embd.weight")?.rows(),
    };
    Ok(Arch {
        family: family.gguf.unwrap_or("llama"),
        vocab_size,
        hidden_size,
        intermediate_size: need("feed_forward_length")?,
        heads,
        kv_heads: size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        context_size,
        norm_eps: w.get_f32(&eps)?.ok_or_else(|| w.missing_key(&eps))?,
        norm_offset: 0.0,
        activation: family.activation,
        embedding_scale: if family.scaled_embedding {
            (hidden_size as f32).sqrt()
        } else {
            1.0
        },
        attention_scale: gguf_attention_scale(family, layers, hidden_size, heads, head_dim),
        attention_softcap: w
            .get_f32(&key("attn_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        logit_softcap: w
            .get_f32(&key("final_logit_softcapping"))?
            .filter(|&x| x > 0.0),
        qkv_bias: family.qkv_bias,
        qk_norm: family.qk_norm,
        post_norms: family.post_norms,
        fused: family.fused,
        tied: w.tensor("output.weight").is_none(),
        pairing: family.gguf_pairing,
        ropes,
        layers: (0..layers)
            .map(|i| layer(i, interval, family.nope_interval, window))
            .collect(),
        original_context: scaling.original_context,
        names: Names::Gguf,
    })
}

/// GGUF files do not say `query_pre_attn_scalar`: it is the head size, but for gemma3's largest model (62 layers).
fn gguf_attention_scale(
    family: &Family,
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
) -> f32 {
    let width = if family.scaled_embedding && layers == 62 && heads > 0 {
        hidden / heads
    } else {
        head_dim
    };
    1.0 / (width as f32).sqrt()
}

/// The traits of layer `i`: with a window interval n, layers n-1, 2n-1, ... see everything.
fn layer(
    i: usize,
    interval: Option<usize>,
    nope: Option<usize>,
    window: Option<usize>,
) -> LayerArch {
    if nope.is_some_and(|n| (i + 1).is_multiple_of(n)) {
        return LayerArch { rope: None, window };
    }
    match interval {
        Some(n) if !(i + 1).is_multiple_of(n) => LayerArch {
            rope: Some(1),
            window,
        },
        Some(_) => LayerArch {
            rope: Some(0),
            window: None,
        },
        None => LayerArch {
            rope: Some(0),
            window,
        },
    }
}

struct GgufScaling {
    kind: String,
    factor: f32,
    attention_factor: Option<f32>,
    original_context: Option<usize>,
}

fn gguf_scaling(w: &Weights, name: &str) -> Result<GgufScaling> {
    let key = |k: &str| format!("{name}.rope.scaling.{k}");
    Ok(GgufScaling {
        kind: w.get_str(&key("type"))?.unwrap_or("none").to_string(),
        factor: w.get_f32(&key("factor"))?.unwrap_or(1.0),
        attention_factor: w.get_f32(&key("attn_factor"))?,
        original_context: w.get_usize(&key("original_context_length"))?,
    })
}

fn gguf_scale(w: &Weights, name: &str, scaling: &GgufScaling, rope: &mut Rope) -> Result<()> {
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
        // Without its factor tensors there is nothing to scale by.
        "longrope" => {}
        other => {
            return Err(unknown(
                "rope scaling",
                other,
                ["none", "linear", "longrope"].into_iter(),
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
        let n = v
            .as_u64()
            .ok_or_else(|| self.wrong(key, "a whole number", v))?;
        Ok(Some(usize::try_from(n).unwrap_or(usize::MAX)))
    }
    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| self.weights.problem(format!("config.json has no {key:?}")))
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
    let hidden_size = c.need("hidden_size")?;
    let heads = c.need("num_attention_heads")?;
    let head_dim = match c.size("head_dim")? {
        Some(n) => n,
        None if heads > 0 => hidden_size / heads,
        None => 0,
    };
    let layers = c.need("num_hidden_layers")?.min(MAX_LAYERS + 1);
    let context_size = c.need("max_position_embeddings")?;
    let activation = config_activation(&c, family)?;
    let scalar = c.float("query_pre_attn_scalar")?.unwrap_or(head_dim as f32);
    let (ropes, original_context) =
        config_ropes(&c, family, head_dim.min(MAX_WIDTH), context_size)?;
    Ok(Arch {
        family: family.gguf.unwrap_or("llama"),
        vocab_size: c.need("vocab_size")?,
        hidden_size,
        intermediate_size: c.need("intermediate_size")?,
        heads,
        kv_heads: c.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        context_size,
        norm_eps: c.float("rms_norm_eps")?.unwrap_or(1e-6),
        norm_offset: family.hf_norm_offset,
        activation,
        embedding_scale: if family.scaled_embedding {
            (hidden_size as f32).sqrt()
        } else {
            1.0
        },
        attention_scale: 1.0 / scalar.sqrt(),
        attention_softcap: c.float("attn_logit_softcapping")?,
        logit_softcap: c.float("final_logit_softcapping")?,
        qkv_bias: family.qkv_bias || c.bool("attention_bias")?.unwrap_or(false),
        qk_norm: family.qk_norm,
        post_norms: family.post_norms,
        fused: family.fused,
        tied: c.bool("tie_word_embeddings")?.unwrap_or(family.tied),
        pairing: Pairing::Halves,
        ropes,
        layers: (0..layers)
            .map(|i| config_layer(&c, family, i))
            .collect::<Result<_>>()?,
        original_context,
        names: Names::Transformers,
    })
}

fn config_activation(c: &Config, family: &Family) -> Result<Activation> {
    match c.str("hidden_activation").or_else(|| c.str("hidden_act")) {
        None => Ok(family.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some(other) => Err(unknown(
            "activation",
            other,
            ["silu", "gelu_pytorch_tanh"].into_iter(),
        )),
    }
}

/// A layer's window and rope, from `layer_types` (transformers 5) or the older keys.
fn config_layer(c: &Config, family: &Family, i: usize) -> Result<LayerArch> {
    let window = c.size("sliding_window")?.filter(|&n| n > 0);
    let local_rope = usize::from(family.window_interval.is_some());
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
    let windowed = match c
        .get("layer_types")
        .and_then(|l| l.get(i))
        .and_then(Json::as_str)
    {
        Some("sliding_attention") => true,
        Some("full_attention") => false,
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
    Ok(LayerArch {
        rope: (!nope).then_some(rope),
        window: window.filter(|_| windowed),
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
        None => Ok(true),
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
    let dim = (head_dim as f32 * partial.unwrap_or(1.0).clamp(0.0, 1.0)) as usize;
    let theta = base(full)?.or(c.float("rope_theta")?).unwrap_or(10000.0);
    let mut rope = Rope {
        frequencies: base_frequencies(theta, dim),
        long_frequencies: None,
        factor: 1.0,
    };
    let mut original = None;
    if let Some(scaling) = scaling {
        original = config_scale(c, &c.of(scaling), context, &mut rope)?;
    }
    let mut ropes = vec![rope];
    if family.window_interval.is_some() {
        let theta = base(local)?
            .or(c.float("rope_local_base_freq")?)
            .unwrap_or(10000.0);
        ropes.push(Rope {
            frequencies: base_frequencies(theta, dim),
            long_frequencies: None,
            factor: 1.0,
        });
    }
    Ok((ropes, original))
}

/// Apply a rope scaling; returns the original context size where long sequences differ.
fn config_scale(c: &Config, s: &Config, context: usize, rope: &mut Rope) -> Result<Option<usize>> {
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
        "default" => Ok(None),
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
            ["default", "linear", "llama3", "longrope"].into_iter(),
        )),
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

/// transformers' name of a tensor, from GGUF's.
fn transformers_name(layer: Option<usize>, name: &str, post_norms: bool) -> String {
    let (stem, ending) = name.rsplit_once('.').unwrap_or((name, "weight"));
    let stem = match stem {
        "token_embd" => return format!("model.embed_tokens.{ending}"),
        "output_norm" => return format!("model.norm.{ending}"),
        "output" => return format!("lm_head.{ending}"),
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_qkv" => "self_attn.qkv_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "post_attention_norm" => "post_attention_layernorm",
        "ffn_norm" if post_norms => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_gate_up" => "mlp.gate_up_proj",
        "ffn_down" => "mlp.down_proj",
        other => other,
    };
    format!("model.layers.{}.{stem}.{ending}", layer.unwrap_or(0))
}

#[cfg(test)]
mod tests;
