//! A family of encoders as data: sizes, norms, positions, tensor names. No tensors, no branch on names elsewhere.

use hfcore_kernels::elementwise::Activation;
use serde_json::Value as Json;

use crate::arch::{LayerArch, Rope};
use crate::error::{Error, Result};
use crate::weights::{Weights, nearest};

/// How a family's checkpoints name their tensors; in `layer`, `#` is its number.
pub(super) struct Names {
    /// Before all names, where the checkpoint has more than the encoder.
    pub prefix: &'static str,
    pub words: &'static str,
    /// The norm of the embeddings.
    pub embedding_norm: &'static str,
    /// What makes them as wide as the layers, where they are not.
    pub widen: Option<&'static str>,
    pub layer: &'static str,
    /// Queries, keys and values, or all of them as one.
    pub qkv: &'static [&'static str],
    pub attn_output: &'static str,
    /// Of what attention reads; a layer without the tensor reads the stream itself.
    pub input_norm: Option<&'static str>,
    /// Of what the feed-forward reads.
    pub middle_norm: &'static str,
    pub up: Up,
    pub down: &'static str,
    /// Of what a layer gives.
    pub output_norm: Option<&'static str>,
    /// After all layers.
    pub final_norm: Option<&'static str>,
    /// Every matrix and norm has a bias; else those that the file has one for.
    pub biased: bool,
}

