//! Encoders of the BERT family, generic over their device: whole sequences in, a vector for each token out. Nothing is kept
//! from step to step. What becomes of the vectors is `model/embed.rs`.
//!
//! Each layer adds what its attention and its feed-forward make, and norms the sum (Devlin et al. 2018, arXiv:1810.04805).

use std::sync::Arc;

use hfcore_kernels::elementwise::{Activation, Pairing};
use serde_json::Value as Json;

use crate::batch::{Batch, PAGE};
use crate::decoder::Progress;
use crate::device::{AttentionLayer, AttentionShape, Device, Norm};
use crate::error::{Error, Result};
use crate::weights::{Tensor, Weights};

/// How a family's checkpoints name their tensors.
struct Names {
    /// Before all names, where the checkpoint has more than the encoder.
    prefix: &'static str,
    layers: &'static str,
    qkv: [&'static str; 3],
    attn_output: &'static str,
    attn_norm: &'static str,
    up: &'static str,
    down: &'static str,
    output_norm: &'static str,
}

const BERT: Names = Names {
    prefix: "bert.",
    layers: "encoder.layer",
    qkv: [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ],
    attn_output: "attention.output.dense",
    attn_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    output_norm: "output.LayerNorm",
};
const ROBERTA: Names = Names {
    prefix: "roberta.",
    ..BERT
};
const DISTILBERT: Names = Names {
    prefix: "distilbert.",
    layers: "transformer.layer",
    qkv: ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    attn_output: "attention.out_lin",
    attn_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    output_norm: "output_layer_norm",
};

/// `model_type`, its names, whether positions begin after the padding token's id.
const FAMILIES: [(&str, &Names, bool); 5] = [
    ("bert", &BERT, false),
    ("distilbert", &DISTILBERT, false),
    ("roberta", &ROBERTA, true),
    ("xlm-roberta", &ROBERTA, true),
    ("camembert", &ROBERTA, true),
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
    pub layers: usize,
    /// Most tokens of a sequence.
    pub context_size: usize,
    norm_eps: f32,
    activation: Activation,
    /// The row of the table of positions that a sequence's first token takes.
    first_position: usize,
    names: &'static Names,
}

impl EncoderArch {
    /// Whether `config.json` is an encoder's.
    pub fn knows(config: &Json) -> bool {
        let kind = config.get("model_type").and_then(Json::as_str);
        FAMILIES.iter().any(|(name, ..)| Some(*name) == kind)
    }

