//! A model's tensors onto a device: read by their role, checked, each used once. What runs with them is in `decoder.rs`.

use std::collections::HashSet;
use std::sync::{Arc, RwLock};

use hfcore_kernels::quant::TensorType;

use hfcore_kernels::elementwise::Activation;

use super::latent::Latent;
use super::{Experts, FeedForward, Layer, Mixer, Mlp, Progress, Resident, attention_shape};
use crate::arch::{Arch, Block, ExpertArch, LatentArch};
use crate::device::{AttentionLayer, Convolution, Device, HeadNorms, Norm};
use crate::error::{Error, Result};
use crate::prepared::Prepared;
use crate::quantised::Quantised;
use crate::recipe::AtLoad;
use crate::weights::{Target, Tensor, Weights};

/// A matrix as a device takes it.
enum Stored<'a> {
    /// As it lies in its file.
    File(Tensor<'a>),
    /// Made of a quantised checkpoint's parts.
    Made {
        tensor_type: TensorType,
        shape: [usize; 2],
        data: Vec<u8>,
        of: &'a Quantised,
    },
}

impl Stored<'_> {
    fn tensor(&self) -> Tensor<'_> {
        match self {
            Self::File(tensor) => *tensor,
            Self::Made {
                tensor_type,
                shape,
                data,
                ..
            } => Tensor::of(*tensor_type, shape, data),
        }
    }

    /// It is resident twice now, and the file's may go.
    fn forget(&self, weights: &Weights) {
        match self {
            Self::File(tensor) => tensor.forget(0..tensor.data.len()),
            Self::Made { of, .. } => of.forget(&weights.files),
        }
    }
}

/// Reads tensors by their role, checks their shapes, remembers which were used.
struct Loader<'a, D: Device> {
    device: &'a D,
    arch: &'a Arch,
    weights: &'a Weights,
    /// What matrices are to become.
    at_load: Option<&'a AtLoad>,
    /// What became of some of them before.
    prepared: Option<&'a Prepared>,
    used: HashSet<String>,
}

impl<'a, D: Device> Loader<'a, D> {
    /// The tensor `name` of `layer`, which must be `[rows, cols]`.
    fn tensor(
        &mut self,
        layer: Option<usize>,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Tensor<'a>> {
        let general = name;
        let name = self.arch.tensor_name(layer, name);
        let tensor = self.weights.require(&name)?;
        let fits = match tensor.shape {
            [n] => rows == 1 && *n == cols,
            [m, n] => *m == rows && *n == cols,
            _ => false,
        };
        if !fits {
            let got = tensor.shape;
            return Err(self.weights.problem(format!(
                "tensor {name:?} is {got:?}, wanted [{rows}, {cols}]"
            )));
        }
        let shape = match self.arch.transposed && layer.is_some() {
            true => [cols, rows],
            false => [rows, cols],
        };
        let target = self.target(layer, general, &tensor, &shape);
        self.used.insert(name);
        Ok(self.aimed(tensor, target))
    }