/// A feed-forward's first matrix.
#[derive(Clone, Copy)]
pub(super) enum Up {
    Plain(&'static str),
    /// Gates, and what they gate.
    Gated(&'static str, &'static str),
    /// The same as one tensor.
    Fused(&'static str),
}

const BERT: Names = Names {
    prefix: "bert.",
    words: "embeddings.word_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    widen: None,
    layer: "encoder.layer.#",
    qkv: &[
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ],
    attn_output: "attention.output.dense",
    input_norm: None,
    middle_norm: "attention.output.LayerNorm",
    up: Up::Plain("intermediate.dense"),
    down: "output.dense",
    output_norm: Some("output.LayerNorm"),
    final_norm: None,
    biased: true,
};
const ROBERTA: Names = Names {
    prefix: "roberta.",
    ..BERT
};
const DISTILBERT: Names = Names {
    prefix: "distilbert.",
    layer: "transformer.layer.#",
    qkv: &["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    attn_output: "attention.out_lin",
    middle_norm: "sa_layer_norm",
    up: Up::Plain("ffn.lin1"),
    down: "ffn.lin2",
    output_norm: Some("output_layer_norm"),
    ..BERT
};
const MPNET: Names = Names {
    prefix: "mpnet.",
    qkv: &["attention.attn.q", "attention.attn.k", "attention.attn.v"],
    attn_output: "attention.attn.o",
    middle_norm: "attention.LayerNorm",
    ..BERT
};
const ALBERT: Names = Names {
    prefix: "albert.",
    widen: Some("encoder.embedding_hidden_mapping_in"),
    layer: "encoder.albert_layer_groups.0.albert_layers.0",
    qkv: &["attention.query", "attention.key", "attention.value"],
    attn_output: "attention.dense",
    middle_norm: "attention.LayerNorm",
    up: Up::Plain("ffn"),
    down: "ffn_output",
    output_norm: Some("full_layer_layer_norm"),
    ..BERT
};
/// As nomic-ai's files have it.
const NOMIC: Names = Names {
    prefix: "bert.",
    embedding_norm: "emb_ln",
    layer: "encoder.layers.#",
    qkv: &["attn.Wqkv"],
    attn_output: "attn.out_proj",
    middle_norm: "norm1",
    up: Up::Gated("mlp.fc12", "mlp.fc11"),
    down: "mlp.fc2",
    output_norm: Some("norm2"),
    biased: false,
    ..BERT
};
/// As transformers 5 has it.
const NOMIC_5: Names = Names {
    prefix: "nomic_bert.",
    embedding_norm: "embeddings.LayerNorm",
    layer: "layers.#",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attn_output: "self_attn.o_proj",
    middle_norm: "post_attention_layernorm",
    up: Up::Gated("mlp.gate_proj", "mlp.up_proj"),
    down: "mlp.down_proj",
    output_norm: Some("post_mlp_layernorm"),
    ..NOMIC
};
const MODERNBERT: Names = Names {
    prefix: "model.",
    words: "embeddings.tok_embeddings",
    embedding_norm: "embeddings.norm",
    layer: "layers.#",
    qkv: &["attn.Wqkv"],
    attn_output: "attn.Wo",
    input_norm: Some("attn_norm"),
    middle_norm: "mlp_norm",
    up: Up::Fused("mlp.Wi"),
    down: "mlp.Wo",
    output_norm: None,
    final_norm: Some("final_norm"),
    biased: false,
    ..BERT
};

/// How a family tells where a token stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Positions {
    /// A table, from its first row on.
    Table,
    /// A table, from the row after the padding token's id on.
    AfterPadding,
    /// The same after row 1, and what scores get by distance (Song et al. 2020, arXiv:2004.09297).
    Distances,
    /// Angles.
    Rotary,
    /// Angles; most layers see a window, with angles of their own.
    Windows,
}

struct Family {
    /// `model_type` of `config.json`.
    name: &'static str,
    /// Its naming, and older ones.
    names: &'static [Names],
    positions: Positions,
    activation: Activation,
    /// One layer's tensors serve all of them.
    shared: bool,
}

const FIRST: Family = Family {
    name: "bert",
    names: &[BERT],
    positions: Positions::Table,
    activation: Activation::Gelu,
    shared: false,
};

static FAMILIES: [Family; 9] = [
    FIRST,
    Family {
        name: "distilbert",
        names: &[DISTILBERT],
        ..FIRST
    },
    Family {
        name: "roberta",
        names: &[ROBERTA],
        positions: Positions::AfterPadding,
        ..FIRST
    },
    Family {
        name: "xlm-roberta",
        names: &[ROBERTA],
        positions: Positions::AfterPadding,
        ..FIRST
    },
    Family {
        name: "camembert",
        names: &[ROBERTA],
        positions: Positions::AfterPadding,
        ..FIRST
    },
    Family {
        name: "mpnet",
        names: &[MPNET],
        positions: Positions::Distances,
        ..FIRST
    },
    Family {
        name: "albert",
        names: &[ALBERT],
        activation: Activation::GeluTanh,
        shared: true,
        ..FIRST
    },
    Family {
        name: "nomic_bert",
        names: &[NOMIC_5, NOMIC],
        positions: Positions::Rotary,
        activation: Activation::Silu,
        ..FIRST
    },
    Family {
        name: "modernbert",
        names: &[MODERNBERT],
        positions: Positions::Windows,
        ..FIRST
    },
];

/// No real model comes near these; a hostile file might.
const MAX_LAYERS: usize = 256;
const MAX_WIDTH: usize = 1 << 16;

/// An encoder's shape.
pub struct EncoderArch {
    /// As `config.json` calls it.
    pub family: &'static str,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub heads: usize,
    pub layers: Vec<LayerArch>,
    /// Most tokens of a sequence.
    pub context_size: usize,
    /// Numbers of an embedding, before it is made as wide as the layers.
    pub(super) embedding_size: usize,
    pub(super) norm_eps: f32,
    pub(super) activation: Activation,
    /// The row of the table of positions that a sequence's first token takes; none: there is no table.
    pub(super) first_position: Option<usize>,
    /// Scores get something by distance.
    pub(super) distances: bool,
    pub(super) ropes: Vec<Rope>,
    /// The first layer's tensors serve all of them.
    pub(super) shared: bool,
    pub(super) names: &'static Names,
}

/// Values of a `config.json`, with errors that name the key.
struct Config<'a> {
    weights: &'a Weights,
    json: &'a Json,
}

impl Config<'_> {
    fn find(&self, keys: &[&str]) -> Option<&Json> {
        let mut found = keys.iter().filter_map(|key| self.json.get(key));
        found.find(|value| !value.is_null())
    }