    /// Read it from a checkpoint's `config.json`.
    ///
    /// # Errors
    /// `Unsupported` for another family, activation or kind of positions; `ModelFile` for a missing or impossible value.
    pub fn read(weights: &Weights) -> Result<Self> {
        let none = Json::Null;
        let config = weights.config.as_ref().unwrap_or(&none);
        let text = |key: &str| config.get(key).and_then(Json::as_str);
        let kind = text("model_type").unwrap_or("without a model_type");
        let unsupported = |what, name: &str, supported: &str| Error::Unsupported {
            what,
            name: name.into(),
            supported: supported.into(),
        };
        let found = FAMILIES.iter().find(|(name, ..)| *name == kind);
        let &(family, names, after_padding) = found.ok_or_else(|| {
            unsupported("encoder", kind, &FAMILIES.map(|(name, ..)| name).join(", "))
        })?;
        if let Some(other) = text("position_embedding_type").filter(|t| *t != "absolute") {
            return Err(unsupported("position_embedding_type", other, "absolute"));
        }
        let act = text("hidden_act").or(text("activation")).unwrap_or("gelu");
        let activation = match act {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            other => {
                return Err(unsupported(
                    "activation",
                    other,
                    "gelu, gelu_new, gelu_pytorch_tanh, relu, silu",
                ));
            }
        };
        let size = |keys: [&str; 2], most: usize| {
            let value = keys.iter().find_map(|key| config.get(key));
            let number = value
                .and_then(Json::as_u64)
                .and_then(|n| usize::try_from(n).ok());
            number.filter(|n| (1..=most).contains(n)).ok_or_else(|| {
                let got = value.unwrap_or(&none);
                weights.problem(format!(
                    "{:?} should be a whole number from 1 to {most}, got {got}",
                    keys[0]
                ))
            })
        };
        let hidden_size = size(["hidden_size", "dim"], MAX_WIDTH)?;
        let heads = size(["num_attention_heads", "n_heads"], 4096)?;
        if !hidden_size.is_multiple_of(heads) {
            return Err(weights.problem(format!(
                "{hidden_size} numbers do not make {heads} heads of one size"
            )));
        }
        let table = size(["max_position_embeddings"; 2], 1 << 20)?;
        let padding = config.get("pad_token_id").and_then(Json::as_u64);
        let first_position = match after_padding {
            true => padding.unwrap_or(1).min(1 << 20) as usize + 1,
            false => 0,
        };
        let eps = config.get("layer_norm_eps").and_then(Json::as_f64);
        Ok(Self {
            family,
            vocab_size: size(["vocab_size"; 2], 1 << 24)?,
            hidden_size,
            intermediate_size: size(["intermediate_size", "hidden_dim"], MAX_WIDTH)?,
            heads,
            layers: size(["num_hidden_layers", "n_layers"], MAX_LAYERS)?,
            context_size: table
                .checked_sub(first_position)
                .filter(|n| *n > 0)
                .ok_or_else(|| {
                    weights.problem(format!("{table} positions, the first is {first_position}"))
                })?,
            norm_eps: eps.unwrap_or(1e-12) as f32,
            activation,
            first_position,
            names,
        })
    }
}

struct Layer<D: Device> {
    qkv: D::Matrix,
    attn_output: D::Matrix,
    attn_norm: Norm<D::Vector>,
    up: D::Matrix,
    down: D::Matrix,
    output_norm: Norm<D::Vector>,
}

/// An encoder's weights on a device.
pub struct Resident<D: Device> {
    pub arch: EncoderArch,
    weights: Arc<Weights>,
    /// Names of tables that are read row by row from the file.
    words: String,
    positions: String,
    /// What every token has added: it is of the first kind.
    kind: Vec<f32>,
    norm: Norm<D::Vector>,
    layers: Vec<Layer<D>>,
    attention: AttentionLayer<D::Vector>,
}

struct Loader<'a, D: Device> {
    device: &'a D,
    arch: &'a EncoderArch,
    weights: &'a Weights,
    prefix: &'static str,
}

impl<'a, D: Device> Loader<'a, D> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.weights.require(&format!("{}{name}", self.prefix))?;
        match tensor.shape == shape {
            true => Ok(tensor),
            false => Err(self.weights.problem(format!(
                "tensor {name:?} is {:?}, wanted {shape:?}",
                tensor.shape
            ))),
        }
    }

    fn norm(&self, name: &str) -> Result<Norm<D::Vector>> {
        // Checkpoints that came from TensorFlow call them so.
        let old = format!("{}{name}.gamma", self.prefix);
        let [weight, bias] = match self.weights.tensors.contains_key(&old) {
            true => ["gamma", "beta"],
            false => ["weight", "bias"],
        };
        let vector = |part: &str| {
            let tensor = self.tensor(&format!("{name}.{part}"), &[self.arch.hidden_size])?;
            self.device.vector(tensor.dequantize())
        };
        Ok(Norm {
            weight: vector(weight)?,
            bias: Some(vector(bias)?),
            eps: self.arch.norm_eps,
            centred: true,
        })
    }

    /// Matrices that share their inputs, with their biases.
    fn matrix(&self, names: &[String], outputs: usize, inputs: usize) -> Result<D::Matrix> {
        let (mut parts, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            parts.push(self.tensor(&format!("{name}.weight"), &[outputs, inputs])?);
            bias.extend(
                self.tensor(&format!("{name}.bias"), &[outputs])?
                    .dequantize(),
            );
        }
        let matrix = self.device.matrix(&parts, Some(&bias))?;
        parts.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    fn layer(&self, i: usize) -> Result<Layer<D>> {
        let (arch, names) = (self.arch, self.arch.names);
        let (hidden, width) = (arch.hidden_size, arch.intermediate_size);
        let of = |name: &str| format!("{}.{i}.{name}", names.layers);
        let one = |name: &str, outputs, inputs| self.matrix(&[of(name)], outputs, inputs);
        Ok(Layer {
            qkv: self.matrix(&names.qkv.map(of), hidden, hidden)?,
            attn_output: one(names.attn_output, hidden, hidden)?,
            attn_norm: self.norm(&of(names.attn_norm))?,
            up: one(names.up, width, hidden)?,
            down: one(names.down, hidden, width)?,
            output_norm: self.norm(&of(names.output_norm))?,
        })
    }
}

