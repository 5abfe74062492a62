//! LoRA adapters as PEFT saves them (Hu et al. 2021, arXiv:2106.09685): a directory read and checked against a model, and its
//! thin matrices on a device. Applies nothing: see `decoder.rs`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use hfcore_kernels::elementwise::Pairing;
use hfcore_kernels::quant::TensorType;
use regex::Regex;
use serde_json::{Map, Value as Json};

use crate::arch::Arch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::safetensors;
use crate::weights::{Tensor, Weights, nearest};

/// A layer's matrices that an adapter adds to. Those that share their inputs are one, as in the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Queries, keys and values.
    Qkv,
    AttnOutput,
    /// Gate and up, or up alone.
    Up,
    Down,
}

/// What is added to one matrix: `y += B (A x)`.
pub struct Pair<D: Device> {
    /// `[ranks, inputs]`
    pub a: D::Matrix,
    /// `[outputs, ranks]`, scaled.
    pub b: D::Matrix,
}

/// An adapter on a device.
pub struct Adapter<D: Device> {
    pairs: HashMap<(usize, Site), Pair<D>>,
}

impl<D: Device> Adapter<D> {
    /// What it adds to a matrix of a layer, if anything.
    pub fn pair(&self, layer: usize, site: Site) -> Option<&Pair<D>> {
        self.pairs.get(&(layer, site))
    }

    /// Read the adapter in the directory `dir`, which must fit the model `arch`, and make it resident.
    ///
    /// # Errors
    /// `ModelFile` for a file that is missing, damaged or another model's; `Unsupported` for what is more than LoRA on the
    /// matrices of attention and feed-forward.
    pub fn load(device: &D, arch: &Arch, dir: &Path) -> Result<Self> {
        let source = Source::read(arch, dir)?;
        let mut pairs = HashMap::new();
        for ((layer, site), parts) in &source.sites {
            let pair = source.pair(device, arch, *site, parts)?;
            pairs.insert((*layer, *site), pair);
        }
        Ok(Self { pairs })
    }
}

/// One module's two matrices, and the rows of its site that it adds to.
struct Part {
    /// Its name, less `lora_A.weight`.
    name: String,
    first: usize,
    outputs: usize,
    inputs: usize,
    scale: f32,
    /// GGUF files have the rows of these heads in another order than transformers.
    turned: bool,
}

/// An adapter's file, sorted by what it adds to.
struct Source {
    weights: Weights,
    sites: BTreeMap<(usize, Site), Vec<Part>>,
}

/// A module of a layer: its name in GGUF, where it adds, its first row there, its rows and its inputs.
struct Module {
    name: &'static str,
    site: Site,
    first: usize,
    outputs: usize,
    inputs: usize,
}

fn modules(arch: &Arch) -> Vec<Module> {
    let (hidden, width) = (arch.hidden_size, arch.intermediate_size);
    let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
    let up = if arch.gated { width } else { 0 };
    let of = |name, site, (first, outputs), inputs| Module {
        name,
        site,
        first,
        outputs,
        inputs,
    };
    let mut modules = vec![
        of("attn_q", Site::Qkv, (0, q), hidden),
        of("attn_k", Site::Qkv, (q, kv), hidden),
        of("attn_v", Site::Qkv, (q + kv, kv), hidden),
        of("attn_qkv", Site::Qkv, (0, q + 2 * kv), hidden),
        of("attn_output", Site::AttnOutput, (0, hidden), q),
        of("ffn_up", Site::Up, (up, width), hidden),
        of("ffn_down", Site::Down, (0, hidden), width),
    ];
    if arch.gated {
        modules.push(of("ffn_gate", Site::Up, (0, width), hidden));
        modules.push(of("ffn_gate_up", Site::Up, (0, 2 * width), hidden));
    }
    modules
}

/// What PEFT puts before the model's own names.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