    fn text(&self, keys: &[&str]) -> Option<&str> {
        self.find(keys).and_then(Json::as_str)
    }

    /// The first of these keys that there is, `or` without one.
    fn size(&self, keys: &[&str], most: usize, or: Option<usize>) -> Result<usize> {
        let value = self.find(keys);
        let number = match value {
            None => or,
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()),
        };
        number.filter(|n| (1..=most).contains(n)).ok_or_else(|| {
            self.weights.problem(format!(
                "{:?} should be a whole number from 1 to {most}, got {}",
                keys.first().copied().unwrap_or_default(),
                value.unwrap_or(&Json::Null)
            ))
        })
    }

    /// The first of these keys that there is, a finite number.
    fn float(&self, keys: &[&str], or: f32) -> Result<f32> {
        let Some(value) = self.find(keys) else {
            return Ok(or);
        };
        let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        number.ok_or_else(|| {
            self.weights
                .problem(format!("{:?} should be a number, got {value}", keys[0]))
        })
    }

    /// # Errors
    /// `Unsupported` where a key has another value than its family's own.
    fn only(&self, key: &'static str, wanted: &Json) -> Result<()> {
        let number = wanted.as_f64();
        let same = |got: &Json| got == wanted || (number.is_some() && got.as_f64() == number);
        match self.find(&[key]).filter(|got| !same(got)) {
            None => Ok(()),
            Some(got) => Err(unsupported(key, &got.to_string(), &wanted.to_string())),
        }
    }
}

fn unsupported(what: &'static str, name: &str, supported: &str) -> Error {
    Error::Unsupported {
        what,
        name: name.into(),
        supported: supported.into(),
    }
}

impl EncoderArch {
    /// Whether `config.json` is an encoder's.
    pub fn knows(config: &Json) -> bool {
        let kind = config.get("model_type").and_then(Json::as_str);
        FAMILIES.iter().any(|family| Some(family.name) == kind)
    }

    /// The families' names.
    pub fn families() -> impl Iterator<Item = &'static str> {
        FAMILIES.iter().map(|family| family.name)
    }

    /// Read it from a checkpoint's `config.json`.
    ///
    /// # Errors
    /// `Unsupported` for another family, activation or kind of positions; `ModelFile` for a missing or impossible value.
    pub fn read(weights: &Weights) -> Result<Self> {
        let json = weights.config.as_ref().unwrap_or(&Json::Null);
        let c = Config { weights, json };
        let family = family_of(&c)?;
        for (key, wanted) in [
            ("num_hidden_groups", Json::from(1)),
            ("inner_group_num", Json::from(1)),
            ("num_experts", Json::from(0)),
            ("prenorm", Json::from(false)),
            ("relative_attention_num_buckets", Json::from(BUCKETS)),
        ] {
            c.only(key, &wanted)?;
        }
        if first_position(&c, family).is_some() {
            c.only("position_embedding_type", &Json::from("absolute"))?;
        }
        let hidden_size = c.size(&["hidden_size", "dim", "n_embd"], MAX_WIDTH, None)?;
        let heads = c.size(&["num_attention_heads", "n_heads", "n_head"], 4096, None)?;
        if !hidden_size.is_multiple_of(heads) {
            return Err(weights.problem(format!(
                "{hidden_size} numbers do not make {heads} heads of one size"
            )));
        }
        let table = c.size(&["max_position_embeddings", "n_positions"], 1 << 20, None)?;
        let first_position = first_position(&c, family);
        let context_size = table.checked_sub(first_position.unwrap_or(0));
        let layers = c.size(
            &["num_hidden_layers", "n_layers", "n_layer"],
            MAX_LAYERS,
            None,
        )?;
        let four = Some(4 * hidden_size);
        let inner = ["intermediate_size", "hidden_dim", "n_inner"];
        let (layers, ropes) = seen(&c, family, layers, hidden_size / heads)?;
        let or = c.json.get("n_embd").and(four);
        let eps = ["norm_eps", "layer_norm_eps", "layer_norm_epsilon"];
        let default_eps = match family.positions {
            Positions::Windows => 1e-5,
            _ => 1e-12,
        };
        Ok(Self {
            family: family.name,
            vocab_size: c.size(&["vocab_size"], 1 << 24, None)?,
            hidden_size,
            intermediate_size: c.size(&inner, MAX_WIDTH, or)?,
            heads,
            layers,
            context_size: context_size.filter(|n| *n > 0).ok_or_else(|| {
                let first = first_position.unwrap_or(0);
                weights.problem(format!("{table} positions, the first is {first}"))
            })?,
            embedding_size: match family.shared {
                true => c.size(&["embedding_size"], MAX_WIDTH, Some(128))?,
                false => hidden_size,
            },
            norm_eps: c.float(&eps, default_eps)?,
            activation: activation(&c, family)?,
            first_position,
            distances: family.positions == Positions::Distances,
            ropes,
            shared: family.shared,
            names: names(weights, family),
        })
    }
}