impl<D: Device> Resident<D> {
    /// Make an encoder resident, layer by layer; `progress(done, total)` is told in bytes of the file.
    ///
    /// # Errors
    /// `Closed` when `progress` says to stop; a missing tensor, or one of another shape.
    pub fn load(
        device: &D,
        arch: EncoderArch,
        weights: Arc<Weights>,
        progress: Progress,
    ) -> Result<Self> {
        let words = "embeddings.word_embeddings.weight";
        let prefix = match weights.tensors.contains_key(words) {
            true => "",
            false => arch.names.prefix,
        };
        let loader = Loader {
            device,
            arch: &arch,
            weights: &weights,
            prefix,
        };
        let hidden = arch.hidden_size;
        loader.tensor(words, &[arch.vocab_size, hidden])?;
        let positions = "embeddings.position_embeddings.weight";
        let rows = arch.context_size + arch.first_position;
        loader.tensor(positions, &[rows, hidden])?;
        let kinds = format!("{prefix}embeddings.token_type_embeddings.weight");
        let mut kind = vec![0.0; hidden];
        if let Some(table) = weights.tensor(&kinds) {
            if table.shape.len() != 2 || table.cols() != hidden || table.rows() == 0 {
                let got = table.shape;
                return Err(weights.problem(format!(
                    "tensor {kinds:?} is {got:?}, wanted rows of {hidden}"
                )));
            }
            table.dequantize_row(0, &mut kind);
        }
        let (total, steps) = (weights.total_bytes(), arch.layers as u64);
        let mut layers = Vec::with_capacity(arch.layers);
        for i in 0..arch.layers {
            if !progress(total * i as u64 / steps, total) {
                return Err(Error::Closed);
            }
            layers.push(loader.layer(i)?);
        }
        let norm = loader.norm("embeddings.LayerNorm")?;
        progress(total, total);
        let head_dim = hidden / arch.heads;
        Ok(Self {
            words: format!("{prefix}{words}"),
            positions: format!("{prefix}{positions}"),
            kind,
            norm,
            layers,
            attention: AttentionLayer {
                shape: AttentionShape {
                    heads: arch.heads,
                    kv_heads: arch.heads,
                    head_dim,
                    scale: 1.0 / (head_dim as f32).sqrt(),
                    softcap: None,
                    window: None,
                    both_ways: true,
                },
                norms: None,
                sinks: None,
                rope: None,
                pairing: Pairing::Halves,
            },
            arch,
            weights,
        })
    }

    /// The sum of word, position and kind, from the file.
    fn embed(&self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        let width = self.arch.hidden_size;
        let words = self.weights.require(&self.words)?;
        let positions = self.weights.require(&self.positions)?;
        let mut position = vec![0.0; width];
        out.resize(batch.tokens.len() * width, 0.0);
        let rows = batch.tokens.iter().zip(&batch.positions);
        for ((&token, &at), row) in rows.zip(out.chunks_exact_mut(width)) {
            if token as usize >= self.arch.vocab_size {
                let size = self.arch.vocab_size;
                return Err(Error::InvalidRequest(format!(
                    "token id must be below {size}, got {token}"
                )));
            }
            words.dequantize_row(token as usize, row);
            positions.dequantize_row(at as usize + self.arch.first_position, &mut position);
            let others = position.iter().zip(&self.kind);
            row.iter_mut()
                .zip(others)
                .for_each(|(x, (p, k))| *x += p + k);
        }
        Ok(())
    }
}