    /// The tensor on its way to `target`, which it may have reached before.
    fn aimed(&self, tensor: Tensor<'a>, target: Option<Target>) -> Tensor<'a> {
        let ready = target.and_then(|target| {
            let row = target.tensor_type.row_bytes(tensor.cols())?;
            self.prepared?
                .tensor(tensor.name, target, tensor.rows() * row)
        });
        tensor.aimed(target).readied(ready)
    }

    /// What a matrix of this name and shape is to become.
    fn target(
        &self,
        layer: Option<usize>,
        name: &str,
        tensor: &Tensor,
        shape: &[usize],
    ) -> Option<Target> {
        let name = match layer {
            Some(i) => format!("blk.{i}.{name}"),
            None => name.to_owned(),
        };
        let model = (self.arch.layers.len(), self.arch.tied);
        let names = (&name[..], tensor.name);
        self.at_load?
            .target(names, tensor.tensor_type, shape, model)
    }

    /// The same of a quantised checkpoint's matrices, if it is one of them.
    fn quantised(
        &mut self,
        layer: Option<usize>,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Option<&'a Quantised>> {
        let name = self.arch.tensor_name(layer, name);
        let Some(found) = self.weights.quantised.get(&name) else {
            return Ok(None);
        };
        if found.shape != [rows, cols] {
            let (kind, got) = (found.kind, found.shape);
            return Err(self.weights.problem(format!(
                "tensor {name:?} is {got:?} in {kind}, wanted [{rows}, {cols}]"
            )));
        }
        self.used.insert(name);
        Ok(Some(found))
    }

    /// The matrix `name` of `layer`, `[rows, cols]`, as the device is to have it: what each becomes is decided here.
    fn stored(
        &mut self,
        layer: Option<usize>,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Stored<'a>> {
        let Some(of) = self.quantised(layer, name, rows, cols)? else {
            return self.tensor(layer, name, rows, cols).map(Stored::File);
        };
        let files = &self.weights.files;
        let (tensor_type, data) = match self.device.packing() {
            Some(pool) => of.blocks(files, pool),
            None => (TensorType::F32, bytes(&of.floats(files, None))),
        };
        Ok(Stored::Made {
            tensor_type,
            shape: of.shape,
            data,
            of,
        })
    }

    /// The numbers of the matrix `name`, never rounded.
    fn numbers(
        &mut self,
        layer: Option<usize>,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<f32>> {
        match self.quantised(layer, name, rows, cols)? {
            Some(of) => Ok(of.floats(&self.weights.files, self.device.packing())),
            None => Ok(self.tensor(layer, name, rows, cols)?.dequantize()),
        }
    }

    fn has(&self, layer: Option<usize>, name: &str) -> bool {
        let name = self.arch.tensor_name(layer, name);
        self.weights.tensors.contains_key(&name) || self.weights.quantised.contains_key(&name)
    }

    fn vector(&mut self, layer: Option<usize>, name: &str, width: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(layer, name, 1, width)?.dequantize())
    }

    /// The norm `name`, whose weight and bias are multiplied by `scale`.
    fn scaled_norm(
        &mut self,
        layer: Option<usize>,
        name: &str,
        scale: f32,
    ) -> Result<Norm<D::Vector>> {
        let (arch, width) = (self.arch, self.arch.hidden_size);
        let mut weight = match arch.plain_norms {
            true => vec![1.0; width],
            false => self.vector(layer, &format!("{name}.weight"), width)?,
        };
        weight
            .iter_mut()
            .for_each(|x| *x = (*x + arch.norm_offset) * scale);
        let bias = format!("{name}.bias");
        let bias = match arch.layer_norm && self.has(layer, &bias) {
            true => Some(self.vector(layer, &bias, width)?),
            false => None,
        };
        let scaled = |bias: Vec<f32>| bias.into_iter().map(|x| x * scale).collect();
        Ok(Norm {
            weight: self.device.vector(weight)?,
            bias: bias.map(|b| self.device.vector(scaled(b))).transpose()?,
            eps: arch.norm_eps,
            centred: arch.layer_norm,
        })
    }

    fn norm(&mut self, layer: Option<usize>, name: &str) -> Result<Norm<D::Vector>> {
        self.scaled_norm(layer, name, 1.0)
    }

    /// The norm of something smaller than the stream.
    fn inner_norm(
        &mut self,
        layer: Option<usize>,
        name: &str,
        width: usize,
        eps: f32,
    ) -> Result<Norm<D::Vector>> {
        let weight = self.vector(layer, &format!("{name}.weight"), width)?;
        Ok(Norm {
            weight: self.device.vector(weight)?,
            bias: None,
            eps,
            centred: false,
        })
    }

    /// The norm of `heads` heads: one weight for all of them, a row for each, or a tensor for each.
    fn head_norm(&mut self, layer: Option<usize>, name: &str, heads: usize) -> Result<D::Vector> {
        let (arch, dim) = (self.arch, self.arch.head_dim);
        let whole = format!("{name}.weight");
        let mut weight = Vec::with_capacity(heads * dim);
        if self.has(layer, &format!("{name}.0.weight")) {
            for head in 0..heads {
                weight.extend(self.vector(layer, &format!("{name}.{head}.weight"), dim)?);
            }
        } else {
            let found = self.weights.require(&arch.tensor_name(layer, &whole))?;
            match (found.elements() == dim && !arch.qk_together, found.shape) {
                (true, _) => {
                    let one = self.vector(layer, &whole, dim)?;
                    (0..heads).for_each(|_| weight.extend(&one));
                }
                (false, [_, _]) => weight = self.tensor(layer, &whole, heads, dim)?.dequantize(),
                (false, _) => weight = self.vector(layer, &whole, heads * dim)?,
            }
        }
        weight.iter_mut().for_each(|x| *x += arch.norm_offset);
        self.device.vector(weight)
    }

    /// Matrices that share their inputs, `(name, outputs)`, with their biases if the file has them.
    fn matrix(
        &mut self,
        layer: Option<usize>,
        parts: &[(&str, usize)],
        inputs: usize,
        needs_bias: bool,
    ) -> Result<D::Matrix> {
        let mut stored = Vec::new();
        let mut bias = Vec::new();
        let mut has_bias = false;
        // Quantised ones lie as everyone's: their libraries turned them.
        let quantised = |name: &str| {
            let name = self.arch.tensor_name(layer, &format!("{name}.weight"));
            self.weights.quantised.contains_key(&name)
        };
        let turned = self.arch.transposed && layer.is_some();
        let turned = turned && !parts.iter().any(|(name, _)| quantised(name));
        for &(name, outputs) in parts {
            let weight = format!("{name}.weight");
            stored.push(match turned {
                true => Stored::File(self.tensor(layer, &weight, inputs, outputs)?),
                false => self.stored(layer, &weight, outputs, inputs)?,
            });
            let bias_name = format!("{name}.bias");
            if needs_bias || self.has(layer, &bias_name) {
                bias.extend(self.vector(layer, &bias_name, outputs)?);
                has_bias = true;
            } else {
                bias.extend(std::iter::repeat_n(0.0, outputs));
            }
        }
        let bias = has_bias.then_some(&bias[..]);
        let tensors: Vec<Tensor> = stored.iter().map(Stored::tensor).collect();
        if turned {
            return self.transposed(&tensors, 1, bias);
        }
        let matrix = self.device.matrix(&tensors, bias)?;
        stored.iter().for_each(|t| t.forget(self.weights));
        Ok(matrix)
    }

    /// Matrices that are stored as `[inputs, outputs]`; each becomes `parts` of them, of every `parts`-th output.
    fn transposed(
        &self,
        tensors: &[Tensor],
        parts: usize,
        bias: Option<&[f32]>,
    ) -> Result<D::Matrix> {
        let (mut shapes, mut data) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let (inputs, outputs) = (tensor.rows(), tensor.cols());
            let size = self.element_size(tensor)?;
            let row = outputs * size;
            for part in 0..parts {
                let columns = (part..outputs).step_by(parts);
                shapes.push([columns.len(), inputs]);
                let mut turned = Vec::with_capacity(columns.len() * inputs * size);
                for column in columns {
                    for i in 0..inputs {
                        turned.extend_from_slice(&tensor.data[i * row + column * size..][..size]);
                    }
                }
                data.push((tensor.tensor_type, tensor.target, turned));
            }
        }
        let owned = shapes.iter().zip(&data);
        let owned: Vec<_> = owned
            .map(|(shape, (tensor_type, target, data))| {
                Tensor::of(*tensor_type, shape, data).aimed(*target)
            })
            .collect();
        let matrix = self.device.matrix(&owned, bias)?;
        tensors.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// Bytes of a number of a tensor that is not quantised.
    fn element_size(&self, tensor: &Tensor) -> Result<usize> {
        let kind = tensor.tensor_type;
        match kind.block_len() {
            1 => Ok(kind.block_bytes()),
            _ => Err(self.weights.problem(format!(
                "tensor {:?} of {} cannot be transposed",
                tensor.name,
                kind.name()
            ))),
        }
    }

    /// A layer's attention, or what it has in its place; and how wide what it makes is.
    fn mixer(&mut self, i: usize) -> Result<(Mixer<D>, usize)> {
        let (arch, at) = (self.arch, Some(i));
        if arch.layers[i].convolution {
            return self.convolution(at).map(|mixer| (mixer, arch.hidden_size));
        }
        if let Some(latent) = arch.latent {
            let width = arch.heads * latent.value;
            return Ok((Mixer::Latent(self.latent(i, latent)?), width));
        }
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let qkv: &[(&str, usize)] = match self.has(at, "attn_qkv.weight") {
            true => &[("attn_qkv", q + 2 * kv)],
            false => &[("attn_q", q), ("attn_k", kv), ("attn_v", kv)],
        };
        let norms = match arch.qk_norm {
            true => Some(HeadNorms {
                q: self.head_norm(at, "attn_q_norm", arch.heads)?,
                k: self.head_norm(at, "attn_k_norm", arch.kv_heads)?,
                eps: arch.norm_eps,
                centred: arch.layer_norm,
                together: arch.qk_together,
                last: arch.qk_norm_last,
            }),
            false => None,
        };
        let sinks = match arch.sinks {
            true => {
                let sinks = self.vector(at, "attn_sinks.weight", arch.heads)?;
                Some(self.device.vector(sinks)?)
            }
            false => None,
        };
        let qkv = self.matrix(at, qkv, arch.hidden_size, arch.qkv_bias)?;
        let layer = AttentionLayer {
            shape: attention_shape(arch, &arch.layers[i]),
            norms,
            sinks,
            distances: None,
            rope: arch.layers[i].rope,
            pairing: arch.pairing,
        };
        Ok((Mixer::Attention { qkv, layer }, q))
    }

    /// A short convolution between two gates. Its weights are `[width, 1, positions]`, or without the 1.
    fn convolution(&mut self, at: Option<usize>) -> Result<Mixer<D>> {
        let width = self.arch.hidden_size;
        let positions = self.arch.convolution.unwrap_or_default();
        let input = self.matrix(at, &[("shortconv.in_proj", 3 * width)], width, false)?;
        let name = self.arch.tensor_name(at, "shortconv.conv.weight");
        let tensor = self.weights.require(&name)?;
        let fits = match tensor.shape {
            [w, 1, n] | [w, n] => (*w, *n) == (width, positions),
            _ => false,
        };
        if !fits {
            let got = tensor.shape;
            return Err(self.weights.problem(format!(
                "tensor {name:?} is {got:?}, wanted [{width}, 1, {positions}]"
            )));
        }
        self.used.insert(name);
        let numbers = tensor.dequantize();
        let at_position = |i: usize| numbers.iter().skip(i).step_by(positions);
        let weight = (0..positions).flat_map(at_position).copied().collect();
        let bias = match self.has(at, "shortconv.conv.bias") {
            true => Some(self.vector(at, "shortconv.conv.bias", width)?),
            false => None,
        };
        let layer = Convolution {
            width,
            weight: self.device.vector(weight)?,
            positions,
            bias: bias.map(|bias| self.device.vector(bias)).transpose()?,
        };
        Ok(Mixer::Convolution { input, layer })
    }

    fn latent(&mut self, i: usize, latent: LatentArch) -> Result<Latent<D>> {
        let (arch, at) = (self.arch, Some(i));
        let hidden = arch.hidden_size;
        let queries = arch.heads * (latent.plain + latent.rotated);
        let (query_latent, queries) = match latent.query_rank {
            Some(rank) => {
                let down = self.matrix(at, &[("attn_q_a", rank)], hidden, false)?;
                let norm = self.inner_norm(at, "attn_q_a_norm", rank, latent.eps)?;
                let up = self.matrix(at, &[("attn_q_b", queries)], rank, false)?;
                (Some((down, norm)), up)
            }
            None => (
                None,
                self.matrix(at, &[("attn_q", queries)], hidden, false)?,
            ),
        };
        let both = latent.rank + latent.rotated;
        let matrix = self.matrix(at, &[("attn_kv_a_mqa", both)], hidden, false)?;
        let latent_norm = self.inner_norm(at, "attn_kv_a_norm", latent.rank, latent.eps)?;
        let [keys, values] = match self.has(at, "attn_k_b.weight") {
            true => {
                let keys = [arch.heads, latent.rank, latent.plain];
                let values = [arch.heads, latent.value, latent.rank];
                [
                    self.each_head(at, "attn_k_b.weight", keys)?,
                    self.each_head(at, "attn_v_b.weight", values)?,
                ]
            }
            false => self.split_heads(at, &latent)?,
        };
        Ok(Latent {
            arch: latent,
            query_latent,
            queries,
            latent: matrix,
            latent_norm,
            keys,
            values,
            attention: AttentionLayer {
                shape: attention_shape(arch, &arch.layers[i]),
                norms: None,
                sinks: None,
                distances: None,
                rope: arch.layers[i].rope,
                pairing: arch.pairing,
            },
        })
    }

    /// The matrix of each head, of a tensor of this shape, `[heads, outputs, inputs]`.
    fn each_head(
        &mut self,
        at: Option<usize>,
        name: &str,
        shape: [usize; 3],
    ) -> Result<Vec<D::Matrix>> {
        let full = self.arch.tensor_name(at, name);
        let tensor = self.weights.require(&full)?;
        if tensor.shape != shape {
            let got = tensor.shape;
            return Err(self
                .weights
                .problem(format!("tensor {full:?} is {got:?}, wanted {shape:?}")));
        }
        let target = self.target(at, name, &tensor, &shape[1..]);
        self.used.insert(full);
        let [heads, rows, _] = shape;
        let head = |head: usize| {
            let part = tensor.slice(head * rows, rows).aimed(target);
            self.device.matrix(&[part], None)
        };
        let all = (0..heads).map(head).collect();
        tensor.forget(0..tensor.data.len());
        all
    }

    /// The same of one matrix with the rows of a head's key and value after those of the head before: from latents. A
    /// query goes the other way, so keys are turned: what is quantised through floats, which become Q8_0 on devices that
    /// pack.
    fn split_heads(
        &mut self,
        at: Option<usize>,
        latent: &LatentArch,
    ) -> Result<[Vec<D::Matrix>; 2]> {
        let (rank, plain, each) = (latent.rank, latent.plain, latent.plain + latent.value);
        let (rows, name) = (self.arch.heads * each, "attn_kv_b.weight");
        let full = self.arch.tensor_name(at, name);
        let stored = match self.weights.quantised.contains_key(&full) {
            true => None,
            false => Some(self.tensor(at, name, rows, rank)?),
        };
        let exact = stored.filter(|tensor| tensor.tensor_type.block_len() == 1);
        let floats = match exact {
            Some(_) => Vec::new(),
            None => bytes(&self.numbers(at, name, rows, rank)?),
        };
        let shape = [rows, rank];
        let packs = self.device.packing().is_some();
        let small = |cols: usize| {
            (packs && cols.is_multiple_of(TensorType::Q8_0.block_len())).then_some(Target {
                tensor_type: TensorType::Q8_0,
                nested: false,
            })
        };
        let numbers = Tensor::of(TensorType::F32, &shape, &floats).aimed(small(rank));
        let turned = match &exact {
            Some(tensor) => self.target(at, "attn_k_b.weight", tensor, &[rank, plain]),
            None => small(plain),
        };
        let (of_keys, of_values) = (exact.unwrap_or(numbers), stored.unwrap_or(numbers));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(each) {
            let key = of_keys.slice(first, plain).aimed(turned);
            keys.push(self.transposed(&[key], 1, None)?);
            let value = of_values.slice(first + plain, latent.value);
            let value = value.aimed(of_values.target);
            values.push(self.device.matrix(&[value], None)?);
        }
        if let Some(tensor) = stored {
            tensor.forget(0..tensor.data.len());
        }
        Ok([keys, values])
    }

    fn layer(&mut self, i: usize) -> Result<Layer<D>> {
        let (arch, at) = (self.arch, Some(i));
        let hidden = arch.hidden_size;
        let (before, after) = match arch.block {
            Block::Before => (true, false),
            Block::After => (false, true),
            Block::Around => (true, true),
            Block::Parallel => (true, false),
        };
        let norm = |this: &mut Self, wanted: bool, name: &str| match wanted {
            true => this.norm(at, name).map(Some),
            false => Ok(None),
        };
        let (mixer, width) = self.mixer(i)?;
        let output = match arch.layers[i].convolution {
            true => "shortconv.out_proj",
            false => "attn_output",
        };
        Ok(Layer {
            attn_norm: norm(self, before, "attn_norm")?,
            mixer,
            attn_output: self.matrix(at, &[(output, hidden)], width, false)?,
            post_attn_norm: norm(self, after, "post_attention_norm")?,
            ffn_norm: match before && arch.block != Block::Parallel {
                true => Some(self.ffn_norm(at)?),
                false => None,
            },
            ffn: match arch.experts.filter(|_| arch.layers[i].experts) {
                Some(experts) => FeedForward::Experts(self.experts(at, experts)?),
                None => FeedForward::Mlp(self.mlp(at, "", arch.intermediate_size)?),
            },
            post_ffn_norm: norm(self, after, "post_ffw_norm")?,
        })
    }

    /// GGUF files of gpt-oss call it what it follows.
    fn ffn_norm(&mut self, at: Option<usize>) -> Result<Norm<D::Vector>> {
        let before = self.arch.block == Block::Before && !self.arch.plain_norms;
        let own = self.has(at, "ffn_norm.weight") || !before;
        self.norm(
            at,
            if own {
                "ffn_norm"
            } else {
                "post_attention_norm"
            },
        )
    }

    /// The feed-forward whose tensors' names end so. Fused ones are one tensor: GGUF calls it `ffn_up`, transformers
    /// `gate_up_proj`.
    fn mlp(&mut self, at: Option<usize>, ending: &str, width: usize) -> Result<Mlp<D>> {
        let (hidden, gated) = (self.arch.hidden_size, self.arch.gated);
        let name = |stem: &str| format!("{stem}{ending}");
        let (gate, up, both) = (name("ffn_gate"), name("ffn_up"), name("ffn_gate_up"));
        let weight = |name: &str| format!("{name}.weight");
        let up = if !gated {
            self.matrix(at, &[(&up, width)], hidden, false)?
        } else if self.has(at, &weight(&both)) {
            self.halves(at, &weight(&both), width)?
        } else if self.has(at, &weight(&gate)) {
            self.matrix(at, &[(&gate, width), (&up, width)], hidden, false)?
        } else {
            self.halves(at, &weight(&up), width)?
        };
        let down = self.matrix(at, &[(&name("ffn_down"), hidden)], width, false)?;
        let activation = self.activation(at)?;
        Ok(Mlp {
            up,
            gated,
            activation,
            down,
        })
    }

    /// A layer's activation: xIELU has numbers of its own for each, in tensors or in metadata.
    fn activation(&mut self, at: Option<usize>) -> Result<Activation> {
        let known = self.arch.activation;
        let (Activation::Xielu { beta, .. }, Some(i)) = (known, at) else {
            return Ok(known);
        };
        let mut number = |name: &str, or: Option<f32>| -> Result<f32> {
            let full = self.arch.tensor_name(at, &format!("xielu.{name}.weight"));
            if let Some(tensor) = self.weights.tensor(&full).filter(|t| t.elements() == 1) {
                self.used.insert(full);
                return Ok(tensor.dequantize()[0]);
            }
            let key = format!("xielu.{name}");
            let all = self.weights.get_floats(&key)?.unwrap_or_default();
            let one = all.get(i).copied().or(or);
            one.ok_or_else(|| self.weights.problem(format!("layer {i} has no {key:?}")))
        };
        let softplus = |x: f32| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let (positive, negative) = (number("alpha_p", None)?, number("alpha_n", None)?);
        let beta = number("beta", Some(beta))?;
        let eps = number("eps", Some(0.0))?;
        if !(-1e-4..=0.0).contains(&eps) {
            return Err(self
                .weights
                .problem(format!("xielu.eps must be within 1e-4 below 0, got {eps}")));
        }
        Ok(Activation::Xielu {
            positive: softplus(positive),
            negative: beta + softplus(negative),
            beta,
        })
    }

    /// Gate and up of one tensor.
    fn halves(&mut self, at: Option<usize>, name: &str, width: usize) -> Result<D::Matrix> {
        let both = self.stored(at, name, 2 * width, self.arch.hidden_size)?;
        let matrix = self.device.matrix(&both.tensor().halves(), None)?;
        both.forget(self.weights);
        Ok(matrix)
    }

    fn experts(&mut self, at: Option<usize>, arch: ExpertArch) -> Result<Experts<D>> {
        let (hidden, width) = (self.arch.hidden_size, arch.intermediate_size);
        let router = self.float_matrix(at, "ffn_gate_inp", arch.count, hidden)?;
        let bias = match self.has(at, "exp_probs_b.bias") {
            true => self.vector(at, "exp_probs_b.bias", arch.count)?,
            false => Vec::new(),
        };
        let numbered = self.has(at, "ffn_gate.0.weight");
        let mut experts = Vec::with_capacity(arch.count);
        for e in 0..arch.count {
            experts.push(match numbered {
                true => self.mlp(at, &format!(".{e}"), width)?,
                false => self.expert(at, e, &arch)?,
            });
        }
        let shared = match arch.shared_size {
            Some(width) => {
                let mlp = self.mlp(at, "_shexp", width)?;
                let gate = match self.has(at, "ffn_gate_inp_shexp.weight") {
                    true => Some(self.float_matrix(at, "ffn_gate_inp_shexp", 1, hidden)?),
                    false => None,
                };
                Some((mlp, gate))
            }
            None => None,
        };
        Ok(Experts {
            router,
            bias,
            arch,
            experts,
            shared,
        })
    }

    /// Expert `e` of tensors that hold all of them, `[experts, outputs, inputs]`.
    fn expert(&mut self, at: Option<usize>, e: usize, arch: &ExpertArch) -> Result<Mlp<D>> {
        let (hidden, width, gated) = (self.arch.hidden_size, arch.intermediate_size, true);
        let both = "ffn_gate_up_exps";
        let fused = self.has(at, &format!("{both}.weight"));
        let up = match fused || self.packed_name(at, both, "_blocks").1 {
            true => self.expert_matrix(at, &[both], e, arch, (2 * width, hidden))?,
            false => {
                let parts = ["ffn_gate_exps", "ffn_up_exps"];
                self.expert_matrix(at, &parts, e, arch, (width, hidden))?
            }
        };
        let down = self.expert_matrix(at, &["ffn_down_exps"], e, arch, (hidden, width))?;
        let activation = self.arch.activation;
        Ok(Mlp {
            up,
            gated,
            activation,
            down,
        })
    }

    /// Expert `e`'s part of some tensors, each of `(outputs, inputs)` for one expert. A tensor with gates and inputs
    /// becomes two: its halves; or, of a family with sinks (gpt-oss), whose tensors lie transposed, every second row.
    fn expert_matrix(
        &mut self,
        at: Option<usize>,
        names: &[&str],
        e: usize,
        arch: &ExpertArch,
        (outputs, inputs): (usize, usize),
    ) -> Result<D::Matrix> {
        let both = names == ["ffn_gate_up_exps"];
        if let [name] = names
            && self.arch.turned_experts()
            && self.packed_name(at, name, "_blocks").1
        {
            return self.packed_expert(at, name, e, arch, (outputs, inputs));
        }
        let mut parts = Vec::new();
        let mut bias = Vec::new();
        let mut turned = false;
        for name in names {
            let weight = self.arch.tensor_name(at, &format!("{name}.weight"));
            let found = self.weights.require(&weight)?;
            let plain = [arch.count, outputs, inputs];
            turned = self.arch.turned_experts();
            let wanted = if turned {
                [arch.count, inputs, outputs]
            } else {
                plain
            };
            if found.shape != wanted {
                let got = found.shape;
                return Err(self
                    .weights
                    .problem(format!("tensor {weight:?} is {got:?}, wanted {wanted:?}")));
            }
            self.used.insert(weight);
            let rows = wanted[1];
            let general = format!("{name}.weight");
            let target = self.target(at, &general, &found, &plain);
            parts.push(self.aimed(found, target).slice(e * rows, rows));
            let name = format!("{name}.bias");
            if self.has(at, &name) {
                let all = self.tensor(at, &name, arch.count, outputs)?;
                bias.extend(all.slice(e, 1).dequantize());
            }
        }
        if both && turned {
            // Gates and inputs lie side by side in pairs.
            let of = |first: usize| bias.iter().copied().skip(first).step_by(2);
            bias = of(0).chain(of(1)).collect();
        }
        let bias = (!bias.is_empty()).then_some(&bias[..]);
        if bias.is_some_and(|b| b.len() != parts.len() * outputs) {
            return Err(self
                .weights
                .problem("some experts' tensors lack their biases"));
        }
        if turned {
            return self.transposed(&parts, if both { 2 } else { 1 }, bias);
        }
        let halves = both.then(|| parts[0].halves());
        let matrix = self
            .device
            .matrix(halves.as_ref().map_or(&parts, |h| &h[..]), bias)?;
        parts.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// The name of a packed tensor's part, and whether there is one.
    fn packed_name(&self, at: Option<usize>, name: &str, part: &str) -> (String, bool) {
        let name = self.arch.tensor_name(at, &format!("{name}.weight")) + part;
        let there = self.weights.packed.contains_key(&name);
        (name, there)
    }

    /// Expert `e`'s part of a tensor in MXFP4: `_blocks` of `[experts, outputs, inputs / 32, 16]` bytes with two numbers each,
    /// one after the other, and `_scales` (OCP Microscaling Formats 1.0). Of gates and inputs, every second row.
    fn packed_expert(
        &mut self,
        at: Option<usize>,
        name: &str,
        e: usize,
        arch: &ExpertArch,
        (outputs, inputs): (usize, usize),
    ) -> Result<D::Matrix> {
        let each = inputs / 32;
        let mut parts = Vec::new();
        for (part, own) in [("_blocks", &[16][..]), ("_scales", &[])] {
            let (full, _) = self.packed_name(at, name, part);
            let wanted = [&[arch.count, outputs, each], own].concat();
            match self.weights.packed(&full) {
                Some((shape, data)) if shape == wanted && inputs == each * 32 => {
                    let bytes = data.len() / arch.count;
                    parts.push(&data[e * bytes..(e + 1) * bytes]);
                }
                found => {
                    let got = found.map(|(shape, _)| shape);
                    return Err(self
                        .weights
                        .problem(format!("tensor {full:?} is {got:?}, wanted {wanted:?}")));
                }
            }
            self.used.insert(full);
        }
        let bias_name = format!("{name}.bias");
        let bias = self.tensor(at, &bias_name, arch.count, outputs)?;
        let bias = bias.slice(e, 1).dequantize();
        let step = if name == "ffn_gate_up_exps" { 2 } else { 1 };
        let rows = |first: usize| (first..outputs).step_by(step);
        let order: Vec<usize> = (0..step).flat_map(rows).collect();
        let bias: Vec<f32> = order.iter().map(|row| bias[*row]).collect();
        let mut blocks = Vec::with_capacity(outputs * each * 17);
        for row in &order {
            for at in row * each..(row + 1) * each {
                blocks.push(parts[1][at]);
                // GGUF's order: the numbers of the first half beside those of the second.
                let pairs = &parts[0][at * 16..(at + 1) * 16];
                let number = |i: usize| pairs[i / 2] >> (i % 2 * 4) & 15;
                blocks.extend((0..16).map(|i| number(i) | number(i + 16) << 4));
            }
        }
        let shape = [outputs, inputs];
        let matrix = Tensor::of(TensorType::MXFP4, &shape, &blocks);
        let halves = matrix.halves();
        let whole = [matrix];
        let parts = if step == 2 { &halves[..] } else { &whole };
        self.device.matrix(parts, Some(&bias))
    }

    /// A small matrix whose products choose: never rounded.
    fn float_matrix(
        &mut self,
        at: Option<usize>,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<D::Matrix> {
        let values = self.numbers(at, &format!("{name}.weight"), outputs, inputs)?;
        let bytes = bytes(&values);
        let bias = format!("{name}.bias");
        let bias = match self.has(at, &bias) {
            true => Some(self.vector(at, &bias, outputs)?),
            false => None,
        };
        let shape = [outputs, inputs];
        let matrix = Tensor::of(TensorType::F32, &shape, &bytes);
        self.device.matrix(&[matrix], bias.as_deref())
    }

    /// A tensor that nobody used means that the file is not what its architecture says.
    fn check_all_used(&self) -> Result<()> {
        let known = |name: &str| {
            let spare = [
                "rope_freqs.weight",
                "rope_factors_long.weight",
                "rope_factors_short.weight",
            ];
            spare.contains(&name)
                || name.ends_with("rotary_emb.inv_freq")
                // gpt2's masks.
                || name.ends_with(".attn.bias")
                || name.ends_with(".attn.masked_bias")
                || name == self.arch.tensor_name(None, "output.weight")
                || self.arch.is_guessing(name)
        };
        let mut unused: Vec<_> = self
            .weights
            .tensors
            .keys()
            .chain(self.weights.packed.keys())
            .chain(self.weights.quantised.keys())
            .filter(|n| !self.used.contains(*n) && !known(n))
            .collect();
        unused.sort();
        let Some(first) = unused.first() else {
            return Ok(());
        };
        Err(self.weights.problem(format!(
            "{} tensors have no place in architecture {:?}, {first:?} the first",
            unused.len(),
            self.arch.family
        )))
    }
}

/// As a tensor in F32 lies.
fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

impl<D: Device> Resident<D> {
    /// Make a model resident, layer by layer, its matrices quantised as `at_load` says, or taken from `prepared` where that
    /// was done before; `progress(done, total)` is told in bytes of the file.
    ///
    /// # Errors
    /// `Closed` when `progress` says to stop; a missing tensor, one of another shape, one that the architecture has no place for.
    pub fn load(
        device: &D,
        arch: Arch,
        weights: Arc<Weights>,
        at_load: Option<&AtLoad>,
        prepared: Option<&Prepared>,
        progress: Progress,
    ) -> Result<Self> {
        Self::load_parts(device, arch, weights, at_load, prepared, true, progress)
    }

    /// The same without the head: for [`super::Decoder::vectors`].
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn load_headless(
        device: &D,
        arch: Arch,
        weights: Arc<Weights>,
        progress: Progress,
    ) -> Result<Self> {
        Self::load_parts(device, arch, weights, None, None, false, progress)
    }

    fn load_parts(
        device: &D,
        arch: Arch,
        weights: Arc<Weights>,
        at_load: Option<&AtLoad>,
        prepared: Option<&Prepared>,
        head: bool,
        progress: Progress,
    ) -> Result<Self> {
        let mut loader = Loader {
            device,
            arch: &arch,
            weights: &weights,
            at_load,
            prepared,
            used: HashSet::new(),
        };
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let embedding = loader.tensor(None, "token_embd.weight", vocab, hidden)?;
        let positions = match arch.learned_positions {
            true => {
                let name = "position_embd.weight";
                loader.tensor(None, name, arch.context_size, hidden)?;
                Some(arch.tensor_name(None, name))
            }
            false => None,
        };
        let total = weights.total_bytes();
        let steps = arch.layers.len() as u64 + 1;
        let report = |done: u64| match progress(done, total) {
            true => Ok(()),
            false => Err(Error::Closed),
        };
        report(0)?;
        let mut layers = Vec::with_capacity(arch.layers.len());
        for i in 0..arch.layers.len() {
            layers.push(loader.layer(i)?);
            report(total * (i as u64 + 1) / steps)?;
        }
        // GGUF files of lfm2 call it by another place.
        let other = "token_embd_norm";
        let output_norm = match loader.has(None, &format!("{other}.weight")) {
            true => other,
            false => "output_norm",
        };
        let scale = if head { arch.logit_scale } else { 1.0 };
        let output_norm = loader.scaled_norm(None, output_norm, scale)?;
        let output = match (head, arch.tied) {
            (false, _) => None,
            (true, true) => {
                let output = device.matrix(&[embedding], None)?;
                embedding.forget(0..embedding.data.len());
                Some(output)
            }
            (true, false) => Some(loader.matrix(None, &[("output", vocab)], hidden, false)?),
        };
        loader.check_all_used()?;
        report(total)?;
        let embedding = arch.tensor_name(None, "token_embd.weight");
        Ok(Self {
            arch,
            weights,
            embedding,
            positions,
            layers,
            output_norm,
            output,
            adapters: RwLock::default(),
        })
    }
}
