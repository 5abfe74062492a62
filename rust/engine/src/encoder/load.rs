//! An encoder's tensors onto a device, checked. What runs with them is in `encoder.rs`.

use std::sync::Arc;

use hfcore_kernels::elementwise::Pairing;

use super::arch::{EncoderArch, Names, Up, bucket};
use super::{Layer, Resident};
use crate::arch::LayerArch;
use crate::batch::PAGE;
use crate::decoder::Progress;
use crate::device::{AttentionLayer, AttentionShape, Device, Norm};
use crate::error::{Error, Result};
use crate::weights::{Tensor, Weights};

struct Loader<'a, D: Device> {
    device: &'a D,
    arch: &'a EncoderArch,
    weights: &'a Weights,
    prefix: &'static str,
}

impl<'a, D: Device> Loader<'a, D> {
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.tensors.contains_key(&self.name(name))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.weights.require(&self.name(name))?;
        match tensor.shape == shape {
            true => Ok(tensor),
            false => Err(self.weights.problem(format!(
                "tensor {name:?} is {:?}, wanted {shape:?}",
                tensor.shape
            ))),
        }
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm<D::Vector>> {
        // Checkpoints that came from TensorFlow call them so.
        let [weight, bias] = match self.has(&format!("{name}.gamma")) {
            true => ["gamma", "beta"],
            false => ["weight", "bias"],
        };
        let vector = |part: &str| {
            let tensor = self.tensor(&format!("{name}.{part}"), &[width])?;
            self.device.vector(tensor.dequantize())
        };
        let biased = self.arch.names.biased || self.has(&format!("{name}.{bias}"));
        Ok(Norm {
            weight: vector(weight)?,
            bias: biased.then(|| vector(bias)).transpose()?,
            eps: self.arch.norm_eps,
            centred: true,
        })
    }

    /// The norm of layers that have the tensor.
    fn norm_if_there(&self, name: Option<String>, width: usize) -> Result<Option<Norm<D::Vector>>> {
        let name = name.filter(|name| self.has(&format!("{name}.weight")));
        name.map(|name| self.norm(&name, width)).transpose()
    }

    /// Matrices that share their inputs, with their biases.
    fn matrix(&self, names: &[String], outputs: usize, inputs: usize) -> Result<D::Matrix> {
        let (mut parts, mut bias) = (Vec::new(), Vec::new());
        let biased = |name: &String| self.has(&format!("{name}.bias"));
        let biased = self.arch.names.biased || names.iter().any(biased);
        for name in names {
            parts.push(self.tensor(&format!("{name}.weight"), &[outputs, inputs])?);
            if biased {
                let tensor = self.tensor(&format!("{name}.bias"), &[outputs])?;
                bias.extend(tensor.dequantize());
            }
        }
        self.resident(&parts, biased.then_some(&bias[..]))
    }