/// A resident encoder with a device's threads and a workspace.
pub struct Encoder<D: Device> {
    device: D,
    model: Arc<Resident<D>>,
    /// Keys and values of a step's tokens, for one layer at a time.
    cache: D::Cache,
    pages: usize,
    batch: Batch,
    embedded: Vec<f32>,
    x: D::Buffer,
    y: D::Buffer,
    qkv: D::Buffer,
    attended: D::Buffer,
    wide: D::Buffer,
}

impl<D: Device> Encoder<D> {
    /// Steps of at most `pages` pages: each sequence takes whole ones, of [`PAGE`] tokens.
    pub fn new(device: D, model: Arc<Resident<D>>, pages: usize) -> Result<Self> {
        let cache = device.cache(pages, &[model.attention.shape])?;
        Ok(Self {
            device,
            model,
            cache,
            pages,
            batch: Batch::default(),
            embedded: Vec::new(),
            x: D::Buffer::default(),
            y: D::Buffer::default(),
            qkv: D::Buffer::default(),
            attended: D::Buffer::default(),
            wide: D::Buffer::default(),
        })
    }

    /// The last layer's vectors of all tokens, `[tokens of all sequences, hidden_size]`, one sequence after the other.
    ///
    /// # Errors
    /// `ContextOverflow` for a sequence that is too long, `InvalidRequest` for more than a step takes or an unknown token.
    pub fn forward(&mut self, sequences: &[&[u32]], out: &mut Vec<f32>) -> Result<()> {
        let Self { device, model, .. } = self;
        let limit = model.arch.context_size;
        self.batch.clear();
        let mut next = 0;
        for ids in sequences.iter().filter(|ids| !ids.is_empty()) {
            if ids.len() > limit {
                let prompt = ids.len();
                return Err(Error::ContextOverflow { prompt, limit });
            }
            let end = next + ids.len().div_ceil(PAGE);
            if end > self.pages {
                let most = self.pages;
                return Err(Error::InvalidRequest(format!(
                    "a step takes {most} pages of {PAGE} tokens, got more"
                )));
            }
            let pages: Vec<u32> = (next as u32..end as u32).collect();
            self.batch.push(ids, 0, &pages, false);
            next = end;
        }
        out.clear();
        if self.batch.tokens.is_empty() {
            return Ok(());
        }
        model.embed(&self.batch, &mut self.embedded)?;
        device.begin(&self.batch, &[])?;
        device.upload(&self.embedded, model.arch.hidden_size, &mut self.y)?;
        let first = model.layers.first().map(|layer| &layer.qkv);
        device.norm(&self.y, &model.norm, first, &mut self.x)?;
        for (i, layer) in model.layers.iter().enumerate() {
            device.linear(&layer.qkv, &self.x, &mut self.qkv)?;
            let (attention, batch) = (&model.attention, &self.batch);
            let (qkv, attended) = (&mut self.qkv, &mut self.attended);
            device.attention(0, attention, batch, qkv, &mut self.cache, false, attended)?;
            device.linear_add(&layer.attn_output, &self.attended, &mut self.x)?;
            device.norm(&self.x, &layer.attn_norm, Some(&layer.up), &mut self.y)?;
            device.activated(model.arch.activation, &layer.up, &self.y, &mut self.wide)?;
            device.linear_add(&layer.down, &self.wide, &mut self.y)?;
            let next = model.layers.get(i + 1).map(|layer| &layer.qkv);
            device.norm(&self.y, &layer.output_norm, next, &mut self.x)?;
        }
        device.read(&self.x, out)
    }
}