impl Source {
    fn read(arch: &Arch, dir: &Path) -> Result<Self> {
        let weights = safetensors::open_adapter(dir)?;
        if arch.transposed {
            return Err(unsupported(
                "adapter of a family",
                arch.family,
                "families whose matrices are [outputs, inputs]",
            ));
        }
        if arch.latent.is_some() || arch.layers.iter().any(|layer| layer.convolution) {
            return Err(unsupported(
                "adapter of a family",
                arch.family,
                "families whose layers are all attention by queries, keys and values",
            ));
        }
        let config = Config::read(&weights)?;
        let mut places = HashMap::new();
        for layer in 0..arch.layers.len() {
            for module in modules(arch) {
                let dense = !arch.layers[layer].experts;
                if dense || matches!(module.site, Site::Qkv | Site::AttnOutput) {
                    places.insert(arch.module_name(layer, module.name), (layer, module));
                }
            }
        }
        let mut names: Vec<&String> = weights.tensors.keys().collect();
        names.sort();
        let mut sites: BTreeMap<(usize, Site), Vec<Part>> = BTreeMap::new();
        for name in names {
            let Some(stem) = name.strip_suffix(A) else {
                check_other(&weights, name)?;
                continue;
            };
            let own = stem.strip_prefix(PREFIX).unwrap_or(stem);
            let Some((layer, module)) = places.get(own) else {
                return Err(no_place(own, &places));
            };
            let rank = check_shapes(&weights, stem, module)?;
            let part = Part {
                name: stem.to_string(),
                first: module.first,
                outputs: module.outputs,
                inputs: module.inputs,
                scale: config.scale(own, rank),
                turned: arch.turned_heads()? && ["attn_q", "attn_k"].contains(&module.name),
            };
            sites.entry((*layer, module.site)).or_default().push(part);
        }
        if sites.is_empty() {
            return Err(weights.problem("has no LoRA matrices (*.lora_A.weight)"));
        }
        Ok(Self { weights, sites })
    }

    /// The parts of one site as one pair: their ranks one after the other, each of them for its own outputs alone.
    fn pair<D: Device>(
        &self,
        device: &D,
        arch: &Arch,
        site: Site,
        parts: &[Part],
    ) -> Result<Pair<D>> {
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs = match site {
            Site::Qkv => (arch.heads + 2 * arch.kv_heads) * arch.head_dim,
            Site::AttnOutput | Site::Down => arch.hidden_size,
            Site::Up => arch.intermediate_size * (1 + usize::from(arch.gated)),
        };
        let mut a = Vec::new();
        let mut own = Vec::new();
        for part in parts {
            a.extend(self.values(&part.name, A)?);
            let b = self.values(&part.name, B)?;
            own.push(match part.turned {
                true => turned(&b, part.outputs, arch.head_dim),
                false => b,
            });
        }
        let ranks = a.len() / inputs.max(1);
        let mut b = vec![0.0; outputs * ranks];
        let mut before = 0;
        for (part, own) in parts.iter().zip(&own) {
            let rank = own.len() / part.outputs.max(1);
            for (row, values) in own.chunks_exact(rank).enumerate() {
                let at = (part.first + row) * ranks + before;
                for (to, from) in b[at..at + rank].iter_mut().zip(values) {
                    *to = from * part.scale;
                }
            }
            before += rank;
        }
        Ok(Pair {
            a: matrix(device, &a, [ranks, inputs])?,
            b: matrix(device, &b, [outputs, ranks])?,
        })
    }

    fn values(&self, stem: &str, ending: &str) -> Result<Vec<f32>> {
        let name = format!("{stem}{ending}");
        let values = self.weights.require(&name)?.dequantize();
        match values.iter().all(|x| x.is_finite()) {
            true => Ok(values),
            false => Err(self
                .weights
                .problem(format!("tensor {name:?} has numbers that are not finite"))),
        }
    }
}