    fn resident(&self, parts: &[Tensor], bias: Option<&[f32]>) -> Result<D::Matrix> {
        let matrix = self.device.matrix(parts, bias)?;
        parts.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// Gates and what they gate, of one tensor.
    fn halves(&self, name: &str, width: usize, inputs: usize) -> Result<D::Matrix> {
        let both = self.tensor(&format!("{name}.weight"), &[2 * width, inputs])?;
        let bias = format!("{name}.bias");
        let bias = match self.has(&bias) {
            true => Some(self.tensor(&bias, &[2 * width])?.dequantize()),
            false => None,
        };
        self.resident(&both.halves(), bias.as_deref())
    }

    fn layer(&self, i: usize) -> Result<Layer<D>> {
        let (arch, names) = (self.arch, self.arch.names);
        let (hidden, width) = (arch.hidden_size, arch.intermediate_size);
        let layer = names.layer.replace('#', &i.to_string());
        let of = |name: &str| format!("{layer}.{name}");
        let one = |name: &str, outputs, inputs| self.matrix(&[of(name)], outputs, inputs);
        let qkv: Vec<String> = names.qkv.iter().map(|name| of(name)).collect();
        Ok(Layer {
            input_norm: self.norm_if_there(names.input_norm.map(of), hidden)?,
            qkv: self.matrix(&qkv, 3 * hidden / qkv.len().max(1), hidden)?,
            attn_output: one(names.attn_output, hidden, hidden)?,
            middle_norm: self.norm(&of(names.middle_norm), hidden)?,
            up: match names.up {
                Up::Plain(up) => one(up, width, hidden)?,
                Up::Gated(gate, up) => self.matrix(&[of(gate), of(up)], width, hidden)?,
                Up::Fused(both) => self.halves(&of(both), width, hidden)?,
            },
            gated: !matches!(names.up, Up::Plain(_)),
            down: one(names.down, hidden, width)?,
            output_norm: match names.output_norm {
                Some(name) => Some(self.norm(&of(name), hidden)?),
                None => None,
            },
        })
    }

    /// What every token has added: the first row of the table of kinds.
    fn kind(&self) -> Result<Vec<f32>> {
        let width = self.arch.embedding_size;
        let mut kind = vec![0.0; width];
        let name = self.name("embeddings.token_type_embeddings.weight");
        if let Some(table) = self.weights.tensor(&name) {
            if table.shape.len() != 2 || table.cols() != width || table.rows() == 0 {
                let got = table.shape;
                return Err(self.weights.problem(format!(
                    "tensor {name:?} is {got:?}, wanted rows of {width}"
                )));
            }
            table.dequantize_row(0, &mut kind);
        }
        Ok(kind)
    }

    /// The attention of all layers with a window, or of all without.
    fn attention(&self, window: bool) -> Result<AttentionLayer<D::Vector>> {
        let arch = self.arch;
        let head_dim = arch.hidden_size / arch.heads;
        let its = |layer: &&LayerArch| layer.window.is_some() == window;
        let of = arch.layers.iter().find(its).or(arch.layers.first());
        let distances = match arch.distances {
            true => Some(self.device.vector(self.distances()?)?),
            false => None,
        };
        Ok(AttentionLayer {
            shape: AttentionShape {
                heads: arch.heads,
                kv_heads: arch.heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                softcap: None,
                window: of.and_then(|layer| layer.window),
                both_ways: true,
            },
            norms: None,
            sinks: None,
            distances,
            rope: of.and_then(|layer| layer.rope),
            pairing: Pairing::Halves,
        })
    }

    /// `[heads][2 * reach]`: see [`AttentionLayer::distances`].
    fn distances(&self) -> Result<Vec<f32>> {
        let heads = self.arch.heads;
        let name = "encoder.relative_attention_bias.weight";
        let table = self
            .tensor(name, &[super::arch::BUCKETS, heads])?
            .dequantize();
        let reach = self.arch.context_size.next_multiple_of(PAGE) as isize;
        let of_head = |head: usize| (-reach..reach).map(move |d| bucket(d) * heads + head);
        Ok((0..heads).flat_map(of_head).map(|i| table[i]).collect())
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
        let names: &Names = arch.names;
        let words = format!("{}.weight", names.words);
        let prefix = match weights.tensors.contains_key(&words) {
            true => "",
            false => names.prefix,
        };
        let loader = Loader {
            device,
            arch: &arch,
            weights: &weights,
            prefix,
        };
        let (hidden, embedding) = (arch.hidden_size, arch.embedding_size);
        loader.tensor(&words, &[arch.vocab_size, embedding])?;
        let table = "embeddings.position_embeddings.weight";
        if let Some(first) = arch.first_position {
            loader.tensor(table, &[arch.context_size + first, embedding])?;
        }
        let distinct = if arch.shared { 1 } else { arch.layers.len() };
        let (total, steps) = (weights.total_bytes(), distinct as u64);
        let mut layers = Vec::with_capacity(distinct);
        for i in 0..distinct {
            if !progress(total * i as u64 / steps, total) {
                return Err(Error::Closed);
            }
            layers.push(loader.layer(i)?);
        }
        let embedding_norm = loader.norm(names.embedding_norm, embedding)?;
        let widen = match names.widen {
            Some(name) => Some(loader.matrix(&[name.into()], hidden, embedding)?),
            None => None,
        };
        let final_norm = match names.final_norm {
            Some(name) => Some(loader.norm(name, hidden)?),
            None => None,
        };
        let attention = [loader.attention(false)?, loader.attention(true)?];
        progress(total, total);
        Ok(Self {
            words: loader.name(&words),
            positions: arch.first_position.map(|_| loader.name(table)),
            kind: loader.kind()?,
            embedding_norm,
            widen,
            layers,
            attention,
            final_norm,
            arch,
            weights,
        })
    }
}