fn family_of(c: &Config) -> Result<&'static Family> {
    let kind = c.text(&["model_type"]).unwrap_or("without a model_type");
    let found = FAMILIES.iter().find(|family| family.name == kind);
    found.ok_or_else(|| {
        let known: Vec<String> = EncoderArch::families().map(str::to_string).collect();
        let near = nearest(kind, known.iter());
        let near = near.map_or(String::new(), |near| format!("; the nearest is {near:?}"));
        unsupported("encoder", kind, &(known.join(", ") + &near))
    })
}

/// The naming that the file follows: the first whose first layer it has.
fn names(weights: &Weights, family: &'static Family) -> &'static Names {
    let has = |names: &&Names| {
        let layer = names.layer.replace('#', "0");
        let name = format!("{layer}.{}.weight", names.attn_output);
        let prefixed = format!("{}{name}", names.prefix);
        weights.tensors.contains_key(&name) || weights.tensors.contains_key(&prefixed)
    };
    family.names.iter().find(has).unwrap_or(&family.names[0])
}

fn first_position(c: &Config, family: &Family) -> Option<usize> {
    match family.positions {
        Positions::Table => Some(0),
        Positions::AfterPadding => {
            let padding = c.find(&["pad_token_id"]).and_then(Json::as_u64);
            Some(padding.unwrap_or(1).min(1 << 20) as usize + 1)
        }
        // transformers takes 1, whatever the file says.
        Positions::Distances => Some(2),
        Positions::Rotary | Positions::Windows => None,
    }
}

fn activation(c: &Config, family: &Family) -> Result<Activation> {
    let keys = [
        "hidden_activation",
        "hidden_act",
        "activation",
        "activation_function",
    ];
    match c.text(&keys) {
        None => Ok(family.activation),
        Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some("relu") => Ok(Activation::Relu),
        Some("silu" | "swish") => Ok(Activation::Silu),
        // nomic-ai's name for gates and what they are activated by.
        Some("swiglu") if family.positions == Positions::Rotary => Ok(Activation::Silu),
        Some(other) => Err(unsupported(
            "activation",
            other,
            "gelu, gelu_new, gelu_pytorch_tanh, relu, silu",
        )),
    }
}

/// What each layer sees, and by which angles; the ropes.
fn seen(
    c: &Config,
    family: &Family,
    layers: usize,
    head_dim: usize,
) -> Result<(Vec<LayerArch>, Vec<Rope>)> {
    let plain = LayerArch {
        convolution: false,
        rope: None,
        window: None,
        experts: false,
    };
    match family.positions {
        Positions::Rotary => {
            c.only("rotary_emb_fraction", &Json::from(1.0))?;
            c.only("rotary_emb_interleaved", &Json::from(false))?;
            c.only("rotary_scaling_factor", &Json::Null)?;
            let own = c.json.get("rope_parameters").unwrap_or(&Json::Null);
            let theta = c.float(&["rotary_emb_base", "rope_theta"], 1000.0)?;
            let theta = base(c, own, theta)?;
            let layer = LayerArch {
                convolution: false,
                rope: Some(0),
                ..plain
            };
            Ok((vec![layer; layers], vec![Rope::of_base(theta, head_dim)]))
        }
        Positions::Windows => {
            let both = c.json.get("rope_parameters").unwrap_or(&Json::Null);
            let rope = |kind: &str, key: &str, or: f32| -> Result<Rope> {
                let own = both.get(kind).unwrap_or(&Json::Null);
                let theta = base(c, own, c.float(&[key], or)?)?;
                Ok(Rope::of_base(theta, head_dim))
            };
            let ropes = vec![
                rope("full_attention", "global_rope_theta", 160_000.0)?,
                rope("sliding_attention", "local_rope_theta", 10_000.0)?,
            ];
            // Half of it on either side, and the token itself.
            let window = c.size(&["local_attention"], 1 << 24, Some(128))? / 2 + 1;
            let each = c.size(&["global_attn_every_n_layers"], MAX_LAYERS, Some(3))?;
            let all = (0..layers).map(|i| {
                let kinds = c.json.get("layer_types").filter(|kinds| !kinds.is_null());
                let all = match kinds.map(|kinds| kinds.get(i).and_then(Json::as_str)) {
                    None => i.is_multiple_of(each),
                    Some(Some("full_attention")) => true,
                    Some(Some("sliding_attention")) => false,
                    Some(other) => {
                        let known = "full_attention, sliding_attention";
                        return Err(unsupported("layer type", other.unwrap_or("none"), known));
                    }
                };
                Ok(LayerArch {
                    convolution: false,
                    rope: Some(usize::from(!all)),
                    window: (!all).then_some(window),
                    experts: false,
                })
            });
            Ok((all.collect::<Result<_>>()?, ropes))
        }
        _ => Ok((vec![plain; layers], Vec::new())),
    }
}

/// The base of transformers 5's parameters of a rope, which must not be scaled.
fn base(c: &Config, own: &Json, or: f32) -> Result<f32> {
    let own = Config {
        weights: c.weights,
        json: own,
    };
    own.only("rope_type", &Json::from("default"))?;
    let theta = own.float(&["rope_theta"], or)?;
    match theta > 0.0 {
        true => Ok(theta),
        false => Err(c
            .weights
            .problem(format!("a rope's base must be positive, got {theta}"))),
    }
}

/// Distances that mpnet tells apart, and the one from which on all are the same.
pub(super) const BUCKETS: usize = 32;
const FARTHEST: f32 = 128.0;

/// The row of the table for a key that stands `distance` behind the query: half of the rows are for those before it; the
/// nearest have each their own, the others share them by the logarithm (Raffel et al. 2020, arXiv:1910.10683).
pub(super) fn bucket(distance: isize) -> usize {
    const HALF: usize = BUCKETS / 2;
    const NEAR: usize = HALF / 2;
    let behind = if distance > 0 { HALF } else { 0 };
    let far = distance.unsigned_abs();
    if far < NEAR {
        return behind + far;
    }
    // f32, as transformers computes it.
    let share = (far as f32 / NEAR as f32).ln() / (FARTHEST / NEAR as f32).ln();
    behind + (NEAR + (share * (HALF - NEAR) as f32) as usize).min(HALF - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_share_rows_by_their_logarithm() {
        let rows = [0, 1, -1, 7, 8, 11, 12, 16, 32, 64, 90, 91, 127, 500, -500].map(bucket);
        assert_eq!(
            rows,
            [0, 17, 1, 23, 24, 24, 25, 26, 28, 30, 30, 31, 31, 31, 15]
        );
    }
}