/// Numbers on a device: as bf16 where that loses none of them, as f32 else.
fn matrix<D: Device>(device: &D, values: &[f32], shape: [usize; 2]) -> Result<D::Matrix> {
    let short = values.iter().all(|x| x.to_bits() & 0xffff == 0);
    let bytes: Vec<u8> = match short {
        true => {
            let high = |x: &f32| ((x.to_bits() >> 16) as u16).to_le_bytes();
            values.iter().flat_map(high).collect()
        }
        false => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let kind = if short {
        TensorType::BF16
    } else {
        TensorType::F32
    };
    device.matrix(&[Tensor::of(kind, &shape, &bytes)], None)
}

/// Rows of heads whose numbers pair by halves, in the order in which they pair as neighbours: as converters to GGUF turn
/// llama's.
fn turned(b: &[f32], outputs: usize, head_dim: usize) -> Vec<f32> {
    let rank = b.len() / outputs.max(1);
    let mut out = Vec::with_capacity(b.len());
    for head in 0..outputs / head_dim.max(1) {
        for i in 0..head_dim {
            let from = head * head_dim + i % 2 * (head_dim / 2) + i / 2;
            out.extend_from_slice(&b[from * rank..(from + 1) * rank]);
        }
    }
    out
}

/// The rank of a module's two matrices, which must be `[rank, inputs]` and `[outputs, rank]`.
fn check_shapes(weights: &Weights, stem: &str, module: &Module) -> Result<usize> {
    let a = weights.require(&format!("{stem}{A}"))?;
    let b = weights.require(&format!("{stem}{B}"))?;
    let (inputs, outputs) = (module.inputs, module.outputs);
    match (a.shape, b.shape) {
        (&[rank, m], &[n, other]) if rank == other && rank > 0 && (m, n) == (inputs, outputs) => {
            Ok(rank)
        }
        (a, b) => Err(weights.problem(format!(
            "{stem:?} has matrices of {a:?} and {b:?}, this model wants [rank, {inputs}] and [{outputs}, rank]"
        ))),
    }
}

/// A tensor that is no `lora_A` must be the `lora_B` of one.
fn check_other(weights: &Weights, name: &str) -> Result<()> {
    if let Some(stem) = name.strip_suffix(B) {
        return weights.require(&format!("{stem}{A}")).map(drop);
    }
    Err(unsupported(
        "adapter tensor",
        name,
        "lora_A.weight and lora_B.weight of linear layers",
    ))
}

fn no_place(module: &str, places: &HashMap<String, (usize, Module)>) -> Error {
    let mut last: Vec<&str> = places
        .keys()
        .filter_map(|name| name.rsplit('.').next())
        .collect();
    last.sort_unstable();
    last.dedup();
    let near = nearest(module, places.keys()).map(|near| format!("; the nearest is {near:?}"));
    unsupported(
        "adapter module",
        module,
        &(last.join(", ") + &near.unwrap_or_default()),
    )
}

fn unsupported(what: &'static str, name: &str, supported: &str) -> Error {
    Error::Unsupported {
        what,
        name: name.to_string(),
        supported: supported.to_string(),
    }
}

/// What `adapter_config.json` says of scales.
struct Config {
    alpha: f32,
    patterns: Vec<(Regex, f32)>,
    by_root: bool,
}

/// Keys of `adapter_config.json` that change what is computed, and the values under which they do not.
const PLAIN: &[(&str, &[&str])] = &[
    ("peft_type", &["\"LORA\""]),
    ("bias", &["\"none\""]),
    ("use_dora", &["false"]),
    ("fan_in_fan_out", &["false"]),
    ("lora_bias", &["false"]),
    ("modules_to_save", &["[]"]),
    ("trainable_token_indices", &["[]", "{}"]),
    ("target_parameters", &["[]"]),
    ("layer_replication", &["[]"]),
    ("alora_invocation_tokens", &["[]"]),
    ("use_qalora", &["false"]),
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"eva\"", "\"orthogonal\""],
    ),
];

/// Keys that may be true, or objects, and change nothing here.
const HARMLESS: &[&str] = &[
    "inference_mode",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "auto_mapping",
    "eva_config",
    "ensure_weight_tying",
    "runtime_config",
];

/// Patterns of one file, and the bytes of each.
const MAX_PATTERNS: usize = 4096;
const MAX_PATTERN: usize = 512;

impl Config {
    fn read(weights: &Weights) -> Result<Self> {
        let none = Map::new();
        let config = weights.config.as_ref().and_then(Json::as_object);
        let config = config.unwrap_or(&none);
        refuse_more(config)?;
        let number = |key: &str, value: &Json| match value.as_f64().map(|x| x as f32) {
            Some(x) if x.is_finite() => Ok(x),
            _ => Err(weights.problem(format!("{key:?} must be a finite number, got {value:.100}"))),
        };
        let alpha = config.get("lora_alpha");
        let alpha =
            alpha.ok_or_else(|| weights.problem("adapter_config.json lacks \"lora_alpha\""))?;
        let mut patterns = Vec::new();
        let given = config.get("alpha_pattern").and_then(Json::as_object);
        for (pattern, alpha) in given.into_iter().flatten() {
            if patterns.len() == MAX_PATTERNS || pattern.len() > MAX_PATTERN {
                return Err(weights.problem(format!(
                    "alpha_pattern must have at most {MAX_PATTERNS} patterns of {MAX_PATTERN} bytes"
                )));
            }
            let whole = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            let whole = whole.map_err(|error| {
                let reason = error.to_string();
                let reason = reason.lines().last().unwrap_or_default();
                weights.problem(format!("alpha_pattern {pattern:?}: {reason}"))
            })?;
            patterns.push((whole, number("alpha_pattern", alpha)?));
        }
        Ok(Self {
            alpha: number("lora_alpha", alpha)?,
            patterns,
            by_root: config.get("use_rslora") == Some(&Json::Bool(true)),
        })
    }

