//! A model family as data: sizes, norms, rotary positions, biases, tensor names. No tensors, no branch on names elsewhere.

use hfcore_kernels::elementwise::{Activation, Pairing};

use crate::error::{Error, Result};
use crate::weights::{Weights, nearest};

mod config;
mod families;
mod gguf;
mod rope;

use config::from_config;
use families::{FAMILIES, Family, LLAMA, transformers_name};
use gguf::from_gguf;
use rope::base_frequencies;

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

#[cfg(test)]
mod tests;