    /// What multiplies a module's product: alpha by the rank, or by its root (Kalajdzievski 2023, arXiv:2312.03732).
    fn scale(&self, module: &str, rank: usize) -> f32 {
        let own = self.patterns.iter().find(|(p, _)| p.is_match(module));
        let alpha = own.map_or(self.alpha, |(_, alpha)| *alpha);
        match self.by_root {
            true => alpha / (rank as f32).sqrt(),
            false => alpha / rank as f32,
        }
    }
}

/// Refuse an adapter that does more than add `B A x`.
fn refuse_more(config: &Map<String, Json>) -> Result<()> {
    let empty = |value: &Json| match value {
        Json::Null => true,
        Json::Object(fields) => fields.is_empty(),
        _ => false,
    };
    for (key, value) in config {
        let shown = value.to_string();
        let name = || {
            let short: String = shown.chars().take(100).collect();
            format!("{key} = {short}")
        };
        if let Some((_, plain)) = PLAIN.iter().find(|(known, _)| known == key) {
            if !value.is_null() && !plain.contains(&&*shown) {
                return Err(unsupported("adapter option", &name(), &plain.join(", ")));
            }
            continue;
        }
        let acts = *value == Json::Bool(true) || (value.is_object() && !empty(value));
        if acts && !HARMLESS.contains(&&**key) {
            return Err(unsupported("adapter option", &name(), "false, null"));
        }
    }
    if config.get("peft_type").is_none_or(Json::is_null) {
        return Err(unsupported(
            "adapter option",
            "peft_type = null",
            "\"LORA\"",
        ));
    }
    Ok(())
}

impl Arch {
    /// Whether the rows of query and key heads lie in another order than in transformers.
    ///
    /// # Errors
    /// `Unsupported` for an order that no converter is known to make.
    fn turned_heads(&self) -> Result<bool> {
        match (self.transformers_pairing(), self.pairing) {
            (theirs, ours) if theirs == ours => Ok(false),
            (Pairing::Halves, Pairing::Neighbours) => Ok(true),
            _ => Err(unsupported(
                "adapter of a family",
                self.family,
                "its safetensors checkpoint",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: Json) -> String {
        let config = config.as_object().unwrap().clone();
        refuse_more(&config).unwrap_err().to_string()
    }

    #[test]
    fn what_is_more_than_lora_is_refused_by_name() {
        let lora = serde_json::json!({"peft_type": "LORA", "use_dora": true});
        assert!(refused(lora).contains("use_dora = true"));
        for (key, value) in [
            ("bias", serde_json::json!("all")),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("fan_in_fan_out", serde_json::json!(true)),
            ("init_lora_weights", serde_json::json!("pissa")),
            ("use_what_comes_next", serde_json::json!(true)),
            ("next_config", serde_json::json!({"a": 1})),
        ] {
            let mut config = serde_json::json!({"peft_type": "LORA"});
            config[key] = value;
            assert!(refused(config).contains(key));
        }
        assert!(refused(serde_json::json!({"peft_type": "LOHA"})).contains("LOHA"));
        assert!(refused(serde_json::json!({})).contains("peft_type"));
    }

    #[test]
    fn scales_follow_alpha_rank_and_patterns() {
        let of = |pattern: &str, alpha| {
            (
                Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).unwrap(),
                alpha,
            )
        };
        let mut config = Config {
            alpha: 16.0,
            patterns: vec![of("q_proj", 4.0), of(r"layers\.1\..*", 2.0)],
            by_root: false,
        };
        assert_eq!(config.scale("model.layers.0.self_attn.k_proj", 8), 2.0);
        assert_eq!(config.scale("model.layers.1.self_attn.q_proj", 8), 0.5);
        assert_eq!(config.scale("model.layers.1.self_attn.k_proj", 8), 0.25);
        assert_eq!(config.scale("model.layers.0.self_attn.q_projx", 8), 2.0);
        config.by_root = true;
        assert_eq!(config.scale("model.layers.0.mlp.up_proj", 16), 4.0);
    }

    #[test]
    fn rows_of_heads_are_turned_as_converters_do() {
        // Two heads of four rows, rank 1: halves become neighbours.
        let rows = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        assert_eq!(
            turned(&rows, 8, 4),
            [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
        );
    }
}
